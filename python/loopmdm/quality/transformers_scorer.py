"""Any causal language model of `transformers` in a local folder, as a scorer."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from loopmdm.data.tokenizer import Tokenizer
from loopmdm.model.modes import evaluating
from loopmdm.quality.samples import check_samples, lengths
from loopmdm.quality.scorer import score_rows

_CONTEXT = 1024  # where the model's configuration names none


class TransformersScorer:
    """Its tokens are not those of the samples: they are decoded to text and encoded again.

    Perplexity is then per token of the scorer, and comparable between figures of the same scorer only; bits
    per byte are comparable between all. Marks of begin and end are no text and are left out. Where the scorer
    has a begin-of-text token it is put in front and every token is counted, else all but the first.
    """

    def __init__(self, model: Any, encoder: Any, tokenizer: Tokenizer, name: str) -> None:
        """Take what `AutoModelForCausalLM` and `AutoTokenizer` give, and the tokenizer of the samples."""
        self.model, self.encoder, self.tokenizer, self.name = model, encoder, tokenizer, name

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], tokenizer: Tokenizer | None, device: torch.device | str
    ) -> TransformersScorer:
        """See `load_scorer`; nothing is downloaded."""
        if tokenizer is None:
            raise ValueError(
                f"tokenizer: the scorer {path} reads text; give the tokenizer the samples were made with"
            )
        try:
            import transformers
        except ImportError as error:
            raise ImportError(
                f"the scorer {path} is a model of transformers, which is not installed:"
                " pip install 'loopmdm-kernels[hf]'"
            ) from error
        try:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
            encoder = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(f"transformers cannot read the scorer {path}: {error}") from error
        return cls(model.to(device), encoder, tokenizer, str(path))

    def nll(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As `Scorer.nll`; text longer than the model's context is read in overlapping windows."""
        tokens = check_samples(tokens, self.tokenizer.mask_token_id)
        texts = [
            self.tokenizer.decode(row[:size])
            for row, size in zip(tokens, lengths(tokens).tolist(), strict=True)
        ]
        opening = [] if self.encoder.bos_token_id is None else [self.encoder.bos_token_id]
        encoded = self.encoder(texts, add_special_tokens=False)["input_ids"]
        rows = [torch.tensor([*opening, *ids], dtype=torch.int64) for ids in encoded]
        context = getattr(self.model.config, "max_position_embeddings", None) or _CONTEXT
        return score_rows(self._token_nll, rows, context=context, unscored=1, filler=0)

    def _token_nll(self, ids: Tensor, counted: Tensor) -> Tensor:
        ids = ids.to(self.model.device)
        # Attention is causal and the filler is at the end, so no mask is needed.
        with evaluating([self.model]):
            logits = self.model(ids).logits[:, :-1]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = -wide.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return torch.cat([torch.zeros_like(nll[:, :1]), nll], dim=1)
