"""`likelihood`: how probable texts are to a masked diffusion model, with gradients.

Every method reads corrupted copies of a text and scores some of the tokens that a copy hides:

- "stratified" and "mc" estimate the bound log p(x) >= -E_t [ (1/t) sum over masked i of -log p(x_i | x_t) ]
  (MDLM, arXiv 2406.07524, Eq. 10) with t uniform in [1e-3, 1), each token masked with probability 0.999 t. A
  sample is one t with its masks; "stratified" takes one t in each of equal parts of the range, "mc" anywhere;
- "chain_rule" computes log p(x) = sum over k of log p(x_o(k) | x_o(1), ..., x_o(k - 1)) for an order o of the
  tokens, exactly: a copy for each k hides o(k), ..., o(L) and scores o(k) alone. The mean over random orders
  is the bound above with nothing left out of the range of t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from loopmdm.data.batches import Batch
from loopmdm.exits import ExitRule
from loopmdm.model import LoopMDM, diffusion, vocabulary
from loopmdm.model.config import LoopMDMConfig
from loopmdm.model.masks import boolean
from loopmdm.model.modes import evaluating
from loopmdm.model.seeds import derive_seed
from loopmdm_kernels.ops import checks
from loopmdm_kernels.values import meant, positive

METHODS = ("stratified", "mc", "chain_rule")
ORDERS = ("left_to_right", "random", "confidence")
_STREAM = 0x45564C  # "EVL": keeps these draws apart from those of training with the same seed
_ORDER_STREAM = 0x4F5244  # "ORD"
_TOKENS_A_CALL = 2**14


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Log-likelihoods in nats, float64 on the model's device; gradients flow through all but `stderr`."""

    log_prob: Tensor  # [B] of the counted tokens given the others: an estimated lower bound, or exact
    stderr: Tensor  # [B] standard error of `log_prob` over samples: 0 where exact, NaN of one sample
    num_tokens: Tensor  # [B] int64, counted tokens
    token_log_prob: Tensor  # [B, L] what each token adds to `log_prob`; 0 where it does not count
    samples: Tensor  # [B, K] the estimates whose mean is `log_prob`


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
    length = tokens.shape[1]
    most = max(1, _TOKENS_A_CALL // length) if max_batch is None else positive("max_batch", max_batch)
    reader = Reader(model, loops, most)
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
    )


@dataclass(frozen=True)
class Reader:
    """A network as it reads corrupted texts."""

    model: Any
    num_loops: int
    max_batch: int  # copies in a network call
    exit: ExitRule | None = None
    min_loops: int = 1

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def calls(self, copies: Tensor) -> Iterable[Tensor]:
        """Copies [N] in parts that one network call reads."""
        return torch.split(copies, self.max_batch) if len(copies) else ()

    def read(
        self, batch: Batch, sequence: Tensor, masked: Tensor, t: Tensor
    ) -> tuple[Tensor, vocabulary.AnyHead, torch.dtype | None, Tensor]:
        """Residual stream [N, L, D], its head and dtype, loops used [N], of sequences with masks [N, L]."""
        model, config = self.model, self.model.config
        noisy = torch.where(masked, config.mask_token_id, batch.input_ids[sequence])
        sigma = diffusion.sigma(t).float() if config.time_conditioning else None
        keys = None
        if config.key_padding_mask and batch.attention_mask is not None:
            keys = batch.attention_mask[sequence]
        used = torch.full((len(t),), self.num_loops)
        options: Any = {"num_loops": self.num_loops, "attention_mask": keys}
        if not isinstance(model, LoopMDM):
            logits = model(noisy, sigma, **options)
            shared = torch.zeros(1, 1, device=logits.device)
            return logits, vocabulary.CalledHead(lambda x, _: x, shared, config.mask_token_id), None, used
        if self.exit is None:
            hidden = model.hidden(noisy, sigma, **options)
        else:
            hidden, used = model.hidden(noisy, sigma, exit=self.exit, min_loops=self.min_loops, **options)
        return hidden, model.head(sigma), model.compute_dtype, used


class Copies(NamedTuple):
    """Corrupted copies of the sequences of a batch, [N] in the order in which they are read, on the CPU."""

    sequence: Tensor  # [N] of the batch
    sample: Tensor  # [N] the estimate it belongs to
    t: Tensor  # [N] diffusion time
    scale: Tensor  # [N] float64, what its cross-entropy is divided by
    masks: Callable[
        [Tensor], tuple[Tensor, Tensor]
    ]  # of copies [n]: masked, and scored of these, [n, L] bool


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


def copies_of(
    reader: Reader,
    batch: Batch,
    method: str,
    order: str | Tensor | None,
    samples: int,
    seed: int,
    first: int = 0,
) -> Copies:
    """What `method` reads of the sequences from index `first` on; draws are functions of (seed, index)."""
    if method == "chain_rule":
        return _prefixes(_ranks(reader, batch, order, samples, seed, first))
    t, masked, _ = corruption(batch, samples, seed, first, stratified=method == "stratified")
    sample, sequence = torch.cartesian_prod(torch.arange(samples), torch.arange(len(t))).unbind(1)

    def masks(part: Tensor) -> tuple[Tensor, Tensor]:
        chosen = masked[sequence[part], sample[part]]
        return chosen, chosen

    times = t.T.flatten()
    return Copies(sequence, sample, times, times.double(), masks)


def _prefixes(rank: Tensor) -> Copies:
    """A copy for each token, given its place in each order, rank [B, K, L]; -1: not counted."""
    sequence, sample, position = (rank >= 0).nonzero().unbind(1)
    known = rank[sequence, sample, position]
    counted = (rank >= 0).sum(2)[sequence, sample]

    def masks(part: Tensor) -> tuple[Tensor, Tensor]:
        own, before = rank[sequence[part], sample[part]], known[part, None]
        return own >= before, own == before

    share = (counted - known).double() / counted  # as `sample` has it in orders without a clock
    return Copies(sequence, sample, share, torch.ones_like(share), masks)


def _ranks(
    reader: Reader, batch: Batch, order: str | Tensor | None, samples: int, seed: int, first: int
) -> Tensor:
    """Which counted token is known how early: places [B, K, L] from 0 in each order; -1: not counted."""
    counted = counted_tokens(batch)
    size, length = counted.shape
    if isinstance(order, str) and order == "confidence":
        return _confidence(reader, batch, counted)[:, None]
    if isinstance(order, str) and order == "random":
        generator = torch.Generator()
        drawn_orders = []
        for index in range(first, first + size):
            generator.manual_seed(derive_seed(seed, _ORDER_STREAM, index))
            drawn_orders += [torch.randperm(length, generator=generator) for _ in range(samples)]
        positions = torch.stack(drawn_orders).view(size, samples, length)
    else:
        positions = _positions(order, size, length).expand(size, 1, length)
    inside = counted[:, None].expand(positions.shape).gather(2, positions)
    place = (inside.cumsum(2) - 1).masked_fill(~inside, -1)
    return torch.empty_like(place).scatter(2, positions, place)


def _positions(order: object, size: int, length: int) -> Tensor:
    """An order as a caller gives it, [1 or B, 1, L]."""
    if not isinstance(order, Tensor):
        return torch.arange(length)[None, None]
    if order.dtype != torch.int64 or order.shape not in ((length,), (size, length)):
        raise ValueError(
            f"order: got {order.dtype} of shape {tuple(order.shape)}, expected int64 positions [{length}] or"
            f" [{size}, {length}]"
        )
    order = order.cpu().view(-1, 1, length)
    if not bool((order.sort(2).values == torch.arange(length)).all()):
        raise ValueError(f"order: expected every position 0..{length - 1} once in each row")
    return order


@torch.no_grad()
def _confidence(reader: Reader, batch: Batch, counted: Tensor) -> Tensor:
    """Ranks [B, L] of the counted tokens, the surest prediction first, the lowest position on ties."""
    batch, masked = batch.to(reader.device), counted.clone()
    rank, total = torch.full(counted.shape, -1), counted.sum(1)
    for place in range(int(total.max())):
        for part in reader.calls(masked.any(1).nonzero().squeeze(1)):
            share = masked[part].sum(1).double() / total[part]
            inputs = (tensor.to(reader.device) for tensor in (part, masked[part], share))
            hidden, head, dtype, _ = reader.read(batch, *inputs)
            rows = masked[part].flatten().nonzero().squeeze(1)
            found = vocabulary.most_probable(hidden, head, rows.to(reader.device), compute_dtype=dtype)
            sure = torch.full(masked[part].shape, -1.0, dtype=torch.float64)
            sure[masked[part]] = found.top1_prob.double().cpu()
            best = (sure == sure.amax(1, keepdim=True)).int().argmax(1)
            rank[part, best] = place
            masked[part, best] = False
    return rank


def corruption(
    batch: Batch, num_t: int, seed: int, first: int, *, stratified: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Times [B, num_t], masks [B, num_t, L] and counted tokens [B] of the sequences from index `first` on.

    Functions of (seed, index of the sequence): one time in each of `num_t` equal parts of [1e-3, 1), or all
    anywhere in it.
    """
    size, length = batch.input_ids.shape
    counted = counted_tokens(batch)
    jitter, uniform = (
        torch.empty(size, num_t, dtype=torch.float32),
        torch.empty(size, num_t, length, dtype=torch.float32),
    )
    generator = torch.Generator()
    for index in range(size):
        generator.manual_seed(derive_seed(seed, _STREAM, first + index))
        jitter[index] = torch.rand(num_t, generator=generator, dtype=torch.float32)
        uniform[index] = torch.rand(num_t, length, generator=generator, dtype=torch.float32)
    if stratified:
        t = diffusion.MIN_TIME + (1 - diffusion.MIN_TIME) * (torch.arange(num_t) + jitter) / num_t
    else:
        t = diffusion.MIN_TIME + (1 - diffusion.MIN_TIME) * jitter
    masked = (uniform < diffusion.mask_probability(t)[..., None]) & counted[:, None]
    return t, masked, counted.sum(1).double()


def counted_tokens(batch: Batch) -> Tensor:
    """Which tokens may be masked and count: neither padding nor prompt, bool [B, L] on the CPU."""
    counted = torch.ones(batch.input_ids.shape, dtype=torch.bool)
    if batch.attention_mask is not None:
        counted &= boolean("attention_mask", batch.attention_mask).cpu()
    if batch.prompt_mask is not None:
        counted &= ~boolean("prompt_mask", batch.prompt_mask).cpu()
    return counted


def drawn(method: str, order: str | Tensor | None) -> bool:
    """Whether another seed gives another value."""
    return method != "chain_rule" or (isinstance(order, str) and order == "random")


def checked_samples(method: Any, order: Any, samples: Any) -> int:
    """How many estimates of each sequence there are, once method, order and number fit each other."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}{meant(method, METHODS)}; expected {', '.join(METHODS)}")
    if order is not None and method != "chain_rule":
        raise ValueError(f"order: given with method {method!r}; it belongs to 'chain_rule'")
    if not (order is None or isinstance(order, Tensor) or (isinstance(order, str) and order in ORDERS)):
        raise ValueError(
            f"unknown order {order!r}{meant(order, ORDERS)}; expected {', '.join(ORDERS)} or positions [B, L]"
        )
    if samples is None:
        return 16 if drawn(method, order) else 1
    number = positive("samples", samples)
    if number > 1 and not drawn(method, order):
        raise ValueError(f"samples: got {number}, but in one order nothing is drawn; expected 1 or None")
    return number


def _checked_config(model: Any) -> LoopMDMConfig:
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "mask_token_id"):
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
