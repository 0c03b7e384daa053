"""One run of the benchmarks on a GPU, or its dry run on a CPU: sizes, inputs, and what is done to a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import loopmdm_kernels as lk
from bench import gpu_times
from loopmdm_kernels.testing import LoopedInputs, head_inputs, interleaved_medians, looped_inputs, row_rng
from loopmdm_kernels.types import BlockWeights, Fp8BlockWeights, Fp8Head, Head, RowRng

BF16 = torch.bfloat16
DTYPES = {"fp32": torch.float32, "bf16": BF16}
Call = Callable[[], Any]
Calls = Mapping[str, Call]  # by the name of the implementation
Figure = float | str | dict[str, Any] | None  # None: a dry run; a string says why a GPU has no figure
Figures = dict[str, Figure]


class Sizes(NamedTuple):
    """Of the model and of the cases."""

    hidden: int = 768
    heads: int = 12
    vocab_size: int = 50258
    forward: tuple[tuple[int, int], ...] = ((1, 128), (1, 1024), (16, 1024))  # batch and length, no gradients
    training: tuple[int, int] = (16, 1024)  # of looped_blocks and masked_cross_entropy with gradients
    checked: tuple[int, int] = (2, 1024)  # where values are compared with float64
    loops: int = 12
    training_loops: int = 6
    sampled_rows: tuple[int, ...] = (64, 1024)
    sampling: tuple[int, int, int] = (8, 1024, 256)  # batch, length and steps of a whole sampling run
    step: tuple[int, int, int] = (1, 128, 64)  # the same of a run whose steps are short
    repeats: int = 15


REAL = Sizes()
TINY = Sizes(16, 2, 40, ((1, 4),), (1, 4), (1, 6), 1, 1, (3,), (1, 3, 2), (1, 2, 2), 1)


class Run(NamedTuple):
    dry: bool
    other_sizes: Sizes | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def sizes(self) -> Sizes:
        return self.other_sizes or (TINY if self.dry else REAL)

    @lru_cache(maxsize=4)  # noqa: B019 (making them takes longer than most calls, and runs end with their process)
    def looped(
        self, batch: int, length: int, dtype: torch.dtype = BF16, *, grad: bool = False
    ) -> LoopedInputs:
        inputs = looped_inputs(batch, length, self.sizes.hidden, self.sizes.heads, 2)
        return inputs.to(dtype, requires_grad=grad, device=self.device)

    @lru_cache(maxsize=4)  # noqa: B019
    def head(
        self, batch: int, length: int, dtype: torch.dtype = BF16, *, grad: bool = False
    ) -> tuple[Tensor, Head]:
        excluded = self.sizes.vocab_size - 1
        hidden, head = head_inputs(
            batch, length, self.sizes.hidden, self.sizes.vocab_size, excluded_token=excluded
        )
        leaves = [t.to(self.device, dtype).requires_grad_(grad) for t in head[:4]]
        wide = torch.promote_types(dtype, torch.float32)
        return hidden.to(self.device, wide).requires_grad_(grad), Head(*leaves, excluded)

    def rows(self, batch: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """(targets [B, L], every second row, weights of the rows)."""
        generator = torch.Generator().manual_seed(1)
        targets = torch.randint(self.sizes.vocab_size - 1, (batch, length), generator=generator)
        rows = torch.arange(0, batch * length, 2)
        weights = torch.rand(rows.shape[0], generator=generator) + 0.5
        return targets.to(self.device), rows.to(self.device), weights.to(self.device)

    def names(self, num_rows: int) -> RowRng:
        rng = row_rng(num_rows)
        return RowRng(rng.seed, *(name.to(self.device) for name in rng[1:]))

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What a user can get from torch; CUDA graphs are captured around it, as around our kernels."""
        if self.dry:
            return torch.compile(function, backend="eager", dynamic=False)
        return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)

    def captured(self, call: Call) -> Call:
        """The call as one CUDA graph."""
        if self.dry:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def synchronize(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def made(self, makers: Mapping[str, Callable[[], Call]]) -> tuple[dict[str, Call], Figures]:
        """The calls that could be made, and of the others why not."""
        calls: dict[str, Call] = {}
        failed: Figures = {}
        for name, make in makers.items():
            try:
                calls[name] = make()
            except Exception as error:  # whatever a peer's compiler has to say
                failed[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return calls, failed

    def tried(self, calls: Calls) -> tuple[dict[str, Call], Figures]:
        """Those that work, and of the others why not."""

        def tried(call: Call) -> Call:
            call()
            return call

        return self.made({name: partial(tried, call) for name, call in calls.items()})

    def times(self, calls: Calls) -> Figures:
        """As `gpu_times.measured`; a call that fails says why instead."""
        works, failed = self.tried(calls)
        return {**failed, **(dict.fromkeys(works) if self.dry else gpu_times.measured(works))}

    def seconds(self, calls: Calls) -> Figures:
        """The same, the medians alone."""
        return {
            name: found["ms"] / 1000 if isinstance(found, dict) else found
            for name, found in self.times(calls).items()
        }

    def host_times(self, calls: Calls, share: float = 1.0) -> Figures:
        """Of calls that take so long that the host's clock will do: medians of two, or a share of them."""
        medians = interleaved_medians(calls, repeats=1 if self.dry else 2, warmup=0 if self.dry else 1)
        return {name: {"ms": 1000 * share * seconds} for name, seconds in medians.items()}

    def on_backends(self, ours: Call) -> dict[str, Call]:
        """Ours by CUDA and by Triton; in a dry run by the reference and interpreted."""

        def forced(backend: str) -> Call:
            def on_backend() -> Any:
                with lk.use_backend(backend):
                    return ours()

            return on_backend

        return {"cuda": forced("reference" if self.dry else "cuda"), "triton": forced("triton")}


def in_fp8(inputs: LoopedInputs) -> LoopedInputs:
    """The matrices rounded from bf16 to e4m3."""
    blocks = [BlockWeights(*(w.to(BF16) for w in block)) for block in inputs.blocks]
    return inputs._replace(blocks=[Fp8BlockWeights.of(block) for block in blocks])  # type: ignore[misc]


def head_in_fp8(head: Head) -> Fp8Head:
    norm, weight, bias, modulation = (t.to(BF16) for t in head[:4])
    return Fp8Head.of(Head(norm, weight, bias, modulation, head.excluded_token))


def gradients_of(result: Callable[[], Tensor], leaves: list[Tensor]) -> Call:
    """Forward and backward."""

    def both() -> Any:
        out = result()
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return both
