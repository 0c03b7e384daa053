"""Training: `Trainer`, its configuration and what it leaves behind."""

from loopmdm.data.batches import Batch, BatchSource
from loopmdm.model.checkpoint import Trainable
from loopmdm.train.batches import batch_source
from loopmdm.train.config import TrainConfig
from loopmdm.train.ema import EMA
from loopmdm.train.evaluation import SharedEvaluation
from loopmdm.train.folder import RunFolder
from loopmdm.train.loop import Counters, NonFiniteError, Trainer
from loopmdm.train.metrics import read_metrics
from loopmdm.train.plot import plot_loss
from loopmdm.train.state import CheckpointError

__all__ = [
    "EMA",
    "Batch",
    "BatchSource",
    "CheckpointError",
    "Counters",
    "NonFiniteError",
    "RunFolder",
    "SharedEvaluation",
    "TrainConfig",
    "Trainable",
    "Trainer",
    "batch_source",
    "plot_loss",
    "read_metrics",
]
