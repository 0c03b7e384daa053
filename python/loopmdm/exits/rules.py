"""The rules: data, so that plans can be stored with theirs, and what following them costs."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from loopmdm.exits.judges import ArgmaxJudge, ChangeJudge, Judge, OutputJudge
from loopmdm.exits.loop import loop_by_loop, loop_to_threshold
from loopmdm.model.stages import Exit, Stages
from loopmdm.printable import printable
from loopmdm_kernels.values import integer, meant, positive, real

LEAST_CHANGE = 1e-12  # of a change whose logarithm is taken


class ExitCost(NamedTuple):
    """What a rule computed of each sequence beside the loops and the blocks after them, int64 [B]."""

    tails: Tensor  # passes of the blocks after the loop
    projections: Tensor  # times that its masked positions went through the vocabulary head


class ExitRule(Exit):
    """Stops a sequence after a loop. The first loop that may be the last is loop `min_loops`."""

    kind: ClassVar[str]

    @property
    def lookback(self) -> int:
        """Loops that a decision looks back."""
        return 1

    @property
    def threshold(self) -> float | None:
        """The threshold of `looped_blocks` that is this rule, or None: it is then applied between loops."""
        return None

    @abstractmethod
    def judge(self, stages: Stages, hidden: Tensor) -> Judge:
        """A judge that has seen the state before the first loop it is asked about."""

    def run(self, stages: Stages, num_loops: int | Tensor, min_loops: int = 1) -> tuple[Tensor, Tensor]:
        least = int(num_loops.min()) if isinstance(num_loops, Tensor) else num_loops
        earliest = integer("min_loops", min_loops)
        if not 1 <= earliest <= least:
            raise ValueError(
                f"min_loops must be in 1..{least}, the most loops of a sequence, got {min_loops}"
            )
        if self.threshold is None:
            return loop_by_loop(stages, num_loops, earliest, self.lookback, self.judge)
        return loop_to_threshold(stages, num_loops, self.threshold, earliest)

    def cost(self, used: Tensor, most: Tensor, min_loops: int) -> ExitCost:
        """What deciding cost sequences that used so many loops of at most `most`, both int64 [B]."""
        return ExitCost(torch.zeros_like(used), torch.zeros_like(used))

    def to_dict(self) -> dict[str, Any]:
        """The rule as JSON values."""
        assert dataclasses.is_dataclass(self)
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        # JSON has no infinity; float() reads the word back.
        stored = {n: str(v) if isinstance(v, float) and math.isinf(v) else v for n, v in values.items()}
        return {"rule": self.kind, **stored}

    @staticmethod
    def from_dict(row: Mapping[str, Any]) -> ExitRule:
        """The rule that `to_dict` wrote.

        Raises:
            ValueError: no rule of this name, or values it does not take.
        """
        values = dict(row)
        kind = values.pop("rule", None)
        if kind not in RULES:
            raise ValueError(
                f"no exit rule is called {kind!r}, accepted are {', '.join(RULES)}{meant(kind, RULES)}"
            )
        values = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        if values.get("eps") == "inf":
            values["eps"] = math.inf
        try:
            rule: ExitRule = RULES[kind](**values)
            return rule
        except TypeError as error:
            raise ValueError(f"not an exit rule {kind!r}: {printable(error)}") from error

    def __str__(self) -> str:
        assert dataclasses.is_dataclass(self)
        changed = [
            f"{field.name}={_short(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return " ".join([self.kind, *changed])


@dataclass(frozen=True)
class HiddenChange(ExitRule):
    """Stops when ||H(k) - H(k-1)|| < eps ||H(k)|| (LoopMDM, section 4).

    Args:
        eps: bound of the relative change, >= 0; inf stops after the first loop that may be the last.
        denominator: "new" divides by ||H(k)||, "old" by ||H(k-1)||.
        positions: "all", or the "masked" ones only.
        norm: "sequence" takes Frobenius norms of a sequence, "tokens" the mean of the tokens' own ratios.
    """

    eps: float
    denominator: Literal["new", "old"] = "new"
    positions: Literal["all", "masked"] = "all"
    norm: Literal["sequence", "tokens"] = "sequence"

    kind: ClassVar[str] = "hidden"

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", _checked_eps(self.eps))
        for name, accepted in (
            ("denominator", ("new", "old")),
            ("positions", ("all", "masked")),
            ("norm", ("sequence", "tokens")),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"{name} must be {' or '.join(map(repr, accepted))}, got {getattr(self, name)!r}"
                )

    @property
    def threshold(self) -> float | None:
        plain = (self.denominator, self.positions, self.norm) == ("new", "all", "sequence")
        return float(self.eps) if plain else None

    def judge(self, stages: Stages, hidden: Tensor) -> Judge:
        return ChangeJudge(lambda part, old, new, loop: self.change(part, old, new) < self.eps)

    def change(self, stages: Stages, old: Tensor, new: Tensor) -> Tensor:
        """The relative change of each sequence, float64 [b]."""
        where = stages.masked if self.positions == "masked" else None
        moved = _row_squares(new - old, where)
        size = _row_squares(new if self.denominator == "new" else old, where)
        if self.norm == "sequence":
            return _ratio(moved.sum(dim=1).sqrt(), size.sum(dim=1).sqrt())
        counted = torch.full_like(moved[:, 0], moved.shape[1]) if where is None else where.sum(dim=1)
        return _ratio(moved.sqrt(), size.sqrt()).sum(dim=1) / counted.clamp_min(1)


class PredictionRule(ExitRule):
    """Looks at what the model predicts, after every loop from the first that is looked back on."""

    def cost(self, used: Tensor, most: Tensor, min_loops: int) -> ExitCost:
        tails = used - max(0, min_loops - self.lookback)
        return ExitCost(tails, tails + (used < most))  # at `most` no prediction is needed


@dataclass(frozen=True)
class OutputChange(PredictionRule):
    """Stops when the predictions move little: the mean over masked positions of KL(p_k || p_(k-1)) < eps.

    Every loop is followed by the blocks behind it and the vocabulary head, so the ledger of a run counts
    more than its loops. p_0 is the prediction without a loop. Needs memory for the log-probabilities of all
    masked positions, twice.

    Args:
        eps: nats, >= 0; inf stops after the first loop that may be the last.
    """

    eps: float

    kind: ClassVar[str] = "output"

    def __post_init__(self) -> None:
        object.__setattr__(self, "eps", _checked_eps(self.eps))

    def judge(self, stages: Stages, hidden: Tensor) -> Judge:
        return OutputJudge(self.eps, stages, hidden)


@dataclass(frozen=True)
class ArgmaxStable(PredictionRule):
    """Stops when no masked position's most probable token changed during the last `patience` loops.

    Costs as much as `OutputChange`, without its memory.
    """

    patience: int = 1

    kind: ClassVar[str] = "argmax"

    def __post_init__(self) -> None:
        object.__setattr__(self, "patience", positive("patience", self.patience))

    @property
    def lookback(self) -> int:
        return self.patience

    def judge(self, stages: Stages, hidden: Tensor) -> Judge:
        return ArgmaxJudge(self.patience, stages, hidden)


@dataclass(frozen=True)
class ExitGate(ExitRule):
    """Stops where a logistic function of `features` reaches a probability; made by fitting, after training.

    Args:
        weights: one for each of FEATURES.
        bias: added to their weighted sum.
        probability: the least that stops a sequence.
    """

    weights: tuple[float, ...]
    bias: float = 0.0
    probability: float = 0.5

    kind: ClassVar[str] = "gate"
    FEATURES: ClassVar[tuple[str, ...]] = ("log loop", "masked share", "log relative change")

    def __post_init__(self) -> None:
        values = (*self.weights, self.bias)
        if len(self.weights) != len(self.FEATURES) or not all(map(math.isfinite, values)):
            raise ValueError(
                f"weights must be {len(self.FEATURES)} finite numbers ({', '.join(self.FEATURES)}) and bias"
                f" one, got {self.weights!r} and {self.bias!r}"
            )
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], got {self.probability!r}")

    @classmethod
    def features(cls, stages: Stages, old: Tensor, new: Tensor, loop: int) -> Tensor:
        """What the gate looks at, float64 [b, 3]: log k, share of masks, log of `HiddenChange`'s change."""
        change = HiddenChange(0.0).change(stages, old, new)
        share = stages.masked.double().mean(dim=1)
        return torch.stack(
            (torch.full_like(share, math.log(loop)), share, change.clamp_min(LEAST_CHANGE).log()), dim=1
        )

    def judge(self, stages: Stages, hidden: Tensor) -> Judge:
        return ChangeJudge(lambda *seen: self.stop_probability(self.features(*seen)) >= self.probability)

    def stop_probability(self, features: Tensor) -> Tensor:
        """Of features [b, 3], float64 [b]."""
        score = (features.double() * features.new_tensor(self.weights, dtype=torch.float64)).sum(dim=1)
        # Not torch.sigmoid, whose last bit depends on the number of sequences.
        return 1.0 / (1.0 + (-score - self.bias).exp())


RULES: dict[str, Any] = {rule.kind: rule for rule in (HiddenChange, OutputChange, ArgmaxStable, ExitGate)}


def make_rule(criterion: str | ExitRule, eps: float | None) -> ExitRule:
    """The rule meant by a name and a threshold, or by itself: "hidden" and "output" need eps."""
    if isinstance(criterion, ExitRule) or criterion == ArgmaxStable.kind:
        if eps is not None:
            raise ValueError(f"eps does not go with the criterion {criterion}: it has no threshold to give")
        return criterion if isinstance(criterion, ExitRule) else ArgmaxStable()
    makers: dict[str, type[HiddenChange | OutputChange]] = {"hidden": HiddenChange, "output": OutputChange}
    if not isinstance(criterion, str) or criterion not in makers:
        known = meant(criterion, (*makers, ArgmaxStable.kind))
        raise ValueError(f"criterion must be hidden, output, argmax or an ExitRule, got {criterion!r}{known}")
    if eps is None:
        raise ValueError(f"the criterion {criterion} needs a threshold eps")
    return makers[criterion](eps)


def _row_squares(x: Tensor, where: Tensor | None) -> Tensor:
    """Squared norms of the rows of x [b, L, D], float64 [b, L]; zero where `where` is false."""
    squares = x.detach().double().square().sum(dim=2)
    return squares if where is None else squares * where


def _ratio(change: Tensor, size: Tensor) -> Tensor:
    """change / size; no change at all is none, whatever the size."""
    return torch.where(change == 0, 0.0, change / size)


def _checked_eps(eps: Any) -> float:
    number = real(eps)
    if number is None or not number >= 0:
        raise ValueError(f"eps must be a number >= 0 (inf is accepted), got {eps!r}")
    return number


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
