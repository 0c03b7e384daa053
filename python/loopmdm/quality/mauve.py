"""MAUVE (Pillutla et al. 2021) of samples beside human text, by the package mauve-text.

A value depends on the model that the features are of, on how many texts there are and how long they are, and
on the seed of its clustering; all of them stand beside it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from loopmdm.data.tokenizer import Tokenizer
from loopmdm.quality.duo_samples import texts_of
from loopmdm.quality.scorer import CausalScorer, TransformersScorer

MAX_TEXT_LENGTH = 1024  # tokens of the featuriser; the default of mauve-text, as its seed is
SEED = 25


def mauve(
    featurizer: CausalScorer | TransformersScorer, human: Tensor, samples: Tensor, tokenizer: Tokenizer
) -> dict[str, Any]:
    """MAUVE of samples [N, L] beside human text [M, L], both token ids with -1 behind the end of one.

    The features of a text are the last hidden state of its last token, as in mauve-text, whose `p` is the
    human text and `q` the samples. Nothing is downloaded.

    Raises:
        ImportError: mauve-text is not installed.
    """
    compute_mauve = needed()
    features = [
        featurizer.features(tokens, texts_of(tokens, tokenizer), MAX_TEXT_LENGTH).numpy()
        for tokens in (human, samples)
    ]
    found = compute_mauve(p_features=features[0], q_features=features[1], seed=SEED, verbose=False)
    return {
        "value": float(found.mauve),
        "frontier_integral": float(found.frontier_integral),
        "human": len(human),
        "samples": len(samples),
        "featurizer": featurizer.name,
        "max_text_length": min(MAX_TEXT_LENGTH, featurizer.context),
        "buckets": int(found.num_buckets),
        "seed": SEED,
    }


def needed() -> Any:
    """`compute_mauve` of mauve-text.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from mauve import compute_mauve
    except ImportError as error:
        raise ImportError(f"MAUVE needs the package mauve-text: pip install mauve-text ({error})") from error
    return compute_mauve
