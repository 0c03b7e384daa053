"""`loopmdm convert`: weights unchanged, loop from the options, foreign files refused."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loopmdm import LoopMDM, LoopMDMConfig

from .conftest import Call


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    """A state dict of the reference at small size, under the prefix of its training module."""
    torch.manual_seed(3)
    model = LoopMDM(LoopMDMConfig(13, 12, hidden_size=16, num_heads=2, num_layers=4, cond_dim=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}


def test_converted_weights_are_the_reference(
    call: Call, tmp_path: Path, reference: dict[str, torch.Tensor]
) -> None:
    torch.save(reference, tmp_path / "mdlm.pt")
    save_file(reference, tmp_path / "mdlm.safetensors")
    options = ["--loop", "1:2", "--max-loops", 5, "--mask-token-id", 12, "--num-heads", 2, "--max-length", 99]
    for source in ("mdlm.pt", "mdlm.safetensors"):
        target = tmp_path / f"{source}-converted"
        done = call("convert", tmp_path / source, target, *options, "--json")
        assert done.status == 0, done.err
        model = LoopMDM.from_pretrained(target)
        assert done.json["config"] == model.config.to_dict()
        config = model.config
        assert (config.loop_start, config.loop_end, config.max_loops, config.max_length) == (1, 2, 5, 99)
        got = model.state_dict()
        assert got.keys() == {name.removeprefix("backbone.") for name in reference}
        assert all(
            torch.equal(got[name.removeprefix("backbone.")], tensor) for name, tensor in reference.items()
        )


def test_defaults_are_those_of_the_paper(
    call: Call, tmp_path: Path, reference: dict[str, torch.Tensor]
) -> None:
    torch.save(reference, tmp_path / "mdlm.pt")
    done = call("convert", tmp_path / "mdlm.pt", tmp_path / "out")
    assert done.status == 0 and "blocks 1 to 2 are looped, 12 times" in done.out
    sampled = call("sample", tmp_path / "out", "--num", 1, "--length", 5, "--plan", 2)
    assert sampled.status == 0 and "holds no tokenizer" in sampled.err


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo attacked",)


def test_a_damaged_tokenizer_is_noticed_before_anything_is_written(
    call: Call, tmp_path: Path, text_run: Path
) -> None:
    run = shutil.copytree(text_run, tmp_path / "run")
    (run / "loopmdm_tokenizer.json").write_text("{")
    done = call("convert", run, tmp_path / "out")
    assert done.status == 1 and f"the tokenizer in {run} is damaged" in done.err
    assert not (tmp_path / "out").exists()


def test_bad_input(call: Call, tmp_path: Path, reference: dict[str, torch.Tensor]) -> None:
    torch.save(reference, tmp_path / "good.pt")
    torch.save({"state_dict": Attack()}, tmp_path / "attack.ckpt")
    content = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    save_file({**reference, "backbone.extra": torch.ones(2)}, tmp_path / "extra.safetensors")
    (tmp_path / "file").write_text("")
    cases: list[tuple[list[object], int, str]] = [
        ([tmp_path / "nothere.ckpt", tmp_path / "out"], 1, "nothere.ckpt"),
        ([tmp_path / "attack.ckpt", tmp_path / "out"], 1, "system"),
        ([tmp_path / "cut.pt", tmp_path / "out"], 1, "cut.pt"),
        ([tmp_path / "other.pt", tmp_path / "out"], 1, "other.pt"),
        ([tmp_path / "extra.safetensors", tmp_path / "out"], 1, "extra"),
        ([tmp_path / "good.pt", tmp_path / "file"], 1, "file"),
        ([tmp_path / "good.pt", tmp_path / "out", "--num-heads", 3], 1, "num_heads: got 3"),
        ([tmp_path / "good.pt", tmp_path / "out", "--mask-token-id", 13], 1, "mask_token_id: got 13"),
        ([tmp_path / "good.pt", tmp_path / "out", "--loop", "3:9"], 2, "--loop: got 3:9, expected START:END"),
        ([tmp_path / "good.pt", tmp_path / "out", "--max-loops", 0], 2, "--max-loops: got '0'"),
        ([tmp_path / "good.pt", tmp_path / "out", "--no-ema"], 2, "good.pt holds one set of weights"),
        ([tmp_path / "extra.safetensors", tmp_path / "out", "--no-ema"], 2, "holds one set of weights"),
        ([tmp_path / "good.pt"], 2, "the following arguments are required: DST"),
    ]
    for words, status, message in cases:
        done = call("convert", *words)
        assert done.status == status, (words, done.err)
        assert message in done.err and "Traceback" not in done.err and "attacked" not in done.out
        assert not (tmp_path / "out" / "model.safetensors").exists()
