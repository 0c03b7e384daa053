"""What a step can do besides: compiled passes, Muon, truncated backpropagation, warnings, logs."""

from __future__ import annotations

import itertools
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from toy_training import ToyModel, batches

from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm.data.batches import Batch
from loopmdm.model import flops
from loopmdm.train import NonFiniteError, TrainConfig, Trainer, loop, read_metrics
from loopmdm.train.loggers import logger, scalars

CONFIG: dict[str, Any] = {"steps": 12, "batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 2}


def new_model(dropout: float = 0.1) -> LoopMDM:
    config = LoopMDMConfig(
        7, 6, hidden_size=16, num_heads=2, num_layers=3, cond_dim=4, loop_end=2, max_loops=4, max_length=8,
        dropout=dropout, gate_init=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    return LoopMDM(config)


def trained(folder: Path, model: Any, **changes: Any) -> Trainer:
    config = TrainConfig(**(CONFIG | {"log_every": 1} | changes))
    built = Trainer(model, batches, config, folder, show_progress=False)
    built.train()
    return built


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]


def test_a_compiled_step_has_at_most_two_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S changes from step to step, and the losses are those of the run that is not compiled."""
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend("aot_eager")
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compile(module, backend=counter))
    trained(tmp_path / "compiled", new_model(), compile=True, accumulation=2)
    trained(tmp_path / "eager", new_model(), accumulation=2)
    assert len({r["num_loops"] for r in read_metrics(tmp_path / "compiled" / "metrics.jsonl")}) > 2
    assert 1 <= counter.frame_count <= 2 and not counters["graph_break"]
    assert losses(tmp_path / "compiled") == losses(tmp_path / "eager")
    torch._dynamo.reset()


def test_muon_moves_the_matrices_of_the_blocks_and_resumes_bitwise(tmp_path: Path) -> None:
    options = {"optimizer": "muon", "weight_decay": 0.1}
    whole = trained(tmp_path / "whole", new_model(), **options)
    adamw, muon = whole.optimizer.parts
    names = {whole.optimizer._names[p] for p in muon.param_groups[0]["params"]}
    matrices = ("attn_qkv", "attn_out", "mlp.0", "mlp.2")
    assert names == {f"blocks.{i}.{name}.weight" for i in range(3) for name in matrices}
    assert len(adamw.param_groups[0]["params"]) + len(names) == len(list(whole.model.parameters()))
    reference = nn.Parameter(whole.model.blocks[1].attn_out.weight.detach().clone())
    expected = torch.optim.Muon([reference], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    reference.grad = torch.randn(reference.shape, generator=torch.Generator().manual_seed(1))
    expected.state[reference]["momentum_buffer"] = muon.state[whole.model.blocks[1].attn_out.weight][
        "momentum_buffer"
    ].clone()
    expected.step()
    for parameter in whole.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    whole.model.blocks[1].attn_out.weight.grad = reference.grad
    whole.optimizer.step(1e-2)
    assert torch.equal(whole.model.blocks[1].attn_out.weight, reference)

    trained(tmp_path / "half", new_model(), **options, steps=6)
    resumed = Trainer(
        new_model(),
        batches,
        TrainConfig(**CONFIG, **options, log_every=1),
        tmp_path / "half",
        show_progress=False,
    )
    assert resumed.resume() == 6
    resumed.train()
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")


def test_truncated_backpropagation_is_that_of_the_last_loops() -> None:
    model, tokens = new_model(dropout=0.0).double().train(), torch.arange(16).view(2, 8) % 6

    def gradients(loops: int) -> dict[str, torch.Tensor | None]:
        model.zero_grad()
        model.loss(tokens, num_loops=loops, seed=3).loss.backward()
        return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}

    whole = gradients(4)
    model.backprop_loops = 4
    for name, value in gradients(4).items():
        assert torch.equal(value, whole[name]), name
    model.backprop_loops = 1
    truncated = gradients(4)
    assert truncated["vocab_embed.embedding"] is None and truncated["blocks.0.attn_qkv.weight"] is None
    # The last loop alone, from the state before it.
    loop = model.stages

    def cut(*arguments: Any, **options: Any) -> Any:
        stages = loop(*arguments, **options)
        before = stages.before

        def detached() -> torch.Tensor:
            with torch.no_grad():
                return stages.loop(before(), 3)

        stages.before = detached
        return stages

    model.backprop_loops = 0
    model.stages = cut
    for name, value in gradients(1).items():
        if value is not None:
            torch.testing.assert_close(truncated[name], value, rtol=1e-12, atol=1e-14, msg=name)


def test_truncated_steps_count_their_work_and_every_weight_of_the_optimizer(tmp_path: Path) -> None:
    model = new_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trained(tmp_path, model, backprop_loops=2, loop_law="fixed:4", steps=2, batch_size=3)
    dims = model.config
    forward, last = (flops.training_flops(dims, 8, loops) for loops in (4, 2))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[0]["flops"] == pytest.approx(3 * (forward / 3 + last * 2 / 3))
    after = model.state_dict()
    assert torch.equal(after["blocks.0.mlp.0.weight"], before["blocks.0.mlp.0.weight"])
    assert not torch.equal(after["blocks.1.mlp.0.weight"], before["blocks.1.mlp.0.weight"])
    moments = trainer.optimizer.moments()
    assert moments.keys() == {f"{m}.{n}" for m in ("exp_avg", "exp_avg_sq") for n in trainer.ema.names}


def test_a_spike_is_told_and_its_batch_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Jumping(ToyModel):
        def loss(self, *arguments: Any, **options: Any) -> Any:
            out = super().loss(*arguments, **options)
            return out._replace(loss=out.loss * 1e3) if len(self.calls) == 50 else out

    config = TrainConfig(**(CONFIG | {"steps": 30, "accumulation": 2, "spike": 50.0}))
    Trainer(Jumping(), batches, config, tmp_path).train()
    assert "warning: step 25: the loss is" in capsys.readouterr().err
    (saved,) = (tmp_path / "spikes").iterdir()
    assert saved.name == "step-00000025-rank-0.safetensors"
    with safe_open(saved, framework="pt") as file:
        header = json.loads(file.metadata()["loopmdm_micro_batches"])
        assert torch.equal(file.get_tensor("input_ids.1"), batches(24, 1, 0, 1, 2).input_ids)
    assert header["step"] == 25 and len(header["micro_batches"]) == 2


def test_after_many_spikes_a_loss_that_is_no_number_still_leaves_its_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Jumping(ToyModel):
        def loss(self, *arguments: Any, **options: Any) -> Any:
            out = super().loss(*arguments, **options)
            number = len(self.calls)
            factor = {33: float("nan")}.get(number, 1e3 if 22 < number < 32 else 1.0)
            return out._replace(loss=out.loss * factor)

    config = TrainConfig(**(CONFIG | {"steps": 40, "spike": 50.0}))
    with pytest.raises(NonFiniteError, match=r"step 33: loss nan.* its batch is in "):
        Trainer(Jumping(), batches, config, tmp_path).train()
    steps = [int(path.name.split("-")[1]) for path in sorted((tmp_path / "spikes").iterdir())]
    assert steps == [*range(23, 31), 33]
    told = [line for line in capsys.readouterr().err.splitlines() if "warning: step " in line]
    assert len(told) == 9 and "its batch is not saved, there are 8 in " in told[-1]


def test_a_loss_that_is_no_number_leaves_its_batch(tmp_path: Path) -> None:
    model = ToyModel()
    model.poison_after = 3
    with pytest.raises(NonFiniteError, match=r"step 4: loss nan.* its batch is in "):
        trained(tmp_path, model)
    assert [path.name for path in (tmp_path / "spikes").iterdir()] == ["step-00000004-rank-0.safetensors"]


def test_records_tell_work_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which a micro-batch takes a second."""
    model, config = ToyModel(), TrainConfig(**CONFIG, log_every=4)
    clock = types.SimpleNamespace(perf_counter=lambda: len(model.calls), process_time=time.process_time)
    monkeypatch.setattr(loop, "time", clock)
    Trainer(model, batches, config, tmp_path, show_progress=False, peak_flops=1e9).train()
    records = [{"flops": 0.0, "seconds": 0}, *read_metrics(tmp_path / "metrics.jsonl")]
    for before, record in itertools.pairwise(records):
        assert record["seconds"] - before["seconds"] == 4
        assert record["flops_per_second"] == pytest.approx((record["flops"] - before["flops"]) / 4)
        assert record["mfu"] == record["flops_per_second"] / 1e9 > 0
        assert 2**20 < record["peak_memory"] < 2**40
    assert len(records) == 4


RECORDS = [
    {"step": 3, "loss": 2.0, "num_loops": 4},
    {"step": 4, "evaluation": {"held_out": [{"num_loops": 2, "nll": 1.5}]}, "flops": 8.0},
    {"step": 5, "evaluation": {"solved": [{"order": "random", "num_loops": 1, "share_solved": 0.5}]}},
]


def test_scalars_of_records() -> None:
    names = [dict(scalars(record)) for record in RECORDS]
    assert names == [
        {"train/loss": 2.0, "train/num_loops": 4},
        {"train/flops": 8.0, "held_out/nll_S2": 1.5},
        {"solved/random_S1": 0.5},
    ]


SAMPLED: dict[str, Any] = {
    "step": 5,
    "evaluation": {
        "samples": [
            {"num_loops": 1, "prompt": "a", "text": "b"},
            {"num_loops": 1, "prompt": "c", "text": "d"},
            {"num_loops": 2, "prompt": "1.", "text": "12", "solved": True},
        ]
    },
}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_loggers_speak_to_their_packages(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By stand-ins with the calls of the packages, which need not be installed."""
    module = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}[name]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {name}"):
        logger(name, tmp_path, {})
    told: list[Any] = []
    stand_in = types.ModuleType(module)

    class Writer:
        def __init__(self, folder: str) -> None:
            told.append(folder)

        def add_scalar(self, *arguments: Any) -> None:
            told.append(arguments)

        def add_text(self, *arguments: Any) -> None:
            told.append(arguments)

        def close(self) -> None:
            told.append("closed")

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            told.extend((key, value, step) for key, value in values.items())

        def finish(self) -> None:
            told.append("closed")

    def init(**options: Any) -> Run:
        assert options["mode"] == "offline" and options["config"] == {"seed": 1}
        told.append(options["dir"])
        return Run()

    def table(columns: list[str], data: list[list[str]]) -> list[list[str]]:
        return [columns, *data]

    stand_in.SummaryWriter, stand_in.init, stand_in.Table = Writer, init, table  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module, stand_in)
    made = logger(name, tmp_path, {"seed": 1})
    for record in (*RECORDS[:2], SAMPLED):
        made.write(record)
    made.close()
    expected = [("train/loss", 2.0, 3), ("train/num_loops", 4, 3), ("train/flops", 8.0, 4)]
    folder = tmp_path / "tensorboard" if name == "tensorboard" else tmp_path
    expected.append(("held_out/nll_S2", 1.5, 4))
    drawn = [["samples/S1_1", "ab"], ["samples/S1_2", "cd"], ["samples/S2_1", "1.\n12"]]
    samples = [("samples", [["sample", "text"], *drawn], 5)]
    if name == "tensorboard":
        samples = [(name, text, 5) for name, text in drawn]
    assert told == [str(folder), *expected, *samples, "closed"]


def test_batches_are_found_again(tmp_path: Path) -> None:
    """A batch with all its masks goes into a file whole."""
    from loopmdm.train.step import MicroBatch
    from loopmdm.train.watch import Watch

    ids = torch.arange(6).view(2, 3)
    batch = Batch(ids, attention_mask=ids > 1, prompt_mask=ids == 2)
    Watch(tmp_path, 3, 0.0).save(7, float("inf"), [MicroBatch(batch, 2, 5)])
    with safe_open(tmp_path / "spikes" / "step-00000007-rank-3.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("attention_mask.0"), ids > 1)
        assert torch.equal(file.get_tensor("prompt_mask.0"), ids == 2)
        assert json.loads(file.metadata()["loopmdm_micro_batches"]) == {
            "step": 7, "loss": "inf", "micro_batches": [{"num_loops": 2, "seed": 5}]
        }  # fmt: skip
