"""`generate` in the manner of transformers' diffusion models: a canvas, drafts, tokens per forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils.generic import ModelOutput

from loopmdm.model import LoopMDM
from loopmdm.sampling import sample
from loopmdm.sampling.result import StepEvent

# Options of `generate` by transformers' names, and what `sample` calls them.
_RENAMED = {"max_denoising_steps": "steps", "suppress_tokens": "forbidden", "num_loops": "plan"}
_OWN = (
    "max_new_tokens",
    "max_length",
    "do_sample",
    "pad_token_id",
    "decoder_input_ids",
    "return_dict_in_generate",
)


@dataclass
class LoopMDMGenerationOutput(ModelOutput):
    """What `generate` returns.

    sequences: [B, P + N] int64, the prompts as they were given, and the N new tokens.
    tokens_per_forward: [B] float, new tokens, up to the end-of-sequence token, per network call of each.
    network_calls: [B] int64. loops: [B] int64, summed over the calls.
    """

    sequences: Tensor | None = None
    tokens_per_forward: Tensor | None = None
    network_calls: Tensor | None = None
    loops: Tensor | None = None


class DiffusionGeneration:
    """`generate` of a model that holds a `LoopMDM` as `model`."""

    model: LoopMDM

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> LoopMDMGenerationOutput | Tensor:
        """Write `max_new_tokens` behind each prompt, by `loopmdm.sample`.

        Args:
            input_ids: [B, P] int64, the prompts; None: there is none.
            attention_mask: [B, P], 0 at padding, which may stand on the left only.
            streamer: gets the prompt and the finished tokens by `put`, and after each step the canvas of new
                tokens, [B, N] with the mask token where nothing is written yet, by `put_draft` if it has one.
            generation_config: what is set in it are defaults of `options`.
            options: `max_new_tokens` or `max_length` (default: as long as the model allows),
                `max_denoising_steps` (steps of `sample`), `decoder_input_ids` ([B, N], the canvas to begin
                with: the mask token at positions to fill), `do_sample` (False: temperature 0),
                `suppress_tokens` (never drawn), `num_loops` (S, or any plan), `pad_token_id` (written behind
                ends), `return_dict_in_generate` (default True), and all others of `sample` by their names:
                `temperature`, `top_k`, `top_p`, `eos_token_id`, `order`, `seed`, `block_length`, ...

        Raises:
            ValueError, TypeError: as `sample`.
        """
        given = {**_set_in(generation_config), **options}
        own = {name: given.pop(name, None) for name in _OWN}
        for theirs, ours in _RENAMED.items():
            if theirs in given and ours in given:
                raise ValueError(f"{theirs}, {ours}: both are given, and mean the same")
            if theirs in given:
                given[ours] = given.pop(theirs)
        if own["do_sample"] is False:
            given["temperature"] = 0.0
        canvas = _Canvas(self.model, input_ids, attention_mask, own)

        def put_draft(event: StepEvent) -> None:
            canvas.write(event)
            streamer.put_draft(canvas.new.clone())

        if streamer is not None:
            if input_ids is not None:
                streamer.put(input_ids.cpu())
            if hasattr(streamer, "put_draft"):
                given["on_step"] = put_draft
        result = sample(self.model, infill=canvas.rows(), **{"progress": False, **given})
        new, behind = canvas.of_result(result.tokens), canvas.behind_ends(result.lengths)
        if own["pad_token_id"] is not None:
            new = new.masked_fill(behind, own["pad_token_id"])
        if streamer is not None:
            streamer.put(new.cpu())
            streamer.end()
        sequences = new if input_ids is None else torch.cat((input_ids, new), dim=1)
        if own["return_dict_in_generate"] is False:
            return sequences
        calls = result.network_calls
        written = (canvas.filled.to(new.device) & ~behind).sum(dim=1)
        return LoopMDMGenerationOutput(sequences, written / calls.clamp_min(1), calls, result.loops)


class _Canvas:
    """The new tokens [B, N] of a run, behind prompts of any lengths."""

    def __init__(
        self, model: LoopMDM, input_ids: Tensor | None, attention_mask: Tensor | None, own: dict[str, Any]
    ) -> None:
        config, canvas = model.config, own["decoder_input_ids"]
        if input_ids is not None and (input_ids.ndim != 2 or input_ids.dtype != torch.int64):
            raise ValueError(
                f"input_ids: got {input_ids.dtype} of shape {tuple(input_ids.shape)}, expected int64 [B, P]"
            )
        batch = 1 if input_ids is None else len(input_ids)
        prompt = torch.empty(batch, 0, dtype=torch.int64) if input_ids is None else input_ids.cpu()
        lengths = [own["max_new_tokens"], own["max_length"]]
        if canvas is not None:
            if any(length is not None for length in lengths):
                raise ValueError("decoder_input_ids: given with a length, which it has itself")
            if canvas.ndim != 2 or (input_ids is not None and len(canvas) != batch):
                raise ValueError(f"decoder_input_ids: got shape {tuple(canvas.shape)}, expected [{batch}, N]")
            self.new = canvas.cpu().clone()
            prompt = prompt.expand(len(canvas), -1)
        else:
            most = config.max_length if lengths[1] is None else lengths[1]
            count = most - prompt.shape[1] if lengths[0] is None else lengths[0]
            if count < 1:
                raise ValueError(f"max_new_tokens, max_length: they leave {count} tokens to write")
            self.new = torch.full((batch, count), config.mask_token_id)
        self.filled = self.new == config.mask_token_id
        self._prompts = [row[kept] for row, kept in zip(prompt, _kept(prompt, attention_mask), strict=True)]
        self._start = torch.tensor([len(row) for row in self._prompts])

    def rows(self) -> list[Tensor]:
        """Prompt and canvas of each sequence, as `infill` of `sample`."""
        return [torch.cat(pair) for pair in zip(self._prompts, self.new, strict=True)]

    def write(self, event: StepEvent) -> None:
        self.new[event.sequence, event.positions - self._start[event.sequence]] = event.tokens

    def of_result(self, tokens: Tensor) -> Tensor:
        return tokens.gather(1, self._places().to(tokens.device))

    def behind_ends(self, lengths: Tensor) -> Tensor:
        """Which new tokens [B, N] lie behind the end of their sequence."""
        return self._places().to(lengths.device) >= lengths[:, None]

    def _places(self) -> Tensor:
        return self._start[:, None] + torch.arange(self.new.shape[1])


def _kept(prompt: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Which tokens of the prompts are no padding."""
    if attention_mask is None:
        return torch.ones_like(prompt, dtype=torch.bool)
    kept = attention_mask.cpu().bool()
    if kept.shape != prompt.shape or bool((kept[:, :-1] & ~kept[:, 1:]).any()):
        raise ValueError(
            f"attention_mask: expected {list(prompt.shape)} with zeros on the left only: pad prompts there"
        )
    return kept


def _set_in(config: GenerationConfig | None) -> dict[str, Any]:
    """What differs from the defaults of transformers, which are made for autoregressive models."""
    if config is None:
        return {}
    noted = ("transformers_version", "bos_token_id", "_from_model_config")
    return {name: value for name, value in config.to_diff_dict().items() if name not in noted}
