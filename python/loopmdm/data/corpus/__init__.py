"""A corpus on disk: tokenised once into shards, then trained on without being held in memory."""

from loopmdm.data.corpus.build import Settings, build_corpus
from loopmdm.data.corpus.data import CorpusData
from loopmdm.data.corpus.store import Corpus, is_corpus
from loopmdm.data.corpus.stream import CorpusStream, GrowingCorpus, StreamData

__all__ = [
    "Corpus",
    "CorpusData",
    "CorpusStream",
    "GrowingCorpus",
    "Settings",
    "StreamData",
    "build_corpus",
    "is_corpus",
]
