"""Every form of a reference checkpoint, and what is said about files that do not fit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loopmdm import LoopMDM
from loopmdm.formats.pickles import UnsafePickleError
from loopmdm.mdlm import DIT, convert_checkpoint, from_mdlm
from loopmdm.mdlm.weights import parameter_names
from tests.formats.payloads import Call, payloads
from tests.mdlm.files import VOCAB, averaged, diffusion, write_lightning
from tests.mdlm.reference_dit import ReferenceDIT, reference_config


def check(model: LoopMDM, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
    assert not model.training
    assert (model.config.hidden_size, model.config.num_heads, model.config.num_layers) == (16, 2, 5)
    assert (model.config.cond_dim, model.config.mlp_ratio, model.config.vocab_size) == (8, 4, VOCAB)


def raw(module: Any) -> dict[str, Tensor]:
    return dict(module.backbone.state_dict())


@pytest.mark.parametrize(
    "prefix", ["", "backbone.", "_orig_mod.", "module.", "backbone._orig_mod.", "module.backbone."]
)
@pytest.mark.parametrize(
    "form", ["torch", "legacy torch", "safetensors", "dict", "safetensors folder", "torch folder"]
)
def test_bare_weights(tmp_path: Path, form: str, prefix: str) -> None:
    module = diffusion()
    state = {prefix + name: tensor.clone() for name, tensor in raw(module).items()}
    source: Any = tmp_path / "weights.pt"
    if form.endswith("torch"):
        torch.save(state, source, _use_new_zipfile_serialization=form == "torch")
    elif form == "safetensors":
        source = tmp_path / "weights.safetensors"
        save_file(state, source)
    elif form == "safetensors folder":
        source = tmp_path
        save_file(state, tmp_path / "model.safetensors")
    elif form == "torch folder":
        source = str(tmp_path)
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        source = state
    check(LoopMDM.from_mdlm(source), raw(module))


def test_prefixes_inside_names() -> None:
    """torch.compile on single blocks puts its prefix in the middle."""
    module = diffusion()
    state = {
        name.replace("blocks.1.", "blocks.1._orig_mod."): tensor
        for name, tensor in module.state_dict().items()
    }
    check(LoopMDM.from_mdlm(state), raw(module))


@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: module.backbone])
def test_modules(wrap: Any) -> None:
    module = diffusion()
    model = LoopMDM.from_mdlm(wrap(module))
    check(model, raw(module))
    with torch.no_grad():
        model.vocab_embed.embedding.zero_()
    assert module.backbone.vocab_embed.embedding.any()  # a copy, not the module's own tensor


def test_module_with_averaged_weights() -> None:
    module = diffusion()
    shadow = averaged(module)
    module.ema = type("ExponentialMovingAverage", (), {"shadow_params": shadow})()
    model = LoopMDM.from_mdlm(module)
    assert all(torch.equal(p, s) for p, s in zip(model.parameters(), shadow, strict=True))
    check(LoopMDM.from_mdlm(module, ema=False), raw(module))


def test_lightning_gives_averaged_weights_under_the_right_names(tmp_path: Path) -> None:
    module = diffusion()
    shadow = averaged(module)
    path = write_lightning(tmp_path / "last.ckpt", module, shadow)
    expected = raw(module)
    for (name, _), tensor in zip(module.backbone.named_parameters(), shadow, strict=True):
        assert not torch.equal(expected[name], tensor)
        expected[name] = tensor
    model = LoopMDM.from_mdlm(path)
    check(model, expected)
    check(LoopMDM.from_mdlm(path, ema=False), raw(module))
    # What shapes cannot tell comes from the configuration pickled with the weights.
    config = model.config
    assert (config.max_length, config.dropout, config.time_conditioning) == (48, 0.25, True)
    overridden = LoopMDM.from_mdlm(path, max_length=7, time_conditioning=False, dropout=0.0).config
    assert (overridden.max_length, overridden.dropout, overridden.time_conditioning) == (7, 0.0, False)


def test_lightning_with_compiled_and_wrapped_prefixes(tmp_path: Path) -> None:
    module = diffusion()
    state = {"backbone._orig_mod." + name: tensor for name, tensor in raw(module).items()}
    path = write_lightning(tmp_path / "last.ckpt", module, averaged(module), state_dict=state)
    check(LoopMDM.from_mdlm(path, ema=False), raw(module))
    check(LoopMDM.from_mdlm({"state_dict": state}, ema=False), raw(module))


def test_positional_order_is_that_of_parameters() -> None:
    module = diffusion()
    assert parameter_names(5) == [name for name, _ in module.backbone.named_parameters()]
    assert parameter_names(5) == [name for name, _ in DIT(reference_config(), VOCAB).named_parameters()]
    assert len(parameter_names(12)) == 130


def test_lightning_without_averaged_weights(tmp_path: Path) -> None:
    module = diffusion()
    path = write_lightning(tmp_path / "last.ckpt", module, None)
    with pytest.raises(
        ValueError,
        match=r"last\.ckpt holds no averaged weights \(EMA\); ema=False, or `loopmdm convert --no-ema`",
    ):
        LoopMDM.from_mdlm(path)
    check(LoopMDM.from_mdlm(path, ema=False), raw(module))


def test_averaged_weights_that_do_not_fit(tmp_path: Path) -> None:
    module = diffusion()
    shadow = averaged(module)
    path = write_lightning(tmp_path / "short.ckpt", module, shadow[:-1])
    with pytest.raises(ValueError, match=r"has 59 tensors, the model has 60 parameters"):
        LoopMDM.from_mdlm(path)
    shadow[6], shadow[7] = shadow[7], shadow[6]  # attn_qkv and attn_out of block 0
    path = write_lightning(tmp_path / "swapped.ckpt", module, shadow)
    with pytest.raises(
        ValueError, match=r"averaged weights.*2 of 60(.|\n)*blocks\.0\.attn_qkv\.weight +\[48, 16\]"
    ):
        LoopMDM.from_mdlm(path)


def test_logits_are_the_reference_s() -> None:
    module = diffusion()
    model = LoopMDM.from_mdlm(module, max_loops=3, time_conditioning=True)
    ids, sigma = torch.arange(22).view(2, 11) % VOCAB, torch.tensor([0.3, 2.0])
    torch.testing.assert_close(model(ids, sigma, num_loops=1), module.backbone(ids, sigma))
    module.backbone.order = [0, *[1, 2] * 3, 3, 4]
    torch.testing.assert_close(model(ids, sigma), module.backbone(ids, sigma))


def test_loop_and_mask_options() -> None:
    module = diffusion()
    config = LoopMDM.from_mdlm(module).config
    assert (config.loop_start, config.loop_end, config.max_loops, config.mask_token_id) == (
        1,
        3,
        12,
        VOCAB - 1,
    )
    assert (config.max_length, config.dropout, config.time_conditioning) == (1024, 0.1, False)
    config = LoopMDM.from_mdlm(module, loop=(2, 5), max_loops=4, mask_token_id=3, num_heads=2).config
    assert (config.loop_start, config.loop_end, config.max_loops, config.mask_token_id) == (2, 5, 4, 3)
    for vocab_size, mask in ((50258, 50257), (30522, 103), (35, 4), (36, 35)):
        reference = ReferenceDIT(reference_config(n_blocks=3), vocab_size)
        assert LoopMDM.from_mdlm(reference).config.mask_token_id == mask
    with pytest.raises(ValueError, match="loop_start, loop_end"):
        LoopMDM.from_mdlm(module, loop=(3, 9))
    with pytest.raises(ValueError, match="mask_token_id"):
        LoopMDM.from_mdlm(module, mask_token_id=VOCAB)
    with pytest.raises(ValueError, match="width"):
        LoopMDM.from_mdlm(module, width=3)


def test_other_sizes_are_inferred() -> None:
    reference = ReferenceDIT(reference_config(hidden_size=24, cond_dim=6, n_blocks=4, n_heads=3), 20)
    config = LoopMDM.from_mdlm(reference).config
    assert (config.hidden_size, config.cond_dim, config.num_layers, config.num_heads) == (24, 6, 4, 3)


def test_hub_folder_states_its_configuration(tmp_path: Path) -> None:
    module = diffusion()
    save_file(
        {name: tensor.clone() for name, tensor in module.state_dict().items()}, tmp_path / "model.safetensors"
    )
    stated = {
        "model_type": "mdlm",
        "model_length": 40,
        "n_heads": 2,
        "dropout": 0.3,
        "time_conditioning": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(stated))
    model = LoopMDM.from_mdlm(tmp_path)
    check(model, raw(module))
    assert (model.config.max_length, model.config.dropout, model.config.time_conditioning) == (40, 0.3, True)
    (tmp_path / "config.json").write_text(json.dumps({**stated, "n_heads": 4}))
    with pytest.raises(ValueError, match="num_heads: got 4, but"):
        LoopMDM.from_mdlm(tmp_path)
    with pytest.raises(ValueError, match=r"MDLM checkpoints are read by LoopMDM\.from_mdlm"):
        LoopMDM.from_pretrained(tmp_path)


def test_half_precision_is_widened() -> None:
    module = diffusion()
    exact = raw(module)["rotary_emb.inv_freq"].clone()
    state = {name: tensor.bfloat16() for name, tensor in raw(module).items()}
    assert not torch.equal(state["rotary_emb.inv_freq"].float(), exact)
    model = LoopMDM.from_mdlm(state)
    assert torch.equal(model.rotary_emb.inv_freq, exact)
    del state["rotary_emb.inv_freq"]
    for name, tensor in state.items():
        assert torch.equal(model.state_dict()[name], tensor.float())


def test_random_numbers_are_not_touched() -> None:
    module = diffusion()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    LoopMDM.from_mdlm(module)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"blocks.3.mlp.0.weight": torch.zeros(32, 16)},
            r"1 of 61 (.|\n)*blocks\.3\.mlp\.0\.weight +\[64, 16\] +\[32, 16\]",
        ),
        ({"blocks.3.mlp.0.weight": None}, r"blocks\.3\.mlp\.0\.weight +\[64, 16\] +missing"),
        ({"blocks.1.extra": torch.zeros(2)}, r"blocks\.1\.extra +no such tensor +\[2\]"),
        ({"vocab_embed.embedding": None}, r"has no tensor vocab_embed\.embedding, so it is no MDLM model"),
        (
            {"vocab_embed.embedding": torch.zeros(3)},
            r"vocab_embed\.embedding has shape \[3\], expected 2 dimensions",
        ),
        ({"rotary_emb.inv_freq": None}, r"has no tensor rotary_emb\.inv_freq"),
        ({"rotary_emb.inv_freq": torch.ones(3)}, r"num_heads: got None, but .* 3 rotary frequencies"),
        ({"rotary_emb.inv_freq": 1 / 5e5 ** (torch.arange(4) / 4)}, r"reference's base 10000"),
        (
            {"output_layer.linear.bias": torch.tensor([torch.nan] * VOCAB)},
            r"output_layer\.linear\.bias holds 13 values",
        ),
        (
            {"blocks.0.norm1.weight": torch.full((16,), torch.inf)},
            r"blocks\.0\.norm1\.weight holds 16 values that are NaN",
        ),
        (
            {"blocks.0.norm1.weight": torch.ones(16, dtype=torch.int64)},
            r"norm1\.weight has dtype torch\.int64",
        ),
        ({"blocks.0.mlp.0.weight": torch.zeros(40, 16)}, r"MLP width 40 is not a multiple"),
        ({"blocks.0.norm1.weight": 3}, r"entry 'blocks\.0\.norm1\.weight' is a int"),
        (
            {"backbone.blocks.0.norm1.weight": torch.ones(16)},
            r"two entries are named blocks\.0\.norm1\.weight",
        ),
    ],
)
def test_state_dicts_that_do_not_fit(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = {name: tensor for name, tensor in {**raw(diffusion()), **change}.items() if tensor is not None}
    torch.save(state, tmp_path / "model.pt")
    for source in (state, tmp_path / "model.pt"):
        with pytest.raises(ValueError, match=message):
            LoopMDM.from_mdlm(source)


def test_long_differences_are_cut() -> None:
    state = {
        name: tensor
        for name, tensor in raw(diffusion()).items()
        if "mlp.2" not in name and "norm" not in name
    }
    state |= {f"surplus.{i}": torch.zeros(1) for i in range(30)}
    with pytest.raises(ValueError) as caught:
        LoopMDM.from_mdlm({**state, "sigma_map.mlp.2.weight": torch.zeros(8, 8)})
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 1 + 20 + 1 and lines[-1].strip() == "... and 32 more"
    assert lines[1].split() == ["tensor", "expected", "in", "the", "file"]


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    module = diffusion()
    shadow = averaged(module)
    hyper_parameters = {"config": {"model": [Call(os.system, f"touch {sentinel}")]}}
    path = write_lightning(tmp_path / "evil.ckpt", module, shadow, hyper_parameters=hyper_parameters)
    with pytest.raises(
        UnsafePickleError, match=r"evil\.ckpt: the pickle asks for (posix|nt)\.system, which is refused"
    ):
        LoopMDM.from_mdlm(path)
    for name, data in payloads(sentinel).items():
        path.write_bytes(data)
        with pytest.raises(ValueError):
            LoopMDM.from_mdlm(path)
        assert not sentinel.exists(), name


def test_other_sources(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a checkpoint folder or a hub id"):
        LoopMDM.from_mdlm(tmp_path / "none.ckpt")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        LoopMDM.from_mdlm(tmp_path)
    with pytest.raises(TypeError, match="path_or_module: got int"):
        LoopMDM.from_mdlm(3)
    with pytest.raises(ValueError, match="no entries"):
        LoopMDM.from_mdlm({})
    with pytest.raises(ValueError, match=r"has no tensor vocab_embed\.embedding"):
        LoopMDM.from_mdlm(torch.nn.Linear(2, 3))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="expected a state dict, got list"):
        LoopMDM.from_mdlm(tmp_path / "list.pt")
    torch.save({"epoch": 3, "model": {}}, tmp_path / "wrapped.pt")
    with pytest.raises(ValueError, match="entry 'epoch' is a int"):
        LoopMDM.from_mdlm(tmp_path / "wrapped.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a whole safetensors file"):
        LoopMDM.from_mdlm(tmp_path / "cut.safetensors")


def test_dit_is_loaded_too(tmp_path: Path) -> None:
    module = diffusion()
    model = from_mdlm(
        DIT, write_lightning(tmp_path / "last.ckpt", module, averaged(module)), ema=False, max_loops=1
    )
    check(model, raw(module))
    ids, sigma = torch.arange(22).view(2, 11) % VOCAB, torch.tensor([0.3, 2.0])
    torch.testing.assert_close(model(ids, sigma), module.backbone(ids, sigma))


def test_conversion(tmp_path: Path) -> None:
    module = diffusion()
    shadow = averaged(module)
    path = write_lightning(tmp_path / "last.ckpt", module, shadow)
    config = convert_checkpoint(path, tmp_path / "converted", max_loops=6)
    assert config.max_loops == 6
    converted, direct = LoopMDM.from_pretrained(tmp_path / "converted"), LoopMDM.from_mdlm(path, max_loops=6)
    assert converted.config == direct.config == config
    for name, tensor in direct.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor)
