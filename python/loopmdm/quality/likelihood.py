"""Held-out likelihood: the negative log-likelihood per token of a model at several loop counts.

`loopmdm.quality.estimator` says what is estimated and how; here it is summed over sequences. By default it is
the NELBO with `num_t` times per sequence, one in each of `num_t` equal strata. All draws are functions of
(seed, index of the sequence): they are the same for every loop count, every model and every batch size, so
differences have little noise.
As in the reference, the range of t and the 0.999 leave out up to 0.1 % (a uniform guess scores 0.999 log V).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from loopmdm.data.batches import Batch
from loopmdm.exits import ExitRule
from loopmdm.model import LoopMDM, diffusion
from loopmdm.model.flops import SamplingLedger
from loopmdm.model.modes import evaluating
from loopmdm.plan import ComputePlan
from loopmdm.quality.causal import CausalLM
from loopmdm.quality.copies import checked_samples, copies_of, counted_tokens, drawn
from loopmdm.quality.cost import Cost
from loopmdm.quality.estimator import Sums, estimate
from loopmdm.quality.reader import Reader
from loopmdm_kernels.ops import checks
from loopmdm_kernels.values import positive, real, whole


@dataclass(frozen=True)
class NLLResult:
    """Held-out likelihood at one loop count."""

    num_loops: int
    nll: float  # nats per counted token: the NELBO, or exact by the chain rule
    stderr: float  # of `nll`, over sequences; NaN with one sequence
    perplexity: float  # exp(nll)
    bits_per_byte: float | None  # None if the bytes of a token are not known
    num_tokens: int
    num_sequences: int
    num_t: int
    mean_loops: float | None = None  # that an exit rule ran, over sequences and times; None without one
    method: str = "stratified"
    cost: Cost | None = None  # what it was computed with; None of a model whose FLOPs are not known

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what is not finite becomes None."""
        return _json_values(asdict(self))


@dataclass(frozen=True)
class TimeBin:
    """The part of the NELBO that comes from times in [t_low, t_high)."""

    num_loops: int
    t_low: float
    t_high: float
    nll: float  # nats per counted token; the mean over all bins is the NELBO
    stderr: float  # of `nll`, over sequences
    cross_entropy: float  # nats per masked token; NaN if none was masked
    num_masked: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what is not finite becomes None."""
        return _json_values(asdict(self))


@dataclass(frozen=True)
class Measured:
    """What a process has measured of its share of the sequences; `nll_results` puts the shares together."""

    sums: dict[int, list[Sums | None]]  # of each batch by loop count, on the CPU; None: no sequence of it
    ledgers: dict[int, SamplingLedger]
    num_t: int
    precision: torch.dtype | None  # None of a model whose FLOPs are not known
    seeds: dict[str, int]
    method: str
    exit: ExitRule | None
    min_loops: int


def evaluate_nll(
    model: nn.Module,
    batches: Iterable[Batch | Tensor],
    *,
    num_loops: Sequence[int],
    num_t: int = 16,
    seed: int = 0,
    bytes_per_token: float | None = None,
    exit: ExitRule | None = None,
    min_loops: int = 1,
    method: str = "stratified",
    order: str | None = None,
) -> list[NLLResult]:
    """NELBO per token of held-out sequences, one result for each loop count in `num_loops`.

    Args:
        model: a LoopMDM, or a module with its `config` and `forward` (logits [B, L, V]).
        batches: `Batch`es, or tensors of token ids [B, L] int64. Prompt and padding are not counted.
        num_loops: loop counts to evaluate.
        num_t: times per sequence, or random orders; counts as 1 where nothing is drawn.
        seed: of all that is drawn.
        bytes_per_token: bytes of text per counted token, for bits per byte.
        exit: ends the loop of a sequence of a LoopMDM before `num_loops`, after `min_loops` at the earliest.
        method: as in `loopmdm.likelihood`; "chain_rule" reads each sequence once for every token.
        order: as in `loopmdm.likelihood`.
    """
    _check_bytes(bytes_per_token)
    checked_samples(method, order, None)
    num_t = positive("num_t", num_t) if drawn(method, order) else 1
    if exit is not None and not isinstance(model, LoopMDM):
        raise TypeError(f"exit: given with a {type(model).__name__}, expected a LoopMDM")
    measured = _measure(model, batches, num_loops, num_t, seed, exit, min_loops, method, order)
    return nll_results([measured], bytes_per_token=bytes_per_token)


def measure_nll(
    model: nn.Module,
    batches: Iterable[Batch | Tensor],
    *,
    num_loops: Sequence[int],
    num_t: int = 16,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Measured:
    """What one of several processes measures for `nll_results`: its share of the sequences of every batch.

    Other arguments as in `evaluate_nll`; each process gives all batches.
    """
    return _measure(
        model, batches, num_loops, positive("num_t", num_t), seed, rank=rank, world_size=world_size
    )


def nll_results(parts: Sequence[Measured], *, bytes_per_token: float | None = None) -> list[NLLResult]:
    """The results of `evaluate_nll` from what each process has measured, in the order of their ranks.

    Sums are added by sequence, in the order of the sequences, so that the figures do not depend on the number
    of processes where what is measured of a sequence does not depend on its batch.
    """
    _check_bytes(bytes_per_token)
    first = parts[0]
    results = []
    for loops in first.sums:
        sums, ledger = _merged(parts, loops)
        result = _nll_result(sums.weighted.mean(1), sums.counted, loops, first.num_t, bytes_per_token)
        plan, mean_loops = ComputePlan.constant(loops), None
        if first.exit is not None:
            plan = ComputePlan.adaptive(None, loops, first.min_loops, first.exit)
            mean_loops = float(sums.loops.mean())
        cost = None
        if first.precision is not None:
            cost = Cost.of(
                ledger,
                result.num_tokens,
                precision=first.precision,
                plan=plan,
                steps=ledger.sequence_calls / result.num_sequences,
                seeds=first.seeds,
            )
        results.append(replace(result, mean_loops=mean_loops, method=first.method, cost=cost))
    return results


def evaluate_autoregressive(
    model: CausalLM, batches: Iterable[Batch | Tensor], *, bytes_per_token: float | None = None
) -> NLLResult:
    """Exact likelihood of held-out sequences under an autoregressive model, on the tokens of `evaluate_nll`.

    Arguments as there. The result says one loop and one time: the model reads a sequence once.
    """
    _check_bytes(bytes_per_token)
    return autoregressive_result([measure_autoregressive(model, batches)], bytes_per_token=bytes_per_token)


@torch.no_grad()
def measure_autoregressive(
    model: CausalLM, batches: Iterable[Batch | Tensor], *, rank: int = 0, world_size: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """What one of several processes measures for `autoregressive_result`: every `world_size`-th batch.

    Whole batches, since the last bits of this model depend on what else is in a batch.

    Returns:
        Nats and counted tokens of the sequences of each batch, [B] float64 on the CPU.
    """
    device = next(model.parameters()).device
    found = []
    with evaluating([model]):
        for index, item in enumerate(_items(batches)):
            batch = _batch(item)
            if index % world_size != rank:
                continue
            counted = counted_tokens(batch)
            nll = model.token_nll(batch.input_ids.to(device), counted.to(device))
            found.append((nll.double().sum(1).cpu(), counted.sum(1).double()))
    return found


def autoregressive_result(
    parts: Sequence[Sequence[tuple[Tensor, Tensor]]], *, bytes_per_token: float | None = None
) -> NLLResult:
    """The result of `evaluate_autoregressive` from what each process has measured, by their ranks."""
    rounds = zip_longest(*parts)
    in_order = [measured for batches in rounds for measured in batches if measured is not None]
    if not sum(float(tokens.sum()) for _, tokens in in_order):
        raise ValueError("batches: there is no token to evaluate")
    sums, tokens = map(torch.cat, zip(*in_order, strict=True))
    return _nll_result(sums, tokens, 1, 1, bytes_per_token)


def _nll_result(
    sums: Tensor, tokens: Tensor, num_loops: int, num_t: int, bytes_per_token: float | None
) -> NLLResult:
    """The result of sequences whose counted `tokens` [N] cost `sums` [N] nats."""
    nll, stderr = ratio_of_sums(sums, tokens)
    return NLLResult(
        num_loops=num_loops,
        nll=nll,
        stderr=stderr,
        perplexity=math.exp(nll) if nll < math.log(1e308) else math.inf,
        bits_per_byte=None if bytes_per_token is None else nll / math.log(2) / bytes_per_token,
        num_tokens=int(tokens.sum()),
        num_sequences=len(tokens),
        num_t=num_t,
    )


def _check_bytes(bytes_per_token: float | None) -> None:
    if bytes_per_token is not None and not 0 < (real(bytes_per_token) or 0) < math.inf:
        raise ValueError(f"bytes_per_token must be positive and finite, got {bytes_per_token!r}")


def nll_by_sequence(
    model: nn.Module,
    batches: Iterable[Batch | Tensor],
    *,
    num_loops: int,
    num_t: int = 16,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """NELBO in nats and counted tokens of each sequence, both [N] float64; arguments as in `evaluate_nll`."""
    measured = _measure(model, batches, [num_loops], positive("num_t", num_t), seed)
    sums, _ = _merged([measured], num_loops)
    return sums.weighted.mean(1), sums.counted


def nll_by_time_bin(
    model: nn.Module,
    batches: Iterable[Batch | Tensor],
    *,
    num_loops: Sequence[int],
    num_bins: int = 16,
    seed: int = 0,
) -> list[list[TimeBin]]:
    """The NELBO split over `num_bins` equal bins of t, one list of bins for each loop count.

    Arguments as in `evaluate_nll`; every sequence has one time in every bin.
    """
    num_bins = positive("num_bins", num_bins)
    measured = _measure(model, batches, num_loops, num_bins, seed)
    edges = [diffusion.MIN_TIME + (1 - diffusion.MIN_TIME) * j / num_bins for j in range(num_bins + 1)]
    results = []
    for loops in measured.sums:
        sums, _ = _merged([measured], loops)
        bins = []
        for j in range(num_bins):
            nll, stderr = ratio_of_sums(sums.weighted[:, j], sums.counted)
            masked = int(sums.scored[:, j].sum())
            cross_entropy = float(sums.plain[:, j].sum()) / masked if masked else math.nan
            bins.append(TimeBin(loops, edges[j], edges[j + 1], nll, stderr, cross_entropy, masked))
        results.append(bins)
    return results


def _loop_counts(num_loops: Any) -> list[int]:
    given = num_loops if isinstance(num_loops, Iterable) and not isinstance(num_loops, str) else []
    counts = [whole(loops) or 0 for loops in given]
    if not counts or min(counts) < 1:
        raise ValueError(f"num_loops must be a list of integers of at least 1, got {num_loops!r}")
    return counts


def _items(batches: Any) -> Iterable[Any]:
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches: got {type(batches).__name__}, expected several tensors [B, L] or Batches")
    return batches


def _batch(item: Any) -> Batch:
    batch = item if isinstance(item, Batch) else Batch(item)
    if not isinstance(batch.input_ids, Tensor) or batch.input_ids.ndim != 2:
        what = tuple(batch.input_ids.shape) if isinstance(batch.input_ids, Tensor) else type(item).__name__
        raise ValueError(
            f"batches: an item is {what}, expected token ids [B, L] or a Batch; give one tensor as [tensor]"
        )
    return batch


@torch.no_grad()
def _measure(
    model: nn.Module,
    batches: Iterable[Batch | Tensor],
    num_loops: Sequence[int],
    samples: int,
    seed: int,
    exit: ExitRule | None = None,
    min_loops: int = 1,
    method: str = "stratified",
    order: str | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Measured:
    seed = checks.seed("seed", seed)
    sums: dict[int, list[Sums | None]] = {loops: [] for loops in _loop_counts(num_loops)}
    ledgers = {loops: SamplingLedger(1) for loops in sums}
    done = 0
    with evaluating([model]):
        for item in _items(batches):
            batch = _batch(item)
            size = len(batch.input_ids)
            start, end = size * rank // world_size, size * (rank + 1) // world_size
            own = batch.rows(start, end)
            for loops, found in sums.items():
                if start == end:
                    found.append(None)
                    continue
                reader = Reader(model, loops, end - start, exit, min_loops, ledgers[loops])
                copies = copies_of(reader, own, method, order, samples, seed, done + start)
                estimates, _ = estimate(reader, own, copies, samples)
                found.append(Sums(*(values.cpu() for values in estimates)))
            done += size
    if not done:
        raise ValueError("batches is empty: there is nothing to evaluate")
    seeds = {}
    if drawn(method, order):
        seeds = {"orders" if method == "chain_rule" else "masks": seed}
    precision = model.compute_dtype if isinstance(model, LoopMDM) else None
    return Measured(sums, ledgers, samples, precision, seeds, method, exit, min_loops)


def _merged(parts: Sequence[Measured], loops: int) -> tuple[Sums, SamplingLedger]:
    """Of all sequences, in their order; each part has its share of every batch."""
    of_batches = zip(*(part.sums[loops] for part in parts), strict=True)
    found = [sums for batch in of_batches for sums in batch if sums is not None]
    merged = Sums(*map(torch.cat, zip(*found, strict=True)))
    if not merged.counted.sum():
        raise ValueError("batches: every token is prompt or padding, there is none to count")
    ledger = SamplingLedger(1)
    for part in parts:
        ledger.add(part.ledgers[loops])
    return merged, ledger


def ratio_of_sums(values: Tensor, tokens: Tensor) -> tuple[float, float]:
    """sum(values) / sum(tokens) and its standard error, sequences [N] being the independent units.

    Of the difference of two models' sums on the same masks, it gives the paired difference of their NLL.
    """
    total, count = float(tokens.sum()), len(tokens)
    ratio = float(values.sum()) / total
    if count < 2:
        return ratio, math.nan
    residuals = values - ratio * tokens
    return ratio, math.sqrt(count / (count - 1) * float(residuals.square().sum())) / total


def _json_values(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
