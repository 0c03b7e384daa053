"""Which variants decide, the figures made of their times, and the peak beside them."""

from functools import partial

import pytest
import torch

from bench import compare, looped_blocks, roofline


def test_slow_peers_do_not_decide_but_ours_always_counts():
    medians = {"ours": 9.0, "eager": 3.1, "compiled": 2.0, "other": 2.9}
    assert compare.contenders(medians) == ["ours", "compiled", "other"]


def test_deciding_variants_are_timed_more_often(monkeypatch):
    seconds = {"ours": 0.1, "fast": 0.1, "slow": 0.3, "hopeless": 0.6, "compiled": 0.1}
    calls = dict.fromkeys(seconds, 0)

    def timed(variants, *, repeats, warmup):
        for _ in range(warmup + repeats):
            for call in variants.values():
                call()
        return {name: [seconds[name]] * repeats for name in variants}

    def counted(name):
        calls[name] += 1

    monkeypatch.setattr(compare, "interleaved_times", timed)
    medians = compare.measure({name: partial(counted, name) for name in calls})
    assert medians == seconds
    often = 1 + compare.MOST
    assert calls == {"ours": often, "fast": often, "slow": 1 + compare.FEW, "hopeless": 1, "compiled": often}


def test_only_peers_of_other_packages_may_fail():
    def broken():
        raise IndexError("list index\nout of range")

    peers = {"compiled fp32": broken, "zentorch fp32": broken, "OpenVINO bf16": dict}
    working, failed = compare.without_failing(peers)
    assert [*working] == ["compiled fp32", "OpenVINO bf16"] and failed == {"zentorch fp32": "list index"}


def test_a_dtype_in_which_pytorch_crawls():
    """Eager PyTorch is timed once in it, if that is short; compiled not at all, ours all the same."""
    names = [
        "ours",
        "eager fp32",
        "eager bf16",
        compare.WITH_BF16_PARAMETERS,
        "compiled fp32",
        "compiled bf16",
    ]
    variants = dict.fromkeys(names, len)
    assert compare.without_crawling(variants, 1e15, None) == (variants, {})
    chances, once = compare.without_crawling(variants, 9e9, 1e9)
    assert [*chances] == ["ours", "eager fp32", compare.WITH_BF16_PARAMETERS, "compiled fp32"]
    assert [*once] == ["eager bf16"]
    assert compare.without_crawling(variants, 11e9, 1e9) == (chances, {})


@pytest.mark.parametrize(("bf16", "expected"), [(1e9, 1e9), (4e9, None)])
def test_torch_crawls_by_its_product(monkeypatch, bf16, expected):
    rates = {torch.bfloat16: bf16, torch.float32: 1e10}
    monkeypatch.setattr(roofline, "_matmul_rate", lambda dtype, sizes: rates[dtype])
    roofline.crawls.cache_clear()
    assert roofline.crawls() == expected
    roofline.crawls.cache_clear()


@pytest.mark.parametrize(("seconds", "sizes"), [(0.1, [768, 1024, 2048]), (0.3, [768])])
def test_long_products_are_not_timed_in_all_sizes(monkeypatch, seconds, sizes):
    timed = []

    def fastest(call):
        timed.append(call.args[0].shape[0])
        return seconds

    monkeypatch.setattr(roofline, "_fastest", fastest)
    assert roofline._matmul_rate(torch.float32) == 2 * sizes[-1] ** 3 / seconds
    assert timed == sizes


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


def test_bf16_parameters_have_a_speed_up_of_their_own():
    medians = {"ours": 0.5, compare.WITH_BF16_PARAMETERS: 0.8, "eager": 2.0, "compiled": 1.0}
    figures = compare.figures(medians, flops=2e11, dtype=torch.float32)
    assert (figures["best_peer"], figures["speedup"]) == ("compiled", 2.0)
    assert figures["speedup_with_bf16_parameters"] == 1.25


def test_a_comparison_must_be_fair(monkeypatch):
    """Where our kernels are held to AVX2, torch has to be."""
    monkeypatch.setattr(roofline._C, "cpu_isa", lambda: "avx2")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setenv("LOOPMDM_CPU_ISA", "avx2")
    assert "torch AVX512" in roofline.unequal_limits()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert roofline.unequal_limits() is None


@pytest.mark.parametrize(("isa", "dtype"), [("avx512", torch.float32), ("amx_bf16", torch.bfloat16)])
def test_cases_have_the_dtype_of_the_fastest_product(monkeypatch, isa, dtype):
    monkeypatch.setattr(roofline._C, "cpu_isa", lambda: isa)
    assert roofline.native_dtype() == dtype
    everything = [torch.float32, torch.bfloat16]
    assert [*looped_blocks.kinds_of_peers(dtype)] == everything
    alone = [torch.float32] if dtype == torch.bfloat16 else everything
    assert [*looped_blocks.kinds_of_peers(torch.float32)] == alone


def test_the_best_peak_of_a_run_is_kept(monkeypatch):
    rates = iter([3.0, 5.0, 4.0, 2.0, 7.0, 6.0])
    monkeypatch.setattr(roofline, "_peaks", {"fp32": 4.5, "bf16": 1.0})
    monkeypatch.setattr(roofline._C, "cpu_peak_flops", lambda *_: next(rates))
    roofline.measure_peaks(attempts=3)
    assert roofline._peaks == {"fp32": 5.0, "bf16": 7.0}
