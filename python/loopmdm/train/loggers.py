"""The records of a run for other programs: TensorBoard, and Weights & Biases without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from loopmdm.train.metrics import results

NAMES = ("tensorboard", "wandb")


class Logger(Protocol):
    """Takes the records of metrics.jsonl."""

    def write(self, record: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class TensorBoardLogger:
    """Event files in `tensorboard/` of the run's folder."""

    def __init__(self, folder: Path, *, pairs: bool = False) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("--log tensorboard needs a package: pip install tensorboard") from error
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))
        self._pairs = pairs

    def write(self, record: dict[str, Any]) -> None:
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record["step"])
        for name, text in texts(record, pairs=self._pairs):
            self._writer.add_text(name, text, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """An offline run in `wandb/` of the run's folder, which `wandb sync` sends when you say so."""

    def __init__(self, folder: Path, config: dict[str, Any], *, pairs: bool = False) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("--log wandb needs a package: pip install wandb") from error
        self._table: Any = wandb.Table
        self._pairs = pairs
        self._run: Any = wandb.init(
            mode="offline", dir=str(folder), project="loopmdm", name=folder.name, config=config
        )

    def write(self, record: dict[str, Any]) -> None:
        values: dict[str, Any] = dict(scalars(record))
        samples = [list(row) for row in texts(record, pairs=self._pairs)]
        if samples:
            values["samples"] = self._table(columns=["sample", "text"], data=samples)
        self._run.log(values, step=record["step"])

    def close(self) -> None:
        self._run.finish()


def scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a record, by names with slashes: train/loss, held_out/nll_S4, solved/confidence_S4."""
    for name, value in record.items():
        if name != "step" and isinstance(value, (int, float)):
            yield f"train/{name}", value
    for one in results(record, "held_out"):
        yield f"held_out/nll_S{one['num_loops']}", one["nll"]
    for one in results(record, "solved"):
        yield f"solved/{one['order']}_S{one['num_loops']}", one["share_solved"]


def texts(record: dict[str, Any], *, pairs: bool = False) -> Iterator[tuple[str, str]]:
    """The samples of a record, by names such as samples/S4_1, with what they begin with.

    pairs: they are responses to prompts.
    """
    seen: dict[int, int] = {}
    for one in results(record, "samples"):
        number = seen[one["num_loops"]] = seen.get(one["num_loops"], 0) + 1
        # A puzzle or question and what answers it, not a text and how it goes on.
        gap = "\n" if "solved" in one or (pairs and one["prompt"]) else ""
        yield f"samples/S{one['num_loops']}_{number}", one["prompt"] + gap + one["text"]


def logger(name: str, folder: Path, config: dict[str, Any], *, pairs: bool = False) -> Logger:
    """One of `NAMES`. pairs: of a run on prompts and responses, which are shown apart.

    Raises:
        ImportError: its package is not installed.
    """
    if name == "tensorboard":
        return TensorBoardLogger(folder, pairs=pairs)
    return WandbLogger(folder, config, pairs=pairs)
