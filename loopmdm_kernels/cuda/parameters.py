"""What the kernels are compiled for and what they get at launch; the other side is csrc/cuda/config*.cuh."""

from __future__ import annotations

import ctypes

from loopmdm_kernels.schedule import BlockShape, Plan
from loopmdm_kernels.schedule.cost import COUNTER_BYTES

WEIGHTS = ("qkv_weight", "attn_out_weight", "mlp_in_weight", "mlp_out_weight")
MAPS = ("stream", "qkv", "mixed", "wide", *WEIGHTS)
MAP_ALIGNMENT = 64
POINTERS = (
    "input", "output", "stream_values", "qkv_values", "mixed_values", "wide_values", "partial_values",
    "statistics1", "statistics2", "change", "affine", "gate", "mlp_in_bias", "mlp_out_bias",
    "cosines", "sines", "key_mask", "table", "counters", "stop", "max_loops",
)  # fmt: skip
NUMBERS = (
    "enter", "loop", "leave",
    "batch", "length", "row_tiles", "num_counters", "modulated_sequences", "adaptive", "keep",
)  # fmt: skip


class Parameters(ctypes.Structure):
    """`Parameters` of every kernel, field for field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int32) for name in NUMBERS),
        ("exit_threshold", ctypes.c_float),
    )


class ParametersWithWeights(Parameters):
    """`KernelParameters` of config_sm80.cuh."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in WEIGHTS)


class ParametersWithMaps(Parameters):
    """`KernelParameters` of config_sm90.cuh."""

    _fields_ = (
        ("unused", ctypes.c_uint8 * (-ctypes.sizeof(Parameters) % MAP_ALIGNMENT)),
        *((name, ctypes.c_uint8 * 128) for name in MAPS),
    )

    def set_map(self, name: str, encoded: bytes) -> None:
        getattr(self, name)[:] = encoded


def defines(shape: BlockShape, plan: Plan) -> dict[str, int]:
    """The macros of `Config`."""
    tiles = plan.tiles
    values = {
        "HIDDEN": shape.hidden,
        "HEADS": shape.heads,
        "MLP": shape.mlp,
        "LAYERS": shape.layers,
        "ROWS": tiles.rows,
        "QKV_COLUMNS": tiles.qkv,
        "ATTN_OUT_COLUMNS": tiles.attn_out,
        "MLP_IN_COLUMNS": tiles.mlp_in,
        "MLP_OUT_COLUMNS": tiles.mlp_out,
        "MLP_OUT_PARTS": tiles.mlp_out_parts,
        "KEY_BLOCK": plan.key_block,
        "STAGES": plan.stages,
        "STAGE_BYTES": plan.stage_bytes,
        "RESIDENT_BYTES": plan.resident_bytes,
    }
    if plan.cluster > 1:
        values |= {"CLUSTER": 1, "COUNTER_BYTES": COUNTER_BYTES}
    return {f"LOOPMDM_{name}": value for name, value in values.items()}
