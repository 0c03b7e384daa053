"""`likelihood`: how probable texts are to a masked diffusion model, with gradients.

Every method reads corrupted copies of a text and scores some of the tokens that a copy hides:

- "stratified" and "mc" estimate the bound log p(x) >= -E_t [ (1/t) sum over masked i of -log p(x_i | x_t) ]
  (MDLM, arXiv 2406.07524, Eq. 10) with t uniform in [1e-3, 1), each token masked with probability 0.999 t. A
  sample is one t with its masks; "stratified" takes one t in each of equal parts of the range, "mc" anywhere;
- "chain_rule" computes log p(x) = sum over k of log p(x_o(k) | x_o(1), ..., x_o(k - 1)) for an order o of the
  tokens, exactly: a copy for each k hides o(k), ..., o(L) and scores o(k) alone. The mean over random orders
  is the bound above with nothing left out of the range of t. A network conditioned on time is told the share
  of the counted tokens that are masked, as `sample` tells it in orders without a clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from loopmdm.data.batches import Batch
from loopmdm.model import vocabulary
from loopmdm.model.config import LoopMDMConfig
from loopmdm.model.flops import SamplingLedger
from loopmdm.model.masks import boolean
from loopmdm.model.modes import evaluating
from loopmdm.quality.copies import Copies, checked_samples, copies_of, counted_tokens, drawn
from loopmdm.quality.reader import Reader, copies_a_call
from loopmdm_kernels.ops import checks
from loopmdm_kernels.values import positive


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Log-likelihoods in nats, float64 on the model's device; gradients flow through all but `stderr`."""

    log_prob: Tensor  # [B] of the counted tokens given the others: an estimated lower bound, or exact
    stderr: Tensor  # [B] standard error of `log_prob` over samples: 0 where exact, NaN of one sample
    num_tokens: Tensor  # [B] int64, counted tokens
    token_log_prob: Tensor  # [B, L] what each token adds to `log_prob`; 0 where it does not count
    samples: Tensor  # [B, K] the estimates whose mean is `log_prob`
    ledger: SamplingLedger  # what was executed: network calls, loops, FLOPs; of a LoopMDM only


def likelihood(
    model: nn.Module,
    tokens: Tensor,
    given: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    method: str = "stratified",
    order: str | Tensor | None = None,
    samples: int | None = None,
    num_loops: int | None = None,
    seed: int = 0,
    max_batch: int | None = None,
) -> Likelihood:
    """Log-likelihood of each text, and of each of its tokens, in eval mode and with gradients.

    Gradients keep what every network call computed: take `torch.no_grad()` to measure, and to train on long
    texts `model.gradient_checkpointing_enable()`, or fewer texts at once. Draws are functions of the seed and
    of the place of a text in `tokens`.

    Args:
        model: a LoopMDM, or a module with its `config` and `forward` (logits [B, L, V]).
        tokens: [B, L] int64. No counted token may be the mask; elsewhere it stands for an unknown token.
        given: [B, L], True or 1 at tokens that are known from the start and not counted; None: none.
        attention_mask: [B, L], True or 1 at real tokens; the others are not counted. None: all.
        method: "stratified" or "mc", a bound from random masks; "chain_rule", exact for `order`.
        order: of the chain rule: "left_to_right" (None), "random" (a permutation for each sample),
            "confidence" (at each step the position whose most probable token is most probable, whatever token
            the text has there), or positions [L] or [B, L] int64, each once, the first to be known first.
        samples: times and masks of a text, or random orders; None: 16, or 1 where nothing is drawn.
        num_loops: S; None: `max_loops`.
        max_batch: copies of texts in a network call; None: as many as have 16384 tokens. The chain rule reads
            one copy for each counted token, in the order "confidence" twice.

    Returns:
        A `Likelihood`. The standard error of "stratified" treats neighbouring parts of the range as one
        (collapsed strata) and so errs on the large side.
    """
    config = _checked_config(model)
    batch = _checked_tokens(config, tokens, given, attention_mask)
    samples = checked_samples(method, order, samples)
    loops = config.max_loops if num_loops is None else positive("num_loops", num_loops)
    reader = Reader(model, loops, copies_a_call(tokens.shape[1], max_batch))
    with evaluating([model]):
        copies = copies_of(reader, batch, method, order, samples, checks.seed("seed", seed))
        sums, by_token = estimate(reader, batch, copies, samples)
    values = -sums.weighted
    return Likelihood(
        log_prob=values.mean(1),
        stderr=_standard_error(values.detach(), method, drawn(method, order)),
        num_tokens=sums.counted.long(),
        token_log_prob=-by_token / samples,
        samples=values,
        ledger=reader.ledger,
    )


class Sums(NamedTuple):
    """Sums over the scored tokens of each sequence and sample, float64 on the model's device."""

    weighted: Tensor  # [B, K] cross-entropy in the NELBO
    plain: Tensor  # [B, K] cross-entropy
    scored: Tensor  # [B, K] tokens
    loops: Tensor  # [B, K] loops that were run, the mean over copies
    counted: Tensor  # [B] counted tokens


def estimate(reader: Reader, batch: Batch, copies: Copies, samples: int) -> tuple[Sums, Tensor]:
    """Reads all copies, `reader.max_batch` in a call, and scores what each hides.

    Returns:
        The sums, and `weighted` by token, [B, L] summed over samples.
    """
    counted, (size, length) = counted_tokens(batch).sum(1).double(), batch.input_ids.shape
    batch, device = batch.to(reader.device), reader.device
    places = copies.sequence * samples + copies.sample
    tokens = torch.zeros(size * length, dtype=torch.float64, device=device)
    weighted, plain, scored, loops = tokens.new_zeros(4, size * samples).unbind()
    for part in reader.calls(torch.arange(len(places))):
        sequence, place, t, scale = (
            values[part].to(device) for values in (copies.sequence, places, copies.t, copies.scale)
        )
        masked, wanted = (mask.to(device) for mask in copies.masks(part))
        rows = wanted.flatten().nonzero().squeeze(1)
        copy, position = rows // length, rows % length
        hidden, head, dtype, used = reader.read(batch, sequence, masked, t)
        _, nll = vocabulary.masked_cross_entropy(
            hidden,
            head,
            batch.input_ids[sequence],
            rows,
            torch.ones(len(rows), device=device, dtype=torch.float32),
            compute_dtype=dtype,
        )
        reader.count(masked, used, len(rows))
        own = scale.new_zeros(len(part)).index_add(0, copy, nll.double())
        plain = plain.index_add(0, place, own)
        weighted = weighted.index_add(0, place, own / scale)
        tokens = tokens.index_add(0, sequence[copy] * length + position, nll.double() / scale[copy])
        scored.index_add_(0, place, wanted.sum(1).double())
        loops.index_add_(0, place, used.to(device).double())
    loops /= places.bincount(minlength=len(loops)).clamp_min(1).to(device)
    weighted, plain, scored, loops = (
        values.view(size, samples) for values in (weighted, plain, scored, loops)
    )
    return Sums(weighted, plain, scored, loops, counted.to(device)), tokens.view(size, length)


def _checked_config(model: Any) -> LoopMDMConfig:
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "time_conditioning"):
        raise TypeError(f"model must be a LoopMDM, or a module like one, got {type(model).__name__}")
    return cast(LoopMDMConfig, config)


def _checked_tokens(config: LoopMDMConfig, tokens: Any, given: Any, attention_mask: Any) -> Batch:
    """The arguments of `likelihood` as a batch."""
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64:
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens: got {got}, expected an int64 tensor [B, L]")
    if tokens.ndim != 2 or not tokens.numel():
        raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, expected [B, L], not empty")
    for name, mask in (("given", given), ("attention_mask", attention_mask)):
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(f"{name}: got {type(mask).__name__}, expected a tensor [B, L]")
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(f"{name}: got shape {tuple(mask.shape)}, expected {tuple(tokens.shape)}")
    batch = Batch(tokens, attention_mask, None if given is None else boolean("given", given))
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"tokens: got ids in {low}..{high}, expected 0..{config.vocab_size - 1}")
    if bool(((tokens.cpu() == config.mask_token_id) & counted_tokens(batch)).any()):
        raise ValueError(f"tokens: a counted token is the mask token {config.mask_token_id}")
    return batch


def _standard_error(samples: Tensor, method: str, is_drawn: bool) -> Tensor:
    """Of the mean of samples [B, K]; with one draw in a stratum neighbours are taken for draws of one."""
    count = samples.shape[1]
    if not is_drawn:
        return torch.zeros_like(samples[:, 0])
    if count < 2:
        return torch.full_like(samples[:, 0], math.nan)
    groups = samples.tensor_split(count // 2, 1) if method == "stratified" else [samples]
    return torch.stack([group.shape[1] * group.var(1) for group in groups]).sum(0).sqrt() / count
