"""The FLOP ledger: what a forward pass, a training step and a sampling run cost, under named conventions.

One multiply-add is two FLOPs. Only matrix products count: norms, activations, softmax and the conditioning
network (see `conditioning_flops`) are left out, as in the papers. Per token and layer, d the hidden size:

    qkv 6 d^2 + attention output 2 d^2 + MLP 4 mlp_ratio d^2 + attention 4 L d (24 d^2 + 4 L d at mlp_ratio 4)

Published figures differ in what they count beside the layers, so every total names its convention:

    "blocks"                 the layers only (the 16.7 % of the model-scheduling paper)
    "blocks+head"            and the vocabulary projection 2 d V
    "blocks+head+embedding"  and the embedding as if it were a matrix product (the DUO code base)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from loopmdm_kernels.values import check_at_least

Convention = Literal["blocks", "blocks+head", "blocks+head+embedding"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
DEFAULT_CONVENTION: Convention = "blocks+head"

TRAINING_FACTOR = 3  # the backward pass computes two products for each one of the forward pass
SIGMA_FEATURES = 256  # width of the sinusoid that enters the conditioning network


class Dimensions(Protocol):
    """The sizes the ledger needs; `LoopMDMConfig` has them all."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def mlp_ratio(self) -> float: ...
    @property
    def cond_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def loop_start(self) -> int: ...
    @property
    def loop_end(self) -> int: ...
    @property
    def max_loops(self) -> int: ...


def layer_matmuls(dims: Dimensions, length: int) -> dict[str, int]:
    """FLOPs per token of each matrix product of one layer in a sequence of `length` tokens."""
    check_at_least("length", length, 1)
    d = dims.hidden_size
    mlp = round(dims.mlp_ratio * d)
    return {
        "qkv": 2 * d * 3 * d,
        "attention_scores": 2 * length * d,
        "attention_values": 2 * length * d,
        "attention_output": 2 * d * d,
        "mlp_in": 2 * d * mlp,
        "mlp_out": 2 * mlp * d,
    }


def layer_flops(dims: Dimensions, length: int) -> int:
    """FLOPs per token of one layer, forward."""
    return sum(layer_matmuls(dims, length).values())


def head_flops(dims: Dimensions) -> int:
    """FLOPs of one row of the vocabulary projection, forward."""
    return 2 * dims.hidden_size * dims.vocab_size


def conditioning_flops(dims: Dimensions) -> int:
    """FLOPs of the conditioning network and all modulation projections for one condition vector.

    In no convention: a model without time conditioning evaluates them once per set of weights.
    """
    c, d = dims.cond_dim, dims.hidden_size
    return 2 * (SIGMA_FEATURES * c + c * c) + dims.num_layers * 2 * c * 6 * d + 2 * c * 2 * d


def executed_layers(dims: Dimensions, num_loops: float) -> float:
    """Layers a token passes: num_layers + (S - 1) n_m. `num_loops` may be an expectation."""
    check_at_least("num_loops", num_loops, 1)
    return dims.num_layers + (num_loops - 1) * (dims.loop_end - dims.loop_start)


def forward_flops(
    dims: Dimensions, length: int, num_loops: float, convention: Convention = DEFAULT_CONVENTION
) -> float:
    """FLOPs of one forward pass over one sequence of `length` tokens with S = `num_loops`."""
    outside = _projections(convention) * head_flops(dims)
    return length * (executed_layers(dims, num_loops) * layer_flops(dims, length) + outside)


def readout_flops(dims: Dimensions, length: int, convention: Convention = DEFAULT_CONVENTION) -> float:
    """FLOPs of reading out a loop of one sequence, forward: the blocks behind it, and the head if counted."""
    head = min(1, _projections(convention)) * head_flops(dims)
    return length * ((dims.num_layers - dims.loop_end) * layer_flops(dims, length) + head)


def training_flops(
    dims: Dimensions, length: int, num_loops: float, convention: Convention = DEFAULT_CONVENTION
) -> float:
    """FLOPs of forward and backward over one sequence, backpropagated through all loops."""
    return TRAINING_FACTOR * forward_flops(dims, length, num_loops, convention)


def outside_in_blocks(dims: Dimensions, length: int, convention: Convention) -> float:
    """What `convention` counts outside the layers, in layers (4.462 for MDLM-small's head, L = 1024)."""
    return _projections(convention) * head_flops(dims) / layer_flops(dims, length)


def training_ratio(
    dims: Dimensions,
    length: int,
    convention: Convention = DEFAULT_CONVENTION,
    *,
    expected_loops: float | None = None,
) -> float:
    """Cost of a training step relative to the same network without the loop.

    `expected_loops` is E[S] of the training law; default (max_loops + 1) / 2, the uniform law's.
    """
    loops = (dims.max_loops + 1) / 2 if expected_loops is None else expected_loops
    return forward_flops(dims, length, loops, convention) / forward_flops(dims, length, 1, convention)


def matched_steps(
    base_steps: int,
    dims: Dimensions,
    length: int,
    convention: Convention = DEFAULT_CONVENTION,
    *,
    expected_loops: float | None = None,
) -> int:
    """Looped training steps that cost as much as `base_steps` of the network without the loop."""
    check_at_least("base_steps", base_steps, 1)
    return round(base_steps / training_ratio(dims, length, convention, expected_loops=expected_loops))


def schedule_saving(
    light_fraction: float, light_blocks: float, total_blocks: float, *, outside_blocks: float = 0.0
) -> float:
    """Share of the sampling FLOPs saved when `light_fraction` of the network calls run `light_blocks` blocks.

    `outside_blocks` adds what both models spend outside their blocks (`outside_in_blocks`).
    """
    if not 0 <= light_fraction <= 1:
        raise ValueError(f"light_fraction is {light_fraction}; accepted: 0 to 1")
    if not 0 <= light_blocks <= total_blocks or total_blocks <= 0:
        raise ValueError(f"light_blocks is {light_blocks}; accepted: 0 to total_blocks = {total_blocks} > 0")
    check_at_least("outside_blocks", outside_blocks, 0)
    return light_fraction * (total_blocks - light_blocks) / (total_blocks + outside_blocks)


def equal_depth(num_layers: int, looped_layers: int, expected_loops: float) -> int:
    """Depth of the plain network whose training step costs the same in blocks: n + floor((E[S] - 1) n_m)."""
    check_at_least("looped_layers", looped_layers, 0)
    check_at_least("num_layers", num_layers, max(1, looped_layers))
    check_at_least("expected_loops", expected_loops, 1)
    return num_layers + math.floor((expected_loops - 1) * looped_layers)


@dataclass
class SamplingLedger:
    """Counts what a sampling run of sequences of `length` tokens really executed.

    Call `record` once per network call. Skipped calls, early exits and rows that never reach the head
    therefore lower the total, and calls of models of different size add up.
    """

    length: int
    network_calls: int = field(default=0, init=False)
    sequence_calls: int = field(default=0, init=False)
    loops: int = field(default=0, init=False)
    rows_projected: int = field(default=0, init=False)
    _flops: dict[str, float] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_at_least("length", self.length, 1)
        self._flops = dict.fromkeys(CONVENTIONS[-1].split("+"), 0.0)

    def record(
        self, dims: Dimensions, loops: Iterable[int], rows_projected: int, *, length: int | None = None
    ) -> None:
        """One network call: `loops` holds S of each sequence, `rows_projected` the head's rows.

        length: tokens of these sequences; None: the ledger's.
        """
        length = self.length if length is None else length
        check_at_least("length", length, 1)
        counts = [int(s) for s in loops]
        for s in counts:
            check_at_least("loops", s, 1)
        if not 0 <= rows_projected <= len(counts) * length:
            raise ValueError(
                f"rows_projected is {rows_projected}; accepted: 0 to {len(counts)} sequences"
                f" x {length} tokens"
            )
        self.record_calls(dims, 1, len(counts), sum(counts), rows_projected, length=length)

    def record_calls(
        self, dims: Dimensions, calls: int, sequences: int, loops: int, rows_projected: int, *, length: int
    ) -> None:
        """Some network calls of so many sequences in all, which took so many loops in all."""
        self.network_calls += calls
        self.sequence_calls += sequences
        self.loops += loops
        self.rows_projected += rows_projected
        layers = sequences * dims.num_layers + (loops - sequences) * (dims.loop_end - dims.loop_start)
        self._flops["blocks"] += length * layers * layer_flops(dims, length)
        self._flops["head"] += rows_projected * head_flops(dims)
        self._flops["embedding"] += length * sequences * head_flops(dims)

    def record_tails(self, dims: Dimensions, passes: int, *, length: int | None = None) -> None:
        """Passes of a sequence through the blocks behind the loop, beside the one of each call."""
        check_at_least("passes", passes, 0)
        length = self.length if length is None else length
        layers = passes * (dims.num_layers - dims.loop_end)
        self._flops["blocks"] += length * layers * layer_flops(dims, length)

    def record_rows(self, dims: Dimensions, rows: int) -> None:
        """Rows projected onto the vocabulary again, from the hidden state of a call recorded before."""
        check_at_least("rows", rows, 0)
        self.rows_projected += rows
        self._flops["head"] += rows * head_flops(dims)

    def add(self, other: SamplingLedger) -> None:
        """Count all that another ledger counted, too."""
        self.network_calls += other.network_calls
        self.sequence_calls += other.sequence_calls
        self.loops += other.loops
        self.rows_projected += other.rows_projected
        for part, flops in other._flops.items():
            self._flops[part] += flops

    def flops(self, convention: Convention = DEFAULT_CONVENTION) -> float:
        """Executed FLOPs so far; the head is counted for the projected rows only."""
        _projections(convention)
        return sum(self._flops[part] for part in convention.split("+"))

    @property
    def mean_loops(self) -> float:
        """Mean S over sequence calls; 0 before the first."""
        return self.loops / self.sequence_calls if self.sequence_calls else 0.0

    def report(self) -> dict[str, Any]:
        """All figures, ready for JSON; `flops` maps each convention's name to its total."""
        return {
            "network_calls": self.network_calls,
            "sequence_calls": self.sequence_calls,
            "mean_loops": self.mean_loops,
            "rows_projected": self.rows_projected,
            "flops": {convention: self.flops(convention) for convention in CONVENTIONS},
        }


def _projections(convention: Convention) -> int:
    """How many d x V products per token the convention counts."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}; accepted: {', '.join(map(repr, CONVENTIONS))}")
    return CONVENTIONS.index(convention)
