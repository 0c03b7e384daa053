"""What a kernel is compiled for and what it gets at launch.

The struct of a kernel stands in its source, with shapes and dtypes, and nowhere else: it is read there.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import Tensor

from loopmdm_kernels.cuda import sources
from loopmdm_kernels.schedule import BackwardPlan, BlockShape, Plan, Tiles
from loopmdm_kernels.schedule.backward import KEY_BLOCK
from loopmdm_kernels.schedule.cost import sides

MAP = ctypes.c_uint8 * 128  # a TMA map
_MAP_ALIGNMENT = 64
_KINDS: dict[str, Any] = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "TensorMap": MAP,
}
_FIELDS = re.compile(r"(?:const )?(\w+)(\*?) (\w+(?:, \w+)*)")


def structure(source: str, name: str) -> type[ctypes.Structure]:
    """The struct `name` of a file of csrc/cuda, or of those it includes.

    Raises:
        ValueError: it is not there, or has a field of a type that no kernel gets.
    """
    return _structure(f"cuda/{source}", name)


@cache
def _structure(source: str, name: str) -> type[ctypes.Structure]:
    declared = rf"^struct {name}(?: : (\w+))? {{([^}}]*?)(?:__device__|}};)"
    own, *included = sources.closure(source)
    found = re.search(declared, own.read_text(), re.MULTILINE)
    if found is None:  # of the file that has it, so that it is one type for all
        for path in included:
            if re.search(declared, path.read_text(), re.MULTILINE):
                return _structure(str(path.relative_to(sources.folder())), name)
        raise ValueError(f"{source}: there is no struct {name}")
    base, body = found.groups()
    fields: list[tuple[str, Any]] = []
    end = 0

    def padded_to(alignment: int) -> None:
        nonlocal end
        if gap := -end % alignment:
            fields.append((f"padding{len(fields)}", ctypes.c_uint8 * gap))
            end += gap

    for field, kind in (*_fields(base and _structure(source, base)), *_declared(source, name, body)):
        padded_to(_alignment(kind))
        fields.append((field, kind))
        end += ctypes.sizeof(kind)
    padded_to(max(_alignment(kind) for _, kind in fields))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def _declared(source: str, name: str, body: str) -> Iterator[tuple[str, Any]]:
    for declaration in re.sub(r"//.*", "", body).split(";")[:-1]:
        match = _FIELDS.fullmatch(declaration.strip())
        if match is None:
            raise ValueError(f"{source}: {name}: cannot read {declaration.strip()!r}")
        written, pointer, names = match.groups()
        kind = ctypes.c_void_p if pointer else _KINDS.get(written) or _structure(source, written)
        for field in names.split(", "):
            yield field, kind


def _alignment(kind: Any) -> int:
    if kind is MAP:
        return _MAP_ALIGNMENT
    return max((_alignment(inner) for _, inner in _fields(kind)), default=ctypes.alignment(kind))


def _fields(kind: Any) -> Any:
    return getattr(kind, "_fields_", ())


def fields(kind: type[ctypes.Structure], of: Any) -> list[str]:
    """Names of the fields of one type: `MAP`, `ctypes.c_void_p`."""
    return [name for name, found in _fields(kind) if found is of]


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def defines(shape: BlockShape, plan: Plan) -> dict[str, int]:
    """The macros of `Config`."""
    tiles, among = plan.tiles, sides(plan.tiles)
    values = {
        "HIDDEN": shape.hidden,
        "HEADS": shape.heads,
        "MLP": shape.mlp,
        "LAYERS": shape.layers,
        "ROWS": tiles.rows,
        "BLOCKS": tiles.blocks,
        "NORM_ROWS": tiles.part,
        "HEADS_PER_TILE": tiles.heads // among,
        "QKV_COLUMNS": tiles.qkv // among,
        "ATTN_OUT_COLUMNS": tiles.attn_out // among,
        "MLP_IN_COLUMNS": tiles.mlp_in // among,
        "MLP_OUT_COLUMNS": tiles.mlp_out // among,
        "MLP_OUT_PARTS": tiles.mlp_out_parts,
        "SUM_ROWS": tiles.sum_rows,
        "KEY_BLOCK": plan.key_block,
        "STAGES": plan.stages,
        "STAGE_BYTES": plan.stage_bytes,
    }
    return {f"LOOPMDM_{name}": value for name, value in values.items()}


def backward_defines(shape: BlockShape, plan: BackwardPlan) -> dict[str, int]:
    """Those of the backward kernel: the same, with tiles of one width."""
    tiles = Tiles(plan.tiles.rows, *4 * (plan.tiles.columns,), part=plan.tiles.part, blocks=plan.tiles.blocks)
    return defines(shape, Plan(tiles, plan.stages, plan.stage_bytes, KEY_BLOCK, {}, 0.0, 0.0))
