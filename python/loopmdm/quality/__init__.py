"""Quality of samples: diversity, and how probable an autoregressive scorer finds them."""

from loopmdm.quality.diversity import distinct_n, self_bleu, unigram_entropy

__all__ = ["distinct_n", "self_bleu", "unigram_entropy"]
