"""Quality of samples: diversity, and how probable an autoregressive scorer finds them."""

from loopmdm.quality.diversity import distinct_n, self_bleu, unigram_entropy
from loopmdm.quality.perplexity import GenerativePerplexity, generative_perplexity, quality
from loopmdm.quality.scorer import CausalScorer, Scorer, load_scorer

__all__ = [
    "CausalScorer",
    "GenerativePerplexity",
    "Scorer",
    "distinct_n",
    "generative_perplexity",
    "load_scorer",
    "quality",
    "self_bleu",
    "unigram_entropy",
]
