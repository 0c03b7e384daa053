"""`patch`: loop the blocks of an existing MDLM module through `looped_blocks`, in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import loopmdm_kernels as lk
from loopmdm.mdlm import likeness
from loopmdm.mdlm.trial import StandIn
from loopmdm.mdlm.weights import NETWORK_ATTRIBUTES
from loopmdm.model import LoopMDM, cut
from loopmdm.model.modules import rotary_angles, weights_of
from loopmdm_kernels.tracing import not_compiled
from loopmdm_kernels.values import positive

Module = TypeVar("Module", bound=nn.Module)

_BLOCK_ATTRIBUTES = ("norm1", "attn_qkv", "attn_out", "norm2", "mlp", "adaLN_modulation")
_WRAPPERS = ("backbone", "module", "_orig_mod")
_STATE = "_loopmdm_patch"


def patch(reference_module: Module, num_loops: int = 12, loop: tuple[int, int] = (1, 3)) -> Module:
    """Make a reference DIT, bare or in a wrapper's `.backbone`, loop over its blocks.

    Blocks loop[0]..loop[1]-1 are applied `num_loops` times. The module stays itself: class, parameters (an
    optimizer keeps working), state_dict, embedding, head, autocast regions and dropout in training. Only the
    forward of its blocks is replaced. A block whose modules are watched (hooks), replaced, or wrapped in more
    than a sum of weights (which LoRA adapters are), now or later, runs its own forward.

    With `num_loops=1` it computes what it computed before: a copy of each block is run once, on random
    weights and 29 random positions, beside the op that takes its place. What shows in longer sequences only
    (such as a wide window of attention) is not seen.

    Change the loop count later by `module.num_loops = S` on the module that was passed in.

    Args:
        reference_module: any module with the attributes of MDLM's DIT.
        num_loops: S >= 1.
        loop: half-open range of looped blocks, zero-based.

    Returns:
        `reference_module`, changed in place. `unpatch` undoes it.

    Raises:
        TypeError: the attributes of a DIT are missing, or it is a LoopMDM, which loops by itself.
        ValueError: `num_loops` or `loop` out of range; a block that computes something else than MDLM's.

    Warns:
        UserWarning: the module cannot be run here (on the meta device, split over ranks, made for a GPU), so
            only its structure was compared.
    """
    network = _find_network(reference_module)
    if isinstance(network, LoopMDM):
        raise TypeError(
            f"reference_module: {type(network).__name__} loops by itself, by num_loops (DIT) or max_loops"
        )
    count = len(network.blocks)
    if not 0 <= loop[0] < loop[1] <= count:
        raise ValueError(f"loop: got {loop}, expected 0 <= start < end <= {count} (the number of blocks)")
    loops = positive("num_loops", num_loops)
    left_out = likeness.check_blocks(network, range(count), _named(network))
    unpatch(reference_module)
    reference_module.num_loops = loops  # type: ignore[assignment]
    setattr(reference_module, _STATE, _LoopedBlocks(reference_module, network, loop, left_out))
    return reference_module


def unpatch(reference_module: Module) -> Module:
    """Undo `patch`; a module that is not patched is left alone."""
    state = getattr(reference_module, _STATE, None)
    if state is not None:
        state.remove()
        delattr(reference_module, _STATE)
        del reference_module.num_loops
    return reference_module


def _find_network(module: nn.Module) -> Any:
    found: Any = module
    while not hasattr(found, "blocks"):
        inner = [
            getattr(found, name) for name in _WRAPPERS if isinstance(getattr(found, name, None), nn.Module)
        ]
        if not inner:
            break
        found = inner[0]
    missing = [name for name in NETWORK_ATTRIBUTES if not hasattr(found, name)]
    if not missing:
        missing = [f"blocks.0.{name}" for name in _BLOCK_ATTRIBUTES if not hasattr(found.blocks[0], name)]
    if missing:
        raise TypeError(
            f"reference_module: {type(module).__name__} has no {', '.join(missing)}; "
            "expected MDLM's DIT or a wrapper that holds it as .backbone"
        )
    return found


class _LoopedBlocks:
    """What the blocks of a patched module call: the first of a stage runs all of it, the others pass on."""

    def __init__(self, owner: Any, network: Any, loop: tuple[int, int], left_out: Sequence[int]) -> None:
        self.owner = owner  # its num_loops is read at every call
        self.network = network
        self.loop = loop
        self.every_state = False
        self.handle: RemovableHandle = network.register_forward_pre_hook(self._before, with_kwargs=True)
        # Of each block and its norms as they are now: `patch` takes these for the reference's.
        self._forwards = [(type(b).forward, _norm_forward(b.norm1)) for b in network.blocks]
        # The norms with which a block was compared with MDLM's; others are compared when the op shall run it.
        self._compared = {i: _norms(b) for i, b in enumerate(network.blocks) if i not in left_out}
        self._before_patch = [vars(block).get("forward") for block in network.blocks]
        for index, block in enumerate(network.blocks):
            block.forward = StandIn(self.run, index)

    def remove(self) -> None:
        self.handle.remove()
        for block, forward in zip(self.network.blocks, self._before_patch, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The hub form of the network collects the state after each block if asked to.
        self.every_state = bool(kwargs.get("output_hidden_states", args[2] if len(args) > 2 else False))

    def stages(self, index: int) -> Iterator[tuple[int, int, int]]:
        """Stages (start, end, S) that the call of block `index` runs."""
        start, end = self.loop
        count, num_loops = len(self.network.blocks), positive("num_loops", self.owner.num_loops)
        if self.every_state:
            # All loops but the last in one go, then block by block: looped blocks report their last state.
            if index == start and num_loops > 1:
                yield start, end, num_loops - 1
            yield index, index + 1, 1
            return
        whole = ((0, start, 1), (start, end, num_loops), (end, count, 1))
        for start, end, loops in whole:
            by_block = loops == 1 and any(self._why_watched(i) for i in range(start, end))
            if by_block and start <= index < end:
                yield index, index + 1, 1
            elif not by_block and start == index and start < end:
                yield start, end, loops

    def run(
        self, index: int, x: Tensor, rotary_cos_sin: Any, c: Tensor, *extra: Any, **options: Any
    ) -> Tensor:
        """Forward of block `index`: x [B, L, D], c [B, cond_dim]; the module's rotary table is not used."""
        unknown = [value for value in (*extra, *options.values()) if value is not None]
        if unknown:
            raise ValueError(f"a patched block takes (x, rotary, c) only, got also {unknown}")
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for start, end, num_loops in self.stages(index):
            called = [self._why_called(i) for i in range(start, end)]
            if any(called):
                x = self._call(x, rotary_cos_sin, c, start, called, num_loops)
            else:
                x = self._apply(x, c, start, end, num_loops)
        return x

    def _why_watched(self, index: int) -> str | None:
        return cut.why_global() or cut.why_watched(self.network.blocks[index], own_forward=False)

    def _why_called(self, index: int) -> str | None:
        """Why block `index` has to run its own forward; None: it has not.

        Raises:
            ValueError: something watches the block itself, which PyTorch calls once for all its loops.
        """
        why = self._why_watched(index)
        if why is not None and self.owner.num_loops > 1 and self.loop[0] <= index < self.loop[1]:
            raise ValueError(
                f"blocks.{index} {why}, but PyTorch calls a patched block once for all its loops; put hooks"
                " on the modules inside it, or use LoopMDM.from_mdlm, where each loop calls its blocks"
            )
        block = self.network.blocks[index]
        why = why or cut.why_block(block, *self._forwards[index], own=False)
        if why is not None:
            return cut.named(f"blocks.{index}", why)
        if self._compared.get(index) != _norms(block):
            self._compare(index)
        return None

    @not_compiled
    def _compare(self, index: int) -> None:
        likeness.check_blocks(self.network, [index], _named(self.network))
        self._compared[index] = _norms(self.network.blocks[index])

    def _call(
        self, x: Tensor, rotary_cos_sin: Any, c: Tensor, start: int, called: list[str | None], num_loops: int
    ) -> Tensor:
        """Blocks from `start` on, `num_loops` times: those with a reason in `called` by their own forward."""
        cut.say(self.network, [why for why in called if why is not None])
        for _ in range(num_loops):
            for index, why in enumerate(called, start):
                if why is None:
                    x = self._apply(x, c, index, index + 1, 1)
                else:
                    block = self.network.blocks[index]
                    x = type(block).forward(block, x, rotary_cos_sin, c)
        return x

    def _apply(self, x: Tensor, c: Tensor, start: int, end: int, num_loops: int) -> Tensor:
        blocks: list[Any] = [self.network.blocks[i] for i in range(start, end)]
        inv_freq = self.network.rotary_emb.inv_freq
        kind = x.device.type
        dropout = getattr(blocks[0], "dropout", 0.0) if blocks[0].training else 0.0
        out = lk.looped_blocks(
            x,
            [weights_of(block) for block in blocks],
            torch.stack([block.adaLN_modulation(c).unflatten(-1, (6, x.shape[-1])) for block in blocks]),
            num_loops,
            num_heads=x.shape[-1] // (2 * len(inv_freq)),
            rotary=rotary_angles(inv_freq, x.shape[1], x.device),
            compute_dtype=(
                torch.get_autocast_dtype(kind)
                if torch.is_autocast_enabled(kind)
                else blocks[0].attn_qkv.weight.dtype
            ),
            dropout=dropout,
            dropout_seed=int(torch.randint(2**62, ())) if dropout else 0,
        )
        return cast(Tensor, out)


def _named(network: Any) -> str:
    return f"reference_module: {type(network).__name__}"


def _norms(block: Any) -> tuple[Any, Any]:
    return block.norm1, block.norm2


def _norm_forward(norm: Any) -> Any:
    """Of its class; None, which is no norm's, where something is wrapped around the norm."""
    return type(norm).forward if isinstance(getattr(norm, "weight", None), Tensor) else None
