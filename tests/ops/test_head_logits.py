"""head_logits of every backend: values and what it takes."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import _C, reference
from loopmdm_kernels.testing import assert_matches_oracle, head_inputs
from loopmdm_kernels.types import Head, RowRng

ISAS = _C.usable_cpu_isas().split(", ")

# (B, L, D, V) around the widths of lanes, register tiles, tiles (256 tokens), chunks (1024), batches (132).
SIZES = [
    (1, 1, 1, 1),
    (2, 3, 7, 15),
    (1, 5, 33, 64),
    (3, 11, 64, 257),
    (2, 67, 37, 1031),
    (1, 265, 96, 97),
    (1, 6, 130, 2111),
]


def inputs(size, dtype, per_sequence=True):
    batch, length, width, vocab_size = size
    hidden, head = head_inputs(batch, length, width, vocab_size, per_sequence_modulation=per_sequence)
    return hidden.float(), Head(*(t.to(dtype) for t in head[:4]), head.excluded_token)


def in_float64(hidden, head):
    return reference.head_logits(hidden.double(), Head(*(t.double() for t in head[:4]), -1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_values(monkeypatch, isa, size, dtype, per_sequence):
    monkeypatch.setenv("LOOPMDM_CPU_ISA", isa)
    hidden, head = inputs(size, dtype, per_sequence)
    with lk.use_backend("cpu"), torch.no_grad():
        logits = lk.head_logits(hidden, head)
    assert logits.dtype == dtype
    assert_matches_oracle(logits, reference.head_logits(hidden, head), in_float64(hidden, head))


@pytest.mark.parametrize("isa", ISAS)
def test_bf16_products_of_a_float32_weight(monkeypatch, isa):
    monkeypatch.setenv("LOOPMDM_CPU_ISA", isa)
    hidden, head = inputs((2, 9, 40, 300), torch.float32)
    with torch.no_grad():
        logits = lk.head_logits(hidden, head, compute_dtype=torch.bfloat16)
    expected = reference.head_logits(hidden, head, compute_dtype=torch.bfloat16)
    assert logits.dtype == torch.bfloat16
    assert_matches_oracle(logits, expected, in_float64(hidden, head))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_batch_or_the_threads(dtype):
    hidden, head = inputs((1, 300, 48, 1500), dtype)
    threads = torch.get_num_threads()
    with lk.use_backend("cpu"), torch.no_grad():
        torch.set_num_threads(1)
        whole = lk.head_logits(hidden, head)
        torch.set_num_threads(3)
        try:
            for begin, end in ((0, 1), (7, 9), (100, 300), (0, 300)):
                assert torch.equal(lk.head_logits(hidden[:, begin:end], head), whole[:, begin:end])
        finally:
            torch.set_num_threads(threads)


def test_strided_hidden_and_weight():
    hidden, head = inputs((2, 5, 24, 70), torch.float32, per_sequence=False)
    with torch.no_grad():
        expected = lk.head_logits(hidden, head)
        strided = lk.head_logits(
            hidden.mT.contiguous().mT, head._replace(weight=head.weight.T.contiguous().T)
        )
    assert torch.equal(strided, expected)


def test_sampling_sees_the_same_logits():
    """Where logits come from does not matter: the most probable token is that of the row's logits."""
    hidden, head = inputs((1, 40, 64, 3001), torch.float32)
    rows = torch.arange(40)
    with torch.no_grad():
        logits = lk.head_logits(hidden, head)[0]
        drawn = lk.sample_rows(hidden, head, rows, RowRng(0, rows, rows, rows), temperature=0.0)
    assert torch.equal(drawn.token, logits.argmax(-1))


def test_nan_stays_in_its_column_and_row():
    hidden, head = inputs((1, 3, 16, 300), torch.float32)
    hidden[0, 1] = float("nan")
    head.weight[70] = float("nan")
    with torch.no_grad():
        nan = lk.head_logits(hidden, head)[0].isnan()
    expected = torch.zeros(3, 300, dtype=torch.bool)
    expected[1] = True
    expected[:, 70] = True
    assert torch.equal(nan, expected)
