"""The calls that `qualify` makes: for each op usual ones and edges, in float64, to be rounded to a dtype.

Widths are those that every kernel takes; no number of tokens is a multiple of a tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import loopmdm_kernels as lk
from loopmdm_kernels.calls import Draw, SampleCall
from loopmdm_kernels.philox import race_times
from loopmdm_kernels.reference.head_logits import row_logits, subs_log_probs
from loopmdm_kernels.testing.cross_entropy import LEAVES, cross_entropy_inputs, cross_entropy_results
from loopmdm_kernels.testing.generators import LoopedInputs, head_inputs, looped_inputs
from loopmdm_kernels.testing.head_gradients import head_gradients
from loopmdm_kernels.testing.tolerance import assert_matches_oracle, luck_factor
from loopmdm_kernels.types import Head, RowRng, SampledRows

Results = dict[str, Tensor]
Prepare = Callable[[torch.dtype], Callable[[], Results]]
DOUBLE = torch.float64
WIDTH, HEADS = 128, 2
VOCABULARY = 515


class Case(NamedTuple):
    """prepare(kind): the call with inputs of this dtype, as a function without arguments.

    judge(out, plain, exact): compares results with those of plain PyTorch in the dtype and in float64.
    same_bits: whether the call promises the same bits every time.
    """

    name: str
    prepare: Prepare
    judge: Callable[[Results, Results, Results], None]
    same_bits: bool = True


def cases(op: str, direction: str, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """The first is a usual call; the others are edges."""
    makers = {
        "attention": _attention,
        "head_logits": _head_logits,
        "looped_blocks": _looped_blocks,
        "masked_cross_entropy": _cross_entropy,
        "sample_rows": _sample_rows,
    }
    return makers[op](direction == "gradients", dtype, device)


def by_the_rule(out: Results, plain: Results, exact: Results, *, factor: float = 2.0) -> None:
    """Every result by the tolerance rule; whole numbers are equal."""
    for name, value in out.items():
        if not value.is_floating_point():
            if not torch.equal(value, exact[name]):
                raise AssertionError(f"{name}: got {value.tolist()}, expected {exact[name].tolist()}")
            continue
        if value.dtype != plain[name].dtype:
            raise AssertionError(f"{name}: got {value.dtype}, expected {plain[name].dtype}")
        assert_matches_oracle(value, plain[name], exact[name], name=name, factor=factor)


def _head(tensors: Sequence[Tensor], excluded_token: int = -1) -> Head:
    norm, weight, bias, modulation = tensors
    return Head(norm, weight, bias, modulation, excluded_token)


def _parts(number: int, at_once: int | None) -> Iterator[slice]:
    """Rows that each call takes: calls of one row are judged together, where one alone would be by chance."""
    step = at_once or number
    return (slice(first, first + step) for first in range(0, number, step))


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def _attention(gradients: bool, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    def case(name: str, batch: int, length: int, **given: bool) -> Case:
        inputs = looped_inputs(batch, length, WIDTH, HEADS, 1, key_mask=given.get("masked", False))
        mask = None if inputs.key_mask is None else inputs.key_mask.to(device)
        shape = batch, HEADS, length, WIDTH // HEADS
        rounded = [_normal(*shape, seed=seed).to(device, dtype) for seed in range(4)]

        def prepare(kind: torch.dtype) -> Callable[[], Results]:
            *leaves, grad = (t.to(kind) for t in rounded)
            angles = inputs.to(kind, device=device).rotary if given.get("rotary") else None

            def call() -> Results:
                q, k, v = (leaf.detach().requires_grad_(gradients) for leaf in leaves)
                out = lk.attention(q, k, v, key_mask=mask, rotary=angles)
                if not gradients:
                    return {"out": out}
                found = torch.autograd.grad(out, (q, k, v), grad)
                return {"out": out.detach(), **dict(zip("qkv", found, strict=True))}

            return call

        # Numbers of a query share the errors of its scores: chance counts queries.
        factor = luck_factor(batch * HEADS * length) if device.type == "cpu" else 2.0
        return Case(name, prepare, partial(by_the_rule, factor=factor))

    yield case("37 tokens, angles", 2, 37, rotary=True)
    yield case("150 tokens", 1, 150)
    yield case("masked keys", 2, 70, masked=True, rotary=True)
    if not gradients:  # gradients of the one score are 0, and what is left of them is chance
        yield case("one token", 1, 1)


def _looped_blocks(gradients: bool, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    def case(name: str, inputs: LoopedInputs, num_loops: int | Tensor, **options: Any) -> Case:
        # Parameters that are trained are float32; what is rounded to `dtype` are operands of products.
        def prepare(kind: torch.dtype) -> Callable[[], Results]:
            weights = torch.promote_types(kind, torch.float32) if gradients else kind
            given = inputs.to(weights, requires_grad=gradients, device=device)
            grad = _normal(*inputs.x.shape, seed=3).to(given.x)

            def call() -> Results:
                with torch.set_grad_enabled(gradients):
                    out = lk.looped_blocks(
                        *(given.x, given.blocks, given.modulation, num_loops),
                        num_heads=given.num_heads,
                        rotary=given.rotary,
                        key_mask=given.key_mask,
                        compute_dtype=kind,
                        **options,
                    )
                state, used = out if isinstance(out, tuple) else (out, None)
                results = {"out": state.detach()}
                if used is not None:
                    results["loops"] = used
                if gradients:
                    leaves = given.leaves()
                    found = torch.autograd.grad(state, list(leaves.values()), grad)
                    results |= dict(zip(leaves, found, strict=True))
                return results

            return call

        return Case(name, prepare, by_the_rule)

    def made(batch: int, length: int, **options: Any) -> LoopedInputs:
        return looped_inputs(batch, length, WIDTH, HEADS, 2, **options)

    yield case("37 tokens, S = 3", made(2, 37), 3)
    yield case("S = 1", made(1, 70), 1)
    yield case("S = 12", made(1, 33), 12)
    yield case("masked keys", made(2, 45, key_mask=True, per_sequence_modulation=True), 2)
    yield case("dropout", made(2, 37), 2, dropout=0.1, dropout_seed=7)
    if gradients:
        yield case("recomputed", made(2, 37), 3, recompute=True)
        return
    yield case("one token", made(1, 1), 2)
    own = torch.tensor([1, 3, 2], device=device)
    yield case("a loop count each", made(3, 21, per_sequence_modulation=True), own, max_loops=3)
    shrinking = made(3, 21, per_sequence_modulation=True)
    shrinking.modulation[:, :, [2, 5]] *= 0.5
    scales = torch.logspace(-0.5, 0.2, 3, dtype=DOUBLE)[:, None, None]
    shrinking = shrinking._replace(x=shrinking.x * scales)
    yield case("adaptive exits", shrinking, 6, exit_threshold=_threshold(shrinking, 6))


def _threshold(inputs: LoopedInputs, num_loops: int) -> float:
    """In the middle of the widest gap between relative changes, so that rounding decides nothing."""
    with torch.no_grad(), lk.use_backend("reference"):
        states = [inputs.x]
        for _ in range(num_loops):
            out = lk.looped_blocks(
                *(states[-1], inputs.blocks, inputs.modulation, 1),
                num_heads=inputs.num_heads,
                rotary=inputs.rotary,
            )
            assert isinstance(out, Tensor)
            states.append(out)
    changes = [
        (new - old).flatten(1).norm(dim=1) / new.flatten(1).norm(dim=1)
        for old, new in itertools.pairwise(states)
    ]
    ordered = torch.cat(changes).sort().values.tolist()
    inner = itertools.pairwise(ordered[len(ordered) // 4 : 3 * len(ordered) // 4 + 1])
    low, high = max(inner, key=lambda pair: pair[1] / pair[0])
    return float((low * high) ** 0.5)


def _head_logits(gradients: bool, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    def case(name: str, batch: int, length: int, vocab_size: int, **options: bool) -> Case:
        hidden, head = head_inputs(batch, length, WIDTH, vocab_size, **options)
        hidden = hidden.float().to(device)
        head = _head([t.to(device, dtype) for t in head.tensors])

        def prepare(kind: torch.dtype) -> Callable[[], Results]:
            exact = DOUBLE if kind == DOUBLE else None
            given = [t if exact is None else t.to(exact) for t in (hidden, *head.tensors)]

            def call() -> Results:
                if not gradients:
                    with torch.no_grad():
                        return {"logits": lk.head_logits(given[0], _head(given[1:]), compute_dtype=kind)}
                found = head_gradients(
                    lk.head_logits, hidden, head, kind=exact, upstream=dtype, compute_dtype=kind
                )
                names = ("logits", "hidden", "norm", "weight", "bias", "modulation")
                return {name: value for name, value in zip(names, found, strict=True) if value is not None}

            return call

        return Case(name, prepare, by_the_rule)

    yield case("37 tokens", 2, 37, VOCABULARY)
    yield case("a modulation each", 3, 50, 300, per_sequence_modulation=True)
    yield case("one token", 1, 1, 130)


def _cross_entropy(gradients: bool, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    def case(
        name: str,
        num_rows: int,
        vocab_size: int,
        *,
        at_once: int | None = None,
        repeated: bool = False,
        **options: bool,
    ) -> Case:
        inputs = cross_entropy_inputs(WIDTH, vocab_size, num_rows, dtype, length=30, device=device, **options)
        if not repeated:
            generator = torch.Generator().manual_seed(num_rows)
            inputs = inputs._replace(rows=torch.randperm(90, generator=generator)[:num_rows].to(device))

        def prepare(kind: torch.dtype) -> Callable[[], Results]:
            exact = DOUBLE if kind == DOUBLE else None

            def call() -> Results:
                if gradients:
                    return cross_entropy_results(lk.masked_cross_entropy, *inputs, kind=exact)
                leaves = [inputs.leaves[name].to(exact or inputs.leaves[name].dtype) for name in LEAVES]
                hidden, *tensors, weights = leaves
                head = _head(tensors, inputs.excluded_token)
                with torch.no_grad():
                    parts = [
                        lk.masked_cross_entropy(
                            hidden, head, inputs.targets, inputs.rows[part], weights[part]
                        )
                        for part in _parts(num_rows, at_once)
                    ]
                totals, nlls = zip(*parts, strict=True)
                return {"total": torch.stack(totals).sum(0, keepdim=True), "nll": torch.cat(nlls)}

            return call

        def judge(out: Results, plain: Results, exact: Results) -> None:
            # One number, whose error says little: it is the sum of those that are compared.
            total = (out["nll"].double() * inputs.leaves["row_weights"].double()).sum()
            torch.testing.assert_close(out["total"][0].double(), total, rtol=1e-6, atol=0)
            by_the_rule({name: value for name, value in out.items() if name != "total"}, plain, exact)

        return Case(
            name, prepare, judge, same_bits=not repeated
        )  # gradients of one row may be added by atomics

    yield case("33 rows", 33, VOCABULARY)
    yield case("no excluded token, one modulation", 70, 300, excluded=False, sequences=False)
    yield case("rows more than once", 70, 300, repeated=True)
    if not gradients:
        yield case("one row at a time", 20, 130, at_once=1)


def _sample_rows(gradients: bool, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    assert not gradients

    def case(
        name: str, num_rows: int, vocab_size: int, *, at_once: int | None = None, **options: Any
    ) -> Case:
        hidden, head = head_inputs(3, 50, WIDTH, vocab_size, per_sequence_modulation=True, excluded_token=7)
        generator = torch.Generator().manual_seed(vocab_size)
        limits = 150, 2**32, 2**30, 2**31
        rows, *names = (torch.randint(0, n, (num_rows,), generator=generator).to(device) for n in limits)
        rng = RowRng(0x1234567890ABCDEF, *names)
        rounded = 3 * hidden.float().to(device), *(t.to(device, dtype) for t in head.tensors)
        draw = Draw(rng, **options)

        def given(kind: torch.dtype) -> SampleCall:
            stream, *tensors = (t.to(DOUBLE) if kind == DOUBLE else t for t in rounded)
            return SampleCall(stream, _head(tensors, head.excluded_token), kind, rows, draw)

        def prepare(kind: torch.dtype) -> Callable[[], Results]:
            call = given(kind)

            def sample() -> Results:
                found = []
                for part in _parts(num_rows, at_once):
                    names = draw.of_rows(part).rng
                    found.append(
                        lk.sample_rows(
                            call.hidden, call.head, rows[part], names, compute_dtype=kind, **options
                        )
                    )
                fields = zip(*found, strict=True)
                return dict(zip(SampledRows._fields, map(torch.cat, map(list, fields)), strict=True))

            return sample

        def judge(out: Results, plain: Results, exact: Results) -> None:
            logits = {kind: row_logits(given(kind), rows) for kind in (dtype, DOUBLE)}
            log_probs = {kind: subs_log_probs(value, head.excluded_token) for kind, value in logits.items()}
            off = 4 * float((logits[dtype].double() - logits[DOUBLE]).abs().max()) + 1e-4
            times = race_times(*rng, vocab_size, DOUBLE) if draw.temperature else None
            scores = log_probs[DOUBLE]
            if times is not None:
                scores = scores / draw.temperature - times.log()
                off = off / draw.temperature
            for name, of in (("token", scores), ("top1_token", log_probs[DOUBLE])):
                behind = of.amax(1) - of.gather(1, out[name][:, None])[:, 0]
                allowed = (out[name] == plain[name]) | (out[name] == exact[name])
                if not (draw.restricted and name == "token"):
                    allowed |= behind <= off
                if not bool(allowed.all()):
                    raise AssertionError(
                        f"{name}: {int((~allowed).sum())} of {num_rows} rows have another token"
                    )
            token = out["token"][:, None]
            own = {kind: value.gather(1, token)[:, 0] for kind, value in log_probs.items()}
            values = {name: value for name, value in out.items() if value.is_floating_point()}
            by_the_rule(values, plain | {"log_prob": own[dtype]}, exact | {"log_prob": own[DOUBLE]})

        return Case(name, prepare, judge)

    yield case("33 rows", 33, VOCABULARY)
    yield case("200 rows, temperature 0.7", 200, VOCABULARY, temperature=0.7)
    yield case("the most probable", 33, VOCABULARY, temperature=0.0)
    yield case("top_k 5 and top_p 0.9", 33, VOCABULARY, top_k=5, top_p=0.9)
    yield case("one row at a time", 20, 130, at_once=1)
