"""Generative perplexity, and everything measured about a set of samples."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from loopmdm.quality.bootstrap import Bootstrap, Floats
from loopmdm.quality.diversity import distinct_n, self_bleu, unigram_entropy
from loopmdm.quality.samples import check_samples, lengths
from loopmdm.quality.scorer import Scorer

RESAMPLES = 2000


class GenerativePerplexity(NamedTuple):
    """Samples as an autoregressive model sees them. Low is probable, which repetitive text is as well."""

    value: float  # exp of the mean of `per_sample`
    per_sample: Tensor  # [N] float64, nats per token of the scorer: (1/L_n) sum over i of -log p(y_i | y_<i)
    nll_sum: Tensor  # [N] float64, nats
    num_bytes: Tensor | None  # [N] float64, UTF-8 bytes of each sample's text; None if not known

    @property
    def bits_per_byte(self) -> float | None:
        """-log2 p of all samples over the bytes of their text: comparable between scorers."""
        if self.num_bytes is None or not float(self.num_bytes.sum()):
            return None
        return float(self.nll_sum.sum() / math.log(2) / self.num_bytes.sum())


def generative_perplexity(scorer: Scorer, tokens: Tensor) -> GenerativePerplexity:
    """exp(-(1/N) sum over n of (1/L_n) sum over i of log p_AR(y_i | y_<i)); samples weigh the same.

    tokens: [N, L] integers, -1 behind the end of a sample.

    Raises:
        ValueError: masks left in a sample, or a sample without a token for the scorer.
    """
    tokens = check_samples(tokens, None if scorer.tokenizer is None else scorer.tokenizer.mask_token_id)
    nll_sum, counted = scorer.nll(tokens)
    if not bool((counted > 0).all()):
        empty = int((counted <= 0).nonzero()[0])
        raise ValueError(f"tokens: sample {empty} has no text that the scorer {scorer.name} could count")
    per_sample = nll_sum / counted
    num_bytes = None
    if scorer.tokenizer is not None:
        sizes = lengths(tokens).tolist()
        text_bytes = scorer.tokenizer.text_bytes
        num_bytes = torch.tensor(
            [text_bytes(row[:size]) for row, size in zip(tokens, sizes, strict=True)], dtype=torch.float64
        )
    return GenerativePerplexity(float(per_sample.mean().exp()), per_sample, nll_sum, num_bytes)


def quality(
    tokens: Tensor,
    scorer: Scorer | None = None,
    *,
    mask_token_id: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Every metric of a set of samples, each {value, stderr, low, high} by a bootstrap over samples.

    Self-BLEU is the mean over samples; its error is that of the mean with the references as they are. With a
    scorer there are also `generative_perplexity`, `bits_per_byte` (None if bytes are not known) and `scorer`.

    Args:
        tokens: [N, L] integers, -1 behind the end of a sample; at least two samples of three tokens.
        scorer: see `load_scorer`.
        mask_token_id: raise where a sample holds it.
        resamples, seed: of the bootstrap.
    """
    tokens = check_samples(tokens, mask_token_id, least=2)
    bootstrap = Bootstrap(len(tokens), resamples=resamples, seed=seed)
    columns = {
        "unigram_entropy": unigram_entropy(tokens),
        "distinct_2": distinct_n(tokens, 2),
        "distinct_3": distinct_n(tokens, 3),
        "self_bleu": self_bleu(tokens),
    }
    figures: dict[str, Any] = {
        "samples": len(tokens),
        "bootstrap": {"resamples": resamples, "seed": seed, "level": bootstrap.level},
        **{
            name: _estimate(bootstrap, column.mean(), bootstrap.means(column))
            for name, column in columns.items()
        },
    }
    if scorer is None:
        return figures
    scored = generative_perplexity(scorer, tokens)
    bits = None
    if scored.num_bytes is not None and scored.bits_per_byte is not None:
        resampled = bootstrap.ratios(scored.nll_sum / math.log(2), scored.num_bytes)
        bits = _estimate(bootstrap, scored.bits_per_byte, resampled)
    resampled = np.exp(bootstrap.means(scored.per_sample))
    return figures | {
        "scorer": scorer.name,
        "generative_perplexity": _estimate(bootstrap, scored.value, resampled),
        "bits_per_byte": bits,
    }


def _estimate(bootstrap: Bootstrap, value: float | Tensor, resampled: Floats) -> dict[str, float]:
    interval = bootstrap.interval(float(value), resampled)
    return {
        "value": float(value),
        "stderr": float(np.nanstd(resampled, ddof=1)),
        "low": float(interval.low),
        "high": float(interval.high),
    }
