"""loopmdm train --init-from and --lora: what a run begins with, what it trains, what it leaves behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loopmdm import LoopMDM
from loopmdm.runs.run_file import RunFile

from .conftest import STEPS, TINY, Call

LIGHT = ["--steps", "4", "--batch-size", "2", "--eval-size", "2", "--warmup", "0", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"line {number}: the quick brown fox {'x' * number}\n" * 5)
    return folder


@pytest.fixture(scope="module")
def plain(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a loop."""
    from loopmdm.cli import main

    out = tmp_path_factory.mktemp("plain") / "run"
    sizes = [*TINY[:6], "--loop", "0:1", "--max-loops", "1", "--length", "16", *STEPS]
    assert main(["train", "--data", str(text), *sizes, "--out", str(out)]) == 0
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_loops_are_added_to_a_plain_model(call: Call, plain: Path, text: Path, tmp_path: Path) -> None:
    """Before the first step it is that model; its tokenizer and length are taken."""
    out = tmp_path / "looped"
    options = ["--init-from", str(plain), "--loop", "1:2", "--max-loops", "3", "--out", str(out)]
    done = call("train", "--data", str(text), *LIGHT, *options, "--ema", "0", "--lr", "1e-12")
    assert done.status == 0, done.err
    model = LoopMDM.from_pretrained(out)
    assert (model.config.loop_start, model.config.loop_end, model.config.max_loops) == (1, 2, 3)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(out)[name], value, rtol=0, atol=1e-9)
    run = RunFile.read(out)
    assert run is not None and (run.length, run.init_from) == (16, str(plain))
    again = call("train", "--resume", "--out", str(out), "--steps", "6")
    assert again.status == 0, again.err


def test_reference_checkpoints_begin_a_run(call: Call, plain: Path, text: Path, tmp_path: Path) -> None:
    """A bare state dict with the reference's names, in a torch file."""
    reference = tmp_path / "mdlm.pt"
    config = LoopMDM.from_pretrained(plain).config
    torch.save({f"backbone.{name}": value for name, value in weights(plain).items()}, reference)
    out = tmp_path / "run"
    done = call("train", "--data", str(text), *LIGHT, "--init-from", str(reference), "--length", "16",
                "--loop", "1:3", "--out", str(out), "--ema", "0", "--lr", "1e-12")  # fmt: skip
    assert done.status == 0, done.err
    assert LoopMDM.from_pretrained(out).config.hidden_size == config.hidden_size
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(out)[name], value, rtol=0, atol=1e-9)


def test_the_raw_weights_of_a_lightning_checkpoint_begin_a_run(
    call: Call, plain: Path, text: Path, tmp_path: Path
) -> None:
    source = LoopMDM.from_pretrained(plain)
    state = {f"backbone.{name}": value for name, value in source.state_dict().items()}
    shadow = [parameter.detach() + 1e-3 for parameter in source.parameters()]
    checkpoint = {"state_dict": state, "ema": {"decay": 0.9, "num_updates": 9, "shadow_params": shadow}}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    shared = ["--data", str(text), *LIGHT, "--init-from", str(tmp_path / "last.ckpt"), "--length", "16"]
    shared += ["--loop", "0:1", "--ema", "0", "--lr", "1e-12"]
    for shift, options in ((1e-3, []), (0.0, ["--no-ema"])):
        out = tmp_path / f"run{shift}"
        done = call("train", *shared, *options, "--out", str(out))
        assert done.status == 0, done.err
        for name, parameter in source.named_parameters():
            torch.testing.assert_close(weights(out)[name], parameter.detach() + shift, rtol=0, atol=1e-6)
    again = call("train", "--resume", "--out", str(out), "--steps", "5")
    assert again.status == 0, again.err


def test_a_run_of_one_process_is_converted_with_its_tokenizer(
    call: Call, plain: Path, tmp_path: Path
) -> None:
    assert call("convert", str(plain), str(tmp_path / "out")).status == 0
    assert weights(tmp_path / "out").keys() == weights(plain).keys()
    name = "loopmdm_tokenizer.json"
    assert (tmp_path / "out" / name).read_bytes() == (plain / name).read_bytes()


def test_lora_trains_adapters_and_is_merged(call: Call, plain: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out = tmp_path / "lora"
    options = ["--init-from", str(plain), "--lora", "2", "--lora-targets", "attn_qkv", "mlp.0"]
    options += ["--out", str(out), "--lr", "1e-2"]
    done = call("train", "--data", str(text), *LIGHT, *options)
    assert done.status == 0, done.err
    before, after = weights(plain), weights(out)
    assert before.keys() == after.keys()
    for name, value in before.items():
        adapted = "blocks." in name and name.endswith(("attn_qkv.weight", "mlp.0.weight"))
        change = after[name] - value
        assert bool(change.any()) == adapted, name
        if adapted:
            assert torch.linalg.matrix_rank(change.double(), rtol=1e-4) <= 2, name
    state = load_file(out / "training_state.safetensors")
    assert {name for name in state if name.startswith("ema.")} == {
        f"ema.blocks.{block}.{target}.lora_{half}.default.weight"
        for block in range(3)
        for target in ("attn_qkv", "mlp.0")
        for half in "AB"
    }
    done = call("train", "--resume", "--data", str(text), *LIGHT, *options, "--steps", "6")
    assert done.status == 0, done.err
    assert call("sample", str(out), "--num", "1", "--steps", "2").status == 0


def test_lora_in_shards_is_merged_on_demand(call: Call, plain: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    out, exported = tmp_path / "lora", tmp_path / "exported"
    options = ["--init-from", str(plain), "--lora", "2", "--keep", "1", "--out", str(out), "--lr", "1e-2"]
    assert call("train", "--data", str(text), *LIGHT, *options).status == 0
    done = call("convert", str(out), str(exported))
    assert done.status == 0, done.err
    expected, got = weights(out), weights(exported)
    assert expected.keys() == got.keys() and all(torch.equal(got[name], expected[name]) for name in got)


def test_a_run_goes_on_with_what_it_began_with(
    call: Call, plain: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same options again are taken, and others are refused, as those of the model are."""
    start, out = tmp_path / "start", tmp_path / "run"
    shutil.copytree(plain, start)
    monkeypatch.chdir(tmp_path)
    command = ["train", "--resume", "--data", str(text), *LIGHT, "--init-from", "start", "--out", str(out)]
    assert call(*command).status == 0
    assert call(*command, "--steps", "6").status == 0
    shutil.rmtree(start)
    assert call(*command, "--steps", "6").status == 0
    before = (out / "training_state.safetensors").read_bytes()
    for options, message in (
        (["--init-from", str(plain)], f"init_from is '{start}', got '{plain}'"),
        (["--lora", "16", "--lora-targets", "mlp.0"], r"lora is {}, got {'rank': 16, 'targets': ['mlp.0']}"),
        (["--lora-targets", "mlp.0"], "those of --lora RANK"),
    ):
        done = call("train", "--resume", "--out", str(out), *options)
        assert done.status == 2 and message in done.err, done.err
    assert (out / "training_state.safetensors").read_bytes() == before


def test_what_does_not_fit_is_refused_in_a_line(call: Call, plain: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bare = tmp_path / "bare.pt"
    torch.save(weights(plain), bare)
    other = tmp_path / "other"
    other.mkdir()
    save_file(weights(plain), other / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "loopmdm-causal"}))
    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoints").mkdir(parents=True)
    cases = {
        "missing": (["--init-from", str(tmp_path / "nothing")], 1, "--init-from: "),
        "autoregressive": (["--init-from", str(other)], 1, "--init-from: .*autoregressive scorer"),
        "unfinished": (["--init-from", str(unfinished)], 1, "`loopmdm convert` exports it"),
        "size": (["--init-from", str(plain), "--hidden", "32"], 2, "hidden_size 16, got 32"),
        "tokenizer": (["--init-from", str(plain), "--tokenizer", "bpe:300"], 1, "not a pair"),
        "targets": (["--lora", "2", "--lora-targets", "head"], 2, "--lora-targets: got head, expected"),
        "no rank": (["--lora-targets", "mlp.0"], 2, "those of --lora RANK"),
        "raw, of a run": (["--init-from", str(plain), "--no-ema"], 2, "holds one set of weights"),
        "raw, of a bare file": (["--init-from", str(bare), "--no-ema"], 2, f"{bare} holds one set of"),
        "raw, of nothing": (["--no-ema"], 2, "--no-ema is of --init-from"),
        "compiled": (["--compile", "--inject", "add"], 2, r"what happens between loops \(inject\)"),
    }
    for name, (options, status, message) in cases.items():
        done = call("train", "--data", str(text), *LIGHT, *options, "--out", str(out))
        lines = [line for line in done.err.splitlines() if "error: " in line]
        assert done.status == status and len(lines) == 1, (name, done.err)
        assert re.search(message, lines[0]), (name, lines)
        assert not (out / "model.safetensors").exists() and (status == 1 or not list(out.glob("*"))), name


def test_a_plain_model_is_looped_without_training(
    call: Call, plain: Path, text: Path, tmp_path: Path
) -> None:
    """Measured and sampled from as it is; converted, the configuration says so; then trained on."""
    looped = ["--loop", "1:3", "--damped"]
    measure = ["--num-t", "2", "--windows", "2", "--data", str(text)]
    done = call("eval", str(plain), "--loops", "1,4", *looped, *measure, "--json")
    assert done.status == 0, done.err
    assert done.json["damped"] is True and (done.json["loop_start"], done.json["loop_end"]) == (1, 3)
    naive = call("eval", str(plain), "--loops", "1,4", *looped[:2], *measure, "--json").json
    assert "damped" not in naive and naive["held_out"][0]["nll"] == done.json["held_out"][0]["nll"]
    assert naive["held_out"][1]["nll"] != done.json["held_out"][1]["nll"]
    written = call("eval", str(plain), "--loops", "4", *looped, *measure)
    assert "blocks 1 to 2 looped, damped loops" in written.out
    drawn = call("sample", str(plain), "--num", "1", "--steps", "2", "--plan", "4", *looped, "--json")
    assert drawn.status == 0 and drawn.json["damped"] is True
    drawn = call("sample", str(plain), "--num", "1", "--steps", "2", "--plan", "4", *looped)
    assert "plan S4, blocks 1 to 2 looped, damped loops" in drawn.err
    converted = tmp_path / "converted"
    done = call("convert", str(plain), str(converted), *looped, "--max-loops", "4")
    assert done.status == 0 and "looped, 4 times (damped)" in done.out, done.err
    model = LoopMDM.from_pretrained(converted)
    assert model.config.damped and model.config.max_loops == 4
    out = tmp_path / "out"
    done = call("train", "--data", str(text), *LIGHT, "--init-from", str(plain), *looped, "--max-loops", "3",
                "--out", str(out))  # fmt: skip
    assert done.status == 0, done.err
    assert LoopMDM.from_pretrained(out).config.damped
    refused = call("train", "--data", str(text), *LIGHT, *looped, "--compile", "--out", str(tmp_path / "no"))
    assert refused.status == 2 and "compile: what happens between loops" in refused.err
    refused = call("study", "trajectories", str(converted), "--tokenizer", str(plain), "--data", str(text),
                   "--windows", "1", "--out", str(tmp_path / "study"))  # fmt: skip
    assert refused.status == 1 and "a loop of a damped model goes 1/S of its way" in refused.err
    refused = call("eval", str(plain), "--loop", "2:9", "--damped", *measure)
    assert refused.status == 2 and "--loop: got 2:9" in refused.err


def test_every_loop_can_have_a_loss(call: Call, plain: Path, text: Path, tmp_path: Path) -> None:
    """The ledger counts what reading them out costs; what does not go with it is refused in a line."""
    options = ["--data", str(text), *LIGHT, "--init-from", str(plain), "--loop", "1:2", "--max-loops", "3"]
    options += ["--loop-law", "fixed:3", "--json"]
    flops = {}
    for kind in ("last", "mean", "linear"):
        done = call("train", *options, "--loop-loss", kind, "--out", str(tmp_path / kind))
        assert done.status == 0, done.err
        flops[kind] = done.json["flops"]
        assert done.json["last_loss"] > 0
    assert flops["last"] < flops["mean"] == flops["linear"]
    other = call("train", "--resume", "--out", str(tmp_path / "mean"), "--loop-loss", "linear")
    assert other.status != 0 and "loop_loss" in other.err
    for wrong, message in (
        (["--damped"], "a damped loop is a part of one step"),
        (["--backprop-loops", "1"], "got backprop_loops 1"),
        (["--compile"], "compile and loop_loss mean"),
    ):
        done = call("train", *options, "--loop-loss", "mean", *wrong, "--out", str(tmp_path / "no"))
        lines = [line for line in done.err.splitlines() if "error: " in line]
        assert done.status == 2 and len(lines) == 1 and message in lines[0], done.err
        assert not list(tmp_path.glob("no/*"))


def test_a_plain_model_gets_weights_between_loops(
    call: Call, plain: Path, text: Path, tmp_path: Path
) -> None:
    """They begin new, are trained, by LoRA too, and stay with the model; what they cannot be is said."""
    out, lora = tmp_path / "out", tmp_path / "lora"
    begin = ["train", "--data", str(text), *LIGHT, "--ema", "0", "--loop-law", "fixed:2"]
    loop = ["--loop", "1:2", "--max-loops", "3"]
    given = ["--inject", "parcae", "--loop-embedding", "2", "--carry-norm"]
    done = call(*begin, "--init-from", str(plain), *loop, *given, "--out", str(out))
    assert done.status == 0, done.err
    names = {"gain", "step", "log_decay", "embedding", "norm.weight"}
    trained = {name: value for name, value in weights(out).items() if name not in weights(plain)}
    assert trained.keys() == {f"between.{name}" for name in names}
    assert bool(trained["between.gain"].any()) and bool(trained["between.embedding"][0].any())
    assert not bool(trained["between.embedding"][1].any())
    assert call("sample", str(out), "--num", "1", "--steps", "2", "--plan", "3").status == 0
    again = call(*begin, "--init-from", str(out), "--out", str(tmp_path / "again"))
    assert again.status == 0, again.err
    for options, message in (
        (["--inject", "add"], "the model has inject 'parcae', got 'add'"),
        (["--loop-embedding", "3"], "the model has loop_embedding 2, got 3"),
        (["--compile"], "what happens between loops"),
        (["--autoregressive", *given], "leave out"),
    ):
        done = call(*begin, "--init-from", str(out), *options, "--out", str(tmp_path / "no"))
        lines = [line for line in done.err.splitlines() if "error: " in line]
        assert done.status != 0 and len(lines) == 1 and message in lines[0], done.err
    pytest.importorskip("peft")
    adapters = ["--lora", "2", "--lora-targets", "mlp.0", "--inject", "add"]
    done = call(*begin, "--init-from", str(plain), *loop, *adapters, "--out", str(lora))
    assert done.status == 0, done.err
    assert bool(weights(lora)["between.gain"].any())
    assert torch.equal(weights(lora)["blocks.0.mlp.2.weight"], weights(plain)["blocks.0.mlp.2.weight"])
