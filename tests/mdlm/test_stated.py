"""What a checkpoint states is read, agrees with its tensors, and is refused where it is another model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from loopmdm import LoopMDM, LoopMDMConfig, patch
from loopmdm.mdlm import DIT, MDLM
from tests.mdlm.files import VOCAB, averaged, diffusion, write_lightning
from tests.mdlm.reference_dit import Diffusion, randomise, reference_config

IDS, SIGMA = torch.arange(22).view(2, 11) % VOCAB, torch.tensor([0.3, 2.0])
HUB = {
    "model_type": "mdlm",
    "vocab_size": VOCAB,
    "model_length": 40,
    "hidden_dim": 16,
    "cond_dim": 8,
    "n_blocks": 5,
    "n_heads": 2,
}


def hub_folder(path: Path, config: dict[str, Any], keep: int = 5) -> Path:
    state = diffusion().state_dict()
    held = {n: t.clone() for n, t in state.items() if not n.startswith(f"backbone.blocks.{keep}")}
    save_file(held, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def lightning(path: Path, config: dict[str, Any], module: Any = None) -> Path:
    module = module or diffusion()
    return write_lightning(path / "last.ckpt", module, averaged(module), config)


@pytest.mark.parametrize(
    ("field", "name", "value"),
    [
        ("vocab_size", "vocab_size", VOCAB + 1),
        ("vocab_size", "vocab_size", VOCAB - 1),
        ("hidden_dim", "hidden_size", 32),
        ("cond_dim", "cond_dim", 129),
        ("n_blocks", "num_layers", 4),
        ("n_blocks", "num_layers", 6),
        ("n_blocks", "num_layers", 10**9),
    ],
)
def test_sizes_stated_and_held_agree(tmp_path: Path, field: str, name: str, value: int) -> None:
    assert LoopMDM.from_mdlm(hub_folder(tmp_path, HUB)).config.num_layers == 5
    message = rf"differ: {name} is {value}, the weights hold \d+"
    with pytest.raises(ValueError, match=message):
        LoopMDM.from_mdlm(hub_folder(tmp_path, {**HUB, field: value}))
    module = MDLM({**HUB, "dropout": 0.1})
    module.config = {**HUB, field: value}  # type: ignore[assignment]
    with pytest.raises(ValueError, match=message):
        LoopMDM.from_mdlm(module)
    reference = {"hidden_dim": "hidden_size"}.get(field, field)
    stated = {"vocab_size": value} if field == "vocab_size" else {"model": {reference: value}}
    with pytest.raises(ValueError, match=message):
        LoopMDM.from_mdlm(lightning(tmp_path, stated))


def test_missing_blocks_are_listed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing: blocks\.4\.norm1\.weight\n(.|\n)*blocks\.4\.adaLN"):
        LoopMDM.from_mdlm(hub_folder(tmp_path, HUB, keep=4))


def test_a_lightning_file_keeps_its_loop(tmp_path: Path) -> None:
    module = diffusion()
    module.backbone = DIT(reference_config(loop_start=2, loop_end=4, num_loops=3), VOCAB).eval()
    randomise(module)
    stated = {**vars(reference_config().model), "loop_start": 2, "loop_end": 4, "num_loops": 3}
    path = lightning(tmp_path, {"model": stated, "time_conditioning": True}, module)
    for source in (path, module):
        model = LoopMDM.from_mdlm(source, ema=False, time_conditioning=True)
        config = model.config
        assert (config.loop_start, config.loop_end, config.max_loops) == (2, 4, 3)
        assert (config.max_length, config.dropout) == (32, 0.1)
        torch.testing.assert_close(model(IDS, SIGMA), module.backbone(IDS, SIGMA))
        config = LoopMDM.from_mdlm(source, ema=False, loop=(1, 3), max_loops=12).config
        assert (config.loop_start, config.loop_end, config.max_loops) == (1, 3, 12)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module, **attributes: Any) -> None:
        super().__init__()
        self.model = inner
        self.metric = nn.BatchNorm1d(2)  # tensors of its own
        for name, value in attributes.items():
            setattr(self, name, value)


@pytest.mark.parametrize("where", ["root", "algo"])
@pytest.mark.parametrize("form", ["file", "config", "nested", "attribute", "hparams"])
def test_time_conditioning_is_read_wherever_it_is_stated(tmp_path: Path, where: str, form: str) -> None:
    module = diffusion()
    stated: dict[str, Any] = {"model": {"length": 24, "dropout": 0.3}}
    stated |= {"algo": {"time_conditioning": True}} if where == "algo" else {"time_conditioning": True}
    source: Any = module
    match form:
        case "file":
            source = lightning(tmp_path, stated)
        case "config":
            module.config = stated  # type: ignore[assignment]
        case "nested":
            nested = SimpleNamespace(model=SimpleNamespace(length=24, dropout=0.3))
            time = SimpleNamespace(time_conditioning=True)
            source = Outer(
                Outer(module), config=nested, **({"algo": time} if where == "algo" else vars(time))
            )
        case "attribute":
            source = Outer(module, time_conditioning=True, config=stated)
        case "hparams":
            source = Outer(module, hparams=stated)
    model = LoopMDM.from_mdlm(source, ema=False)
    assert (model.config.max_length, model.config.dropout) == (24, 0.3)
    torch.testing.assert_close(model(IDS, SIGMA, num_loops=1), module.backbone(IDS, SIGMA))
    assert not LoopMDM.from_mdlm(source, ema=False, time_conditioning=False).config.time_conditioning


def test_our_own_modules_are_read_whole() -> None:
    config = LoopMDMConfig(
        VOCAB, 3, hidden_size=16, num_heads=2, num_layers=4, cond_dim=8, max_length=30, dropout=0.2,
        time_conditioning=True, loop_start=0, loop_end=3, max_loops=5, positions="learned",
    )  # fmt: skip
    assert LoopMDM.from_mdlm(LoopMDM(config)).config == config
    hub = MDLM(
        {**HUB, "dropout": 0.1, "time_conditioning": True, "loop_start": 2, "loop_end": 4, "num_loops": 3}
    )
    read = LoopMDM.from_mdlm(hub).config
    assert (read.time_conditioning, read.loop_start, read.loop_end, read.max_loops) == (True, 2, 4, 3)
    assert read.max_length == 40
    for stated in (True, False):
        reference = reference_config()
        reference.time_conditioning = stated
        assert LoopMDM.from_mdlm(DIT(reference, VOCAB)).config.time_conditioning == stated


def test_a_patched_module_keeps_its_loop() -> None:
    module = patch(diffusion(), num_loops=4, loop=(2, 5))
    config = LoopMDM.from_mdlm(module).config
    assert (config.loop_start, config.loop_end, config.max_loops) == (2, 5, 4)


def test_mask_index_of_the_module() -> None:
    module = diffusion()
    module.mask_index = 4  # type: ignore[assignment]
    assert LoopMDM.from_mdlm(module).config.mask_token_id == 4
    assert LoopMDM.from_mdlm(module, mask_token_id=2).config.mask_token_id == 2


def tree(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("parameterization", "ar", "SUBS"),
        ("parameterization", "d3pm", "SUBS"),
        ("parameterization", "sedd", "SUBS"),
        ("algo.parameterization", "mean", "SUBS"),
        ("algo.parameterization", "score", "SUBS"),
        ("algo.name", "duo_base", "another model"),
        ("algo.name", "ar", "another model"),
        ("algo.causal_attention", True, "causal attention"),
        ("model.causal", True, "causal attention"),
        ("model.causal_attention", True, "causal attention"),
        ("causal", True, "causal attention"),
        ("algo.cross_attn", True, "block diffusion"),
        ("cross_attn", True, "block diffusion"),
        ("model_type", "bd3lm", "another model"),
        ("diffusion", "uniform", "another process"),
        ("backbone", "dimamba", "another network"),
        ("algo.backbone", "unet", "another network"),
        ("model.type", "dimamba", "another network"),
        ("subs_masking", True, "D3PM"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path: Path, path: str, value: Any, message: str) -> None:
    pattern = rf"states {path} = {value!r}: .*{message}.*, which this package does not compute"
    with pytest.raises(ValueError, match=pattern):
        LoopMDM.from_mdlm(lightning(tmp_path, tree(path, value)))
    with pytest.raises(ValueError, match=pattern):
        LoopMDM.from_mdlm(hub_folder(tmp_path, {**HUB, **tree(path, value)}))
    module = diffusion()
    module.config = tree(path, value)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=pattern):
        LoopMDM.from_mdlm(Outer(module))
    reference = {"model": vars(reference_config().model), **tree(path, value)}
    if not path.startswith("model."):
        with pytest.raises(ValueError, match=pattern):
            DIT(reference, VOCAB)


def test_siblings_with_mdlm_s_law_load(tmp_path: Path) -> None:
    """Duo's and BD3-LM's own MDLM; the noise schedule matters where its level is fed to the network."""
    algo = {"name": "mdlm", "backbone": "dit", "parameterization": "subs", "time_conditioning": False}
    algo |= {"causal_attention": False, "cross_attn": False, "subs_masking": False, "T": 0}
    stated = {"algo": algo, "model": {"type": "ddit", "length": "${length}"}, "block_size": 16}
    stated |= {"noise": {"type": "cosine"}, "diffusion": "absorbing_state"}
    config = LoopMDM.from_mdlm(lightning(tmp_path, stated)).config
    assert not config.time_conditioning and config.max_length == 1024  # not resolved, so not stated
    stated["algo"] = {**algo, "time_conditioning": True}
    with pytest.raises(ValueError, match=r"noise\.type = 'cosine'"):
        LoopMDM.from_mdlm(lightning(tmp_path, stated))
    stated["noise"] = {"type": "log-linear"}
    assert LoopMDM.from_mdlm(lightning(tmp_path, stated)).config.time_conditioning


def test_a_network_marked_causal_is_refused() -> None:
    module: Diffusion = diffusion()
    module.backbone.causal = True  # type: ignore[assignment]
    with pytest.raises(ValueError, match="causal attention"):
        LoopMDM.from_mdlm(module)
    tensors: dict[str, Tensor] = module.state_dict()
    assert LoopMDM.from_mdlm(tensors).config.num_layers == 5
