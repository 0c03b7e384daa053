"""Traces: that they foretell what evaluation, exit rules and sampling do."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from loopmdm import sample
from loopmdm.data.batches import Batch
from loopmdm.data.sudoku import SIX
from loopmdm.exits import ArgmaxStable, ExitGate, ExitRule, HiddenChange, OutputChange
from loopmdm.model import LoopMDM
from loopmdm.plan import ComputePlan
from loopmdm.quality.likelihood import evaluate_nll
from loopmdm.runs.boards import held_out_puzzles
from loopmdm.runs.models import load_model
from loopmdm.solve import solve_puzzles
from loopmdm.study.adaptive.policies import (
    call_flops,
    fixed_stops,
    mixed_fixed,
    outcome,
    rule_stops,
    table_stops,
)
from loopmdm.study.kit.inputs import stratified
from loopmdm.study.kit.traces import Trace, left_to_right_trace, text_trace

Build = Callable[..., LoopMDM]
MakeRule = Callable[[Trace], ExitRule]


def middle(array: np.ndarray) -> float:
    """A threshold between the values of the states after the third loop."""
    return float(np.quantile(array[:, :, 2], 0.63))


RULES: dict[str, MakeRule] = {
    "hidden": lambda trace: HiddenChange(middle(trace.hidden_change)),
    "output": lambda trace: OutputChange(middle(trace.output_change)),
    "argmax": lambda trace: ArgmaxStable(1),
    "argmax, patience 2": lambda trace: ArgmaxStable(2),
    "gate": lambda trace: ExitGate((0.3, 0.2, -2.0), 2 * np.log(middle(trace.hidden_change)) - 0.4),
}


@pytest.fixture(scope="module")
def sudoku() -> tuple[LoopMDM, np.ndarray, np.ndarray, Trace]:
    """The shipped model, 8 puzzles with their solutions, and the trace of 8 loops."""
    model = load_model("sudoku6", torch.device("cpu"))
    puzzles = held_out_puzzles(SIX, 8)
    return (
        model,
        puzzles.clues,
        puzzles.solutions,
        left_to_right_trace(model, puzzles.clues, puzzles.solutions, 8),
    )


def text_batch(prompt: bool = False) -> Batch:
    tokens = torch.randint(0, 6, (5, 16), generator=torch.Generator().manual_seed(1))
    prompt_mask = torch.zeros(5, 16, dtype=torch.bool)
    prompt_mask[:, :3] = True
    return Batch(tokens, prompt_mask=prompt_mask if prompt else None)


@pytest.mark.parametrize("prompt", [False, True])
def test_the_losses_of_a_text_add_up_to_its_nelbo(make: Build, prompt: bool) -> None:
    model, batch = make(0), text_batch(prompt)
    trace = text_trace(model, batch, 4, 7, 0, 3)
    for result in evaluate_nll(model, [batch], num_loops=[1, 2, 3], num_t=4, seed=7):
        losses = outcome(trace, fixed_stops(trace, result.num_loops)).loss
        assert losses.mean() == pytest.approx(result.nll, rel=1e-5)
    assert (np.diff(trace.place, axis=1) > 0).all() and np.isnan(trace.right).all()


@pytest.mark.parametrize("name", RULES)
def test_a_rule_stops_where_the_model_stops_by_it(make: Build, name: str) -> None:
    model, batch = make(1), text_batch()
    trace = text_trace(model, batch, 4, 0, 0, 6)
    rule = RULES[name](trace)
    stops = rule_stops(trace, rule, 5)
    for j, noisy in enumerate(stratified(batch, 4, 0, 0)[::-1]):
        tokens = torch.where(noisy.masked, 6, noisy.clean)
        _, used = model.hidden(tokens, num_loops=5, exit=rule)
        assert used.tolist() == stops[:, j].tolist()
    assert len(np.unique(stops)) > 1


@pytest.mark.parametrize("loops", [1, 3, 6])
def test_the_trace_of_a_puzzle_foretells_whether_it_is_solved(
    sudoku: tuple[LoopMDM, np.ndarray, np.ndarray, Trace], loops: int
) -> None:
    model, clues, _, trace = sudoku
    found = outcome(trace, fixed_stops(trace, loops))
    result = solve_puzzles(model, clues, SIX, num_loops=loops, order="left_to_right")
    assert found.solved.tolist() == result.solved.tolist()
    assert found.loops.sum() == result.loops.sum()


def test_the_trace_foretells_a_table_and_a_rule(
    sudoku: tuple[LoopMDM, np.ndarray, np.ndarray, Trace],
) -> None:
    model, clues, solutions, trace = sudoku
    table = [8, 6, 5, 3, 2, 2, 1, 1]
    stops = table_stops(trace, table)
    result = solve_puzzles(
        model, clues, SIX, num_loops=ComputePlan.by_mask_ratio(table), order="left_to_right"
    )
    found = outcome(trace, stops)
    assert found.solved.tolist() == result.solved.tolist()
    assert found.solved.sum() > 0 and found.loops.tolist() == result.loops.tolist()

    rule = HiddenChange(0.15)
    stops = rule_stops(trace, rule, 8)
    given = torch.from_numpy(clues != 0)
    infill = torch.where(given, torch.from_numpy(solutions).long() - 1, 6)
    plan = ComputePlan.adaptive(criterion=rule, max_loops=8)
    run = sample(model, infill=infill, order="left_to_right", plan=plan, temperature=0.0, progress=False)
    solved = outcome(trace, stops).solved == 1
    # A board that goes wrong leaves the way to the solution, and with it the trace.
    assert (run.loops.numpy()[solved] == outcome(trace, stops).loops[solved]).all()


def test_what_a_call_costs_is_what_the_ledger_of_a_run_counts(
    sudoku: tuple[LoopMDM, np.ndarray, np.ndarray, Trace],
) -> None:
    """Of boards that are solved; the ledger also counts the one row that is drawn from each call."""
    model, clues, solutions, trace = sudoku
    for rule in (None, HiddenChange(0.15), OutputChange(0.01), ArgmaxStable(2)):
        stops = fixed_stops(trace, 7) if rule is None else rule_stops(trace, rule, 7)
        right = outcome(trace, stops).solved == 1
        assert right.any()
        infill = torch.where(torch.from_numpy(clues != 0), torch.from_numpy(solutions).long() - 1, 6)[right]
        plan = ComputePlan.constant(7) if rule is None else ComputePlan.adaptive(criterion=rule, max_loops=7)
        run = sample(model, infill=infill, order="left_to_right", plan=plan, temperature=0.0, progress=False)
        calls = int(trace[right].there.sum())
        drawn = calls * 2 * model.config.hidden_size * model.config.vocab_size
        expected = calls * call_flops(trace[right], stops[right], rule, 7, model.config, 36) + drawn
        assert run.ledger.flops("blocks+head") == pytest.approx(expected, rel=1e-9)


def test_a_trace_survives_storage_and_joins_with_shorter_ones(
    sudoku: tuple[LoopMDM, np.ndarray, np.ndarray, Trace],
) -> None:
    trace = sudoku[3]
    few = trace[:3]
    joined = Trace.joined([json.loads(json.dumps(part.to_dict())) for part in (few, trace[3:])])
    assert joined.max_loops == 8 and (joined.there == trace.there).all()
    np.testing.assert_allclose(joined.loss, trace.loss, rtol=1e-5, atol=1e-12)
    np.testing.assert_array_equal(joined.right, trace.right)
    shorter = Trace(*(getattr(few, name)[:, :5] for name in few.__dataclass_fields__))
    padded = Trace.joined([shorter.to_dict(), trace.to_dict()])
    assert padded.there[:3].sum(1).tolist() == [5, 5, 5]
    assert outcome(padded, fixed_stops(padded, 2)).loops[:3].tolist() == [10, 10, 10]


def test_mixtures_of_fixed_loops_meet_them_at_whole_numbers(
    sudoku: tuple[LoopMDM, np.ndarray, np.ndarray, Trace],
) -> None:
    trace = sudoku[3]
    for loops in (1, 3, 8):
        mixed, fixed = mixed_fixed(trace, float(loops)), outcome(trace, fixed_stops(trace, loops))
        np.testing.assert_allclose(mixed.loss, fixed.loss)
        np.testing.assert_allclose(mixed.solved, fixed.solved)
    between = mixed_fixed(trace, 3.25)
    assert between.loops.sum() / between.states.sum() == pytest.approx(3.25)


def test_bad_input(sudoku: tuple[LoopMDM, np.ndarray, np.ndarray, Trace]) -> None:
    trace = sudoku[3]
    with pytest.raises(ValueError, match=r"num_loops must be in 1\.\.8, the loops of the trace, got 9"):
        fixed_stops(trace, 9)
    with pytest.raises(ValueError, match=r"loops must be a list of 1\.\.8, got \[3, 0\]"):
        table_stops(trace, [3, 0])
    with pytest.raises(ValueError, match=r"max_loops must be in 1\.\.8"):
        rule_stops(trace, HiddenChange(0.1), 0)
    with pytest.raises(TypeError, match="a trace does not hold what hidden"):
        rule_stops(trace, HiddenChange(0.1, norm="tokens"), 4)
