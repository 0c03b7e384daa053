"""Every public op against float64: values, gradients, views, batches, instruction sets; and bad arguments.

A case is one random call. The reference in float64 gives its results and gradients, and plain PyTorch in the
dtype of the data says what rounding costs. Then the op is called in ways that may not matter: on each
instruction set, with and without gradients, twice, with other memory behind its tensors, on part of a batch.
Each of these calls is counted, and each is compared: with float64 by the tolerance rule, or with the first
call on the same instruction set bit by bit.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

import loopmdm_kernels as lk
from loopmdm_kernels.testing.tolerance import errors_that_count, luck_factor, max_error, rounding_step
from tests.fuzz import op_draws, op_faults
from tests.fuzz.harness import Wrong, main
from tests.fuzz.op_inputs import OPS, Draw, Problem, disguised

# The rule of `assert_matches_oracle` is made to hold by chance all but once in ten thousand comparisons. Here
# are millions: a result beyond it is wrong if it is far beyond, or if it is so again with other values.
_FAR = 8.0
_AGAIN, _TRIES, _RUNS = 6, 24, 8


def case(seed: int) -> Counter[str]:
    """One random call in all ways, or one of extreme values or bad arguments."""
    draw = Draw(seed)
    kind = draw.random.random()
    name = draw.one(*OPS)
    if kind < 0.08:
        return op_faults.bad_arguments(OPS[name].make(draw), draw)
    if kind < 0.12:
        return op_faults.extreme_values(draw)
    if kind < 0.16:
        return op_faults.not_numbers(OPS[name].make(draw), draw)
    problem = OPS[name].make(draw)
    try:
        return _check(problem, draw, seed)
    except Wrong as wrong:
        raise Wrong(f"{wrong}\n{problem.describe()}") from None


class Expected(NamedTuple):
    """What a result times `scale`, a power of two, may differ from."""

    oracle: Tensor
    allowed: float
    scale: float


def results(problem: Problem, wanted: tuple[str, ...], noise: float = 0.0) -> dict[str, Tensor]:
    """What the op returns, and the gradients of `wanted` leaves of a random sum of it.

    noise: how far, relative, the weights of the sum may be off.
    """
    if not wanted:
        with torch.no_grad():
            return OPS[problem.op].call(problem)
    leaves = {name: leaf.detach().requires_grad_(name in wanted) for name, leaf in problem.leaves.items()}
    out = OPS[problem.op].call(problem._replace(leaves=leaves))
    generator = torch.Generator().manual_seed(7)
    sums = {name: value for name, value in out.items() if value.requires_grad}
    # bf16 values, so that the same upstream gradient exists in every dtype
    upstream = [torch.randn(v.shape, generator=generator).bfloat16().to(v.dtype) for v in sums.values()]
    upstream = (
        [value * (1 + noise * (2 * torch.rand_like(value) - 1)) for value in upstream] if noise else upstream
    )
    grads = torch.autograd.grad(
        list(sums.values()), [leaves[name] for name in wanted], upstream, allow_unused=True
    )
    out = {name: value.detach() for name, value in out.items()}
    for name, grad in zip(wanted, grads, strict=True):
        out[f"gradient of {name}"] = torch.zeros_like(leaves[name]) if grad is None else grad
    return out


def in_float64(problem: Problem, noise: dict[str, float] | None = None) -> Problem:
    """The call in float64, each number of a leaf off by up to its `noise`, relative."""

    def wide(name: str, leaf: Tensor) -> Tensor:
        value = leaf.double()
        return value if noise is None else value * (1 + noise[name] * (2 * torch.rand_like(value) - 1))

    given = dict(problem.given)
    if "compute_dtype" in given:
        given["compute_dtype"] = None
    for name in ("cos", "sin"):
        if given.get(name) is not None:
            given[name] = given[name].double()
    leaves = {name: wide(name, leaf) for name, leaf in problem.leaves.items()}
    return problem._replace(leaves=leaves, given=given)


def expected(problem: Problem, wanted: tuple[str, ...], runs: int = 1) -> dict[str, Expected]:
    """The oracle, and how far a result may be from it.

    That is what the tolerance rule allows, and twice what comes of operands off by one rounding (the most of
    `runs`): the rule measures rounding by one run of plain PyTorch, which in a small problem may have none.
    """
    units = {name: _unit(problem, name) for name in problem.leaves}
    with lk.use_backend("reference"):
        exact = results(in_float64(problem), wanted)
        plain = results(problem, wanted)
        torch.manual_seed(0)
        noise = max(units.values())
        moved = [results(in_float64(problem, units), wanted, noise) for _ in range(runs)]
    floors = _floors(problem, exact)
    return {
        name: _bound(exact[name], plain[name], [run[name] for run in moved], floors.get(name, 0.0))
        for name in exact
    }


def _floors(problem: Problem, exact: dict[str, Tensor]) -> dict[str, float]:
    """What cancellation leaves where what is added up is larger than the sum: of the gradients of q and k,
    which are 0 where there is one key; of the loss's, whose gradients of the logits are rounded once and may
    add up to 0 over tokens that are alike; and of a norm's input, which are 0 where two numbers are
    normalised."""
    if problem.op == "masked_cross_entropy":
        return _floors_of_the_loss(problem, exact)
    if problem.op == "head_logits":
        most = float(problem.leaves["weight"].double().square().sum(0).max().sqrt())
        return {"gradient of hidden": 2.0**-22 * most * _head_sizes(problem)["hidden"]}
    if problem.op != "attention":
        return {}
    q, k, v = (float(leaf.abs().max()) for leaf in problem.leaves.values())
    sums = 2.0**-20 * v * problem.leaves["q"].shape[-1] ** 0.5
    return {"gradient of q": sums * k, "gradient of k": sums * q}


def _floors_of_the_loss(problem: Problem, exact: dict[str, Tensor]) -> dict[str, float]:
    nll = exact["nll"].double()
    rows = problem.given.get("rows")
    weights = (
        problem.leaves.get("row_weights", torch.ones_like(nll)).double().abs() + 1
    )  # of total, and of nll
    if rows is not None and rows.dtype != torch.bool:  # a row that comes again is rounded the same
        weights = weights.new_zeros(problem.leaves["hidden"].shape[:2].numel()).index_add(0, rows, weights)
    # Roundings of different rows are independent: they add up as squares do.
    left = _unit(problem, "weight") * float(weights.square().sum()) ** 0.5
    sizes = _head_sizes(problem)
    largest = float(problem.leaves["weight"].abs().max())  # of what leads from logits to h
    sizes |= {name: largest * sizes[name] for name in ("hidden", "norm", "modulation")} | {"bias": 1.0}
    return {f"gradient of {name}": left * size for name, size in sizes.items()}


def _head_sizes(problem: Problem) -> dict[str, float]:
    """By what a gradient at the operand h = norm(hidden) (1 + scale) + shift of the head's product comes
    multiplied to the leaves behind it, at most; and of the weight, the largest number of h."""
    hidden = problem.leaves["hidden"].double()
    one = torch.ones(1, 2, 1, dtype=hidden.dtype)
    norm = float(problem.leaves.get("norm", one).abs().max())
    shift, scale = problem.leaves.get("modulation", one - 1).double().unbind(1)
    steepest, size = 1.0, float(hidden.abs().max())
    if "norm" in problem.leaves:
        centred = hidden - hidden.mean(dim=-1, keepdim=True)
        inverse = (centred.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt()
        steepest, size = float(inverse.max()), float((centred * inverse).abs().max())
    scaled = float((1 + scale).abs().max())
    return {
        "hidden": steepest * norm * scaled,
        "norm": size * scaled,
        "modulation": max(1.0, size * norm),
        "weight": size * norm * scaled + float(shift.abs().max()),
    }


def _unit(problem: Problem, name: str) -> float:
    """Half a rounding step of a leaf, relative: that of the products, or of the stream."""
    kinds = [problem.leaves[name].dtype]
    if name not in ("x", "row_weights") and problem.op != "attention":
        first = next(leaf for key, leaf in problem.leaves.items() if key.endswith(("weight", "qkv")))
        kinds.append(problem.given.get("compute_dtype") or first.dtype)
    return max(torch.finfo(kind).eps for kind in kinds) / 2


def _bound(oracle: Tensor, plain: Tensor, moved: list[Tensor], floor: float) -> Expected:
    if not oracle.is_floating_point() or not oracle.numel():
        return Expected(oracle, 0.0, 1.0)
    # The rule is by absolute rounding steps: results are brought to order one.
    size = float(oracle.abs().max())
    scale = 2.0 ** -torch.frexp(torch.tensor(size, dtype=torch.float64)).exponent.item() if size else 1.0
    oracle = oracle * scale
    count = min(errors_that_count(oracle), oracle.unique().numel())  # rows may repeat
    change = max(max_error(value * scale, oracle) for value in moved)
    error = max_error(plain.double() * scale, oracle)
    # The step is measured on the values, of which a few may happen to lose nothing.
    step = max(rounding_step(oracle, plain.dtype), torch.finfo(plain.dtype).eps)
    allowed = max(2.0, luck_factor(count)) * error + step + 2 * change
    return Expected(oracle, allowed + floor * scale, scale)


def excess(out: dict[str, Tensor], bounds: dict[str, Expected]) -> tuple[float, str]:
    """The largest error over what is allowed, and where. Infinite for NaN and for a wrong integer."""
    worst, where = 0.0, ""
    for name, (oracle, allowed, scale) in bounds.items():
        value = out[name]
        if value.shape != oracle.shape:
            return float("inf"), f"{name}: shape {list(value.shape)}, expected {list(oracle.shape)}"
        if not value.numel():
            continue
        error = float((value.double() * scale - oracle).abs().max())
        ratio = 0.0 if error <= allowed else error / allowed if allowed else float("inf")
        ratio = float("inf") if error != error else ratio
        if ratio > worst:
            worst, where = ratio, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
    return worst, where


@contextmanager
def instruction_set(name: str | None) -> Iterator[None]:
    """Makes the CPU kernels use one; None leaves the choice to them."""
    before = os.environ.get("LOOPMDM_CPU_ISA")
    if name is not None:
        os.environ["LOOPMDM_CPU_ISA"] = name
    try:
        yield
    finally:
        os.environ.pop("LOOPMDM_CPU_ISA", None)
        if before is not None:
            os.environ["LOOPMDM_CPU_ISA"] = before


@cache
def instruction_sets() -> tuple[str | None, ...]:
    from loopmdm_kernels import _C

    return tuple(_C.usable_cpu_isas().split(", "))


def on_kernels(problem: Problem) -> bool:
    """Whether the call runs on the CPU kernels, which have several instruction sets."""
    kinds = [leaf.dtype for leaf in problem.leaves.values()] + [problem.given.get("compute_dtype")]
    return not {torch.float16, torch.float64} & set(kinds)


def same(first: dict[str, Tensor], second: dict[str, Tensor], what: str) -> None:
    for name, value in second.items():
        if value.dtype != first[name].dtype or not torch.equal(value, first[name]):
            raise Wrong(f"{what}: {name} differs from the first call's")


def _check(problem: Problem, draw: Draw, seed: int) -> Counter[str]:
    draws = problem.op == "sample_rows"
    names = tuple(problem.leaves)
    wanted = () if draws else names if draw.chance(0.7) else tuple(draw.random.sample(names, 1))
    calls = 0
    if not on_kernels(problem):
        return Counter({f"{problem.op} calls": _check_reference(problem, wanted, draw, seed)})
    settled = not draws and _far_from_threshold(problem)
    bounds = expected(problem, wanted) if settled else {}
    for isa in instruction_sets():
        with instruction_set(isa):
            first = results(problem, ())
            if draws:
                op_draws.check(problem, first)
            elif settled:
                _judge(first, bounds, problem, (), seed, isa)
            same(first, results(problem, ()), f"{isa}: the same call again")
            for _ in range(2):
                same(first, results(disguised(problem, draw), ()), f"{isa}: other memory")
            calls += 4
            if wanted and settled:
                both = results(problem, wanted)
                _judge(both, bounds, problem, wanted, seed, isa)
                same(both, results(disguised(problem, draw), wanted), f"{isa}: other memory, with gradients")
                calls += 2
            part = OPS[problem.op].part(problem, draw)
            if part is not None:
                smaller, pick = part
                picked = {name: pick(name, value) for name, value in first.items()}
                parts = {name: value for name, value in picked.items() if value is not None}
                same(results(smaller, ()), parts, f"{isa}: part of the batch, {smaller.describe()}")
                calls += 1
    return Counter({f"{problem.op} calls": calls})


def _check_reference(problem: Problem, wanted: tuple[str, ...], draw: Draw, seed: int) -> int:
    """What no kernel takes goes to plain PyTorch, which promises no bits."""
    if problem.op == "sample_rows":
        op_draws.check(problem, results(disguised(problem, draw), ()))
    elif _far_from_threshold(problem):
        bounds = expected(problem, wanted)
        _judge(results(disguised(problem, draw), wanted), bounds, problem, wanted, seed, None)
    return 1


def _judge(
    out: dict[str, Tensor],
    bounds: dict[str, Expected],
    problem: Problem,
    wanted: tuple[str, ...],
    seed: int,
    isa: str | None,
) -> None:
    ratio, where = excess(out, {name: bound for name, bound in bounds.items() if name in out})
    if ratio <= 1:
        return
    again = 0
    if ratio <= _FAR:
        many = expected(problem, wanted, _RUNS)
        ratio, where = excess(out, {name: bound for name, bound in many.items() if name in out})
    if 1 < ratio <= _FAR:
        for other in range(_TRIES):
            draw = Draw(seed)
            draw.random.random()
            draw.one(*OPS)
            draw.generator = torch.Generator().manual_seed(other)
            fresh = OPS[problem.op].make(draw)
            bounds = expected(fresh, wanted, _RUNS)
            out = results(fresh, wanted)
            again += excess(out, {name: bound for name, bound in bounds.items() if name in out})[0] > 1
    if ratio > _FAR or again >= _AGAIN:
        raise Wrong(f"{isa}: {where} ({ratio:.1f} times it; {again} of {_TRIES} with other values)")


def _far_from_threshold(problem: Problem) -> bool:
    """Whether rounding cannot change after which loop a sequence stops: all else is the same or it is not."""
    threshold = problem.given.get("exit_threshold")
    if threshold is None or threshold in (0.0, float("inf")):
        return True
    wide = in_float64(problem)
    with lk.use_backend("reference"):
        used = []
        for factor in (0.9, 1.1):
            given = {**wide.given, "exit_threshold": threshold * factor}
            used.append(results(wide._replace(given=given), ())["used"])
    return torch.equal(*used)


if __name__ == "__main__":
    raise SystemExit(main("ops", case, __doc__))
