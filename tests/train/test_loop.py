"""Optimizer steps, the law of S, seeds, records, errors."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_training import LENGTH, ToyModel, batches

from loopmdm.data.packing import TextData
from loopmdm.data.sudoku import SIX, SudokuData
from loopmdm.model import flops
from loopmdm.model.loop_law import LoopLaw
from loopmdm.model.seeds import derive_seed
from loopmdm.train import NonFiniteError, TrainConfig, Trainer, batch_source, plot_loss, read_metrics
from loopmdm.train.loggers import scalars
from loopmdm.train.metrics import held_out


def config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "steps": 12,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 5,
        "log_every": 1,
    }
    return TrainConfig(**(values | changes))


def train(model: ToyModel, folder: Path, **changes: Any) -> Trainer:
    trainer = Trainer(model, batches, config(**changes), folder, show_progress=False)
    trainer.train()
    return trainer


def test_steps_equal_a_plain_adamw_loop(tmp_path: Path) -> None:
    trained = ToyModel()
    trainer = train(trained, tmp_path, accumulation=3, clip=0.5, weight_decay=0.1, seed=4)
    model = ToyModel()
    options = trainer.config
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=options.betas, eps=options.eps, weight_decay=0.1, foreach=False, fused=False
    )
    law = LoopLaw.uniform(model.config.max_loops)
    for step in range(12):
        losses = []
        for micro_step in range(3):
            batch = batches(step, micro_step, 0, 1, 4)
            seed = derive_seed(4, 0, step, micro_step)
            losses.append(model.loss(batch.input_ids, num_loops=law.sample(4, step), seed=seed).loss)
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
        scale = min(1.0, 0.5 / float(norm + 1e-6))
        for p in model.parameters():
            assert p.grad is not None
            p.grad *= scale
        optimizer.param_groups[0]["lr"] = options.learning_rate_at(step)
        optimizer.step()
        record = read_metrics(tmp_path / "metrics.jsonl")[step]
        assert record["step"] == step + 1 and record["num_loops"] == law.sample(4, step)
        assert record["lr"] == options.learning_rate_at(step)
        assert record["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
        assert record["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    for got, expected in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_one_loop_count_and_fresh_masks_in_every_micro_batch(tmp_path: Path) -> None:
    model = ToyModel()
    train(model, tmp_path, accumulation=2)
    for first, second in zip(model.calls[::2], model.calls[1::2], strict=True):
        assert first[0] == second[0] and first[1] != second[1]
    assert len({seed for _, seed, _ in model.calls}) == 24
    assert {loops for loops, _, _ in model.calls} <= {1, 2, 3, 4}


def test_seeds_differ_wherever_an_argument_does() -> None:
    seeds = {derive_seed(*words) for words in itertools.product(range(4), range(4), range(8), range(4))}
    assert len(seeds) == 4 * 4 * 8 * 4 and all(0 <= seed < 2**63 for seed in seeds)


def test_records(tmp_path: Path) -> None:
    model = ToyModel()
    seen: list[dict[str, Any]] = []
    trainer = Trainer(model, batches, config(log_every=5), tmp_path, seen.append, show_progress=False)
    counters = trainer.train()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records == seen and [r["step"] for r in records] == [5, 10, 12]
    last = records[-1]
    assert last["tokens"] == counters.tokens == 12 * 4 * LENGTH
    loops = [num_loops for num_loops, _, _ in model.calls]
    assert last["flops"] == pytest.approx(
        sum(4 * flops.training_flops(model.config, LENGTH, s) for s in loops)
    )
    assert last["nll"] == pytest.approx(last["loss"]) and last["tokens_per_second"] > 0
    assert last["cpu_seconds"] > 0 and 0 < last["seconds"] <= counters.seconds
    assert plot_loss(tmp_path).stat().st_size > 0


def test_prompt_and_padding_reach_the_model(tmp_path: Path) -> None:
    def source(*arguments: int) -> Any:
        batch = batches(*arguments)
        padding = torch.arange(LENGTH).expand(4, -1) < LENGTH - 1
        prompt = torch.arange(LENGTH).expand(4, -1) < 3
        return batch._replace(attention_mask=padding, prompt_mask=prompt)

    counters = Trainer(ToyModel(), source, config(), tmp_path, show_progress=False).train()
    assert counters.tokens == 12 * 4 * (LENGTH - 4)


def test_both_data_sets_have_batches() -> None:
    tokens = np.arange(24, dtype=np.int32).reshape(6, 4) % 6
    text = batch_source(
        TextData(tokens, vocab_size=7, mask_token_id=6, lengths=np.full(6, 3, dtype=np.int32))
    )
    first, second = text(0, 0, 0, 2, 3), text(0, 0, 1, 2, 3)
    assert sorted(torch.cat([first.input_ids, second.input_ids])[:, 0].tolist()) == sorted(
        tokens[:, 0].tolist()
    )
    assert first.attention_mask is not None and first.attention_mask.sum() == 9 and first.prompt_mask is None
    sudoku = batch_source(SudokuData(SIX, seed=0, clues=(12, 16), pool_size=20))
    batch = sudoku(0, 0, 0, 1, 5)
    assert batch.input_ids.shape == (5, 36) and batch.attention_mask is None
    assert batch.prompt_mask is not None and 12 <= int(batch.prompt_mask[0].sum()) <= 16


def test_evaluation_sees_the_averaged_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ToyModel()
    seen: list[list[torch.Tensor]] = []

    def evaluate(given: Any) -> dict[str, Any]:
        assert given is model and not model.training
        seen.append([p.detach().clone() for p in model.parameters()])
        return {"held_out": [{"num_loops": 1, "nll": None}, {"num_loops": 2, "nll": 1.0 / len(seen)}]}

    trainer = Trainer(model, batches, config(eval_every=5), tmp_path, evaluate=evaluate)
    trainer.train()
    assert "S 1 NLL not finite, S 2 NLL 0.5000" in capsys.readouterr().err
    assert all(map(torch.equal, seen[-1], trainer.ema.shadow))
    assert not any(map(torch.equal, seen[-1], model.parameters()))
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "evaluation" in r]
    assert [r["step"] for r in records] == [5, 10, 12]
    assert records[1]["evaluation"]["held_out"][1] == {"num_loops": 2, "nll": 0.5}
    assert dict(scalars(records[1]))["held_out/nll_S2"] == 0.5 and held_out(records).keys() == {"2"}
    plot_loss(tmp_path)
    without = train(ToyModel(), tmp_path / "without")
    assert all(map(torch.equal, without.model.parameters(), model.parameters()))


def test_caches_keyed_on_versions_see_every_step(tmp_path: Path) -> None:
    model = ToyModel()
    versions: list[int] = []
    train_loss = model.loss
    model.loss = lambda *a, **k: versions.append(model.embed._version) or train_loss(*a, **k)  # type: ignore
    train(model, tmp_path)
    assert len(set(versions)) == 12


@pytest.mark.parametrize("clip", [1.0, None])
def test_non_finite_loss_stops_and_keeps_the_checkpoint(tmp_path: Path, clip: float | None) -> None:
    model = ToyModel()
    model.poison_after = 7
    with pytest.raises(NonFiniteError, match="step 8: loss nan"):
        train(model, tmp_path, checkpoint_every=3, clip=clip)
    healthy = ToyModel(seed=1)
    trainer = Trainer(healthy, batches, config(checkpoint_every=3, clip=clip), tmp_path, show_progress=False)
    assert trainer.resume() == 6
    assert all(bool(torch.isfinite(p).all()) for p in healthy.parameters())
    assert trainer.train().step == 12


def test_reading_figures_late_changes_nothing(tmp_path: Path) -> None:
    """What happens on a GPU: a step's figures are read after the launch of the next."""
    train(ToyModel(), tmp_path / "now")
    trainer = Trainer(ToyModel(), batches, config(), tmp_path / "late", show_progress=False)
    trainer._read_late = True
    trainer.train()
    clocks = ("seconds", "cpu_seconds", "tokens_per_second", "flops_per_second", "peak_memory")
    now, late = (
        [
            {k: v for k, v in r.items() if k not in clocks}
            for r in read_metrics(tmp_path / name / "metrics.jsonl")
        ]
        for name in ("now", "late")
    )
    assert now == late and len(late) == 12
    model = ToyModel()
    model.poison_after = 7
    trainer = Trainer(model, batches, config(checkpoint_every=3), tmp_path / "poisoned", show_progress=False)
    trainer._read_late = True
    with pytest.raises(NonFiniteError, match="step 8: loss nan"):
        trainer.train()
    assert Trainer(ToyModel(), batches, config(), tmp_path / "poisoned", show_progress=False).resume() == 6


def test_errors_of_the_data_surface(tmp_path: Path) -> None:
    def source(step: int, *rest: int) -> Any:
        if step == 3:
            raise FileNotFoundError("shard 3")
        return batches(step, *rest)

    with pytest.raises(FileNotFoundError, match="shard 3"):
        Trainer(ToyModel(), source, config(), tmp_path, show_progress=False).train()


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(
    tmp_path: Path, terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "200")
    options = config(log_every=6, eval_every=6)
    Trainer(ToyModel(), batches, options, tmp_path, evaluate=lambda _: {"solved": 0.5}).train()
    shown = capsys.readouterr()
    assert shown.out == "" and "step 12/12  loss " in shown.err and "tokens/s  0:00:00 left" in shown.err
    assert '{"solved": 0.5}' in shown.err
    assert ("\x1b" in shown.err) == terminal


def test_bf16_autocast_reaches_the_loss(tmp_path: Path) -> None:
    model = ToyModel()
    dtypes: list[bool] = []
    train_loss = model.loss
    model.loss = lambda *a, **k: dtypes.append(torch.is_autocast_enabled("cpu")) or train_loss(*a, **k)  # type: ignore
    train(model, tmp_path / "bf16", precision="bf16")
    train(model, tmp_path / "fp32")
    assert dtypes == [True] * 12 + [False] * 12
    losses = [r["loss"] for r in read_metrics(tmp_path / "bf16" / "metrics.jsonl")]
    assert all(math.isfinite(loss) for loss in losses)
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("read_late", [False, True])
@pytest.mark.parametrize("moment, expected", [("pass", 4), ("record", 5)])
def test_request_stop_ends_after_a_checkpoint(
    tmp_path: Path, moment: str, expected: int, read_late: bool
) -> None:
    """After the step that is computed; where the record of one is written, that is the next."""

    class Stopping(ToyModel):
        def loss(self, *arguments: Any, **options: Any) -> Any:
            if moment == "pass" and len(self.calls) == 3:
                trainer.request_stop()
            return super().loss(*arguments, **options)

    def stop(record: dict[str, Any]) -> None:
        if moment == "record" and record["step"] == 4:
            trainer.request_stop()

    trainer = Trainer(Stopping(), batches, config(), tmp_path, stop, show_progress=False)
    trainer._read_late = read_late
    assert trainer.train().step == expected
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")][-1] == expected
    assert Trainer(ToyModel(), batches, config(), tmp_path, show_progress=False).resume() == expected


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="data must be a SudokuData"):
        batch_source(3)
    with pytest.raises(ValueError, match="data was made for accumulation 1, the run accumulates 2"):
        text = TextData(np.zeros((2, 4), dtype=np.int32), vocab_size=7, mask_token_id=6)
        Trainer(ToyModel(), text, config(accumulation=2), tmp_path)
    with pytest.raises(ValueError, match="pass evaluate"):
        Trainer(ToyModel(), batches, config(eval_every=2), tmp_path)
    with pytest.raises(ValueError, match="loop law"):
        Trainer(ToyModel(), batches, config(loop_law="sometimes"), tmp_path)
