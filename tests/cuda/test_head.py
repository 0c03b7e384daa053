"""Ops of the vocabulary head on Hopper: which kernels a call launches, and what they do not do."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels.calls import HeadCall
from loopmdm_kernels.cuda import head, masked_cross_entropy, sample_rows
from loopmdm_kernels.cuda.head import why_not_on
from loopmdm_kernels.cuda.head_logits import why_not as why_no_logits
from loopmdm_kernels.types import Head
from tests.conftest import Backend
from tests.masked_cross_entropy.cases import case as loss_case
from tests.masked_cross_entropy.cases import run
from tests.sample_rows.cases import case, some

CUDA = Backend("cuda")
pytestmark = pytest.mark.backends("cuda")


def launched(gpu):
    return [name for name, _ in gpu.launches]


@pytest.mark.parametrize("num_rows", [33, 200])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_draw_is_three_kernels(backend, gpu, num_rows, temperature):
    lk.sample_rows(*case(backend, num_rows=num_rows), temperature=temperature)
    assert launched(gpu) == ["modulated_rows_sm90", "sample_rows_sm90", "sample_rows_combine_sm90"]


@pytest.mark.parametrize("options", [{"top_p": 0.8}, {"top_p": 0.9, "top_k": 20}])
def test_logits_of_a_few_rows_at_a_time(backend, gpu, monkeypatch, options):
    monkeypatch.setattr(sample_rows, "_ROWS_WITH_LOGITS", 20)
    lk.sample_rows(*case(backend, size=(72, 300)), **options)
    assert launched(gpu).count("head_logits_sm90") == 2


def test_a_loss_is_three_kernels_and_keeps_no_logits(backend, gpu):
    leaves, targets, rows, excluded = loss_case(backend, size=(72, 301, 140))
    hidden, *head, weights = leaves.values()
    with torch.no_grad():
        lk.masked_cross_entropy(hidden, Head(*head, excluded), targets, rows, weights)
    names = ["modulated_rows_sm90", "masked_cross_entropy_sm90", "masked_cross_entropy_combine_sm90"]
    assert launched(gpu) == names


def test_a_loss_goes_backward_in_groups_of_rows(backend, gpu, monkeypatch):
    monkeypatch.setattr(masked_cross_entropy, "_GROUP_ELEMENTS", 1)
    run(loss_case(backend, size=(40, 300, 300), sequences=False))
    assert launched(gpu).count("masked_cross_entropy_backward_sm90") == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_do_not_depend_on_blocks_and_the_order_of_loads(backend, gpu, temperature):
    inputs = case(backend, num_rows=200)
    together = lk.sample_rows(*inputs, temperature=temperature)
    for part, multiprocessors in ((slice(0, 1), 2), (slice(30, 90), 8), (slice(20, 190), 5)):
        gpu.multiprocessors, gpu.seed = multiprocessors, multiprocessors
        out = lk.sample_rows(*some(inputs, part), temperature=temperature)
        assert all(torch.equal(alone, value[part]) for alone, value in zip(out, together, strict=True))


def test_nothing_is_launched_for_no_rows(backend, gpu):
    for options in ({}, {"top_k": 3}):
        lk.sample_rows(*some(case(backend), slice(0)), **options)
    assert not gpu.launches


def test_it_is_for_hopper(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    reason = "its kernels are for compute capability 9.0 (H100, H200), got 8.0"
    assert why_not_on(device) == reason and why_not_on(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why_not_on(device) is None


def test_what_it_does_not_do(gpu):
    hidden, weights, _, _ = case(CUDA)

    def why_not(hidden, dtype=None):
        return head.why_not(HeadCall(hidden, weights, dtype))

    assert why_not(hidden) is None
    assert why_not(hidden.double()) == "hidden must be float32, got torch.float64"
    assert why_not(hidden, torch.float32) == "compute_dtype must be bfloat16, got torch.float32"
    wide = torch.empty(1, 1, 8).expand(2**16, 2**15, 8)
    assert why_not(wide) == "hidden may have 2^31 - 1 tokens, got 2147483648"
    assert why_no_logits(HeadCall(hidden.requires_grad_(), weights, None)) == "it has no gradients"
    assert why_not(hidden[..., :71]) == "hidden must be a multiple of 8 wide, got 71"
