"""A kernel whose code is not what it is written to be is refused: another backend does the call, or none."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import backends
from loopmdm_kernels.cuda import driver
from loopmdm_kernels.testing import head_inputs, looped_inputs, reference, row_rng
from loopmdm_kernels.types import Head
from tests.cuda.fake_driver import ATTRIBUTES, SUCCESS, hopper


def compiled_to(wrong=(), registers=168, local_bytes=0):
    """Attributes of kernels; of those named in `wrong` other ones."""

    def attribute(name, function):
        broken = function.decode() in wrong
        if name == ATTRIBUTES.CU_FUNC_ATTRIBUTE_NUM_REGS:
            return SUCCESS, registers if broken else 168
        assert name == ATTRIBUTES.CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
        return SUCCESS, local_bytes if broken else 0

    return attribute


@pytest.fixture
def on_gpu(monkeypatch):
    """A GPU whose kernels are compiled so; its ops are called on the CPU."""
    monkeypatch.setitem(backends._DEVICE_OF, "cuda", "cpu")
    monkeypatch.setattr(driver, "why_unavailable", lambda capability: None)
    monkeypatch.setattr(backends, "_passed_over", set())

    def on_gpu(*wrong, **attributes):
        return hopper(monkeypatch, cuFuncGetAttribute=compiled_to(wrong, **attributes))

    return on_gpu


@pytest.mark.parametrize(
    ("threads", "registers", "local_bytes", "expected"),
    [
        (384, 168, 0, None),
        (384, 168, 8, "168 registers and 8 bytes of local memory a thread, expected 168 registers and none"),
        (384, 160, 0, "expected 168 registers and none"),
        (256, 255, 0, None),
        (256, 40, 0, None),
        (256, 40, 16, "expected at most 255 registers and none"),
        (512, 136, 0, "expected at most 128 registers and none"),
    ],
)
def test_what_a_kernel_may_take(on_gpu, threads, registers, local_bytes, expected):
    with on_gpu("entry", registers=registers, local_bytes=local_bytes):
        reason = driver.Kernel(b"cubin", "entry", 1000).breach(threads)
    assert reason is None if expected is None else f"its kernel entry has {registers} reg" in reason
    assert expected is None or expected in reason


def looped(inputs):
    return lk.looped_blocks(inputs.x, inputs.blocks, inputs.modulation, 2, num_heads=2)


@pytest.mark.parametrize(
    ("name", "trains", "length"),
    [
        ("looped_blocks_sm90", False, 130),
        ("looped_blocks_sm90", True, 130),
        ("looped_rows_sm90", False, 20),
        ("looped_rows_sm90", True, 20),
        ("looped_blocks_backward_sm90", True, 20),
        ("prepare_call", False, 20),
    ],
)
def test_blocks(on_gpu, name, trains, length):
    inputs = looped_inputs(1, length, 128, num_heads=2).to(torch.bfloat16, requires_grad=trains)
    with on_gpu(name, local_bytes=336) as fake, lk.use_backend("cuda"):
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=f"cannot do this: its kernel {name} has 168 registers and"
            ):
                looped(inputs)
        assert fake.named("cuLaunchKernelEx") == 0
    assert fake.named("cuModuleLoadData") <= 3, "a refusal is remembered"
    with on_gpu("looped_blocks_backward_sm90", local_bytes=336), lk.use_backend("cuda"), torch.no_grad():
        looped(inputs)


def test_the_next_backend_takes_the_call(on_gpu):
    inputs = looped_inputs(1, 130, 128, num_heads=2).to(torch.bfloat16)
    expected = reference.looped_blocks(inputs.x, inputs.blocks, inputs.modulation, 2, num_heads=2)
    said = pytest.warns(UserWarning, match="'cuda' cannot do this .its kernel looped_blocks_sm90 has")
    with on_gpu("looped_blocks_sm90", local_bytes=8), lk.use_backend("cuda", "reference"), said:
        assert torch.equal(looped(inputs), expected)


def head(num_rows=40, grad=False):
    hidden, weights = head_inputs(1, 300, 72, 500)
    leaves = [t.to(torch.bfloat16).requires_grad_(grad) for t in weights[:4]]
    return hidden.float(), Head(*leaves, 499), torch.arange(num_rows)


def draw(**options):
    hidden, weights, rows = head()
    lk.sample_rows(hidden, weights, rows, row_rng(len(rows)), **options)


def loss(num_rows=40, grad=False):
    hidden, weights, rows = head(num_rows, grad)
    lk.masked_cross_entropy(
        hidden, weights, torch.zeros(1, 300, dtype=torch.long), rows, torch.ones(num_rows)
    )


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("modulated_rows_sm90", draw),
        ("sample_rows_sm90", draw),
        ("sample_rows_combine_sm90", draw),
        ("head_logits_sm90", lambda: draw(top_k=5)),
        ("head_logits_sm90", lambda: lk.head_logits(*head()[:2])),
        ("masked_cross_entropy_sm90", loss),
        ("masked_cross_entropy_combine_sm90", loss),
        ("masked_cross_entropy_backward_sm90", lambda: loss(grad=True)),
        ("masked_cross_entropy_product_sm90", lambda: loss(grad=True)),
        ("modulated_rows_backward_sm90", lambda: loss(grad=True)),
    ],
)
def test_ops_of_the_head(on_gpu, name, call):
    with (
        on_gpu(name, local_bytes=16) as fake,
        lk.use_backend("cuda"),
        pytest.raises(RuntimeError, match=f"cannot do this: its kernel {name} has"),
    ):
        call()
    assert fake.named("cuLaunchKernelEx") == 0


def test_a_call_needs_its_own_kernels_only(on_gpu):
    others = ("head_logits_sm90", "masked_cross_entropy_backward_sm90", "modulated_rows_backward_sm90")
    with on_gpu(*others, local_bytes=16), lk.use_backend("cuda"):
        draw()
        loss()
