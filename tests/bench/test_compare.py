"""Which variants decide, the figures made of their times, and the peak beside them."""

import torch

from bench import compare, roofline


def test_slow_peers_do_not_decide_but_ours_always_counts():
    medians = {"ours": 9.0, "eager": 3.1, "compiled": 2.0, "other": 2.9}
    assert compare.contenders(medians) == ["ours", "compiled", "other"]


def test_deciding_variants_are_timed_more_often(monkeypatch):
    calls = {"ours": 0, "fast": 0, "slow": 0}

    def timed(variants, *, repeats, warmup):
        for name in variants:
            calls[name] += warmup + repeats
        return {name: [0.3 if name == "slow" else 0.1] * repeats for name in variants}

    monkeypatch.setattr(compare, "interleaved_times", timed)
    medians = compare.measure(dict.fromkeys(calls, lambda: None))
    assert medians == {"ours": 0.1, "fast": 0.1, "slow": 0.3}
    assert calls == {"ours": 1 + compare.MOST, "fast": 1 + compare.MOST, "slow": 1 + compare.FEW}


def test_figures():
    medians = {"ours": 0.5, "eager": 2.0, "compiled": 1.0}
    expected = {
        "milliseconds": {"ours": 500.0, "eager": 2000.0, "compiled": 1000.0},
        "best_peer": "compiled",
        "speedup": 2.0,
        "dtype": "fp32",
        "gflops": 400.0,
    }
    assert compare.figures(medians, flops=2e11, dtype=torch.float32) == expected
    expected["gigabytes_per_second"] = 20.0
    assert compare.figures(medians, flops=2e11, dtype=torch.float32, bytes_read=1e10) == expected


def test_the_best_peak_of_a_run_is_kept(monkeypatch):
    rates = iter([3.0, 5.0, 4.0, 2.0, 7.0, 6.0])
    monkeypatch.setattr(roofline, "_peaks", {"fp32": 4.5, "bf16": 1.0})
    monkeypatch.setattr(roofline._C, "cpu_peak_flops", lambda *_: next(rates))
    roofline.measure_peaks(attempts=3)
    assert roofline._peaks == {"fp32": 5.0, "bf16": 7.0}
