"""What a source of MDLM weights states about itself: configuration beside, inside or on the module.

MDLM and ReMDM keep it as `model.*` with the kind of diffusion at the root, Duo and BD3-LM keep the kind under
`algo.*`, the hub form is flat; a `LoopMDMConfig` has this package's names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loopmdm.formats.pickles import Opaque, lookup
from loopmdm.printable import printable, shown

# Field of LoopMDMConfig -> where it may be stated, the first place counts.
_FIELDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "vocab_size": (("vocab_size",),),
    "mask_token_id": (("mask_index",), ("mask_token_id",)),
    "hidden_size": (("model", "hidden_size"), ("hidden_dim",), ("hidden_size",)),
    "num_heads": (("model", "n_heads"), ("n_heads",), ("num_heads",)),
    "num_layers": (("model", "n_blocks"), ("n_blocks",), ("num_layers",)),
    "cond_dim": (("model", "cond_dim"), ("cond_dim",)),
    "mlp_ratio": (("model", "mlp_ratio"), ("mlp_ratio",)),
    "max_length": (("model", "length"), ("model_length",), ("max_length",)),
    "dropout": (("model", "dropout"), ("dropout",)),
    "time_conditioning": (("algo", "time_conditioning"), ("time_conditioning",)),
    "loop_start": (("model", "loop_start"), ("loop_start",)),
    "loop_end": (("model", "loop_end"), ("loop_end",)),
    "max_loops": (("model", "num_loops"), ("num_loops",), ("max_loops",)),
    "positions": (("positions",),),
    "key_padding_mask": (("key_padding_mask",),),
    "damped": (("damped",),),
    "inject": (("inject",),),
    "loop_embedding": (("loop_embedding",),),
    "carry_norm": (("carry_norm",),),
}
_INTEGERS = frozenset(_FIELDS) - {
    "dropout",
    "time_conditioning",
    "positions",
    "key_padding_mask",
    "damped",
    "inject",
    "carry_norm",
}
# Where a kind of model is stated, the values that this package computes (in lower case); what others mean:
# such models may have MDLM's tensors and still compute something else, or have another law.
_ONLY: tuple[tuple[tuple[str, ...], tuple[Any, ...], str], ...] = (
    (("algo", "parameterization"), ("subs",), "another parameterization than MDLM's SUBS"),
    (("parameterization",), ("subs",), "another parameterization than MDLM's SUBS"),
    (("algo", "backbone"), ("dit", "hf_dit"), "another network than the DiT"),
    (("backbone",), ("dit", "hf_dit"), "another network than the DiT"),
    (("model", "type"), ("ddit",), "another network than the DiT"),
    (("diffusion",), ("absorbing_state",), "another process than masking"),
    *(
        ((*path, name), (False,), "causal attention")
        for path in ((), ("algo",), ("model",))
        for name in ("causal", "causal_attention")
    ),
    (("algo", "cross_attn"), (False,), "block diffusion (BD3-LM)"),
    (("cross_attn",), (False,), "block diffusion (BD3-LM)"),
    (("algo", "subs_masking"), (False,), "D3PM with SUBS masking"),
    (("subs_masking",), (False,), "D3PM with SUBS masking"),
)
_FOREIGN_NAMES = ("bd3lm", "d3pm", "sedd", "duo", "udlm", "distillation", "ot-finetune", "eso")
UNLIMITED = 2**31 - 1  # the length of a `DIT` whose configuration states none
_LOG_LINEAR = ("loglinear", "log-linear")


def look(node: Any, *keys: str) -> Any:
    """The plain value at a path through dicts, configuration nodes, pickled records and objects, or None."""
    for depth, key in enumerate(keys):
        if isinstance(node, Opaque):
            return _resolved(lookup(node, *keys[depth:]))
        try:
            node = node.get(key) if isinstance(node, Mapping) else getattr(node, key, None)
        except Exception:  # an interpolation of a configuration node that cannot be resolved here
            return None
    return _resolved(lookup(node) if isinstance(node, Opaque) else node)


def _resolved(value: Any) -> Any:
    if isinstance(value, str) and ("${" in value or value == "???"):
        return None
    return value if isinstance(value, (bool, int, float, str)) else None


def fields_of(nodes: Iterable[Any]) -> dict[str, Any]:
    """Fields of `LoopMDMConfig` that `nodes` state; where several state one, the first counts."""
    nodes = list(nodes)
    fields = {}
    for field, paths in _FIELDS.items():
        values = (look(node, *path) for node in nodes for path in paths)
        value = next((value for value in values if value is not None), None)
        if value is None or (field == "max_length" and value == UNLIMITED):
            continue
        if field in _INTEGERS and isinstance(value, float) and value.is_integer():
            value = int(value)
        fields[field] = value
    return fields


def refuse_foreign(nodes: Iterable[Any], source: str) -> None:
    """Raise a `ValueError` if a node states a kind of model that this package does not compute."""
    nodes = list(nodes)
    for node in nodes:
        for path, accepted, kind in _ONLY:
            value = look(node, *path)
            known = value.lower() if isinstance(value, str) else value
            if value is not None and known not in accepted:
                raise _refused(source, path, value, kind)
        for path in (("algo", "name"), ("model_type",)):
            name = str(look(node, *path) or "").lower()
            foreign = name == "ar" or name.startswith(_FOREIGN_NAMES)
            if foreign and not (name == "bd3lm" and look(node, "cross_attn") is False):
                raise _refused(source, path, name, "another model than MDLM")
    # Without time conditioning neither the network nor its bound depends on the schedule of the noise.
    if fields_of(nodes).get("time_conditioning"):
        for node in nodes:
            noise = look(node, "noise", "type")
            if noise is not None and str(noise).lower() not in _LOG_LINEAR:
                raise _refused(
                    source, ("noise", "type"), noise, "time conditioning on another noise schedule"
                )


def _refused(source: str, path: tuple[str, ...], value: Any, kind: str) -> ValueError:
    name = printable(".".join(path))
    return ValueError(
        f"{source}: states {name} = {shown(value)}: {kind}, which this package does not compute"
    )
