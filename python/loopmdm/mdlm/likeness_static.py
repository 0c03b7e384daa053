"""Whether the structure of a network is MDLM's: for those that cannot be run here, and as a hint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch._subclasses.fake_tensor import FakeTensor

from loopmdm.mdlm import stated as mdlm_stated
from loopmdm.mdlm.weights import BLOCK_PARAMETERS
from loopmdm.model import cut
from loopmdm.model.cut import named
from loopmdm.model.modules import check_frequencies
from loopmdm_kernels.reference.looped_blocks import NORM_EPS

_NORM_NAMES = ("LayerNorm", "ScaleNorm")
_EPS_NAMES = ("eps", "epsilon", "variance_epsilon")
_HEADS_NAMES = ("n_heads", "num_heads")


def check(network: Any, indices: Iterable[int], owner: str) -> None:
    """Raise a ValueError that names the first part whose structure is not MDLM's."""
    mdlm_stated.refuse_foreign([network, *network.blocks], owner)
    inv_freq = network.rotary_emb.inv_freq
    if not (inv_freq.is_meta or isinstance(inv_freq, FakeTensor)):
        check_frequencies(inv_freq, inv_freq.dtype, owner)
    for index in indices:
        if (why := why_block(network, index)) is not None:
            raise ValueError(f"{owner}: {named(f'blocks.{index}', why)}; expected the structure of MDLM's")


def why_block(network: Any, index: int) -> str | None:
    """What in the structure of a block is not as in MDLM's, naming the module; None: nothing."""
    block = network.blocks[index]
    for name in ("norm1", "norm2"):
        if (why := _why_norm(getattr(block, name))) is not None:
            return named(f".{name}", why)
    if (why := why_called(block)) is not None:
        return why
    names = [name for name, _ in block.named_parameters()]
    surplus = [name for name in names if name not in BLOCK_PARAMETERS]
    if surplus:
        return f"has parameters {', '.join(surplus)}"
    heads = next((getattr(block, name) for name in _HEADS_NAMES if hasattr(block, name)), None)
    size = 2 * len(network.rotary_emb.inv_freq)
    if heads is not None and heads * size != len(block.attn_out.weight):
        return f"has {heads} heads, and its rotary frequencies are of heads of {size}"
    return None


def why_called(block: Any) -> str | None:
    """Why the modules of a block, whose class is taken as it is, have to be called (see `cut`)."""
    return cut.why_block(block, type(block).forward, type(block.norm1).forward, own=False)


def _why_norm(norm: Any) -> str | None:
    if type(norm).__name__ not in _NORM_NAMES:
        return f"is a {type(norm).__module__}.{type(norm).__qualname__}"
    if getattr(norm, "bias", None) is not None:
        return "has a bias"
    eps = next((getattr(norm, name) for name in _EPS_NAMES if hasattr(norm, name)), NORM_EPS)
    return None if eps == NORM_EPS else f"has eps {eps:g}"
