"""A LoopMDM with the interface of transformers' masked language models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from loopmdm.hf.config import LoopMDMPretrainedConfig
from loopmdm.hf.generation import DiffusionGeneration
from loopmdm.model import LoopMDM, vocabulary
from loopmdm.model.inputs import IGNORED_LABEL
from loopmdm.model.vocabulary import AnyHead
from loopmdm_kernels.tracing import can_read


class LoopMDMForMaskedLM(PreTrainedModel, DiffusionGeneration):
    """A `LoopMDM`, which is `model`, for whatever calls a transformers model.

    Of it train `model` and not this: `model.loss` draws times and masks. `forward` computes what it is given.
    """

    config_class = LoopMDMPretrainedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["DDiTBlock"]  # noqa: RUF012
    _supports_sdpa = True  # attention is an op of its own, whatever is asked for

    def __init__(self, config: LoopMDMPretrainedConfig) -> None:
        super().__init__(config)
        self.model = LoopMDM(config.to_loopmdm())
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: modules begin as LoopMDM's do."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """As of transformers, in eval mode; a missing, unknown or unfitting tensor is an error.

        Raises:
            ValueError: with the names of such tensors.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **options)
        model, found = loaded
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if found[kind]:
                raise ValueError(f"{args[0]}: {kind.replace('_', ' ')}: {sorted(map(str, found[kind]))[:5]}")
        for parameter in model.parameters():
            # Memory of its own is aligned alike, and then every load computes the same bits.
            if type(parameter) is nn.Parameter and parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
        return (model, found) if output_loading_info else model

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Keep only loop inputs for backward."""
        self.model.gradient_checkpointing_enable()

    def gradient_checkpointing_disable(self) -> None:
        self.model.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        return bool(self.model.recompute)

    def get_input_embeddings(self) -> nn.Module:
        embedding: nn.Module = self.model.vocab_embed
        return embedding

    def get_output_embeddings(self) -> nn.Module:
        linear: nn.Module = self.model.output_layer.linear
        return linear

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> Any:
        """Nothing where the vocabulary has that size already.

        Raises:
            ValueError: it has another; the mask token's place depends on it.
        """
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"new_num_tokens: got {new_num_tokens}, but the model has {self.config.vocab_size} tokens"
            )
        return self.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        timesteps: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_loops: int | Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Logits of masked tokens and, with `labels`, their cross-entropy.

        Args:
            input_ids: [B, L] int64, with the mask token where something is to be predicted.
            attention_mask: [B, L], True or 1 at the keys that may be attended; None: all.
            timesteps: noise level sigma [B], as of the reference; read with time conditioning only.
            inputs_embeds: [B, L, D] in place of `input_ids`.
            labels: [B, L] int64, the tokens at the positions that count, -100 at all others.
            num_loops: S >= 1, or one S per sequence [B]; None: drawn in training, `max_loops` in eval mode.
            output_hidden_states: also the residual stream after the embedding and after each block, of a
                looped one after its last application: they are called one by one then, which is slower.
            return_dict: False: a tuple of what is not None.

        Returns:
            `MaskedLMOutput`: `loss`, the mean over the positions that count in nats, computed by the fused
            op; `logits` [B, L, V] in the compute dtype, None in training with `labels`, where nobody reads
            them. The mask token's logit is that of a token that is never drawn, unless
            `config.suppress_mask_token` is False.

        Raises:
            ValueError, TypeError: as `LoopMDM.forward`, and for labels that are no tokens.
        """
        states: list[Tensor] | None = None
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            loops = self.model.default_loops() if num_loops is None else num_loops
            stages = self.model.stages(
                input_ids, timesteps, attention_mask=attention_mask, inputs_embeds=inputs_embeds
            )
            states = stages.states(loops)
            hidden = states[-1]
        else:
            hidden = self.model.hidden(
                input_ids,
                timesteps,
                num_loops=num_loops,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
            )
        head = self.model.head(timesteps)
        loss = None if labels is None else self._cross_entropy(hidden, head, labels)
        logits = None
        if labels is None or not self.training:
            if self.config.suppress_mask_token:
                head = vocabulary.without_tokens(head, torch.tensor([self.config.mask_token_id]))
            logits = vocabulary.head_logits(hidden, head, compute_dtype=self.model.compute_dtype)
        out = MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=None if states is None else tuple(states)
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return out if as_dict else out.to_tuple()

    def _cross_entropy(self, hidden: Tensor, head: AnyHead, labels: Tensor) -> Tensor:
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != hidden.shape[:2]:
            got = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else labels
            raise ValueError(f"labels: got {got}, expected int64 of shape {tuple(hidden.shape[:2])}")
        counted = labels != IGNORED_LABEL
        if can_read(labels):
            known = (labels >= 0) & (labels < self.config.vocab_size) & (labels != self.config.mask_token_id)
            if bool((counted & ~known).any()):
                raise ValueError(
                    f"labels: got {int(labels[counted & ~known][0])}, expected {IGNORED_LABEL} or tokens in"
                    f" 0..{self.config.vocab_size - 1} other than the mask token {self.config.mask_token_id}"
                )
        total, _ = vocabulary.masked_cross_entropy(
            hidden,
            head,
            labels.clamp_min(0),
            counted,
            torch.ones(labels.shape, device=labels.device),
            compute_dtype=self.model.compute_dtype,
        )
        return total / counted.sum().clamp_min(1)
