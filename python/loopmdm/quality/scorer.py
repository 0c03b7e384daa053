"""Autoregressive scorers: one trained by this package, or any causal language model of `transformers`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from loopmdm.data import tokenizer as tokenizers
from loopmdm.data.tokenizer import Tokenizer
from loopmdm.formats.folders import CONFIG_FILE, locate, read_json
from loopmdm.model.checkpoint import MODEL_TYPES
from loopmdm.model.modes import evaluating
from loopmdm.quality.causal import CausalLM
from loopmdm.quality.samples import check_samples, lengths

BATCH = 16
_CONTEXT = 1024  # of a model of `transformers` whose configuration names none

# (ids [B, W], counted [B, W]) -> -log p of the counted ids given those before them in the window, [B, W]
TokenNLL = Callable[[Tensor, Tensor], Tensor]


class Scorer(Protocol):
    """Rates samples by their probability under an autoregressive model."""

    @property
    def name(self) -> str:
        """What a figure says it was scored with."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Of the samples, for the bytes of their text; None if not known."""

    def nll(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """-log p of each sample in nats [N] float64, and how many of the scorer's tokens that sums over [N].

        tokens: [N, L] integers, -1 behind the end of a sample.
        """


class CausalScorer:
    """A `CausalLM` as a scorer; every token of a sample is counted, the first one too."""

    def __init__(self, model: CausalLM, tokenizer: Tokenizer | None = None, name: str = "CausalLM") -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name

    def nll(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As `Scorer.nll`; samples longer than the model's max_length are read in overlapping windows."""
        config = self.model.config
        tokens = check_samples(tokens, config.mask_token_id)
        if int(tokens.max()) >= config.vocab_size:
            raise ValueError(
                f"tokens: got the id {int(tokens.max())}, but the scorer {self.name} has {config.vocab_size}"
                " tokens: samples and scorer need the same tokenizer"
            )
        rows = self.rows_of(tokens, [], tokens.shape[1])
        filler = int(config.mask_token_id == 0)
        return score_rows(self.token_nll, rows, context=config.max_length, unscored=0, filler=filler)

    @property
    def context(self) -> int:
        return self.model.config.max_length

    @property
    def eos_token_id(self) -> int | None:
        return None if self.tokenizer is None else self.tokenizer.eos_token_id

    @property
    def refused_id(self) -> int | None:
        """An id that may not be read."""
        return self.model.config.mask_token_id

    def rows_of(self, tokens: Tensor, texts: list[str], most: int) -> list[Tensor]:
        """What Duo scores of samples [N, L] and their texts, `most` tokens of each: the samples, which are of
        the same tokenizer.
        """
        return [row[: min(size, most)] for row, size in zip(tokens, lengths(tokens).tolist(), strict=True)]

    def token_nll(self, ids: Tensor, counted: Tensor) -> Tensor:
        """-log p of the counted ids given those before them, [B, W], 0 elsewhere."""
        with evaluating([self.model]):
            return self.model.token_nll(ids.to(self.model.device), counted.to(self.model.device))

    @torch.no_grad()
    def features(self, tokens: Tensor, texts: list[str], max_length: int) -> Tensor:
        """Last hidden state of the last token of each sample [N, L], float32 [N, D] on the CPU."""
        rows = self.rows_of(check_samples(tokens), texts, min(max_length, self.context))
        with evaluating([self.model]):
            states = [
                self.model.norm_final(self.model.hidden(row[None].to(self.model.device)))[0, -1]
                for row in rows
            ]
        return torch.stack(states).float().cpu()


class TransformersScorer:
    """Any causal language model of `transformers` in a local folder.

    Its tokens are not those of the samples: they are decoded to text and encoded again.

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
        return score_rows(self.token_nll, rows, context=context, unscored=1, filler=0)

    @property
    def context(self) -> int:
        """Tokens that Duo and mauve-text have it read at once: 1024, or its context where that is less."""
        return min(_CONTEXT, getattr(self.model.config, "max_position_embeddings", None) or _CONTEXT)

    @property
    def eos_token_id(self) -> int | None:
        end: int | None = self.encoder.eos_token_id
        return end

    @property
    def refused_id(self) -> int | None:
        """An id that may not be read: there is none."""
        return None

    def rows_of(self, tokens: Tensor, texts: list[str], most: int) -> list[Tensor]:
        """What Duo scores of samples and their texts: these, `most` tokens of each, and one of padding."""
        encoded = self._encoded(texts, most)
        longest = max(map(len, encoded))
        padding = [] if self.eos_token_id is None else [self.eos_token_id]
        rows = [ids if len(ids) == longest else [*ids, *padding] for ids in encoded]
        return [torch.tensor(ids, dtype=torch.int64) for ids in rows]

    def _encoded(self, texts: list[str], most: int) -> list[list[int]]:
        ids: list[list[int]] = self.encoder(texts, truncation=True, max_length=most)["input_ids"]
        return ids

    @torch.no_grad()
    def features(self, tokens: Tensor, texts: list[str], max_length: int) -> Tensor:
        """Last hidden state of the last token of each text, float32 [N, D] on the CPU."""
        rows = self._encoded(texts, min(max_length, self.context))
        states = []
        with evaluating([self.model]):
            for row in rows:
                ids = torch.tensor([row], device=self.model.device)
                states.append(self.model(ids, output_hidden_states=True).hidden_states[-1][0, -1])
        return torch.stack(states).float().cpu()

    def token_nll(self, ids: Tensor, counted: Tensor) -> Tensor:
        """-log p of ids [B, W] given those before them in the window, 0 of the first."""
        ids = ids.to(self.model.device)
        # Attention is causal and the filler is at the end, so no mask is needed.
        with evaluating([self.model]):
            logits = self.model(ids).logits[:, :-1]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nll = -wide.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return torch.cat([torch.zeros_like(nll[:, :1]), nll], dim=1)


def load_scorer(
    path: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    *,
    device: torch.device | str = "cpu",
) -> CausalScorer | TransformersScorer:
    """The scorer in a local folder: a run of `loopmdm train --autoregressive`, or a model of `transformers`.

    Args:
        path: the folder.
        tokenizer: of the samples. A scorer of this package brings its own, which must be the same one; one of
            `transformers` has another, so that samples must be turned into text.
        device: where to compute.

    Raises:
        FileNotFoundError, ValueError: no scorer, damaged files, or another tokenizer.
        ImportError: the model needs `transformers`, which is not installed.
    """
    if not Path(path).is_dir():
        raise FileNotFoundError(f"path: got {str(path)!r}, expected the folder of a scorer")
    model_type = read_json(locate(path, CONFIG_FILE)).get("model_type", next(iter(MODEL_TYPES)))
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        return TransformersScorer.load(path, tokenizer, device)
    model = CausalLM.from_pretrained(path).to(device)
    if (Path(path) / tokenizers.CONFIG_FILE).is_file():
        own = tokenizers.load_tokenizer(path)
        if tokenizer is not None and tokenizer.fingerprint != own.fingerprint:
            raise ValueError(
                f"the scorer {path} was trained with another tokenizer than the samples were made with"
                f" ({own.kind}, {own.vocab_size} tokens; theirs: {tokenizer.kind}, {tokenizer.vocab_size})"
            )
        tokenizer = own
    return CausalScorer(model, tokenizer, str(path))


@torch.no_grad()
def score_rows(
    token_nll: TokenNLL, rows: list[Tensor], *, context: int, unscored: int, filler: int
) -> tuple[Tensor, Tensor]:
    """Sum of -log p over the tokens of each row, and how many were counted, both [N].

    A row longer than `context` is read in windows that overlap by half, so that behind the first window every
    token is scored with at least half a context before it.

    Args:
        rows: N tensors of ids.
        unscored: leading ids of a row that are read only.
        filler: an id that the model accepts, put behind the end of shorter rows.
    """
    sums = torch.zeros(len(rows), dtype=torch.float64)
    counts = torch.zeros(len(rows), dtype=torch.int64)
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=filler)
        sizes = torch.tensor([len(row) for row in part])
        for begin, end, fresh in windows(ids.shape[1], context):
            position = torch.arange(begin, end)
            counted = (position >= max(fresh, unscored)) & (position < sizes[:, None])
            nll = token_nll(ids[:, begin:end], counted).double().cpu()
            sums[start : start + len(part)] += torch.where(counted, nll, 0.0).sum(1)
            counts[start : start + len(part)] += counted.sum(1)
    return sums, counts


def windows(length: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first position to score) of windows of at most `context` over `length` positions."""
    end = min(length, context)
    yield 0, end, 0
    while end < length:
        fresh, end = end, min(length, end + max(1, context // 2))
        yield end - context, end, fresh
