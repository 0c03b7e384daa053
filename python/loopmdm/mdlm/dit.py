"""MDLM's own names over LoopMDM: its constructor and forward, its hub form, and loading its checkpoints."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from loopmdm.formats import shards
from loopmdm.formats.folders import CONFIG_FILE, WEIGHTS_FILE
from loopmdm.mdlm import likeness
from loopmdm.mdlm import stated as mdlm_stated
from loopmdm.mdlm import weights as mdlm_weights
from loopmdm.mdlm.patching import patch, unpatch
from loopmdm.mdlm.weights import MDLMWeights
from loopmdm.model import LoopMDM, checkpoint, cut, draws, vocabulary
from loopmdm.model.between import Between, between_of
from loopmdm.model.config import LoopMDMConfig
from loopmdm.model.modules import check_frequencies
from loopmdm.printable import printable
from loopmdm_kernels.files import refuse_files
from loopmdm_kernels.values import positive

__all__ = ["DIT", "MDLM", "MaskedLMOutput", "convert_checkpoint", "from_mdlm", "patch", "unpatch"]

Model = TypeVar("Model", bound=LoopMDM)

# Mask ids of the published vocabularies (GPT-2 + mask, BERT uncased, text8); elsewhere it is the last id.
_MASK_IDS = {50258: 50257, 30522: 103, 35: 4}
_MISSING = object()


class DIT(LoopMDM):
    """Takes the place of the reference's `models.dit.DIT`: same constructor, parameters and forward.

    Args:
        config: the reference's configuration (attributes or nested dicts): `model.hidden_size`, `cond_dim`,
            `n_blocks`, `n_heads`, `dropout`, and `length` if lengths beyond it shall be refused. Looping is
            asked for by `model.loop_start`, `loop_end`, `num_loops`; without them S = 1, the reference.
            A `LoopMDMConfig` is taken as it is.
        vocab_size: V, mask token included.

    `num_loops` is S of every call, in training too. Like the reference, it always feeds `sigma` to the
    network (callers pass zeros where a model is not conditioned on time), and runs its blocks and head in
    bf16 on a CUDA device, in the parameters' precision on a CPU.
    """

    def __init__(self, config: Any, vocab_size: int | None = None) -> None:
        called_with_time: Any = None
        if not isinstance(config, LoopMDMConfig):
            if vocab_size is None:
                raise TypeError("vocab_size: missing; expected the number of tokens, mask included")
            mdlm_stated.refuse_foreign([config], "config")
            called_with_time = bool(mdlm_stated.fields_of([config]).get("time_conditioning", False))
            config = _config_of_reference(config, vocab_size)
        elif vocab_size not in (None, config.vocab_size):
            raise ValueError(f"vocab_size: got {vocab_size}, but the configuration has {config.vocab_size}")
        if config.positions != "rotary":
            raise ValueError(
                f"config: positions is {config.positions!r}, the reference has rotary positions only"
            )
        super().__init__(config)
        self.num_loops = config.max_loops
        self.called_with_time: bool | None = called_with_time  # for `from_mdlm`; None: as `config` says

    def default_loops(self, seed: int | None = None) -> int:
        return positive("num_loops", self.num_loops)

    def _say_if_trained(self, out: Tensor) -> None:
        """Nothing: S is the same in both modes."""

    def forward(self, indices: Tensor, sigma: Tensor) -> Tensor:  # type: ignore[override]
        """Logits [B, L, V] of tokens `indices` [B, L] int64 at noise levels `sigma` [B]."""
        with _reference_autocast(indices.device):
            hidden = self.hidden(indices, sigma, dropout_seed=self._draw_dropout_seed(indices))
            return vocabulary.head_logits(hidden, self.head(sigma), compute_dtype=self.compute_dtype)

    def _draw_dropout_seed(self, like: Tensor) -> int | Tensor:
        return draws.dropout_seed(like, 2**62) if self.training and self.config.dropout else 0

    def forward_with_states(self, indices: Tensor, sigma: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the residual stream [B, L, D] after the embedding and after each block.

        A looped block reports the state after its last application.
        """
        with _reference_autocast(indices.device):
            stages = self.stages(indices, sigma, dropout_seed=self._draw_dropout_seed(indices))
            states = stages.states(self.default_loops())
            logits = vocabulary.head_logits(states[-1], self.head(sigma), compute_dtype=self.compute_dtype)
            return logits, states


class MaskedLMOutput(NamedTuple):
    logits: Tensor  # [B, L, V]
    hidden_states: list[Tensor] | None = None  # num_layers + 1 of [B, L, D]


class MDLM(torch.nn.Module):
    """The form of the reference on the Hugging Face hub, without transformers: a DIT under `backbone`.

    Args:
        config: fields of the hub's config.json (attributes or a dict): `vocab_size`, `model_length`,
            `hidden_dim`, `cond_dim`, `n_blocks`, `n_heads`, `dropout`, `time_conditioning`, `return_dict`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        names = ("cond_dim", "n_blocks", "n_heads", "dropout", "loop_start", "loop_end", "num_loops")
        model = {name: _get(config, name, None) for name in names}
        model |= {"hidden_size": _get(config, "hidden_dim"), "length": _get(config, "model_length", None)}
        model = {name: value for name, value in model.items() if value is not None}
        self.backbone = DIT({"model": model}, _get(config, "vocab_size"))
        self.time_conditioning = bool(_get(config, "time_conditioning", False))
        self.return_dict = bool(_get(config, "return_dict", False))

    def forward(
        self,
        input_ids: Tensor,
        timesteps: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]] | MaskedLMOutput:
        """Logits; (logits, hidden states) if those are asked for; `MaskedLMOutput` if `return_dict`."""
        if timesteps is None or not self.time_conditioning:
            timesteps = torch.zeros(input_ids.shape[0], device=input_ids.device, dtype=torch.float32)
        states: list[Tensor] | None = None
        if output_hidden_states:
            logits, states = self.backbone.forward_with_states(input_ids, timesteps)
        else:
            logits = self.backbone(input_ids, timesteps)
        if self.return_dict if return_dict is None else return_dict:
            return MaskedLMOutput(logits, states)
        return logits if states is None else (logits, states)


def from_mdlm(
    cls: type[Model],
    path_or_module: Any,
    *,
    loop: tuple[int, int] | None = None,
    ema: bool = True,
    max_loops: int | None = None,
    mask_token_id: int | None = None,
    num_heads: int | None = None,
    **overrides: Any,
) -> Model:
    """Load a reference (MDLM) checkpoint unchanged, on the CPU, in eval mode.

    Args:
        cls: the model class, called with a `LoopMDMConfig`.
        path_or_module: a Lightning .ckpt; a state dict in a torch file (.pt, .pth, .bin), a safetensors file
            or a folder of one; a hub id "owner/name"; a dict; or a module (the DIT or a wrapper of it).
            Keys may have any of the prefixes `backbone.`, `module.`, `_orig_mod.`.
        loop: half-open range of the blocks to loop, zero-based; None: as stated, else (1, 3).
        ema: take the averaged weights where the source keeps them. A Lightning checkpoint without them is an
            error, since published figures use them; other sources hold one set of weights only.
        max_loops: default S of evaluation, largest S of training; None: as stated, else 12.
        mask_token_id: None: as stated, else 50257 (V = 50258), 103 (V = 30522, BERT), 4 (V = 35, text8)
            or V - 1.
        num_heads: None: from the length of `rotary_emb.inv_freq`.
        overrides: other fields of `LoopMDMConfig`, such as `max_length`, `dropout`, `time_conditioning`.
            Where not given they come from what the source states (config.json, the hyper-parameters of a
            Lightning file, the module's `config` and attributes), else the defaults. What acts between loops
            (`inject`, `loop_embedding`, `carry_norm`) begins with the weights of a new model.

    Raises:
        FileNotFoundError: no such file, folder or hub id.
        UnsafePickleError: the file is a pickle that names something outside the allow-list.
        ValueError: damaged or foreign files, tensors that do not fit (listed), NaN or infinity; sizes stated
            that the weights do not have; a stated kind of model that is not computed here (causal, block
            diffusion, uniform-state, another parameterization than SUBS); a module of which a part computes
            something else than MDLM's, named (each is run once in a copy, as by `patch`).

    Warns:
        UserWarning: a module that cannot be run here, of which only the structure was compared; one with
            hooks, which are not taken over.
    """
    weights = mdlm_weights.read_weights(path_or_module, ema=ema)
    explicit = {} if loop is None else {"loop_start": loop[0], "loop_end": loop[1]}
    explicit |= {} if max_loops is None else {"max_loops": max_loops}
    config = _config_of_weights(weights, num_heads, mask_token_id, explicit | overrides)
    with torch.device("meta"):
        model = cls(config)
    tensors = weights.tensors
    if config.learns_between_loops and not between_of(tensors):
        tensors = {**tensors, **{f"between.{name}": t for name, t in Between(config).state_dict().items()}}
    checkpoint.fill(model, tensors, weights.source)
    check_frequencies(model.rotary_emb.inv_freq, weights.tensors["rotary_emb.inv_freq"].dtype, weights.source)
    if isinstance(path_or_module, torch.nn.Module):
        _compare(path_or_module, config)
    return model.eval()


def _compare(module: torch.nn.Module, config: LoopMDMConfig) -> None:
    """Refuse a module that does not compute what the weights in it make of a LoopMDM."""
    network = mdlm_weights.find_chain(module)[-1]
    owner = f"path_or_module: {type(network).__name__}"
    parts = network.named_modules()
    watched = [name or "the network" for name, part in parts if cut.why_watched(part, own_forward=False)]
    if watched:
        warnings.warn(
            f"{owner}: weights are taken over, hooks are not (those of {', '.join(watched[:3])}"
            f"{f' and {len(watched) - 3} more' if len(watched) > 3 else ''})",
            stacklevel=4,
        )
    if not isinstance(network, LoopMDM):
        likeness.check_network(
            network, owner, timed=config.time_conditioning, mask_token_id=config.mask_token_id
        )
        return
    changed = [why for why in network.cuts() if not why.endswith("hooks")]
    if changed:
        raise ValueError(f"{owner}: {changed[0]}; weights are taken over, changed modules are not")


def convert_checkpoint(src: Any, dst: str | os.PathLike[str], **options: Any) -> LoopMDMConfig:
    """Read `src` as `from_mdlm` does, with its options, and write it as a folder for `from_pretrained`.

    Raises:
        ValueError: `dst` holds a checkpoint already; else as `from_mdlm`.
        OSError: it cannot be written.
    """
    names = (CONFIG_FILE, WEIGHTS_FILE, *shards.INDEX_FILES)
    refuse_files(dst, names, "the converted checkpoint")
    model = from_mdlm(LoopMDM, src, **options)
    model.save_pretrained(dst)
    return model.config


def _reference_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def _get(node: Any, name: str, default: Any = _MISSING) -> Any:
    """Field `name` of a dict, an OmegaConf node or an object."""
    value = node.get(name, _MISSING) if isinstance(node, Mapping) else getattr(node, name, _MISSING)
    if value is _MISSING or (value is None and default is not _MISSING):
        value = default
    if value is _MISSING:
        raise ValueError(f"config: has no field {name!r}")
    return value


def _config_of_reference(config: Any, vocab_size: int) -> LoopMDMConfig:
    model = _get(config, "model")
    num_layers = int(_get(model, "n_blocks"))
    start, end = _default_loop(num_layers)
    return LoopMDMConfig(
        vocab_size=vocab_size,
        mask_token_id=_MASK_IDS.get(vocab_size, vocab_size - 1),
        hidden_size=int(_get(model, "hidden_size")),
        num_heads=int(_get(model, "n_heads")),
        num_layers=num_layers,
        cond_dim=int(_get(model, "cond_dim")),
        max_length=int(_get(model, "length", mdlm_stated.UNLIMITED)),
        dropout=float(_get(model, "dropout")),
        time_conditioning=True,
        loop_start=int(_get(model, "loop_start", start)),
        loop_end=int(_get(model, "loop_end", end)),
        max_loops=int(_get(model, "num_loops", 1)),
    )


def _config_of_weights(
    weights: MDLMWeights, num_heads: int | None, mask_token_id: int | None, overrides: dict[str, Any]
) -> LoopMDMConfig:
    """Dimensions from the shapes, the rest from what the source states, then `overrides`."""
    vocab_size, hidden_size = _shape(weights, "vocab_embed.embedding", 2)
    cond_dim = _shape(weights, "sigma_map.mlp.2.weight", 2)[0]
    mlp_size = _shape(weights, "blocks.0.mlp.0.weight", 2)[0]
    if hidden_size < 1 or mlp_size % hidden_size:
        raise ValueError(
            f"{weights.source}: MLP width {mlp_size} is not a multiple of hidden size {hidden_size}"
        )
    head_dim = 2 * _shape(weights, "rotary_emb.inv_freq", 1)[0]
    stated = {**weights.fields}
    heads = stated.pop("num_heads", None) if num_heads is None else num_heads
    inferred = hidden_size // head_dim if head_dim else 0
    if inferred * head_dim != hidden_size or heads not in (None, inferred):
        raise ValueError(
            f"num_heads: got {heads}, but {weights.source} has {head_dim // 2} rotary frequencies: "
            f"head size {head_dim}, so {hidden_size / max(head_dim, 1):g} heads of hidden size {hidden_size}"
        )
    num_layers = mdlm_weights.count_blocks(weights.tensors, weights.source)
    held = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_heads": inferred,
        "num_layers": num_layers,
        "cond_dim": cond_dim,
        "mlp_ratio": mlp_size // hidden_size,
    }
    _check_stated(stated, held, weights)
    loop_start, loop_end = _default_loop(num_layers)
    fields = {
        "mask_token_id": _MASK_IDS.get(vocab_size, vocab_size - 1),
        "loop_start": loop_start,
        "loop_end": loop_end,
        **stated,
        **held,
    }
    fields |= {} if mask_token_id is None else {"mask_token_id": mask_token_id}
    return LoopMDMConfig.from_dict({**fields, **overrides})


def _default_loop(num_layers: int) -> tuple[int, int]:
    return (1, 3) if num_layers >= 3 else (0, num_layers)


def _check_stated(stated: dict[str, Any], held: dict[str, int], weights: MDLMWeights) -> None:
    """Refuse sizes that are stated and not those of the tensors; of missing blocks, name the tensors."""
    differing = [name for name, value in held.items() if stated.get(name, value) != value]
    if not differing:
        return
    message = f"{weights.source}: what is stated and what the weights hold differ: " + "; ".join(
        f"{name} is {stated[name]!r}, the weights hold {held[name]}" for name in differing
    )
    count = stated.get("num_layers", 0)
    if isinstance(count, int) and count > held["num_layers"]:
        # Of many missing blocks, the names of the first two.
        names = mdlm_weights.parameter_names(min(count, held["num_layers"] + 2))
        missing = [name for name in names if name not in weights.tensors]
        message += "\n  missing: " + "\n  missing: ".join(missing)
    raise ValueError(message)


def _shape(weights: MDLMWeights, name: str, ndim: int) -> tuple[int, ...]:
    tensor = weights.tensors.get(name)
    if tensor is None:
        some = printable(", ".join(list(weights.tensors)[:5]))
        raise ValueError(
            f"{weights.source}: has no tensor {name}, so it is no MDLM model; its tensors are {some}, ..."
        )
    if tensor.ndim != ndim:
        raise ValueError(
            f"{weights.source}: {name} has shape {list(tensor.shape)}, expected {ndim} dimensions"
        )
    return tuple(tensor.shape)
