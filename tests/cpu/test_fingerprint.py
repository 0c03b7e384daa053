"""Fingerprints of weights: which writes they see, and that the packed copies follow."""

import pytest
import torch
from torch import nn

import loopmdm_kernels as lk
from loopmdm_kernels import _C
from loopmdm_kernels.cpu.packing import packed_linear
from loopmdm_kernels.types import Head


def test_fingerprint_sees_every_word_of_small_tensors():
    values = torch.randn(17, 29)
    known = {_C.fingerprint(values)}
    for i in range(values.numel()):
        changed = values.clone()
        changed.view(-1)[i] = -changed.view(-1)[i]
        known.add(_C.fingerprint(changed))
    assert len(known) == 1 + values.numel()


def through_data(weight, place, value):
    weight.data.view(-1)[place] = value


def through_numpy(weight, place, value):
    weight.detach().numpy().reshape(-1)[place] = value


def row_through_data(weight, place, value):
    weight.data[place // weight.shape[1]] += value


@pytest.mark.parametrize("write", [through_data, through_numpy, row_through_data])
@pytest.mark.parametrize("shape", [(3, 5), (20, 64), (192, 64), (64, 256), (512, 512)], ids=str)
def test_every_write_to_a_small_matrix_is_seen(write, shape):
    """Up to 1 MB, at any place, whether or not PyTorch counts the write."""
    weight = nn.Parameter(torch.randn(shape))
    number = weight.numel()
    for place in {*range(0, number, max(number // 61, 1)), number - 1, number // 2}:
        packed_linear(weight, bf16=False)
        write(weight, place, 3.25 + place)
        packing_then = packed_linear(weight, bf16=False)
        assert torch.equal(packing_then, packed_linear(weight.detach().clone(), bf16=False))


def test_an_op_sees_any_row_written_through_data():
    weight, hidden = nn.Parameter(torch.randn(20, 64)), torch.randn(1, 2, 64)
    head = Head(torch.ones(64), weight, torch.zeros(20), torch.zeros(1, 2, 64))
    for row in range(20):
        before = lk.head_logits(hidden, head).detach()
        weight.data[row] = torch.randn(64)
        after = lk.head_logits(hidden, head).detach()
        fresh = lk.head_logits(hidden, head._replace(weight=weight.detach().clone()))
        assert torch.equal(after, fresh)
        assert (after != before).any(dim=(0, 1)).nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("count", [1, 63, 64, 65, 2**16, 2**16 + 1, 2**18 - 3, 2**18])
def test_fingerprint_of_up_to_a_megabyte_is_of_every_byte(count):
    values = torch.randn(1, count)
    first = _C.fingerprint(values)
    assert _C.fingerprint(values, num_threads=3) == first
    for place in {0, count - 1, count // 2, count // 3}:
        changed = values.clone()
        changed[0, place] = -changed[0, place]
        assert _C.fingerprint(changed) != first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fingerprint_samples_every_kilobyte(dtype):
    values = torch.randn(1100, 500).to(dtype)  # beyond what is compared whole
    first = _C.fingerprint(values)
    per_block = 1024 // values.element_size()
    flat = values.view(-1)
    for start in range(0, flat.numel() - per_block + 1, 37 * per_block):
        changed = values.clone()
        changed.view(-1)[start : start + per_block] += 1
        assert _C.fingerprint(changed) != first
    changed = values.clone()
    changed.view(-1)[-1] += 1
    assert _C.fingerprint(changed) != first
    assert _C.fingerprint(values) == _C.fingerprint(values.clone()) == first
    assert _C.fingerprint(values, num_threads=3) == first
    assert _C.fingerprint(values[:0]) != _C.fingerprint(values[:1])
