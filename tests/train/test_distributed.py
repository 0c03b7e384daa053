"""Two processes on one machine: same S, different masks, averaged gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from toy_training import ToyModel, batches

from loopmdm.model.loop_law import LoopLaw
from loopmdm.model.seeds import derive_seed
from loopmdm.train import TrainConfig, read_metrics

SCRIPT = """
import json, sys, torch
from dataclasses import replace
import torch.distributed as dist
from toy_training import ToyModel, batches
from loopmdm.train import TrainConfig, Trainer
dist.init_process_group("gloo")
rank = dist.get_rank()
model = ToyModel(seed=rank)
config = TrainConfig(**json.load(open(sys.argv[2])))
trainer = Trainer(model, batches, config, sys.argv[1], show_progress=False)
trainer.train()
half = sys.argv[1] + "-half"
Trainer(ToyModel(), batches, replace(config, steps=3), half, show_progress=False).train()
dist.barrier()
resumed = Trainer(ToyModel(seed=9 + rank), batches, config, half, show_progress=False)
resumed.resume()
resumed.train()
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
averages = torch.cat([s.flatten() for s in trainer.ema.shadow])
torch.save({"calls": model.calls, "weights": weights, "averages": averages}, f"{sys.argv[1]}.{rank}.pt")
dist.destroy_process_group()
"""
OPTIONS = {
    "steps": 6,
    "batch_size": 4,
    "accumulation": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "log_every": 1,
    "seed": 5,
}


def launch(folder: Path) -> list[dict[str, object]]:
    (folder / "run.py").write_text(SCRIPT)
    (folder / "options.json").write_text(json.dumps(OPTIONS))
    run_ranks(folder / "run.py", folder / "run", folder / "options.json")
    return [torch.load(folder / f"run.{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, object]]]:
    folder = tmp_path_factory.mktemp("distributed")
    return folder, launch(folder)


def test_e11_same_loops_other_masks_other_data(run: tuple[Path, list[dict[str, object]]]) -> None:
    first, second = (result["calls"] for result in run[1])
    assert isinstance(first, list) and isinstance(second, list) and len(first) == len(second) == 12
    law = LoopLaw.uniform(4)
    for index, (mine, other) in enumerate(zip(first, second, strict=True)):
        assert mine[0] == other[0] == law.sample(5, index // 2)
        assert mine[1] != other[1]
        assert not torch.equal(mine[2], other[2])
    assert len({call[1] for call in first + second}) == 24


def test_gradients_are_averaged(run: tuple[Path, list[dict[str, object]]]) -> None:
    folder, (first, second) = run
    assert torch.equal(first["weights"], second["weights"])  # type: ignore[arg-type]
    assert torch.equal(first["averages"], second["averages"])  # type: ignore[arg-type]
    model = ToyModel(seed=0)
    config = TrainConfig(**OPTIONS)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    law = LoopLaw.uniform(4)
    expected = []
    for step in range(6):
        losses = []
        for rank in range(2):
            for micro_step in range(2):
                batch = batches(step, micro_step, rank, 2, 4)
                seed = derive_seed(5, 0, step, 2 * micro_step + rank)
                losses.append(model.loss(batch.input_ids, num_loops=law.sample(5, step), seed=seed).loss)
        loss = torch.stack(losses).mean()
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = config.learning_rate_at(step)
        optimizer.step()
    records = read_metrics(folder / "run" / "metrics.jsonl")
    assert [record["loss"] for record in records] == pytest.approx(expected, rel=1e-4)
    assert [record["tokens"] for record in records] == [2 * 2 * 4 * 8 * step for step in range(1, 7)]
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(first["weights"], weights, rtol=1e-4, atol=1e-5)


def test_resumed_ranks_continue_bitwise(run: tuple[Path, list[dict[str, object]]]) -> None:
    whole, half = run[0] / "run", run[0] / "run-half"
    losses = [[r["loss"] for r in read_metrics(at / "metrics.jsonl")] for at in (whole, half)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    expected, got = (load_file(at / "model.safetensors") for at in (whole, half))
    assert all(torch.equal(got[name], expected[name]) for name in expected)
