"""LoopMDM: MDLM's diffusion transformer whose early-middle blocks are applied S times.

The network is three calls of `looped_blocks` (head, loop, tail: see `stages`) and one op on the vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple, TypeVar, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopmdm.exits import ExitRule, run_with_exit
from loopmdm.model import diffusion, draws, inputs, vocabulary
from loopmdm.model.config import LoopMDMConfig
from loopmdm.model.cut import named, say, why_global
from loopmdm.model.masks import boolean
from loopmdm.model.modes import say_if_trained
from loopmdm.model.modules import (
    DDiTBlock,
    OutputLayer,
    RotaryEmbedding,
    SigmaEmbedding,
    TokenEmbedding,
    by_row,
)
from loopmdm.model.parallel import check_averaged
from loopmdm.model.stages import Stages
from loopmdm.model.vocabulary import AnyHead, CalledHead
from loopmdm_kernels.ops import checks
from loopmdm_kernels.tracing import can_read, traced, transformed, without_autocast
from loopmdm_kernels.types import BlockWeights, Fp8BlockWeights, Fp8Head, Fp8Weight, Head

T = TypeVar("T")
_NOTHING: dict[int, dict[Any, Any]] = {}
# What is kept of each model by id; of a context, so that threads do not end each other's.
_FROZEN: ContextVar[dict[int, dict[Any, Any]]] = ContextVar("frozen")


class LossOutput(NamedTuple):
    loss: Tensor  # scalar, nats per counted token: nll_sum / num_tokens
    nll_sum: Tensor  # scalar, NELBO summed over the counted tokens
    num_tokens: Tensor  # scalar int64: real tokens that are not prompt, masked or not
    t: Tensor  # [B]
    num_loops: int | Tensor  # a tensor [1] in a compiled graph that drew it


class LoopMDM(nn.Module):
    """A looped masked diffusion language model.

    `state_dict()` has the names and shapes of the reference model (MDLM's DIT); the loop is configuration
    only, so the parameters do not depend on the number of loops.

    The CPU kernels read copies of the weights in a layout of their own. In-place operations on a parameter
    and optimizer steps are always seen, writes through `.data` or numpy in matrices of up to 1 MB too. In
    larger ones such a write of less than 2 KB in a row (32 KB beyond 16 MB), for example of a single row, can
    pass unseen: call `torch.autograd.graph.increment_version(parameter)` after it.
    """

    model_type: ClassVar[str] = "loopmdm"
    config_class: ClassVar[type[LoopMDMConfig]] = LoopMDMConfig

    def __init__(self, config: LoopMDMConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # save only loop inputs for backward
        self._fp8_blocks = self._fp8_head = False
        self.vocab_embed = TokenEmbedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.position_embed = TokenEmbedding(config.max_length, config.hidden_size)
        self.sigma_map = SigmaEmbedding(config.cond_dim)
        self.rotary_emb = RotaryEmbedding(config.head_dim)
        self.blocks = nn.ModuleList(DDiTBlock(config) for _ in range(config.num_layers))
        self.output_layer = OutputLayer(config)

    @property
    def device(self) -> torch.device:
        return self.vocab_embed.embedding.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the matrix products: autocast's if it is on, else the parameters'."""
        if self.device.type != "meta" and torch.is_autocast_enabled(self.device.type):
            return torch.get_autocast_dtype(self.device.type)
        return self.vocab_embed.embedding.dtype

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Keep only loop inputs for backward (`recompute`); of transformers' name, for its Trainer."""
        self.recompute = True

    def gradient_checkpointing_disable(self) -> None:
        self.recompute = False

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, no weight may change: without gradients, what depends on them alone is computed once."""
        token = _FROZEN.set({**_FROZEN.get(_NOTHING), id(self): {}})
        try:
            yield
        finally:
            _FROZEN.reset(token)

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """make(), or what it returned before for this key where weights are `frozen`."""
        if traced() or transformed() or torch.is_grad_enabled():
            return make()
        kept = _FROZEN.get(_NOTHING).get(id(self))
        if kept is None:
            return make()
        if key not in kept:
            kept[key] = make()
        value: T = kept[key]
        return value

    def use_fp8_weights(self, *, blocks: bool = True, head: bool = True) -> None:
        """Multiply by matrices rounded to e4m3, without gradients; both False: as before.

        The parameters, and with them `state_dict`, stay what they are: the rounded matrices are made from
        them, once where weights are `frozen`, as in `sample`. Only the Triton kernels load them as e4m3; the
        reference computes the same with matrices of the compute dtype.

        Args:
            blocks: of the blocks.
            head: of the vocabulary projection.
        """
        self._fp8_blocks, self._fp8_head = blocks, head

    def block_weights(self, start: int, end: int) -> list[BlockWeights | Fp8BlockWeights]:
        """Of blocks start..end - 1, as the ops take them."""

        def made() -> list[BlockWeights | Fp8BlockWeights]:
            weights = [cast(DDiTBlock, self.blocks[i]).weights() for i in range(start, end)]
            return [Fp8BlockWeights.of(w) if self._fp8_blocks else w for w in weights]

        return self.once(("weights", start, self._fp8_blocks), made)

    def condition(self, sigma: Tensor | None) -> Tensor:
        """silu(sigma_map(sigma)) [1 or B, cond_dim], in the parameters' precision.

        Without gradients a row's bits do not depend on the others (see `by_row`); equal noise levels are one
        row.
        """

        def embedded(noise: Tensor) -> Tensor:
            with without_autocast(self.device):
                return F.silu(self.sigma_map(noise))

        if sigma is not None and self.config.time_conditioning:
            if not torch.is_grad_enabled() and can_read(sigma) and bool((sigma == sigma[0]).all()):
                sigma = sigma[:1]
            return by_row(embedded, sigma)
        return self.once(
            ("condition",), lambda: embedded(torch.zeros(1, device=self.device, dtype=torch.float32))
        )

    def cuts(self) -> list[str]:
        """Why parts of the model run module by module instead of in the fused ops; empty: none does.

        It is so where modules are watched (hooks), wrapped (adapters) or replaced.
        """
        why = why_global()
        if why is not None:
            return [why]
        reasons = {f"blocks.{i}": DDiTBlock.why_called(cast(DDiTBlock, b)) for i, b in enumerate(self.blocks)}
        reasons["output_layer"] = OutputLayer.why_called(self.output_layer)
        return [named(name, why) for name, why in reasons.items() if why is not None]

    def head_is_called(self) -> bool:
        """Whether `head` is one of modules that are called."""
        return why_global() is not None or OutputLayer.why_called(self.output_layer) is not None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def say_cuts(self) -> None:
        """Warn once of each reason in `cuts`."""
        say(self, self.cuts())

    def head(self, sigma: Tensor | None = None) -> AnyHead:
        """The vocabulary head for noise levels sigma [B] (unused without time conditioning)."""
        out = self.output_layer
        if self.head_is_called():
            self.say_cuts()
            if self._fp8_head:
                raise ValueError(f"use_fp8_weights: not of a head that has to be called ({self.cuts()[-1]})")
            return CalledHead(out, self.condition(sigma), self.config.mask_token_id)
        modulation = by_row(out.adaLN_modulation, self.condition(sigma))
        modulation = modulation.view(-1, 2, self.config.hidden_size)
        norm, weight, bias = out.norm_final.weight, out.linear.weight, out.linear.bias
        if self._fp8_head:
            rounded = self.once(("fp8 head",), lambda: Fp8Weight.of(weight))
            return Fp8Head(norm, rounded, bias, modulation, self.config.mask_token_id)
        return Head(norm, weight, bias, modulation, self.config.mask_token_id)

    def stages(
        self,
        input_ids: Tensor,
        sigma: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        dropout_seed: int | Tensor | None = None,
    ) -> Stages:
        """One forward pass of input_ids [B, L] cut at the loop, to be run and looked at stage by stage."""
        inputs.check(input_ids, sigma, attention_mask, self.config, self.device)
        return Stages(self, input_ids, sigma, attention_mask, dropout_seed)

    def hidden(
        self,
        input_ids: Tensor,
        sigma: Tensor | None = None,
        *,
        num_loops: int | Tensor | None = None,
        attention_mask: Tensor | None = None,
        exit: ExitRule | None = None,
        min_loops: int = 1,
        dropout_seed: int | Tensor | None = None,
    ) -> Any:
        """Residual stream [B, L, D] before the final layer; with `exit`, (it, loops used [B]).

        exit ends the loop of a sequence before `num_loops`, and after `min_loops` at the earliest.
        """
        stages = self.stages(input_ids, sigma, attention_mask=attention_mask, dropout_seed=dropout_seed)
        loops = self.default_loops() if num_loops is None else num_loops
        if exit is not None:
            return run_with_exit(stages, loops, exit, min_loops)
        hidden = stages.tail(stages.loop(stages.head(), loops))
        if num_loops is None and not torch.compiler.is_compiling():
            self._say_if_trained(hidden)
        return hidden

    @overload
    def forward(
        self,
        input_ids: Tensor,
        timesteps: Tensor | None = None,
        *,
        num_loops: int | Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        input_ids: Tensor,
        timesteps: None = None,
        *,
        num_loops: int | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor,
    ) -> LossOutput: ...

    def forward(
        self,
        input_ids: Tensor,
        timesteps: Tensor | None = None,
        *,
        num_loops: int | Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor | LossOutput:
        """Logits [B, L, V] in the compute dtype, without SUBS: the mask has a logit too, as in the reference.

        With `labels` the loss in their place, as `loss` computes it: what trainers and parallel wrappers
        (DistributedDataParallel, fully_shard, accelerate, Trainer), which know `forward` only, train with.

        Args:
            input_ids: [B, L] int64.
            timesteps: noise level sigma [B]; used with time conditioning only.
            num_loops: S >= 1, or one S per sequence [B]; None: drawn in training, `max_loops` in eval mode
                (in which a backward pass is warned of, once).
            attention_mask: [B, L], True or 1 at the keys that may be attended; None: all.
            labels: [B, L] int64, the clean tokens, equal to `input_ids`; -100 at tokens that are given: they
                are never masked and not counted. Times, masks and S are drawn here.

        Returns:
            Logits, or a `LossOutput`, whose first field is the loss.
        """
        if labels is not None:
            return self._labelled_loss(input_ids, timesteps, num_loops, attention_mask, labels)
        hidden = self.hidden(input_ids, timesteps, num_loops=num_loops, attention_mask=attention_mask)
        return vocabulary.head_logits(hidden, self.head(timesteps), compute_dtype=self.compute_dtype)

    def _labelled_loss(
        self,
        input_ids: Tensor,
        timesteps: Tensor | None,
        num_loops: Any,
        attention_mask: Tensor | None,
        labels: Tensor,
    ) -> LossOutput:
        if timesteps is not None:
            raise ValueError(
                "timesteps: given with labels; expected None, since the loss draws its own times"
            )
        inputs.check(input_ids, None, attention_mask, self.config, self.device)
        given = inputs.given_by_labels(labels, input_ids)
        return self.loss(input_ids, attention_mask, num_loops, prompt_mask=given)

    def default_loops(self, seed: int | None = None) -> int | Tensor:
        """`max_loops` in eval mode; in training one draw from U{1..max_loops} (LoopMDM, Eq. 5).

        The draw is a function of `seed`, or of torch's global generator. In a compiled graph it is a tensor.
        """
        if not self.training:
            return self.config.max_loops
        return draws.loops(self.vocab_embed.embedding, self.config.max_loops, seed)

    def _say_if_trained(self, out: Tensor) -> None:
        """Warn once if gradients flow from what a model in eval mode computed with its default S."""
        if not self.training and self.config.max_loops > 1:
            say_if_trained(self, out, self.config.max_loops)

    def loss(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        num_loops: int | None = None,
        seed: int | None = None,
        *,
        prompt_mask: Tensor | None = None,
        t: Tensor | None = None,
    ) -> LossOutput:
        """Monte Carlo NELBO of a batch (MDLM's continuous-time loss with weight 1/t; LoopMDM, Eq. 5).

        Args:
            input_ids: [B, L] int64, clean tokens; the mask token may not occur.
            attention_mask: [B, L], True or 1 at real tokens; only these are counted. None: all.
            num_loops: S of this call; None: drawn from U{1..max_loops} in training, `max_loops` in eval mode
                (in which a backward pass is warned of, once).
            seed: makes t, masks, S and dropout a function of the seed; None: torch's global generator.
            prompt_mask: [B, L], True at given tokens, which are never masked and not counted.
            t: [B] times in (0, 1]; None: stratified in [1e-3, 1).

        Raises:
            ValueError: on ids out of range, the mask token in `input_ids`, or no token to count.
        """
        check_averaged(self)
        inputs.check(input_ids, None, attention_mask, self.config, self.device)
        seed = None if seed is None else checks.seed("seed", seed)
        readable = not (traced(input_ids) or transformed())
        if readable and bool((input_ids == self.config.mask_token_id).any()):
            raise ValueError(
                f"input_ids: contains the mask token {self.config.mask_token_id}; expected clean data"
            )
        loops = self.default_loops(seed) if num_loops is None else num_loops
        if t is not None and not isinstance(t, Tensor):
            raise TypeError(f"t: got {type(t).__name__}, expected a tensor of times [{len(input_ids)}]")
        if t is not None:
            fits = t.shape == input_ids.shape[:1]
            if not fits or (readable and not bool(((t > 0) & (t <= 1)).all())):
                raise ValueError(
                    f"t: got shape {tuple(t.shape)}, values {t}, expected [{len(input_ids)}] in (0, 1]"
                )
        counted = (
            torch.ones_like(input_ids, dtype=torch.bool)
            if attention_mask is None
            else boolean("attention_mask", attention_mask)
        )
        if prompt_mask is not None:
            if not isinstance(prompt_mask, Tensor):
                raise TypeError(f"prompt_mask: got {type(prompt_mask).__name__}, expected a tensor [B, L]")
            if prompt_mask.shape != input_ids.shape:
                raise ValueError(
                    f"prompt_mask: got shape {tuple(prompt_mask.shape)}, expected {tuple(input_ids.shape)}"
                )
            counted = counted & ~boolean("prompt_mask", prompt_mask)
        num_tokens = counted.sum()
        if readable and not int(num_tokens):
            raise ValueError("attention_mask, prompt_mask: no token is left to count")
        t, masked, dropout_seed = draws.corruption(~counted, t, bool(self.config.dropout), seed)
        noisy = torch.where(masked, self.config.mask_token_id, input_ids)
        t = t.to(input_ids.device)
        sigma = diffusion.sigma(t) if self.config.time_conditioning else None
        keys = attention_mask if self.config.key_padding_mask else None
        hidden = self.hidden(noisy, sigma, num_loops=loops, attention_mask=keys, dropout_seed=dropout_seed)
        nll_sum, _ = vocabulary.masked_cross_entropy(
            hidden,
            self.head(sigma),
            input_ids,
            masked,
            diffusion.loss_weight(t)[:, None].expand(masked.shape),
            compute_dtype=self.compute_dtype,
        )
        if num_loops is None:
            self._say_if_trained(nll_sum)
        return LossOutput(nll_sum / num_tokens, nll_sum.detach(), num_tokens, t, loops)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors into the folder `path`, each one whole or not at all."""
        from loopmdm.model.checkpoint import save_pretrained

        save_pretrained(self, path)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        config: LoopMDMConfig | None = None,
        **overrides: Any,
    ) -> LoopMDM:
        """Load what `save_pretrained` wrote, from a folder or a Hugging Face hub id, on the CPU in eval mode.

        `revision` names a hub commit, `overrides` replace fields of the stored configuration. `config` takes
        the place of a config.json, which checkpoints of other trainers may lack.
        """
        from loopmdm.model.checkpoint import load_pretrained

        return load_pretrained(cls, path_or_hub_id, revision=revision, config=config, **overrides)

    @classmethod
    def from_mdlm(cls, path_or_module: Any, **options: Any) -> LoopMDM:
        """Load a reference (MDLM) checkpoint unchanged; see `loopmdm.mdlm.from_mdlm`."""
        from loopmdm.mdlm import from_mdlm

        return from_mdlm(cls, path_or_module, **options)
