"""What several kernels compute: products, the layer norm with its modulation, GELU."""

import triton
import triton.language as tl

# numpy has no bf16, and the interpreter's products of it are wrong: there, operands are widened first.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

NORM_EPS = tl.constexpr(1e-5)
LOWEST = tl.constexpr(-3.0e38)  # below every logit, and finite: differences of it are no NaN
STATISTICS_GROUP = tl.constexpr(64)  # columns of a row whose mean and squares one partial result holds

# Decorates kernels that are launched. Triton compiles one anew where a number turns 1 or a multiple of 16, or
# a pointer one of 16 bytes: not for numbers that differ from call to call, nor parts of vectors over rows.
launched = triton.jit(
    do_not_specialize=[
        *("num_rows", "tokens", "tiles_n", "loop", "application", "dropout_seed", "dropout_threshold", "seed")
    ],
    do_not_specialize_on_alignment=[
        *("rows_ptr", "targets_ptr", "sequence_ptr", "step_ptr", "position_ptr", "log_total_ptr")
    ],
)


@triton.jit
def dot(a, b, acc):
    """acc + a b with fp32 sums; fp32 operands are not rounded."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 x in `dtype`, to the nearest; the interpreter would cut bf16 off."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = tl.where(x == x, nearest.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def widened(weight, dtype: tl.constexpr):
    """Part of a weight as an operand in `dtype`, exactly: e4m3 may come as bytes."""
    if weight.dtype == tl.uint8:
        bits = weight.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        weight = half * 256.0  # 2^(15 - 7), by which the exponents of the two are biased
    return weight.to(dtype)


@triton.jit
def product(
    a_ptr,
    a_row_stride,
    b_ptr,
    b_depth_stride,
    b_col_stride,
    rows,
    cols,
    num_rows,
    num_cols,
    depth,
    b_depth,
    BLOCK_K: tl.constexpr,
):
    """The tile (rows, cols) of A B. A is `depth` deep; B has `b_depth` <= depth rows, others count as 0."""
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows.to(tl.int64)[:, None] * a_row_stride + k.to(tl.int64)[None, :]
    b_ptrs = b_ptr + k.to(tl.int64)[:, None] * b_depth_stride + cols.to(tl.int64)[None, :] * b_col_stride
    row_exists = (rows < num_rows)[:, None]
    col_exists = (cols < num_cols)[None, :]
    acc = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        a = tl.load(a_ptrs, mask=row_exists & (k0 + k < depth)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=col_exists & (k0 + k < b_depth)[:, None], other=0.0)
        acc = dot(a, widened(b, a.dtype), acc)
        a_ptrs += BLOCK_K
        b_ptrs += b_depth_stride * BLOCK_K
    return acc


@triton.jit
def scaled_and_biased(acc, scale_ptr, bias_ptr, col, num_cols):
    """A product with what belongs to its columns; each may be None."""
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + col, mask=col < num_cols, other=0.0)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col, mask=col < num_cols, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def tile_origin(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile number -> (row tile, column tile), GROUP row tiles at a time, so that both operands stay in L2."""
    group = tile // (GROUP * tiles_n)
    first = group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = tile % (GROUP * tiles_n)
    return first + inside % height, inside // height


@triton.jit
def one_plus(scale):
    """1 + scale in fp32, rounded in the dtype of scale as the reference model does."""
    return rounded(1.0 + scale.to(tl.float32), scale.dtype).to(tl.float32)


@triton.jit
def gain(norm, scale):
    """norm * (1 + scale)."""
    return norm.to(tl.float32) * one_plus(scale)


@triton.jit
def row_moments(x, exists, size):
    """Mean and 1 / standard deviation of the rows of x, which hold `size` existing numbers.

    The mean is corrected by that of the deviations from it, which is 0 but for rounding: of a constant row,
    nothing but that would be left.
    """
    mean = tl.sum(tl.where(exists, x, 0.0), axis=1) / size
    mean += tl.sum(tl.where(exists, x - mean[:, None], 0.0), axis=1) / size
    centred = tl.where(exists, x - mean[:, None], 0.0)
    return mean, inverse_deviation(tl.sum(centred * centred, axis=1) / size)


@triton.jit
def inverse_deviation(variance):
    """NaN where the variance is beyond fp32, where it would be 0 and the row look fine."""
    deviation = tl.sqrt_rn(variance + NORM_EPS)
    return tl.where(deviation < float("inf"), tl.div_rn(1.0, deviation), float("nan"))


@triton.jit
def combined_moments(mean_ptr, square_ptr, rows, num_rows, size, GROUPS: tl.constexpr):
    """Row moments from the partial ones of each group of columns [T, ceil(D / group)] (Chan et al.)."""
    groups = tl.cdiv(size, STATISTICS_GROUP)
    group = tl.arange(0, GROUPS)
    at = rows.to(tl.int64)[:, None] * groups + group[None, :]
    exists = (rows < num_rows)[:, None] & (group < groups)[None, :]
    count = tl.minimum(size - group * STATISTICS_GROUP, STATISTICS_GROUP).to(tl.float32)
    count = tl.where(group < groups, count, 0.0)[None, :]
    means = tl.load(mean_ptr + at, mask=exists, other=0.0)
    squares = tl.load(square_ptr + at, mask=exists, other=0.0)
    mean = tl.sum(means * count, axis=1) / size
    mean += tl.sum((means - mean[:, None]) * count, axis=1) / size  # see row_moments
    between = means - mean[:, None]
    variance = tl.sum(squares + count * between * between, axis=1) / size
    return mean, inverse_deviation(variance)


@triton.jit
def store_moments(x, mean_ptr, square_ptr, rows, num_rows, first_col, size):
    """The partial moments of a tile x of whole groups of columns, for `combined_moments`."""
    PARTS: tl.constexpr = x.shape[1] // STATISTICS_GROUP
    groups = tl.cdiv(size, STATISTICS_GROUP)
    part = tl.arange(0, PARTS)
    col = first_col + tl.arange(0, x.shape[1])
    count = tl.minimum(size - first_col - part * STATISTICS_GROUP, STATISTICS_GROUP).to(tl.float32)
    count = tl.maximum(count, 1.0)[None, :]
    exists = tl.reshape((col < size), (1, PARTS, STATISTICS_GROUP))
    x = tl.reshape(x, (x.shape[0], PARTS, STATISTICS_GROUP))
    mean = tl.sum(tl.where(exists, x, 0.0), axis=2) / count
    mean += tl.sum(tl.where(exists, x - mean[:, :, None], 0.0), axis=2) / count  # see row_moments
    centred = tl.where(exists, x - mean[:, :, None], 0.0)
    square = tl.sum(centred * centred, axis=2)
    group = first_col // STATISTICS_GROUP + part
    at = rows.to(tl.int64)[:, None] * groups + group[None, :]
    mask = (rows < num_rows)[:, None] & (group < groups)[None, :]
    tl.store(mean_ptr + at, mean, mask=mask)
    tl.store(square_ptr + at, square, mask=mask)


@triton.jit
def gelu(u):
    """GELU by tanh: 0.5 (1 + tanh z) = sigmoid(2 z)."""
    z2 = 1.5957691216057308 * (u + 0.044715 * u * u * u)
    return u / (1.0 + tl.exp(-z2))


@triton.jit
def gelu_slope(u):
    z2 = 1.5957691216057308 * (u + 0.044715 * u * u * u)
    s = 1.0 / (1.0 + tl.exp(-z2))
    return s + u * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * u * u)
