"""What the ops that end in the vocabulary head have in common."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from loopmdm_kernels.calls import HeadCall
from loopmdm_kernels.cuda.launch import Kernel, launch, persistent_blocks, set_map, why_refused
from loopmdm_kernels.cuda.parameters import address, structure
from loopmdm_kernels.cuda.tensor_maps import layout
from loopmdm_kernels.values import ceil_div

CAPABILITY = (9, 0)
OPERAND = torch.bfloat16
CHUNK = 256  # kChunkTokens: what a warp group reduces to one record of a row
ROWS_OF_TILE = (64, 128)  # of a block: few rows, many rows
_STEP = 64  # of D, a stage
RING_BYTES = 2048  # beside the stages
ROW_THREADS = 256
_ROW_BLOCK = ROW_THREADS // 32  # a warp a row

MODULATED_ROWS = Kernel("head/modulated_rows_sm90.cu", ROW_THREADS)

Problem = structure("head/vocabulary_sm90.cuh", "LogitsProblem")
ModulatedRows = structure("head/modulated_row_sm90.cuh", "ModulatedRows")
ModulatedRowsParameters = structure(MODULATED_ROWS.source, "ModulatedRowsParameters")


def why_not(call: HeadCall, *kernels: Kernel) -> str | None:
    """Of a call of an op that runs these kernels on rows after the norm."""
    hidden = call.hidden
    reason = why_not_on(hidden.device)
    if reason is not None:
        return reason
    if call.head.norm is None:
        return "it has no kernel for a head without a norm"
    if hidden.dtype != torch.float32:
        return f"hidden must be float32, got {hidden.dtype}"
    if call.dtype != OPERAND:
        return f"compute_dtype must be bfloat16, got {call.dtype}"
    if hidden.shape[0] * hidden.shape[1] >= 2**31:
        return f"hidden may have 2^31 - 1 tokens, got {hidden.shape[0] * hidden.shape[1]}"
    if hidden.shape[-1] % 8:
        return f"hidden must be a multiple of 8 wide, got {hidden.shape[-1]}"
    return why_refused((MODULATED_ROWS, *kernels), hidden.device)


def why_not_on(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else CAPABILITY
    if capability == CAPABILITY:
        return None
    return "its kernels are for compute capability 9.0 (H100, H200), got {}.{}".format(*capability)


def with_logits(source: str, rows_of_tile: int) -> Kernel:
    """A kernel that reduces tiles of logits: 64 rows stream the weight, pairs of 128 meet it less often."""
    stages, chunks, cluster = (3, 2, 1) if rows_of_tile == 64 else (4, 1, 2)
    stage = 2 * _STEP * (rows_of_tile + chunks * CHUNK)
    return Kernel(source, 384, stages * stage + RING_BYTES, (("LOOPMDM_ROWS", rows_of_tile),), cluster)


def for_rows(source: str, num_rows: int) -> Kernel:
    """The kernel for this number of rows; what it gives a row does not depend on the choice."""
    few, many = ROWS_OF_TILE
    return with_logits(source, few if num_rows <= many else many)


class Operands:
    """Rows and head as the kernels take them; keeps alive what their parameters point to."""

    def __init__(self, call: HeadCall, rows: Tensor) -> None:
        head = call.head
        self.hidden, self.rows = _aligned(call.hidden.detach()), rows.contiguous()
        assert head.norm is not None and isinstance(head.weight, Tensor)  # see why_not
        self.norm, self.bias = (_aligned(t.detach().float()) for t in (head.norm, head.bias))
        self.modulation = _aligned(head.modulation.detach().to(OPERAND))
        self.weight = _aligned(head.weight.detach().to(OPERAND))
        self.excluded_token = head.excluded_token
        self.num_rows, self.vocab_size = rows.shape[0], head.weight.shape[0]
        self.row_blocks = ceil_div(self.num_rows, _ROW_BLOCK)
        self.normalised = self._normalise()

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def chunks(self) -> int:
        return ceil_div(self.vocab_size, CHUNK)

    def source_rows(self) -> ctypes.Structure:
        """Where rows come from, for the kernels of the norm."""
        _, length, size = self.hidden.shape
        return ModulatedRows(
            hidden=self.hidden.data_ptr(),
            rows=self.rows.data_ptr(),
            norm=self.norm.data_ptr(),
            modulation=self.modulation.data_ptr(),
            num_rows=self.num_rows,
            size=size,
            length=length,
            modulation_stride=0 if self.modulation.shape[0] == 1 else 2 * size,
        )

    def _normalise(self) -> Tensor:
        """The rows after the final norm and its modulation, [R, D] bf16."""
        out = torch.empty(self.num_rows, self.hidden.shape[-1], dtype=OPERAND, device=self.device)
        parameters = ModulatedRowsParameters(source=self.source_rows(), out=out.data_ptr())
        launch(MODULATED_ROWS, parameters, self.row_blocks, self.device)
        return out

    def parts(self, size: int) -> list[slice]:
        """The rows, so many at a time; one part if there are none."""
        return [slice(first, first + size) for first in range(0, max(self.num_rows, 1), size)]

    def with_logits(self, source: str) -> Kernel:
        return for_rows(source, self.num_rows)

    def reduce_logits(
        self, kernel: Kernel, kind: type[ctypes.Structure], part: slice = slice(None), /, **fields: object
    ) -> None:
        """Launch over the tiles of a part of the rows by the vocabulary; `fields` follow the problem."""
        left, ((_, rows_of_tile),), pair = self.normalised[part], kernel.macros, kernel.cluster
        if not left.shape[0]:
            return
        problem = Problem(
            bias=self.bias.data_ptr(),
            num_rows=left.shape[0],
            vocab_size=self.vocab_size,
            excluded_token=self.excluded_token,
            row_tiles=ceil_div(left.shape[0], pair * rows_of_tile),
            column_tiles=ceil_div(self.chunks, 128 // rows_of_tile),
            steps=ceil_div(left.shape[1], _STEP),
        )
        problem.tiles = problem.row_tiles * problem.column_tiles
        set_map(problem, "rows", layout(left[None], rows_of_tile))
        set_map(problem, "weight", layout(self.weight[None], CHUNK // pair))
        parameters = kind(problem=problem, **pointers(fields))
        launch(kernel, parameters, persistent_blocks(kernel, problem.tiles, self.device), self.device)


def pointers(fields: Mapping[str, object]) -> dict[str, object]:
    """Tensors become their addresses."""
    return {name: address(v) if isinstance(v, Tensor) else v for name, v in fields.items()}


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and where TMA and vector loads can begin."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
