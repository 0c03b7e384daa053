"""What the ranks of a run measure together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any


class SharedEvaluation(ABC):
    """An evaluation of which every rank does its part, with the whole model.

    Of a single process it is the function that `Trainer` calls.
    """

    @abstractmethod
    def part(self, model: Any, rank: int, world_size: int) -> Any:
        """What this rank has measured; it can be pickled."""

    @abstractmethod
    def whole(self, parts: Sequence[Any]) -> dict[str, Any]:
        """The results (JSON values), from the parts in the order of the ranks."""

    def __call__(self, model: Any) -> dict[str, Any]:
        return self.whole([self.part(model, 0, 1)])
