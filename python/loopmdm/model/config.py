"""What a model is: dimensions, loop, positions. Presets are data."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from loopmdm_kernels.values import meant, real, whole

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

NOTES = ("use_cache",)  # transformers.Trainer
POSITIONS = ("rotary", "learned")
INJECTIONS = ("none", "add", "parcae")
MAX_LAYERS = 4096  # far beyond any model: more is a slip of the pen, and would be built until memory ends
Config = TypeVar("Config", bound="DataclassInstance")


class LoopedBlocksError(ValueError):
    """Blocks to loop that are not among those of the model."""

    num_layers: int | None = None  # of the model; None where the error was raised anew with another message


@dataclass(unsafe_hash=True)
class LoopMDMConfig:
    """Configuration of a looped masked diffusion model.

    Args:
        vocab_size: V, mask token included.
        mask_token_id: id of the mask; no data may contain it.
        hidden_size: D. Must be divisible by `num_heads`, with an even head size.
        num_heads: H.
        num_layers: blocks stored. Blocks loop_start..loop_end-1 are applied S times, the others once.
        cond_dim: width of the conditioning vector behind every adaLN modulation.
        mlp_ratio: width of the MLP over D.
        max_length: longest sequence the model was made for.
        dropout: on both branch outputs before the gate, in training only.
        time_conditioning: feed the noise level sigma; off (sigma = 0) as in MDLM's released models.
        loop_start: first looped block, zero-based (1 in LoopMDM).
        loop_end: the block after the last looped one (3 of 12 in LoopMDM).
        max_loops: largest S drawn in training, and the default S of evaluation. Any S may be asked for.
        positions: "rotary", or "learned" (a table [max_length, D], for grids).
        key_padding_mask: let `attention_mask` also hide keys in `loss`; off as in the reference, whose
            padding is attended.
        gate_init: initial value of the residual gates. 0 is adaLN-zero, the reference; 1 starts from a
            plain pre-norm transformer, which learns faster in short runs.
        damped: each of S loops goes 1/S of its way, which loops a model that was trained without a loop
            (see `loopmdm.model.between`, also for the following); off as in LoopMDM.
        inject: what each loop but the first gets of H(0) again: "none" as in LoopMDM, "add" or "parcae".
        loop_embedding: vectors, one for each loop but the first, that are added to what it begins with; the
            last one serves all later loops. 0 as in LoopMDM.
        carry_norm: a layer norm of what each loop but the first begins with; off as in LoopMDM.
    """

    vocab_size: int
    mask_token_id: int
    hidden_size: int = 768
    num_heads: int = 12
    num_layers: int = 12
    cond_dim: int = 128
    mlp_ratio: int = 4
    max_length: int = 1024
    dropout: float = 0.1
    time_conditioning: bool = False
    loop_start: int = 1
    loop_end: int = 3
    max_loops: int = 12
    positions: str = "rotary"
    key_padding_mask: bool = False
    gate_init: float = 0.0
    damped: bool = False
    inject: str = "none"
    loop_embedding: int = 0
    carry_norm: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        """Fields are set once; a trainer's notes on a model's configuration mean nothing here."""
        if name in NOTES or (name in self.__dataclass_fields__ and name not in self.__dict__):
            object.__setattr__(self, name, value)
        else:
            raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            checked: Any
            if field.type in ("bool", "str"):
                checked = value if isinstance(value, {"bool": bool, "str": str}[field.type]) else None
            else:
                checked = real(value) if field.type == "float" else whole(value)
            if checked is None:
                raise TypeError(f"{field.name}: got {value!r}, expected {field.type}")
            object.__setattr__(self, field.name, checked)
        for name in (
            "vocab_size",
            "hidden_size",
            "num_heads",
            "num_layers",
            "cond_dim",
            "mlp_ratio",
            "max_length",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        check_layers(self.num_layers)
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(f"mask_token_id: got {self.mask_token_id}, expected 0..{self.vocab_size - 1}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size: got {self.hidden_size}, "
                f"expected a multiple of 2 * num_heads = {2 * self.num_heads}"
            )
        if not 0 <= self.loop_start < self.loop_end <= self.num_layers:
            unknown = LoopedBlocksError(
                f"loop_start, loop_end: got ({self.loop_start}, {self.loop_end}), "
                f"expected 0 <= start < end <= num_layers = {self.num_layers}"
            )
            unknown.num_layers = self.num_layers
            raise unknown
        if self.max_loops < 1:
            raise ValueError(f"max_loops: got {self.max_loops}, expected at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: got {self.dropout}, expected 0 <= dropout < 1")
        if self.positions not in POSITIONS:
            known = meant(self.positions, POSITIONS)
            raise ValueError(f"positions: got {self.positions!r}, expected one of {POSITIONS}{known}")
        if self.inject not in INJECTIONS:
            known = meant(self.inject, INJECTIONS)
            raise ValueError(f"inject: got {self.inject!r}, expected one of {INJECTIONS}{known}")
        if self.loop_embedding < 0:
            raise ValueError(f"loop_embedding: got {self.loop_embedding}, expected at least 0")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def acts_between_loops(self) -> bool:
        """Whether a loop is more than H(k) = mid(H(k - 1)), so that the op is called once for each."""
        return any(getattr(self, name) != off for name, off in OFF.items())

    @property
    def learns_between_loops(self) -> bool:
        """Whether there are weights that act between loops alone, and so get no gradient where S is 1."""
        return any(getattr(self, name) != off for name, off in OFF.items() if name != "damped")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> LoopMDMConfig:
        """A named configuration; keyword arguments replace its fields.

        tiny, small and medium are MDLM's sizes and need `vocab_size` and `mask_token_id`; sudoku (9x9) and
        sudoku6 (6x6) bring their own.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"preset: got {name!r}, expected one of {sorted(PRESETS)}{meant(name, PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoopMDMConfig:
        return from_fields(cls, values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


# The fields that say what happens between two loops, with the values that say nothing does.
OFF: dict[str, Any] = {
    name: getattr(LoopMDMConfig, name) for name in ("damped", "inject", "loop_embedding", "carry_norm")
}


def check_layers(num_layers: int) -> None:
    """Raise the ValueError of a model that has more blocks than any."""
    if num_layers > MAX_LAYERS:
        raise ValueError(f"num_layers: got {num_layers}, expected at most {MAX_LAYERS}")


def from_fields(cls: type[Config], values: dict[str, Any]) -> Config:
    """The configuration of these fields, of which none may be unknown and none without a default missing."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        close = "".join(meant(name, fields) for name in unknown)
        raise ValueError(f"unknown configuration fields {unknown}; known are {sorted(fields)}{close}")
    missing = sorted(n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values)
    if missing:
        raise ValueError(f"missing configuration fields {missing}")
    return cls(**values)


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 512, "num_heads": 8, "num_layers": 8},
    "small": {"hidden_size": 768, "num_heads": 12, "num_layers": 12},
    "medium": {"hidden_size": 1024, "num_heads": 16, "num_layers": 24},
    "sudoku": {
        "vocab_size": 10,
        "mask_token_id": 9,
        "hidden_size": 128,
        "num_heads": 4,
        "num_layers": 4,
        "cond_dim": 8,
        "max_length": 81,
        "dropout": 0.0,
        "loop_start": 1,
        "loop_end": 3,
        "max_loops": 8,
        "positions": "learned",
        "gate_init": 1.0,
    },
    "sudoku6": {
        "vocab_size": 7,
        "mask_token_id": 6,
        "hidden_size": 64,
        "num_heads": 4,
        "num_layers": 3,
        "cond_dim": 8,
        "max_length": 36,
        "dropout": 0.0,
        "loop_start": 1,
        "loop_end": 2,
        "max_loops": 6,
        "positions": "learned",
        "gate_init": 1.0,
    },
}
