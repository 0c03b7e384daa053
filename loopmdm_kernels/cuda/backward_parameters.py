"""What the backward kernel is compiled for and gets at launch; the other side is
csrc/cuda/looped_blocks/backward_config_sm90.cuh."""

from __future__ import annotations

import ctypes

from loopmdm_kernels.schedule import BlockShape
from loopmdm_kernels.schedule.backward import BackwardPlan

OPERANDS = (
    "rows1", "qkv", "mixed", "rows2", "wide", "of_branch2", "of_before", "of_branch1", "of_mixed", "of_qkv",
)  # fmt: skip
WEIGHTS = ("qkv", "attn_out", "mlp_in", "mlp_out")
MAPS = (*OPERANDS, *(f"{name}_weight" for name in WEIGHTS))
POINTERS = (
    "tape", "grad",
    "middle", "state", "top",
    "rows1_values", "qkv_values", "mixed_values", "branch1_values",
    "rows2_values", "before_values", "wide_values", "branch2_values",
    "of_rows", "inner",
    "of_branch2_values", "of_before_values", "of_branch1_values", "of_mixed_values", "of_qkv_values",
    "norms", "gates", "of_branch", "wide_bias",
    *(f"of_{name}_weight" for name in WEIGHTS),
    "affine", "gate", "mlp_in_bias", "mlp_out_bias", "cosines", "sines", "key_mask",
    "table", "counters", "stop", "max_loops",
)  # fmt: skip
NUMBERS = ("instructions", "batch", "length", "row_tiles", "modulated_sequences")
_BYTES = 128 * len(MAPS) + 8 * len(POINTERS) + 4 * len(NUMBERS)


class BackwardParameters(ctypes.Structure):
    """`backward::Parameters` of the kernel, field for field."""

    _fields_ = (
        *((name, ctypes.c_uint8 * 128) for name in MAPS),
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int32) for name in NUMBERS),
        ("unused", ctypes.c_uint8 * (-_BYTES % 64)),  # the kernel's alignment is 64
    )

    def set_map(self, name: str, encoded: bytes) -> None:
        getattr(self, name)[:] = encoded


def backward_defines(shape: BlockShape, plan: BackwardPlan) -> dict[str, int]:
    """The macros of `Config`: those of the forward kernel, with tiles of one width."""
    columns = plan.tiles.columns
    values = {
        "HIDDEN": shape.hidden,
        "HEADS": shape.heads,
        "MLP": shape.mlp,
        "LAYERS": shape.layers,
        "ROWS": plan.tiles.rows,
        "QKV_COLUMNS": columns,
        "ATTN_OUT_COLUMNS": columns,
        "MLP_IN_COLUMNS": columns,
        "MLP_OUT_COLUMNS": columns,
        "MLP_OUT_PARTS": 1,
        "KEY_BLOCK": 128,
        "STAGES": plan.stages,
        "STAGE_BYTES": plan.stage_bytes,
        "RESIDENT_BYTES": 0,
    }
    return {f"LOOPMDM_{name}": value for name, value in values.items()}
