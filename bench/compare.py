"""Times an op beside its peers in one interleaved run and relates it to the best of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.roofline import NAMES
from loopmdm_kernels.testing import interleaved_times

OURS, EAGER = "ours", "eager"
WITH_BF16_PARAMETERS = (
    "ours, bf16 parameters"  # where fp32 is the fast dtype: as fast, with half the weight memory?
)
OF_OTHERS = ("zentorch", "OpenVINO")  # a peer that fails is an error, but for these
SECONDS = 10.0  # spent on the variants that decide, about
CONTENDER = 1.5  # a peer slower than the best by this factor is timed a few times only
HOPELESS = 5.0  # slower than the best first call by this factor
COMPILED = ("compiled", "zentorch")
PATIENCE = 10.0  # seconds that eager PyTorch may take in a dtype in which it has no chance
FEW, LEAST, MOST = 2, 3, 25  # repeats


def contenders(medians: Mapping[str, float]) -> list[str]:
    """Ours and the peers that may be the best of all peers."""
    limit = CONTENDER * medians[best_peer(medians)]
    return [name for name, seconds in medians.items() if name.startswith(OURS) or seconds <= limit]


def best_peer(medians: Mapping[str, float]) -> str:
    return min((name for name in medians if not name.startswith(OURS)), key=lambda name: medians[name])


def without_failing(
    peers: Mapping[str, Callable[[], Any]],
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The peers that work; and what those of other packages than torch say that do not."""
    working, failed = dict(peers), {}
    for name, call in peers.items():
        if name.split()[0] not in OF_OTHERS:
            continue
        try:
            call()
        except Exception as error:  # whatever their compilers raise
            failed[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            del working[name]
    return working, failed


def without_crawling(
    variants: Mapping[str, Callable[[], Any]], flops: float, rate: float | None
) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """The variants that are worth timing, and what is to be timed once: eager PyTorch in bf16, if short.

    rate: FLOP/s of torch's product of bf16 where the processor has none (`roofline.crawls`), else None.
    """
    if rate is None:
        return {**variants}, {}
    crawling = {
        name for name in variants if not name.startswith(OURS) and "bf16" in name.replace(",", "").split()
    }
    once = {name for name in crawling if name.startswith(EAGER) and flops / rate < PATIENCE}
    return (
        {name: call for name, call in variants.items() if name not in crawling},
        {name: call for name, call in variants.items() if name in once},
    )


def measure(
    variants: Mapping[str, Callable[[], Any]], *, few: int = FEW, repeats: int | None = None
) -> dict[str, float]:
    """Median seconds of each variant. The first call compiles what is to be compiled and is not timed.

    Of a peer that compiles nothing and is HOPELESS there it is the only one: some of them take ten seconds.

    few: times of each; repeats: times of those that decide, None: as many as fit into SECONDS.
    """
    plain = {name: call for name, call in variants.items() if not name.startswith(COMPILED)}
    first = {name: times[0] for name, times in interleaved_times(plain, repeats=1, warmup=0).items()}
    limit = HOPELESS * min(first.values())
    once = {
        name: [seconds] for name, seconds in first.items() if seconds > limit and not name.startswith(OURS)
    }
    for name, call in variants.items():
        if name not in first:
            call()
    rest = {name: call for name, call in variants.items() if name not in once}
    times = interleaved_times(rest, repeats=few, warmup=0)
    medians = {name: statistics.median((once | times)[name]) for name in variants}
    chosen = contenders(medians)
    if repeats is None:
        repeats = min(MOST, max(LEAST, int(SECONDS / sum(medians[name] for name in chosen))))
    more = interleaved_times({name: variants[name] for name in chosen}, repeats=repeats - few, warmup=0)
    return medians | {name: statistics.median(times[name] + values) for name, values in more.items()}


def figures(
    medians: Mapping[str, float], *, flops: float, dtype: torch.dtype, bytes_read: float | None = None
) -> dict[str, Any]:
    """What is reported; `flops` are those of the model, whatever an implementation computes twice."""
    ours = medians[OURS]
    best = best_peer(medians)
    result: dict[str, Any] = {
        "milliseconds": {name: round(1e3 * value, 4) for name, value in medians.items()},
        "best_peer": best,
        "speedup": round(medians[best] / ours, 3),
        "dtype": NAMES[dtype],
        "gflops": round(flops / ours / 1e9, 1),
    }
    if WITH_BF16_PARAMETERS in medians:
        result["speedup_with_bf16_parameters"] = round(medians[best] / medians[WITH_BF16_PARAMETERS], 3)
    if bytes_read is not None:
        result["gigabytes_per_second"] = round(bytes_read / ours / 1e9, 2)
    return result
