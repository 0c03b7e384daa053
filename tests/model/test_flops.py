"""The FLOP ledger against the published figures (E12) and against PyTorch's own counter."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import loopmdm_kernels as lk
from loopmdm.model import LoopMDM, flops
from loopmdm.model.config import LoopMDMConfig
from loopmdm.model.flops import CONVENTIONS, SamplingLedger
from loopmdm.model.loop_law import LoopLaw

DUO = "blocks+head+embedding"


@dataclass(frozen=True)
class Sizes:
    hidden_size: int = 768
    num_layers: int = 12
    mlp_ratio: float = 4
    cond_dim: int = 128
    vocab_size: int = 50258
    loop_start: int = 1
    loop_end: int = 3
    max_loops: int = 12


SMALL = Sizes()


def test_layer_of_mdlm_small() -> None:
    assert flops.layer_flops(SMALL, 1024) == 24 * 768**2 + 4 * 1024 * 768 == 17_301_504
    assert flops.layer_flops(SMALL, 128) == 14_548_992
    assert flops.head_flops(SMALL) == 77_196_288
    assert flops.outside_in_blocks(SMALL, 1024, "blocks+head") == pytest.approx(4.462, abs=5e-4)
    assert flops.outside_in_blocks(SMALL, 128, "blocks+head") == pytest.approx(5.306, abs=5e-4)
    assert flops.outside_in_blocks(Sizes(vocab_size=30522), 128, "blocks+head") == pytest.approx(
        3.222, abs=5e-4
    )


def test_forward_and_training_totals() -> None:
    assert flops.forward_flops(SMALL, 1024, 1) == pytest.approx(291.6e9, abs=0.05e9)
    assert flops.training_flops(SMALL, 1024, 1) / 1024 == pytest.approx(0.854e9, abs=0.0005e9)
    assert flops.training_flops(SMALL, 1024, 6.5) / 1024 == pytest.approx(1.425e9, abs=0.0005e9)
    loops = [flops.forward_flops(SMALL, 1024, s) for s in (1, 12)]
    assert loops[1] / loops[0] == pytest.approx(2.34, abs=0.005)


@pytest.mark.parametrize(
    ("vocab_size", "length", "convention", "ratio", "steps"),
    [
        (50258, 1024, "blocks", 1.9167, 521_739),
        (50258, 1024, "blocks+head", 1.6682, 599_444),
        (50258, 1024, DUO, 1.5257, 655_428),
        (50258, 128, "blocks", 1.9167, 521_739),
        (50258, 128, "blocks+head", 1.6356, 611_389),
        (50258, 128, DUO, 1.4865, 672_735),
        (30522, 128, "blocks", 1.9167, 521_739),
        (30522, 128, "blocks+head", 1.7226, 580_510),
        (30522, 128, DUO, 1.5964, 626_418),
    ],
)
def test_e12_matched_training(
    vocab_size: int, length: int, convention: str, ratio: float, steps: int
) -> None:
    sizes = Sizes(vocab_size=vocab_size)
    assert flops.training_ratio(sizes, length, convention) == pytest.approx(ratio, abs=5e-5)
    assert flops.matched_steps(1_000_000, sizes, length, convention) == steps


def test_e12_flop_proportional_law() -> None:
    law = LoopLaw.parse("flops", 12, dims=SMALL, length=1024)
    assert law.mean == pytest.approx(5.724, abs=5e-4)
    assert flops.matched_steps(1_000_000, SMALL, 1024, DUO, expected_loops=law.mean) == 688_922


@pytest.mark.parametrize(
    ("light", "blocks_only", "with_head"),
    [(4, 16.67, 12.15), (6, 12.5, 9.11), (8, 8.33, 6.07), (10, 4.17, 3.04)],
)
def test_e12_schedule_saving(light: int, blocks_only: float, with_head: float) -> None:
    head = flops.outside_in_blocks(SMALL, 1024, "blocks+head")
    assert 100 * flops.schedule_saving(0.25, light, 12) == pytest.approx(blocks_only, abs=5e-3)
    assert 100 * flops.schedule_saving(0.25, light, 12, outside_blocks=head) == pytest.approx(
        with_head, abs=5e-3
    )
    assert 100 * flops.schedule_saving(0.4, 4, 12) == pytest.approx(26.7, abs=0.05)


def test_e12_equal_depth() -> None:
    assert flops.equal_depth(14, 2, expected_loops=4.5) == 21
    assert flops.equal_depth(3, 1, expected_loops=3.5) == 5
    assert flops.equal_depth(12, 2, expected_loops=1) == 12


@pytest.mark.parametrize("ratio", [4, 2.5])
def test_e12_layer_equals_profiler(ratio: float) -> None:
    """One layer and the head written out in plain PyTorch, counted by FlopCounterMode."""
    sizes = Sizes(hidden_size=64, mlp_ratio=ratio, vocab_size=97)
    b, length, heads, d, mlp = 3, 40, 4, 64, round(64 * ratio)
    x = torch.zeros(b, length, d)
    with FlopCounterMode(display=False) as counter:
        q, k, v = (
            part.view(b, length, heads, d // heads).transpose(1, 2)
            for part in F.linear(x, torch.zeros(3 * d, d)).chunk(3, dim=-1)
        )
        o = (q @ k.transpose(2, 3)).softmax(-1) @ v
        x = F.linear(o.transpose(1, 2).reshape(b, length, d), torch.zeros(d, d))
        x = F.linear(F.linear(x, torch.zeros(mlp, d)), torch.zeros(d, mlp))
        layer = counter.get_total_flops()
        F.linear(x, torch.zeros(97, d))
    assert layer == b * length * flops.layer_flops(sizes, length)
    assert counter.get_total_flops() - layer == b * length * flops.head_flops(sizes)


@contextlib.contextmanager
def profiler() -> Iterator[FlopCounterMode]:
    """PyTorch's counter; it does not know a CPU's fused attention, so that runs as matrix products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


@pytest.mark.parametrize("mlp_ratio", [4, 2])
@pytest.mark.parametrize("num_loops", [1, 3, 12])
def test_e12_model_equals_profiler(num_loops: int, mlp_ratio: int) -> None:
    """What a forward pass of the model executes, counted by FlopCounterMode."""
    config = LoopMDMConfig(
        vocab_size=501,
        mask_token_id=500,
        hidden_size=128,
        num_heads=4,
        num_layers=5,
        cond_dim=32,
        mlp_ratio=mlp_ratio,
        max_length=96,
        loop_start=1,
        loop_end=3,
    )
    model = LoopMDM(config).eval()
    input_ids = torch.randint(500, (2, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), lk.use_backend("reference"), profiler() as counter:
        model(input_ids, num_loops=num_loops)
    counted = counter.get_total_flops()
    assert counted == pytest.approx(2 * flops.forward_flops(config, 96, num_loops, "blocks+head"), rel=0.01)
    conditioning = counted - 2 * flops.forward_flops(config, 96, num_loops, "blocks+head")
    assert 0 < conditioning <= 2 * flops.conditioning_flops(config)


def test_e12_training_step_equals_profiler() -> None:
    """Forward and backward of the loss cost three forwards; the head runs on the masked rows only."""
    config = LoopMDMConfig(501, 500, hidden_size=128, num_heads=4, num_layers=4, cond_dim=8, max_loops=4)
    model = LoopMDM(config)
    input_ids = torch.randint(500, (4, 96), generator=torch.Generator().manual_seed(0))
    with lk.use_backend("reference"), profiler() as counter:
        model.loss(input_ids, num_loops=4, seed=0, t=torch.ones(4)).loss.backward()
    expected = 4 * flops.training_flops(config, 96, 4, "blocks+head")
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.03)


def test_sampling_ledger_adds_what_was_executed() -> None:
    ledger = SamplingLedger(length=1024)
    ledger.record(SMALL, [12, 12, 3], rows_projected=5)
    ledger.record(SMALL, torch.tensor([1]), rows_projected=0)
    ledger.record(Sizes(num_layers=4), [1, 1], rows_projected=2048)
    layers = 34 + 34 + 16 + 12 + 4 + 4
    blocks = layers * 1024 * 17_301_504
    assert ledger.flops("blocks") == blocks
    assert ledger.flops("blocks+head") == blocks + 2053 * 77_196_288
    assert ledger.flops(DUO) == blocks + (2053 + 6 * 1024) * 77_196_288
    assert ledger.mean_loops == 30 / 6
    report = ledger.report()
    assert (report["network_calls"], report["sequence_calls"], report["rows_projected"]) == (3, 6, 2053)
    assert list(json.loads(json.dumps(report))["flops"]) == list(CONVENTIONS)


def test_full_head_ledger_equals_forward() -> None:
    ledger = SamplingLedger(length=128)
    ledger.record(SMALL, [7], rows_projected=128)
    for convention in CONVENTIONS:
        assert ledger.flops(convention) == flops.forward_flops(SMALL, 128, 7, convention)
    assert SamplingLedger(length=4).mean_loops == 0


def test_bad_input_names_the_argument() -> None:
    with pytest.raises(ValueError, match="convention is 'head'; accepted: 'blocks'"):
        flops.forward_flops(SMALL, 8, 1, "head")
    with pytest.raises(ValueError, match="length is 0"):
        flops.layer_flops(SMALL, 0)
    with pytest.raises(ValueError, match="num_loops is 0"):
        flops.forward_flops(SMALL, 8, 0)
    with pytest.raises(ValueError, match=r"light_fraction is 1\.5"):
        flops.schedule_saving(1.5, 4, 12)
    with pytest.raises(ValueError, match="light_blocks is 13"):
        flops.schedule_saving(0.5, 13, 12)
    with pytest.raises(ValueError, match="num_loops is nan"):
        flops.executed_layers(SMALL, float("nan"))
    ledger = SamplingLedger(length=8)
    with pytest.raises(ValueError, match="rows_projected is 17"):
        ledger.record(SMALL, [1, 1], rows_projected=17)
    with pytest.raises(ValueError, match="loops is 0"):
        ledger.record(SMALL, [1, 0], rows_projected=1)
    assert ledger.network_calls == 0
