"""Tied weights of an MDLM file load tied; numbers of blocks that no file holds are refused at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model

from loopmdm import LoopMDM
from tests.mdlm.files import averaged, diffusion, write_lightning

HEAD, EMBEDDING = "output_layer.linear.weight", "vocab_embed.embedding"


def tied() -> Any:
    """The embedding as the head, and two blocks that share a matrix."""
    module = diffusion()
    net = module.backbone
    net.output_layer.linear.weight = net.vocab_embed.embedding
    net.blocks[3].attn_qkv.weight = net.blocks[1].attn_qkv.weight
    return module


def check(model: LoopMDM, module: Any) -> None:
    assert model.output_layer.linear.weight is model.vocab_embed.embedding
    assert model.blocks[3].attn_qkv.weight is model.blocks[1].attn_qkv.weight
    assert len(list(model.parameters())) == len(list(module.parameters())) == 58
    for name, value in module.backbone.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("form", ["module", "dict", "torch", "legacy torch", "safetensors", "lightning"])
def test_tied_weights_load_tied(tmp_path: Path, form: str) -> None:
    module = tied()
    source: Any = tmp_path / "weights.pt"
    match form:
        case "module":
            source = module
        case "dict":
            source = module.state_dict()
        case "safetensors":
            source = tmp_path / "model.safetensors"
            save_model(module.backbone, str(source))
        case "lightning":
            source = write_lightning(tmp_path / "last.ckpt", module, None)
        case _:
            torch.save(module.state_dict(), source, _use_new_zipfile_serialization=form == "torch")
    model = LoopMDM.from_mdlm(source, ema=False)
    check(model, module)
    model.save_pretrained(tmp_path / "ours")
    check(LoopMDM.from_pretrained(tmp_path / "ours"), module)
    with torch.no_grad():
        model.vocab_embed.embedding.zero_()
    assert module.backbone.vocab_embed.embedding.any()  # a copy of the source's


def test_averaged_weights_of_a_tied_module(tmp_path: Path) -> None:
    """Listed once, as parameters() lists them, or once for each name."""
    module = tied()
    path = write_lightning(tmp_path / "last.ckpt", module, averaged(module))
    shadow = iter(averaged(module))
    for parameter in module.parameters():
        parameter.data = next(shadow)
    check(LoopMDM.from_mdlm(path), module)


def test_weights_that_are_equal_are_not_tied() -> None:
    module = tied()
    model = LoopMDM.from_mdlm({name: value.clone() for name, value in module.state_dict().items()})
    assert model.output_layer.linear.weight is not model.vocab_embed.embedding
    assert torch.equal(model.output_layer.linear.weight, model.vocab_embed.embedding)


@pytest.mark.parametrize(
    ("alias", "kept", "message"),
    [
        (
            "rotary_emb.inv_freq",
            "four",
            r"rotary_emb\.inv_freq is tied to .*expected two parameters|do not fit",
        ),
        ("blocks.append", EMBEDDING, r"blocks\.append +no such tensor"),
        ("", EMBEDDING, "no such tensor"),
        ("sigma_map.mlp.2.bias", "rotary_emb.inv_freq", r"expected two parameters|do not fit"),
        (HEAD, "blocks.0.attn_qkv.weight", "do not fit"),
    ],
)
def test_forged_ties_are_refused(tmp_path: Path, alias: str, kept: str, message: str) -> None:
    """cond_dim is the number of frequencies here, so that shapes agree."""
    module = diffusion(cond_dim=4)
    tensors = {name: value.clone() for name, value in module.backbone.state_dict().items()}
    kept = "sigma_map.mlp.2.bias" if kept == "four" else kept
    tensors.pop(alias, None)
    save_file(tensors, tmp_path / "model.safetensors", metadata={alias: kept})
    with pytest.raises(ValueError, match=message):
        LoopMDM.from_mdlm(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        '{"vocab_size": 13, "mask_token_id": 12, "hidden_size": 16, "num_heads": 2, "num_layers": 5,'
        ' "cond_dim": 4}'
    )
    with pytest.raises(ValueError, match=message):
        LoopMDM.from_pretrained(tmp_path)


@pytest.mark.parametrize("number", ["999999999", "9" * 4000, "61", "10" * 9])
@pytest.mark.parametrize("form", ["dict", "safetensors", "torch", "lightning"])
def test_numbers_of_blocks_are_bounded_by_the_file(tmp_path: Path, number: str, form: str) -> None:
    module = diffusion()
    state = {n: v.clone() for n, v in module.backbone.state_dict().items()}
    state[f"blocks.{number}.norm1.weight"] = torch.ones(16)
    source: Any = tmp_path / "weights.pt"
    match form:
        case "dict":
            source = state
        case "safetensors":
            source = tmp_path / "model.safetensors"
            save_file(state, source)
        case "torch":
            torch.save(state, source)
        case "lightning":
            source = write_lightning(tmp_path / "last.ckpt", module, averaged(module), state_dict=state)
    message = rf"has a tensor blocks\.{number[:20]}.*, but 62 tensors in all|do not fit|60 tensors, the model"
    with pytest.raises(ValueError, match=message) as caught:
        LoopMDM.from_mdlm(source)
    assert len(str(caught.value)) < 5000
