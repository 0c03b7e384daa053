"""The AMX level of the CPU kernels on emulated instructions, which any machine with AVX-512 can run.

Where the machine has AMX, the tests of tests/cpu and of the ops run the level itself.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from loopmdm_kernels import _C

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = [
    "-std=gnu++20",
    "-O2",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
    "-DLOOPMDM_ISA=amx_bf16",
    "-mavx2",
    "-mfma",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-Wno-uninitialized",
]
ROW_COUNTS = [1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 96, 101]
WORD_COUNTS = [1, 7, 16, 17, 32, 45]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None or "avx512" not in _C.usable_cpu_isas():
        pytest.skip("needs g++ and a processor with AVX-512")
    target = tmp_path_factory.mktemp("amx") / "libamx.so"
    command = [compiler, *FLAGS, f"-I{CSRC}", "-include", str(HERE / "amx_emulation.h")]
    subprocess.run([*command, str(HERE / "amx_kernels.cpp"), "-o", str(target)], check=True)
    loaded = ctypes.CDLL(str(target))
    loaded.memory_bytes.restype = ctypes.c_int64
    return loaded


def counts(library):
    """Faults, configurations, tile products, and whether tiles are configured, since the last call."""
    out = np.zeros(4, dtype=np.int64)
    library.take_counts(out.ctypes.data_as(ctypes.c_void_p))
    return out.tolist()


def bf16(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16()


def words_of(values):
    """[..., 2n] bf16 as [..., n] pairs."""
    return np.ascontiguousarray(values.view(torch.int16).numpy()).view(np.uint32)


def product(library, left, right, *, out=None, strided=False):
    """left[rows, 2 words] right[2 words, width], added to `out` if given. Beyond the operands lie NaNs."""
    rows, words = left.shape[0], left.shape[1] // 2
    width = right.shape[1]
    a = np.full((rows + 3, words + 5), 0x7FC07FC0, dtype=np.uint32)
    a[:rows, :words] = words_of(left)
    a_row, a_step = words + 5, 1
    if strided:
        a, a_row, a_step = np.ascontiguousarray(a.T), 1, rows + 3
    b = np.full((words + 3, width), 0x7FC07FC0, dtype=np.uint32)
    b[:words] = words_of(right.view(words, 2, width).transpose(1, 2).contiguous())[..., 0]
    c = np.full((rows + 2, width + 16), 12345.0, dtype=np.float32)
    if out is not None:
        c[:rows, :width] = out.numpy()
    pointer, int64 = (lambda x: x.ctypes.data_as(ctypes.c_void_p)), ctypes.c_int64
    library.multiply(
        *(pointer(a), int64(a_row), int64(a_step), int64(rows), pointer(b), ctypes.c_int(width)),
        *(int64(words), pointer(c), int64(width + 16), ctypes.c_bool(out is not None)),
    )
    assert (c[rows:] == 12345).all() and (c[:, width:] == 12345).all(), "written beyond the result"
    return torch.from_numpy(c[:rows, :width].copy())


@pytest.mark.parametrize("strided", [False, True], ids=["rows", "strided"])
@pytest.mark.parametrize("width", [16, 32, 48, 64])
@pytest.mark.parametrize("words", WORD_COUNTS)
def test_products(library, width, words, strided):
    counts(library)
    for rows in ROW_COUNTS:
        left, right = bf16((rows, 2 * words), rows), bf16((2 * words, width), words)
        before = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
        exact = left.double() @ right.double()
        # Each of the 2 * words + 2 additions rounds a partial sum, which this bounds.
        bound = 2.0**-24 * (2 * words + 2) * (left.double().abs() @ right.double().abs() + before.abs())
        for out in (None, before):
            result = product(library, left, right, out=out, strided=strided)
            error = (result.double() - exact - (0 if out is None else out.double())).abs()
            assert (error <= bound).all(), (rows, float((error / bound).max()))
    faults, _, tile_products, configured = counts(library)
    assert (faults, configured) == (0, 0)
    assert (tile_products == 0) == strided


@pytest.mark.parametrize("words", WORD_COUNTS)
def test_a_row_does_not_depend_on_the_others(library, words):
    left, right = bf16((101, 2 * words), 3), bf16((2 * words, 64), 4)
    whole = product(library, left, right)
    for first in range(0, 101, 9):
        for count in ROW_COUNTS:
            part = left[first : first + count]
            assert torch.equal(product(library, part, right), whole[first : first + len(part)])
    for width in (16, 32, 48):
        assert torch.equal(product(library, left, right[:, :width].contiguous()), whole[:, :width])


def attention(library, q, k, v, grad_out, key_mask=None):
    """out, log_sum_exp, grad_q, grad_k, grad_v of bf16 [H, L, K]."""
    heads, length, head_dim = q.shape
    results = [torch.empty_like(q) for _ in range(4)]
    tensors = [q, k, v, results[0], grad_out, *results[1:]]
    size = library.memory_bytes(ctypes.c_int64(length), ctypes.c_int64(head_dim))
    memory = [torch.empty(size + 64, dtype=torch.uint8) for _ in range(2)]
    aligned = [ctypes.c_void_p(m.data_ptr() + -m.data_ptr() % 64) for m in memory]
    log_sum_exp = torch.empty(heads, length)
    library.attention(
        (ctypes.c_void_p * 8)(*(t.data_ptr() for t in tensors)),
        ctypes.c_void_p(None if key_mask is None else key_mask.data_ptr()),
        *(ctypes.c_int64(n) for n in (heads, length, head_dim)),
        *(ctypes.c_void_p(log_sum_exp.data_ptr()), *aligned),
    )
    return results[0], log_sum_exp, *results[1:]


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "masked"])
@pytest.mark.parametrize(
    ("length", "head_dim"), [(1, 2), (5, 16), (17, 24), (81, 32), (96, 64), (130, 40), (600, 64)]
)
def test_attention(library, length, head_dim, masked):
    q, k, v, grad_out = (bf16((2, length, head_dim), seed) for seed in range(4))
    mask = torch.arange(length)[None] % 3 != 1 if masked else torch.ones(1, length, dtype=torch.bool)
    counts(library)
    out, log_sum_exp, *gradients = attention(library, q, k, v, grad_out, mask if masked else None)
    faults, _, tile_products, configured = counts(library)
    assert faults == 0 and tile_products > 0 and not configured
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    scores = exact[0] @ exact[1].transpose(1, 2) / head_dim**0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    expected = scores.softmax(-1) @ exact[2]
    expected.backward(grad_out.double())
    scale = 1 / np.log(2)
    torch.testing.assert_close(
        log_sum_exp.double(), scale * scores.detach().logsumexp(-1), atol=1e-3, rtol=1e-3
    )
    for value, target in zip([out, *gradients], [expected, *(t.grad for t in exact)], strict=True):
        size = target.detach().norm() + 1e-3 * grad_out.double().norm()  # one key has gradients of zero
        error = (value.double() - target.detach()).norm() / size
        assert error < 8e-3, float(error)  # bf16 probabilities and results: 2^-9 each, and what they cancel


def test_configuration_is_kept_through_a_kernel(library):
    """Whole tiles everywhere: one for attending to a head, one for its gradients."""
    tensors = [bf16((1, 96, 64), seed) for seed in range(4)]
    counts(library)
    attention(library, *tensors)
    faults, configurations, tile_products, configured = counts(library)
    assert (faults, configurations, configured) == (0, 2, 0)
    assert tile_products > 100
