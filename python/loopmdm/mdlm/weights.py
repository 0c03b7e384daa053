"""Weights of the reference model (MDLM's DIT) out of every form in which they are passed around.

Published files differ in container, key prefix and in which weights they hold: a Lightning checkpoint keeps
the raw ones by name and the averaged ones, which all published figures use, as a list without names.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from loopmdm.formats import safetensors_files, shards
from loopmdm.formats.folders import CONFIG_FILE, WEIGHTS_FILE, locate, read_json
from loopmdm.formats.pickles import Opaque, StoredTensor
from loopmdm.formats.torch_files import TorchFile
from loopmdm.mdlm import stated as mdlm_stated
from loopmdm.model import checkpoint
from loopmdm.printable import printable, shown

_MAX_DIGITS = 9  # of the number of a block
_PREFIXES = ("backbone.", "module.", "model.", "_orig_mod.")
_TORCH_WEIGHTS = "pytorch_model.bin"
NETWORK_ATTRIBUTES = ("vocab_embed", "sigma_map", "rotary_emb", "blocks", "output_layer")
BLOCK_PARAMETERS = (
    "norm1.weight",
    "attn_qkv.weight",
    "attn_out.weight",
    "norm2.weight",
    "mlp.0.weight",
    "mlp.0.bias",
    "mlp.2.weight",
    "mlp.2.bias",
    "adaLN_modulation.weight",
    "adaLN_modulation.bias",
)


class MDLMWeights(NamedTuple):
    tensors: dict[str, Tensor]  # under the reference's bare names
    fields: dict[str, Any]  # configuration that shapes cannot tell, as far as the source states it
    source: str  # for messages


def parameter_names(num_layers: int) -> list[str]:
    """Names in the order of the reference's `parameters()`, which its list of averaged weights follows."""
    return [
        "vocab_embed.embedding",
        "sigma_map.mlp.0.weight",
        "sigma_map.mlp.0.bias",
        "sigma_map.mlp.2.weight",
        "sigma_map.mlp.2.bias",
        *(f"blocks.{i}.{name}" for i in range(num_layers) for name in BLOCK_PARAMETERS),
        "output_layer.norm_final.weight",
        "output_layer.linear.weight",
        "output_layer.linear.bias",
        "output_layer.adaLN_modulation.weight",
        "output_layer.adaLN_modulation.bias",
    ]


def count_blocks(names: Mapping[str, Any], source: str) -> int:
    """One more than the largest number of a block; a number beyond that of the tensors is refused."""
    largest = -1
    for name in names:
        number = name.split(".")[1] if name.startswith("blocks.") else ""
        if not number.isdecimal():
            continue
        if len(number) > _MAX_DIGITS or int(number) >= len(names):
            raise ValueError(
                f"{source}: has a tensor {printable(name)}, but {len(names)} tensors in all; expected blocks"
                " that are numbered from 0"
            )
        largest = max(largest, int(number))
    return largest + 1


def read_weights(source: Any, *, ema: bool = True) -> MDLMWeights:
    """Read `source`: a file or folder, a hub id, a state dict, a loaded Lightning checkpoint or a module.

    With `ema`, sources that keep averaged weights (Lightning checkpoints and modules) give those.
    """
    if isinstance(source, nn.Module):
        return _from_module(source, ema)
    if isinstance(source, Mapping):
        return _from_tree(source, _tensor_itself, ema, "the given dict")
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"path_or_module: got {type(source).__name__}, expected a path, hub id, state dict or module"
        )
    path = Path(source)
    if path.is_file() and path.name in shards.INDEX_FILES:
        path, source = path.parent, path.parent
    if path.is_file():
        return _from_file(path, ema)
    index = shards.find_index(path) if path.is_dir() else None
    if index is not None:
        weights = _from_tree(shards.read_shards(path, index), _tensor_itself, ema, str(path / index))
    elif path.is_dir() and not (path / WEIGHTS_FILE).is_file() and (path / _TORCH_WEIGHTS).is_file():
        weights = _from_file(path / _TORCH_WEIGHTS, ema)
    else:
        weights = _from_file(locate(source, WEIGHTS_FILE), ema)
    if path.is_dir() and not (path / CONFIG_FILE).is_file():
        return weights
    config = read_json(locate(source, CONFIG_FILE))
    return weights._replace(fields=_stated([config], str(source)))


def holds_one_set(source: str | os.PathLike[str]) -> bool:
    """Whether there is nothing to choose with `ema`: all but Lightning checkpoints hold one set of weights.

    Raises:
        ValueError: a torch file is damaged.
    """
    path = Path(source, _TORCH_WEIGHTS) if Path(source).is_dir() else Path(source)
    if path.suffix == ".safetensors" or not path.is_file():
        return True
    with contextlib.closing(TorchFile(path)) as file:
        return not _is_lightning(file.root)


def _is_lightning(root: Any) -> bool:
    return isinstance(root, Mapping) and isinstance(root.get("state_dict"), Mapping)


def _from_file(path: Path, ema: bool) -> MDLMWeights:
    if path.suffix == ".safetensors":
        return _from_tree(safetensors_files.read(path), _tensor_itself, ema, str(path))
    with contextlib.closing(TorchFile(path)) as file:
        return _from_tree(file.root, file.tensor, ema, str(path))


def _tensor_itself(tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"path_or_module: holds a {type(tensor).__name__} where a tensor is expected")
    return tensor


def _from_tree(root: Any, read: Callable[[Any], Tensor], ema: bool, source: str) -> MDLMWeights:
    """`root`: a state dict or a Lightning checkpoint; `read` turns one of its leaves into a tensor."""
    lightning = _is_lightning(root)
    leaves = _bare_names(root["state_dict"] if lightning else root, source)
    if not lightning:
        return MDLMWeights({name: read(leaf) for name, leaf in leaves.items()}, {}, source)
    parameters = root.get("hyper_parameters")
    fields = _stated([_entry(parameters, "config"), parameters], source)
    if ema:
        state = root.get("ema")
        if not isinstance(state, Mapping) or not isinstance(state.get("shadow_params"), (list, tuple)):
            raise ValueError(
                f"{source} holds no averaged weights (EMA); ema=False, or `loopmdm convert --no-ema`, takes"
                " the raw ones"
            )
        leaves = _averaged(leaves, state["shadow_params"], source)
    return MDLMWeights({name: read(leaf) for name, leaf in leaves.items()}, fields, source)


def _stated(nodes: Sequence[Any], source: str) -> dict[str, Any]:
    mdlm_stated.refuse_foreign(nodes, source)
    return mdlm_stated.fields_of(nodes)


def _entry(node: Any, name: str) -> Any:
    if isinstance(node, Opaque):
        content = node.state.get("_content") if isinstance(node.state, dict) else None
        node = content if isinstance(content, dict) else node.entries
    return node.get(name) if isinstance(node, Mapping) else None


def find_chain(module: nn.Module) -> list[nn.Module]:
    """`module`, what it wraps, and so on down to the network with MDLM's attributes; [] if there is none."""
    networks = [
        name for name, inner in module.named_modules() if all(hasattr(inner, a) for a in NETWORK_ATTRIBUTES)
    ]
    if not networks:
        return []
    parts = networks[0].split(".") if networks[0] else []
    return [module.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]


def _from_module(module: nn.Module, ema: bool) -> MDLMWeights:
    source = f"the given {type(module).__name__}"
    chain = find_chain(module) or [module]
    leaves = _bare_names(chain[-1].state_dict(), source)
    shadows = [getattr(getattr(each, "ema", None), "shadow_params", None) for each in chain]
    shadow = next((each for each in shadows if each is not None), None)
    if ema and shadow is not None:
        leaves = _averaged(leaves, shadow, source)
    nodes: list[Any] = []
    for each in chain:
        looped = getattr(each, "_loopmdm_patch", None)
        if looped is not None:
            nodes.append({"loop_start": looped.loop[0], "loop_end": looped.loop[1]})
        config = getattr(each, "config", None)
        if config is not None:
            # A `DIT` always uses what its caller feeds it, which is zeros where it is not conditioned.
            called = getattr(each, "called_with_time", None)
            nodes += [{"time_conditioning": called}] if called is not None else []
        nodes += [each, config, getattr(each, "hparams", None)]
    return MDLMWeights(dict(leaves), _stated([node for node in nodes if node is not None], source), source)


def _bare_names(state: Any, source: str) -> dict[str, Any]:
    """The entries of a state dict without the prefixes of wrappers, in any combination."""
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{source}: expected a state dict, got {type(state).__name__} with no entries")
    bare: dict[str, Any] = {}
    for full_name, leaf in state.items():
        if not isinstance(full_name, str) or not isinstance(leaf, (Tensor, StoredTensor)):
            raise ValueError(
                f"{source}: expected names and tensors (or a Lightning checkpoint with a state_dict), "
                f"but entry {shown(full_name)} is a {type(leaf).__name__}"
            )
        name = full_name.replace("_orig_mod.", "")
        while name.startswith(_PREFIXES):
            name = name.partition(".")[2]
        if name in bare:
            raise ValueError(f"{source}: two entries are named {printable(name)} once prefixes are removed")
        bare[name] = leaf
    return bare


def _averaged(leaves: dict[str, Any], shadow: Sequence[Any], source: str) -> dict[str, Any]:
    """`leaves` with the parameters replaced by averaged weights, listed in the order of parameters()."""
    names = parameter_names(count_blocks(leaves, source))
    tied = safetensors_files.tied_names(leaves)
    if tied and len(shadow) == len(names) - len(tied):
        names = [name for name in names if name not in tied]  # as parameters() lists them
    else:
        tied = {}
    if len(shadow) != len(names):
        raise ValueError(
            f"{source}: the list of averaged weights (EMA) has {len(shadow)} tensors, the model has "
            f"{len(names)} parameters; ema=False, or `loopmdm convert --no-ema`, takes the raw ones"
        )
    averaged = dict(zip(names, shadow, strict=True))
    shapes = {name: tuple(leaves[name].shape) for name in names if name in leaves}
    checkpoint.check_same(
        shapes,
        {name: tuple(getattr(leaf, "shape", ())) for name, leaf in averaged.items() if name in shapes},
        f"{source}, averaged weights (EMA)",
    )
    return {**leaves, **averaged, **{alias: averaged[kept] for alias, kept in tied.items()}}
