"""Whether a network with MDLM's attributes computes what MDLM's computes: its own code against the ops.

Both run on the same random weights and a short random input (see `trial`), part by part: first the network
with recorders in place of its blocks, which shows what it feeds to them and does with what they return, then
each block alone. The most that is held at a time is a copy of one block, or of the embedding and the head.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loopmdm_kernels as lk
from loopmdm.mdlm import likeness_static, trial
from loopmdm.mdlm.trial import CannotRunError, Mode, Ran
from loopmdm.model.modules import SigmaEmbedding, rotary_angles, weights_of
from loopmdm_kernels.reference.looped_blocks import layer_norm, modulate
from loopmdm_kernels.types import BlockWeights, Rotary

_BATCH, _LENGTH = 2, 29
# Times the rounding of the ops in the same precision: the order of operations is the module's own.
_MARGIN = 8
# Standard deviations of rows of the residual stream: one at which the eps of a norm counts, an ordinary one.
_SCALES = (3e-3, 1.0)
_COLUMNS = 512  # so many logits of a row are compared


@dataclass
class _Call:
    """What the network fed to a block, and what the recorder in its place returned."""

    index: int
    x: Tensor  # [B, L, D]
    rotary: Any
    c: Tensor  # [B, cond_dim]
    extra: tuple[Any, ...]
    options: dict[str, Any]
    autocast: torch.dtype | None  # to which the network has turned it on
    returned: Tensor  # [B, L, D]


class _Shell(NamedTuple):
    """A copy of the network with recorders in place of its blocks, after one run."""

    network: Any
    ids: Tensor  # [B, L] int64
    sigma: Tensor  # [B]
    calls: list[_Call]
    ran: Ran


def check_blocks(network: Any, indices: Sequence[int], owner: str) -> list[int]:
    """Compare blocks, and how the network connects all of them.

    Args:
        network: with MDLM's attributes; not changed.
        indices: of the blocks to compare.
        owner: names the network in errors.

    Returns:
        Of `indices`, those left out because modules inside are wrapped or replaced (see `cut`).

    Raises:
        ValueError: naming the first block that differs.
    """
    network = _uncompiled(network)

    def compare(mode: Mode) -> list[int]:
        shell = _run_shell(network, mode, owner)
        left_out = []
        for index in indices:
            try:
                block = trial.copied(network.blocks[index], mode, index)
            except CannotRunError:
                if not called(index):
                    raise
                left_out.append(index)
                continue
            if likeness_static.why_called(block) is None:  # a copy has no hooks
                _compare_block(network, index, block, shell, owner)
            else:
                left_out.append(index)
        return left_out

    def called(index: int) -> bool:
        return likeness_static.why_called(network.blocks[index]) is not None

    def look() -> list[int]:
        left_out = [index for index in indices if called(index)]
        likeness_static.check(network, sorted({*indices} - {*left_out}), owner)
        return left_out

    return _tried(network, compare, look, owner)


def check_network(network: Any, owner: str, *, timed: bool, mask_token_id: int) -> None:
    """Compare embedding, conditioning, blocks and final layer.

    Args:
        network: with MDLM's attributes; not changed.
        owner: names the network in errors.
        timed: whether noise levels other than 0 are fed to it.
        mask_token_id: its logit is compared in any case.

    Raises:
        ValueError: naming the first part that differs.
    """
    network = _uncompiled(network)
    every = range(len(network.blocks))

    def compare(mode: Mode) -> list[int]:
        shell = _run_shell(network, mode, owner, timed=timed)
        named = shell.network.named_parameters(remove_duplicate=False)
        weights = {name.replace("_orig_mod.", ""): parameter for name, parameter in named}
        first, precision = shell.calls[0], shell.ran.precision
        embedding = weights["vocab_embed.embedding"][shell.ids]
        _same("vocab_embed", first.x, embedding.to, precision, owner)
        _same("sigma_map", first.c, _condition(shell, weights), precision, owner)
        for index in every:
            block = trial.copied(network.blocks[index], mode, index)
            _compare_block(network, index, block, shell, owner)
        _compare_head(shell, weights, mask_token_id, owner)
        return []

    def look() -> list[int]:
        likeness_static.check(network, every, owner)
        return []

    _tried(network, compare, look, owner)


def _uncompiled(network: Any) -> Any:
    return getattr(network, "_orig_mod", network)


def _tried(
    network: Any, compare: Callable[[Mode], list[int]], look: Callable[[], list[int]], owner: str
) -> list[int]:
    """compare() in the first mode in which everything runs; where there is none, look() at the structure."""
    why: str | None = None
    for mode in trial.modes(network):
        try:
            with trial.apart(mode):
                return compare(mode)
        except CannotRunError as error:
            why = why or str(error)
    left_out = look()
    warnings.warn(
        f"{owner}: could not be run here ({why}), so what it computes was not compared with MDLM's network;"
        " its structure is that of MDLM's",
        stacklevel=4,
    )
    return left_out


class _Recorder(nn.Module):
    """Stands in for a block: notes what it is fed, returns noise, and has the block's other attributes."""

    def __init__(self, block: nn.Module, index: int, calls: list[_Call]) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not as a module of this one
        self.index, self.calls = index, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, x: Tensor, rotary_cos_sin: Any, c: Tensor, *extra: Any, **options: Any) -> Tensor:
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        returned = trial.noise(tuple(x.shape), 100 + len(self.calls)).to(x)
        self.calls.append(_Call(self.index, x, rotary_cos_sin, c, extra, options, autocast, returned))
        return returned


def _run_shell(network: Any, mode: Mode, owner: str, *, timed: bool = True) -> _Shell:
    calls: list[_Call] = []
    recorders = {id(block): _Recorder(block, i, calls) for i, block in enumerate(network.blocks)}
    shell = trial.copied(network, mode, 1000, recorders)
    size = (_BATCH, _LENGTH)
    vocab_size = len(next(shell.vocab_embed.parameters()))
    ids = torch.randint(vocab_size, size, generator=trial.cpu_generator(), device="cpu").to(mode.device)
    sigma = torch.tensor([0.07, 3.1] if timed else [0.0, 0.0], device=mode.device)
    ran = trial.run(shell, ids, sigma)
    _check_connections(calls, len(network.blocks), owner)
    return _Shell(shell, ids, sigma, calls, ran)


def _check_connections(calls: Sequence[_Call], count: int, owner: str) -> None:
    order = [call.index for call in calls]
    if order != list(range(count)):
        raise ValueError(f"{owner}: runs its blocks in the order {order}; MDLM's network runs each once")
    for before, call in pairwise(calls):
        if call.x.shape != before.x.shape or not torch.equal(call.x.to(before.returned), before.returned):
            raise ValueError(
                f"{owner}: feeds blocks.{call.index} something else than what blocks.{before.index} returns"
            )
        if not torch.equal(call.c, before.c):
            raise ValueError(f"{owner}: feeds blocks.{call.index} another conditioning than the block before")


def _compare_block(network: Any, index: int, block: Any, shell: _Shell, owner: str) -> None:
    """block: a copy of block `index`."""
    call = shell.calls[index]
    hidden = call.x.shape[-1]
    inv_freq = network.rotary_emb.inv_freq.to(call.x.device)
    scales = torch.tensor(_SCALES).repeat(_LENGTH)[:_LENGTH, None]
    x = ((trial.noise(tuple(call.x.shape), 7) + 0.5) * scales.cpu()).to(call.x)
    c = trial.noise(tuple(call.c.shape), 8).to(call.c)

    def op(dtype: torch.dtype) -> Any:
        wide = torch.promote_types(dtype, torch.float32)
        with lk.use_backend("reference"):
            return lk.looped_blocks(
                x.to(wide),
                [BlockWeights(*(weight.to(wide) for weight in weights_of(block)))],
                modulation.to(wide),
                1,
                num_heads=hidden // (2 * len(inv_freq)),
                rotary=Rotary(*(part.to(wide) for part in rotary_angles(inv_freq, _LENGTH, x.device))),
                compute_dtype=dtype,
            )

    for gate in _SCALES[::-1]:  # a small one lets the eps of the second norm count
        for parameter in block.adaLN_modulation.parameters():
            if len(parameter) == 6 * hidden:
                parameter[2 * hidden : 3 * hidden] *= gate
        with trial.autocast(x.device.type, call.autocast):
            ran = trial.run(block, x, call.rotary, c, *call.extra, **call.options)
            modulation = trial.run(block.adaLN_modulation, c).out.unflatten(-1, (6, hidden))[None]
        hint = likeness_static.why_block(network, index)
        _same(f"blocks.{index}", ran.out, op, ran.precision, owner, hint)


def _condition(shell: _Shell, weights: dict[str, Tensor]) -> Callable[[torch.dtype], Tensor]:
    module = SigmaEmbedding(len(weights["sigma_map.mlp.2.weight"]))
    module.load_state_dict({name: weights[f"sigma_map.{name}"] for name in module.state_dict()})
    return lambda dtype: F.silu(module.to(dtype)(shell.sigma))


def _compare_head(shell: _Shell, weights: dict[str, Tensor], mask_token_id: int, owner: str) -> None:
    x, c = shell.calls[-1].returned, shell.calls[-1].c
    vocab_size = len(weights["output_layer.linear.bias"])
    columns = torch.linspace(0, vocab_size - 1, min(_COLUMNS, vocab_size)).long()
    columns = torch.cat([columns, torch.tensor([mask_token_id])]).to(x.device)

    def head(dtype: torch.dtype) -> Tensor:
        def part(name: str) -> Tensor:
            return weights[f"output_layer.{name}"].to(dtype)

        modulation = F.linear(c.to(dtype), part("adaLN_modulation.weight"), part("adaLN_modulation.bias"))
        shift, scale = modulation[:, None].chunk(2, dim=2)
        wide = x.to(torch.promote_types(dtype, torch.float32))
        normed = modulate(layer_norm(wide, part("norm_final.weight")), shift, scale).to(dtype)
        return F.linear(normed, part("linear.weight")[columns], part("linear.bias")[columns])

    logits = shell.ran.out
    logits = logits[0] if isinstance(logits, (tuple, list)) else getattr(logits, "logits", logits)
    if isinstance(logits, Tensor) and logits.shape == (_BATCH, _LENGTH, vocab_size):
        logits = logits[..., columns]
    _same("output_layer", logits, head, shell.ran.precision, owner)


def _same(
    part: str,
    got: Any,
    made: Callable[[torch.dtype], Tensor],
    precision: torch.dtype,
    owner: str,
    hint: str | None = None,
) -> None:
    """Raise a ValueError unless `got` is made(float64), up to rounding in `precision`."""
    exact, rounded = made(torch.float64), made(precision)
    if not isinstance(got, Tensor) or got.shape != exact.shape:
        what = f"shape {tuple(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
        raise ValueError(f"{owner}: {part} gives {what}, MDLM's gives shape {tuple(exact.shape)}")
    error = float((got - exact).abs().max())
    rounding = float((rounded - exact).abs().max() + torch.finfo(precision).eps * exact.abs().max())
    if not error <= _MARGIN * rounding:
        raise ValueError(
            f"{owner}: {part} computes something else than MDLM's{'' if hint is None else f' ({hint})'}: on"
            f" random weights and a random input it is off by {error:.2g} of {float(exact.abs().max()):.2g},"
            f" where rounding explains {rounding:.1g}"
        )
