"""Descriptions of tensors for TMA, encoded by the driver and kept per buffer."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from loopmdm_kernels.cuda.driver import bindings, check

SWIZZLE_BYTES = 128  # of a box's row, where the operand is not narrower: one row of the swizzle


class Layout(NamedTuple):
    """What a map describes: a tensor of three dimensions and the box that one load brings."""

    address: int
    dtype: torch.dtype
    sizes: tuple[int, int, int]  # columns, rows, matrices
    strides: tuple[int, int]  # bytes from row to row and from matrix to matrix
    box: tuple[int, int]  # columns, rows


def layout(tensor: Tensor, rows: int, row_bytes: int = SWIZZLE_BYTES) -> Layout:
    """Of a contiguous tensor [matrices, rows, columns], in boxes of `rows` rows of 32, 64 or 128 bytes.

    Raises:
        ValueError: TMA cannot address it.
    """
    matrices, height, width = tensor.shape
    size = tensor.element_size()
    if not tensor.is_contiguous() or tensor.data_ptr() % 16 or width * size % 16:
        raise ValueError(
            f"TMA needs contiguous rows of a multiple of 16 bytes, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}, strides {tensor.stride()}, address {tensor.data_ptr() % 16} modulo 16"
        )
    if not 1 <= rows <= 256:
        raise ValueError(f"rows of a box: got {rows}, expected 1 to 256")
    return Layout(
        tensor.data_ptr(),
        tensor.dtype,
        (width, height, matrices),
        (width * size, height * width * size),
        (row_bytes // size, rows),
    )


@lru_cache(maxsize=512)
def encode(described: Layout) -> bytes:
    """The 128 bytes of the map. Rows and columns beyond the tensor are read as zero."""
    driver = bindings()
    kinds, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
    swizzle = {
        32: swizzles.CU_TENSOR_MAP_SWIZZLE_32B,
        64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
        128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
    }[described.box[0] * described.dtype.itemsize]
    kind = {
        torch.float32: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
        torch.bfloat16: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    }[described.dtype]

    def words(bits: type, values: Sequence[int]) -> list[object]:
        return [bits(value) for value in values]

    result = driver.cuTensorMapEncodeTiled(
        kind,
        3,
        described.address,
        words(driver.cuuint64_t, described.sizes),
        words(driver.cuuint64_t, described.strides),
        words(driver.cuuint32_t, (*described.box, 1)),
        words(driver.cuuint32_t, (1, 1, 1)),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        swizzle,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    encoded = check(result, "cuTensorMapEncodeTiled")
    return ctypes.string_at(encoded.getPtr(), 128)
