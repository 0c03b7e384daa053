"""What a training run is made of, apart from the model and the data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from loopmdm.model.between import LoopLoss, check_loop_loss
from loopmdm.printable import printable
from loopmdm_kernels.values import meant, real, whole

Schedule = Literal["constant", "cosine", "linear"]
Precision = Literal["fp32", "bf16"]
OptimizerName = Literal["adamw", "muon"]

# May differ between a checkpoint and the run that resumes it; every other field shapes the numbers.
RESUMABLE_CHANGES = frozenset(
    {
        "steps",
        "checkpoint_every",
        "checkpoint_minutes",
        "eval_every",
        "log_every",
        "recompute",
        "compile",
        "spike",
    }
)


@dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters of a run; the defaults of the optimizer are those of MDLM.

    batch_size: sequences in one micro-batch of one rank. accumulation: micro-batches of an optimizer step.
    schedule: what the learning rate does after the warm-up. `constant` keeps it; `cosine` and `linear` keep
    it and then bring it to 0 over the last `decay_fraction` of all steps.
    clip: largest norm of the gradient, None for no limit. ema: decay of the averaged weights.
    loop_law: law of the loop count S, see `loopmdm.LoopLaw.parse`.
    checkpoint_every, eval_every, log_every: in optimizer steps, 0 for never (a checkpoint is always written
    at the end). checkpoint_minutes: also write one when the last is that old; 0 for never.
    recompute: keep the activations of one block only and recompute the others in the backward pass.
    optimizer: `muon` moves the matrices of the blocks by torch.optim.Muon, at the same learning rate (its
    updates scaled to the size of AdamW's), and the rest by AdamW.
    backprop_loops: differentiate through the last k loops only; 0 for all. In a step with more loops what
    stands before them (embedding and blocks before the loop) gets no gradient.
    loop_loss: which loops are read out and get a loss: the `last`, as in LoopMDM; all alike, `mean`; or
    `linear`, loop k with a weight in proportion to k. The weights sum to 1.
    compile: compile the passes by torch.compile, in at most two graphs for all S.
    spike: warn of a loss so many times the median of the last 100, and save its batch; 0 for never.
    """

    steps: int
    batch_size: int = 32
    accumulation: int = 1
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 2500
    schedule: Schedule = "constant"
    decay_fraction: float = 0.2
    clip: float | None = 1.0
    ema: float = 0.9999
    precision: Precision = "fp32"
    loop_law: str = "uniform"
    seed: int = 0
    checkpoint_every: int = 0
    checkpoint_minutes: float = 10.0
    eval_every: int = 0
    log_every: int = 10
    recompute: bool = False
    optimizer: OptimizerName = "adamw"
    backprop_loops: int = 0
    loop_loss: LoopLoss = "last"
    compile: bool = False
    spike: float = 10.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation"):
            self._require(name, int, 1, math.inf)
        for name in ("warmup_steps", "checkpoint_every", "eval_every", "log_every", "seed", "backprop_loops"):
            self._require(name, int, 0, math.inf)
        for name in ("learning_rate", "eps"):
            self._require(name, float, math.ulp(0.0), math.inf)
        for name in ("weight_decay", "checkpoint_minutes", "spike"):
            self._require(name, float, 0.0, math.inf)
        self._require("decay_fraction", float, 0.0, 1.0)
        self._require("ema", float, 0.0, 1.0)
        if self.clip is not None:
            self._require("clip", float, math.ulp(0.0), math.inf)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        betas = tuple(real(beta) for beta in self.betas)
        if not all(beta is not None and 0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        object.__setattr__(self, "betas", betas)
        choices = {"schedule": Schedule, "precision": Precision, "optimizer": OptimizerName}
        for name, accepted in ((name, get_args(kind)) for name, kind in choices.items()):
            if getattr(self, name) not in accepted:
                got = getattr(self, name)
                raise ValueError(
                    f"{name} must be one of {', '.join(accepted)}, got {got!r}{meant(got, accepted)}"
                )
        if not isinstance(self.loop_law, str):
            raise TypeError(f"loop_law must be a string, got {type(self.loop_law).__name__}")
        for name in ("recompute", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")

        if self.compile and self.backprop_loops:
            raise ValueError("compile and backprop_loops: got both, expected one of them")
        check_loop_loss(self.loop_loss, backprop_loops=self.backprop_loops)
        if self.compile and self.loop_loss != "last":
            raise ValueError(f"compile and loop_loss {self.loop_loss}: got both, expected one of them")

    def _require(self, name: str, kind: type, low: float, high: float) -> None:
        value = getattr(self, name)
        number = whole(value) if kind is int else real(value)
        if number is None:
            raise TypeError(f"{name} must be {kind.__name__}, got {value!r}")
        object.__setattr__(self, name, number)
        value = number
        if not math.isfinite(value) or not low <= value <= high:
            if low == math.ulp(0.0):
                accepted = "positive"
            elif high == math.inf:
                accepted = f"at least {low:g}"
            else:
                accepted = f"in [{low:g}, {high:g}]"
            raise ValueError(f"{name} must be {accepted} and finite, got {value!r}")

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0.

        The warm-up is linear and its first step already moves: (step + 1) / warmup_steps.
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        decay_start = max(self.warmup_steps, self.steps - round(self.decay_fraction * self.steps))
        if self.schedule == "constant" or step < decay_start:
            return self.learning_rate
        progress = min(1.0, (step - decay_start) / (self.steps - decay_start)) if step < self.steps else 1.0
        if self.schedule == "linear":
            return self.learning_rate * (1.0 - progress)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON values that `from_dict` turns back into an equal config."""
        values = asdict(self)
        values["betas"] = list(self.betas)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Build a config; an unknown key is an error that lists the known ones."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            close = "".join(meant(name, known) for name in unknown)
            raise ValueError(
                f"unknown training option {printable(', '.join(unknown))}; known: {', '.join(known)}{close}"
            )
        return cls(**values)

    def differences(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Fields that change the numbers of a run and differ: name -> (own value, other's value)."""
        mine, theirs = self.to_dict(), other.to_dict()
        return {
            name: (mine[name], theirs[name])
            for name in mine
            if name not in RESUMABLE_CHANGES and mine[name] != theirs[name]
        }
