"""Steps in compiled code: the bits of steps in Python, and only where nobody has to be asked in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm import ComputePlan, LoopMDM, sample
from loopmdm.sampling import SampleResult, StepEvent, fused
from loopmdm_kernels import _C
from loopmdm_kernels.cpu import sample_rows as cpu_sample_rows
from loopmdm_kernels.cpu.decoding import Steps
from loopmdm_kernels.cpu.packing import quantized_head
from tests.sampling.conftest import random_model

ADAPTIVE = ComputePlan.adaptive(0.4, 4)
MASK = 11  # of `random_model`
FUSED: list[dict[str, Any]] = [
    {"order": "ancestral"},
    {"order": "ancestral", "steps": 40, "plan": ComputePlan.parse("L10,H20,L10", light=1, heavy=3)},
    {"order": "ancestral", "block_length": 6, "steps": 16},
    {"order": "first_hitting", "tokens_per_step": 3},
    {"order": "confidence", "plan": ADAPTIVE, "history": False},
    {"order": "confidence", "steps": 5, "plan": ComputePlan.adaptive(0.3, 4, 2)},
    {"order": "confidence", "temperature": 0.0, "max_batch": 2},
    {"order": "margin", "block_length": 5, "tokens_per_step": 2},
    {"order": "entropy", "steps": 7, "counts": "llada", "forbidden": [2, 5]},
    {"order": "entropy", "threshold": 1.2},
    {"order": "margin", "entropy_bound": 1.5, "window": 4, "plan": ADAPTIVE},
    {"order": "confidence", "threshold": 0.3, "block_length": 7, "sequence_ids": [5, 0, 9, 2**32 - 1]},
    {"order": "random", "tokens_per_step": 2, "window": 5},
    {"order": "random"},
    {"order": "left_to_right", "threshold": 0.2, "temperature": 0.7},
    {"order": "left_to_right", "steps": 3, "dtype": torch.bfloat16},
]
ASKED: list[dict[str, Any]] = [
    {"order": "ancestral", "remask": "cap", "steps": 16},
    {"order": "ancestral", "reference_numerics": True, "steps": 4},
    {"order": "random", "eos_token_id": 4},
    {"order": "random", "top_k": 3},
    {"order": "random", "skip_unchanged": False},
    {"order": "confidence", "plan": ComputePlan.adaptive(0.02, 4, criterion="output")},
    {"order": "confidence", "plan": ComputePlan.by_mask_ratio([1, 3])},
    {"order": "first_hitting", "plan": ComputePlan.parse("L4,H4", light=1, heavy=2)},
    {"order": "random", "infill": [[MASK] * 3, [MASK] * 5]},
    {"order": "random", "infill": [[MASK] * 30], "block_length": 4},
]
MODELS = {
    "fp32": random_model(),
    "bf16": random_model().bfloat16(),
    "learned": random_model(positions="learned"),
    "learned bf16": random_model(positions="learned").bfloat16(),
    "no blocks outside": random_model(loop_start=0, loop_end=4),
}


def half_filled() -> torch.Tensor:
    tokens = torch.randint(0, MASK, (4, 18), generator=torch.Generator().manual_seed(1))
    return tokens.masked_fill(torch.rand(4, 18, generator=torch.Generator().manual_seed(2)) < 0.6, MASK)


def run(model: Any, **options: Any) -> SampleResult:
    return sample(model, **{"infill": half_filled(), "seed": 4, "plan": 2, "history": True, **options})


def assert_same(got: SampleResult, expected: SampleResult) -> None:
    for field in ("tokens", "lengths", "network_calls", "loops"):
        assert torch.equal(getattr(got, field), getattr(expected, field)), field
    for name in ("rows_projected", "num_steps", "exact", "ledger", "backends"):
        assert getattr(got, name) == getattr(expected, name), name
    assert_same_events(got.history or [], expected.history or [])


def assert_same_events(got: list[StepEvent], expected: list[StepEvent]) -> None:
    assert [event.step for event in got] == [event.step for event in expected]
    for one, other in zip(got, expected, strict=True):
        for field in StepEvent._fields[1:]:
            assert torch.equal(getattr(one, field), getattr(other, field)), field


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps of each call of compiled code."""
    counts: list[int] = []
    take = Steps.take

    def counted(self: Steps, *arguments: Any) -> Any:
        done = take(self, *arguments)
        counts.append(done.steps)
        return done

    monkeypatch.setattr(Steps, "take", counted)
    return counts


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SampleResult]:
    def run_in_python(*arguments: Any, **options: Any) -> SampleResult:
        with monkeypatch.context() as patch:
            patch.setattr(fused, "_can_fuse", lambda *_: False)
            return run(*arguments, **options)

    return run_in_python


@pytest.mark.parametrize("options", FUSED, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_the_bits_are_those_of_steps_in_python(kind, options, taken, in_python):
    expected = in_python(MODELS[kind], **options)
    assert not taken
    assert_same(run(MODELS[kind], **options), expected)
    assert sum(taken) > 0


@pytest.fixture
def bytes_made(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The weights of which steps in compiled code ask for a copy in bytes, however small they are."""
    weights: list[torch.Tensor] = []

    def counted(weight: torch.Tensor, **options: Any) -> torch.Tensor:
        weights.append(weight)
        return quantized_head(weight, **options)

    monkeypatch.setattr(cpu_sample_rows, "_LEAST_QUANTIZED", 1)
    monkeypatch.setattr("loopmdm_kernels.cpu.sample_rows.quantized_head", counted)
    return weights


@pytest.mark.parametrize("options", FUSED, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_tokens_alone_where_nothing_else_is_asked(kind, options, bytes_made, in_python):
    """An order that rates nothing needs no probabilities, unless the run is watched."""
    options = {**options, "history": False}
    assert_same(run(MODELS[kind], **options), in_python(MODELS[kind], **options))
    rated = options["order"] in ("confidence", "margin", "entropy") or "threshold" in options
    assert len(bytes_made) == (0 if rated else 1)


def test_a_watched_run_has_probabilities(bytes_made):
    events: list[StepEvent] = []
    run(MODELS["fp32"], order="random", history=False, on_step=events.append)
    assert not bytes_made and all(bool((event.confidence < 1).all()) for event in events)


@pytest.mark.parametrize("isa", _C.usable_cpu_isas().split(", "))
def test_on_every_instruction_set(isa, taken, in_python, monkeypatch):
    monkeypatch.setenv("LOOPMDM_CPU_ISA", isa)
    options = {"order": "confidence", "plan": ADAPTIVE}
    for kind in ("fp32", "learned bf16"):
        assert_same(run(MODELS[kind], **options), in_python(MODELS[kind], **options))
    assert taken


@pytest.mark.parametrize("options", ASKED, ids=str)
def test_options_that_need_python_between_two_steps(options, taken):
    out = run(MODELS["fp32"], **options)
    assert not taken
    assert not (out.tokens == MASK).any()


def test_other_models_and_backends(make_fixed, taken, in_python):
    sample(make_fixed(torch.zeros(6, 4)), 2, order="random")
    run(random_model(time_conditioning=True))
    run(random_model().double())
    model = MODELS["fp32"]
    run(model, plan=ComputePlan.parse("L9,H9", random_model(), 2), steps=18)
    with lk.use_backend("reference"):
        assert set(run(model).backends["looped_blocks"]) == {"reference"}
    assert not taken
    run(model)
    assert taken


def test_short_slices_are_the_same_run(monkeypatch, taken):
    whole = run(MODELS["fp32"], order="entropy")
    assert len(taken) == 1
    monkeypatch.setattr(fused, "_SLICE", 0.0)
    assert_same(run(MODELS["fp32"], order="entropy"), whole)
    assert taken[1:] == [1] * whole.num_steps


def test_on_step_sees_every_step_when_it_is_taken(taken):
    seen: list[StepEvent] = []
    out = run(MODELS["fp32"], order="confidence", on_step=seen.append)
    assert_same_events(seen, out.history)
    assert taken == [1] * out.num_steps

    class Enough(Exception):
        pass

    def stop(event: StepEvent) -> None:
        raise Enough

    with pytest.raises(Enough):
        run(MODELS["fp32"], on_step=stop)
    assert len(taken) == out.num_steps + 1


WATCHED = ("blocks.1", "blocks.2.mlp.0", "blocks.3.norm2", "output_layer.linear", "vocab_embed")


@pytest.mark.parametrize("path", WATCHED)
@pytest.mark.filterwarnings("ignore:LoopMDM. modules that are watched:UserWarning")
def test_hooks_are_called(path, taken):
    model = random_model()
    expected = run(model, order="confidence").tokens
    taken.clear()
    calls: list[int] = []
    handle = model.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(run(model, order="confidence").tokens, expected)
    assert calls
    assert not taken
    handle.remove()
    run(model)
    assert taken


@pytest.mark.filterwarnings("ignore:LoopMDM. modules that are watched:UserWarning")
def test_a_hook_that_comes_and_goes_between_two_steps(taken):
    model, calls, handles = random_model(), [], []

    def on_step(event: StepEvent) -> None:
        if event.step == 2:
            handles.append(model.blocks[0].register_forward_hook(lambda *_: calls.append(1)))
        if event.step == 5:
            handles.pop().remove()

    expected = run(model, order="confidence")
    taken.clear()
    assert torch.equal(run(model, order="confidence", on_step=on_step).tokens, expected.tokens)
    assert len(calls) == 3  # of steps 3, 4 and 5
    assert sum(taken) == expected.num_steps - 3


def test_a_replaced_method_is_asked(taken):
    model, calls = random_model(), []
    hidden = model.hidden
    model.hidden = lambda *a, **k: calls.append(1) or hidden(*a, **k)
    run(model)
    assert calls

    class Other(LoopMDM):
        def head(self, sigma: Any = None) -> Any:
            calls.append(2)
            return super().head(sigma)

    other = Other(model.config)
    run(other)
    assert calls[-1] == 2
    assert not taken


@pytest.mark.parametrize("history", [True, False])
def test_weights_that_are_not_finite(in_python, bytes_made, history):
    model = random_model()
    model.output_layer.linear.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match="not finite") as expected:
        in_python(model, history=history)
    with pytest.raises(ValueError, match="not finite") as got:
        run(model, history=history)
    assert len(bytes_made) == (0 if history else 1)
    assert str(got.value) == str(expected.value)
    assert type(got.value) is type(expected.value)


def test_weights_may_change_between_runs():
    model = random_model()
    before = run(model).tokens
    model.blocks[1].mlp[0].weight.data.mul_(-1)
    model.vocab_embed.embedding.data.mul_(-1)
    after = run(model).tokens
    assert not torch.equal(before, after)
