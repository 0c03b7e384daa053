"""What the compiled module refuses, and how it says so."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

import loopmdm_kernels as lk
from loopmdm_kernels import _C
from loopmdm_kernels.calls import HeadCall
from loopmdm_kernels.cpu import head as cpu
from loopmdm_kernels.cpu.packing import packed_linear
from loopmdm_kernels.types import Head, RowRng, SampledRows

INPUTS = ("hidden", "rows", "norm", "shift", "gain", "weight", "bias", "normalized")
OPTIONS = ("bf16", "excluded_token", "seed", "sequence", "step", "position", "temperature", "num_threads")
ARGUMENTS = (*INPUTS, *OPTIONS, *SampledRows._fields)


def packed(weight, bf16=False):
    return packed_linear(weight, bf16=bf16)


def call(**changes):
    """Calls _C.sample_rows with B, L, D, V, R = 2, 3, 8, 10, 4 and some arguments replaced."""
    numbers = torch.zeros(4, dtype=torch.int64)
    arguments = {
        "hidden": torch.zeros(2, 3, 8),
        "norm": torch.ones(8),
        "shift": torch.zeros(1, 8),
        "gain": torch.ones(1, 8),
        "weight": packed(torch.zeros(10, 8)),
        "bias": torch.zeros(10),
        "excluded_token": -1,
        "seed": 0,
        "temperature": 1.0,
        "normalized": True,
        "bf16": False,
        "num_threads": 1,
    }
    for name in ARGUMENTS:
        if name not in arguments:
            arguments[name] = torch.zeros(4) if name.endswith(("prob", "entropy")) else numbers.clone()
    arguments.update(changes)
    _C.sample_rows(**{name: arguments[name] for name in ARGUMENTS})
    return arguments


def ints(*values):
    return torch.tensor(values)


def test_accepts_what_it_should():
    arguments = call(token=torch.full((4,), -5), log_prob=torch.full((4,), float("nan")))
    assert ((arguments["token"] >= 0) & (arguments["token"] < 10)).all()
    torch.testing.assert_close(arguments["log_prob"], torch.full((4,), -2.302585))
    call(hidden=torch.zeros(2, 3, 8, requires_grad=True))
    call(weight=packed(torch.nn.Parameter(torch.zeros(10, 8))))
    call(weight=packed(torch.zeros(10, 8, dtype=torch.bfloat16), bf16=True), bf16=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 8).double()}, TypeError, "hidden: expected dtype float32, got float64"),
        ({"hidden": None}, TypeError, "hidden: expected a torch.Tensor .* got NoneType"),
        ({"hidden": [[0.0]]}, TypeError, "hidden: expected a torch.Tensor .* got list"),
        (
            {"hidden": torch.zeros(6, 8)},
            ValueError,
            r"hidden: expected shape \[any, any, any\], got \[6, 8\]",
        ),
        ({"hidden": torch.zeros(2, 3, 0)}, ValueError, "hidden: expected a width of at least 1, got 0"),
        (
            {"hidden": torch.zeros(2, 8, 3).mT},
            ValueError,
            "hidden: expected a contiguous tensor, got strides",
        ),
        (
            {"hidden": torch.zeros(2, 3, 8, device="meta")},
            ValueError,
            "hidden: expected a .*tensor on the CPU",
        ),
        ({"weight": torch.zeros(10, 8)}, TypeError, "packed head.weight: expected dtype int32, got float32"),
        ({"weight": packed(torch.zeros(10, 7))}, ValueError, r"packed head.weight: expected shape"),
        ({"bias": torch.zeros(900)}, ValueError, r"packed head.weight: expected shape"),
        ({"bias": torch.zeros(0)}, ValueError, "head.bias: expected 1.."),
        ({"norm": torch.ones(8).bfloat16()}, TypeError, "head.norm: expected dtype float32, got bfloat16"),
        ({"shift": torch.zeros(3, 8), "gain": torch.zeros(3, 8)}, ValueError, "head.modulation: .* 1 or 2"),
        ({"rows": ints(0, 1, 2, 3).int()}, TypeError, "rows: expected dtype int64, got int32"),
        ({"rows": ints(0, 1, 2, 6)}, ValueError, "rows: expected values in 0..5, got 6 at index 3"),
        ({"rows": ints(0, -1, 2, 5)}, ValueError, "rows: expected values in 0..5, got -1 at index 1"),
        ({"rows": torch.zeros(8, dtype=torch.int64)[::2]}, ValueError, "rows: expected a contiguous tensor"),
        ({"sequence": ints(0, 0, 0)}, ValueError, r"rng.sequence: expected shape \[4\], got \[3\]"),
        ({"sequence": ints(0, 0, 0, 2**32)}, ValueError, "rng.sequence: expected values in 0..4294967295"),
        ({"step": ints(2**30, 0, 0, 0)}, ValueError, "rng.step: expected values in 0..1073741823"),
        ({"position": ints(0, -1, 0, 0)}, ValueError, "rng.position: expected values in"),
        ({"excluded_token": 10}, ValueError, "head.excluded_token: .* got 10 with 10 tokens"),
        ({"excluded_token": -2}, ValueError, "head.excluded_token: .* got -2"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a finite number >= 0, got -1"),
        ({"temperature": float("nan")}, ValueError, "temperature: .* got nan"),
        ({"temperature": float("inf")}, ValueError, "temperature: .* got inf"),
        ({"num_threads": 0}, ValueError, "num_threads: expected at least 1, got 0"),
        ({"token": torch.zeros(4)}, TypeError, "token: expected dtype int64, got float32"),
        ({"entropy": torch.zeros(5)}, ValueError, r"entropy: expected shape \[4\], got \[5\]"),
    ],
)
def test_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_the_only_token_cannot_be_excluded():
    with pytest.raises(ValueError, match="not its only one"):
        call(weight=packed(torch.zeros(1, 8)), bias=torch.zeros(1), excluded_token=0)


@pytest.mark.filterwarnings("ignore")
def test_refuses_fake_tensors():
    with FakeTensorMode():
        fake = torch.zeros(2, 3, 8)
        view = torch.zeros(3, 3, 8)[1:]  # its address is an offset, not null
    for tensor in (fake, view):
        with pytest.raises(TypeError, match=r"hidden: .* memory of its own.*FakeTensor"):
            call(hidden=tensor)


def head(dtype=torch.float32):
    return Head(torch.ones(8), torch.zeros(10, 8, dtype=dtype), torch.zeros(10), torch.zeros(1, 2, 8))


@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype", "options", "reason"),
    [
        (torch.float32, torch.float32, {}, None),
        (torch.float32, torch.bfloat16, {"compute_dtype": torch.float32}, None),
        (torch.float32, torch.float32, {"compute_dtype": torch.bfloat16}, None),
        (torch.float64, torch.float32, {}, "hidden must be float32"),
        (torch.float32, torch.float64, {}, "head.weight must be float32 or bfloat16"),
        (torch.float32, torch.float32, {"compute_dtype": torch.float64}, "compute_dtype must be"),
    ],
)
def test_says_what_it_supports(hidden_dtype, weight_dtype, options, reason):
    hidden = torch.zeros(1, 1, 8, dtype=hidden_dtype)
    answer = cpu.why_not(HeadCall(hidden, head(weight_dtype), options.get("compute_dtype")))
    assert answer is None if reason is None else reason in answer
    if reason is not None:
        zero = torch.zeros(1, dtype=torch.int64)
        rng = RowRng(0, zero, zero, zero)
        with lk.use_backend("cpu"), pytest.raises(RuntimeError, match=reason):
            lk.sample_rows(hidden, head(weight_dtype), zero, rng, **options)


def test_a_vocabulary_beyond_the_numbers_of_its_tokens_is_a_reason():
    tokens = 2**31 - 1024
    many = Head(
        torch.ones(8),
        torch.zeros(1, 8).expand(tokens, 8),
        torch.zeros(1).expand(tokens),
        torch.zeros(1, 2, 8),
    )
    reason = cpu.why_not(HeadCall(torch.zeros(1, 1, 8), many, None))
    assert reason == f"head.weight may have {tokens - 1} tokens, got {tokens}"


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("LOOPMDM_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="LOOPMDM_CPU_ISA: got 'sse9'; this machine accepts: generic"):
        call()


def test_instruction_set_from_the_environment():
    for isa in _C.usable_cpu_isas().split(", "):
        code = "from loopmdm_kernels import _C; print(_C.cpu_isa())"
        environment = {**os.environ, "LOOPMDM_CPU_ISA": isa}
        out = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert out.stdout.strip() == isa
