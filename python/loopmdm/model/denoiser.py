"""LoopMDM: MDLM's diffusion transformer whose early-middle blocks are applied S times.

The network is three calls of `looped_blocks` (before, in and after the loop: see `stages`) and one op on
the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor

from loopmdm.model import diffusion, draws, inputs, vocabulary
from loopmdm.model.between import check_loop_loss, loop_weights
from loopmdm.model.config import LoopMDMConfig
from loopmdm.model.masks import counted_tokens
from loopmdm.model.modes import say_if_trained
from loopmdm.model.network import Network
from loopmdm.model.parallel import check_averaged
from loopmdm.model.readers import READERS
from loopmdm.model.stages import Exit, Stages
from loopmdm_kernels.ops import checks
from loopmdm_kernels.tracing import traced, transformed


class LossOutput(NamedTuple):
    loss: Tensor  # scalar, nats per counted token: nll_sum / num_tokens, or `loop_loss`'s mean over loops
    nll_sum: Tensor  # scalar, NELBO of the last loop summed over the counted tokens
    num_tokens: Tensor  # scalar int64: real tokens that are not prompt, masked or not
    t: Tensor  # [B]
    num_loops: int | Tensor  # a tensor [1] in a compiled graph that drew it


class LoopMDM(Network):
    """A looped masked diffusion language model.

    `state_dict()` has the names and shapes of the reference model (MDLM's DIT); the loop is configuration
    only, so the parameters do not depend on the number of loops. Only what a configuration turns on between
    loops has weights of its own, in `between` (see `loopmdm.model.between`).

    The CPU kernels read copies of the weights in a layout of their own. In-place operations on a parameter
    and optimizer steps are always seen, writes through `.data` or numpy in matrices of up to 1 MB too. In
    larger ones such a write of less than 2 KB in a row (32 KB beyond 16 MB), for example of a single row, can
    pass unseen: call `torch.autograd.graph.increment_version(parameter)` after it.
    """

    model_type: ClassVar[str] = "loopmdm"
    config_class: ClassVar[type[LoopMDMConfig]] = LoopMDMConfig

    def stages(
        self,
        input_ids: Tensor | None,
        sigma: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        dropout_seed: int | Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Stages:
        """One forward pass of input_ids [B, L] cut at the loop, to be run and looked at stage by stage.

        inputs_embeds: [B, L, D] in place of the tokens' embeddings; `input_ids` is None then.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of them")
        if inputs_embeds is not None:
            inputs.check_embeds(inputs_embeds, sigma, attention_mask, self.config, self.device)
            input_ids = inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.int64)
        else:
            assert input_ids is not None
            inputs.check(input_ids, sigma, attention_mask, self.config, self.device)
        return Stages(self, input_ids, sigma, attention_mask, dropout_seed, inputs_embeds)

    def hidden(
        self,
        input_ids: Tensor | None,
        sigma: Tensor | None = None,
        *,
        num_loops: int | Tensor | None = None,
        attention_mask: Tensor | None = None,
        exit: Exit | None = None,
        min_loops: int = 1,
        dropout_seed: int | Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """Residual stream [B, L, D] before the final layer; with `exit`, (it, loops used [B]).

        exit ends the loop of a sequence before `num_loops`, and after `min_loops` at the earliest.
        inputs_embeds: as in `stages`.
        """
        stages = self.stages(
            input_ids,
            sigma,
            attention_mask=attention_mask,
            dropout_seed=dropout_seed,
            inputs_embeds=inputs_embeds,
        )
        loops = self.default_loops() if num_loops is None else num_loops
        if exit is not None:
            if not isinstance(exit, Exit):
                raise TypeError(
                    f"exit must be an ExitRule such as HiddenChange(0.1), got {type(exit).__name__}"
                )
            return exit.run(stages, loops, min_loops)
        hidden = stages.after(self._looped(stages, loops))
        if num_loops is None and not torch.compiler.is_compiling():
            self._say_if_trained(hidden)
        return hidden

    def _looped(self, stages: Stages, loops: int | Tensor) -> Tensor:
        """H(S), differentiable through the last `backprop_loops` loops, where that is set."""
        kept = self.backprop_loops
        if not kept or not torch.is_grad_enabled() or not isinstance(loops, int) or loops <= kept:
            out: Tensor = stages.loop(stages.before(), loops)
            return out
        with torch.no_grad():
            hidden = stages.loop(stages.before(), loops - kept, total=loops)
        out = stages.loop(hidden, kept, done=loops - kept, total=loops)
        return out

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
        if prompt_mask is not None:
            if not isinstance(prompt_mask, Tensor):
                raise TypeError(f"prompt_mask: got {type(prompt_mask).__name__}, expected a tensor [B, L]")
            if prompt_mask.shape != input_ids.shape:
                raise ValueError(
                    f"prompt_mask: got shape {tuple(prompt_mask.shape)}, expected {tuple(input_ids.shape)}"
                )
        counted = counted_tokens(input_ids, attention_mask, prompt_mask)
        num_tokens = counted.sum()
        if readable and not int(num_tokens):
            raise ValueError("attention_mask, prompt_mask: no token is left to count")
        t, masked, dropout_seed = draws.corruption(~counted, t, bool(self.config.dropout), seed)
        noisy = torch.where(masked, self.config.mask_token_id, input_ids)
        t = t.to(input_ids.device)
        sigma = diffusion.sigma(t) if self.config.time_conditioning else None
        keys = attention_mask if self.config.key_padding_mask else None
        weight = diffusion.loss_weight(t)[:, None].expand(masked.shape)

        def nelbo(hidden: Tensor) -> Tensor:
            total, _ = vocabulary.masked_cross_entropy(
                hidden, self.head(sigma), input_ids, masked, weight, compute_dtype=self.compute_dtype
            )
            return total

        options: dict[str, Any] = {"attention_mask": keys, "dropout_seed": dropout_seed}
        if self.loop_loss == "last" or not torch.is_grad_enabled():
            loss_sum = nll_sum = nelbo(self.hidden(noisy, sigma, num_loops=loops, **options))
        else:
            outputs = self._each_loop(self.stages(noisy, sigma, **options), int(loops))
            sums = [nelbo(hidden) for hidden in outputs]
            weights = loop_weights(self.loop_loss, len(sums))
            loss_sum = torch.stack([w * one for w, one in zip(weights, sums, strict=True)]).sum()
            nll_sum = sums[-1]
        if num_loops is None:
            self._say_if_trained(nll_sum)
        return LossOutput(loss_sum / num_tokens, nll_sum.detach(), num_tokens, t, loops)

    def _each_loop(self, stages: Stages, num_loops: int) -> Iterator[Tensor]:
        """What the head reads after loop 1..S, each [B, L, D]."""
        check_loop_loss(self.loop_loss, damped=self.config.damped, backprop_loops=self.backprop_loops)
        state = stages.before()
        for loop in range(num_loops):
            state = stages.loop(state, done=loop, total=num_loops)
            yield stages.after(state)

    @classmethod
    def from_mdlm(cls, path_or_module: Any, **options: Any) -> LoopMDM:
        """Load a reference (MDLM) checkpoint unchanged; see `loopmdm.mdlm.from_mdlm`."""
        model: LoopMDM = READERS["mdlm"](cls, path_or_module, **options)
        return model
