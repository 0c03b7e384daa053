"""One forward pass, cut where the loop begins and where it ends."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

import loopmdm_kernels as lk
from loopmdm.model import draws
from loopmdm.model.between import damped_step
from loopmdm.model.cut import why_global
from loopmdm.model.masks import boolean
from loopmdm.model.modules import DDiTBlock, by_row
from loopmdm.model.network import Network
from loopmdm.model.parallel import refuse_split, with_whole_weights
from loopmdm_kernels.calls import LoopedCall
from loopmdm_kernels.ops import checks
from loopmdm_kernels.reference.looped_blocks import Dropout, run_loops
from loopmdm_kernels.tracing import not_compiled
from loopmdm_kernels.types import Rotary
from loopmdm_kernels.values import positive

_SEED_BITS = 0x7FFF_FFFF_FFFF_FFFF
_MOST_LOOPS = 2**30  # as of the op


class Exit(ABC):
    """What may end the loop of a sequence early: the rules of `loopmdm.exits`."""

    @abstractmethod
    def run(self, stages: Stages, num_loops: int | Tensor, min_loops: int = 1) -> tuple[Tensor, Tensor]:
        """Residual stream [B, L, D] after the last block, and the loops used, int64 [B].

        Args:
            num_loops: the most loops, of all or of each sequence [B].
            min_loops: a sequence ends after this loop at the earliest.
        """


class Stages:
    """The residual stream of `tokens` [B, L] in stages: before, loop, after. Made by `LoopMDM.stages`.

    `after(loop(before(), S))` is `LoopMDM.hidden` with S loops, bit for bit, and with `done` and `total` the
    loops may be cut anywhere, but for dropout, whose masks begin anew with every call of `loop`.
    """

    def __init__(
        self,
        model: Network,
        tokens: Tensor,
        sigma: Tensor | None,
        attention_mask: Tensor | None,
        dropout_seed: int | Tensor | None,
        inputs_embeds: Tensor | None = None,
    ) -> None:
        refuse_split(model.vocab_embed.embedding)
        self.model = model
        self.tokens = tokens  # [B, L] int64
        self._embeds = inputs_embeds  # [B, L, D] in place of the tokens', which then mean nothing
        self.sigma = sigma  # [B] or None
        self._key_mask = None if attention_mask is None else boolean("attention_mask", attention_mask)
        self._dropout = model.config.dropout if model.training else 0.0
        if self._dropout and dropout_seed is None:
            dropout_seed = draws.dropout_seed(tokens)
        self._dropout_seed: int | Tensor = 0 if dropout_seed is None else dropout_seed
        self._condition = model.condition(sigma)
        self._compute_dtype = model.compute_dtype
        self._rotary: Rotary | None = None
        if model.config.positions == "rotary":
            length = tokens.shape[1]
            self._rotary = model.once(("rotary", length), lambda: model.rotary_emb(length))
        self._modulations: dict[tuple[int, int], Tensor] = {}
        self._first: Tensor | None = None  # H(0), where later loops read it

    @property
    def masked(self) -> Tensor:
        """The positions that hold the mask token, bool [B, L]."""
        if self._embeds is not None:
            raise ValueError("inputs_embeds: exit rules read which tokens are masked; expected input_ids")
        return self.tokens == self.model.config.mask_token_id

    def before(self) -> Tensor:
        """H(0) [B, L, D], float32 or wider: the embedding and the blocks before the loop."""
        out: Tensor = self._run(self.embedded(), 0, self.model.config.loop_start, 1)
        return out

    def embedded(self) -> Tensor:
        """The residual stream before the first block."""
        model = self.model
        x = model.vocab_embed(self.tokens) if self._embeds is None else self._embeds
        if model.config.positions == "learned":
            x = x + model.position_embed(torch.arange(self.tokens.shape[1], device=x.device))
        wide: Tensor = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide

    def block(self, hidden: Tensor, index: int, application: int = 0) -> Tensor:
        """Block `index` applied once to hidden [B, L, D]; `application` names its dropout masks."""
        out: Tensor = self._application(application)._run(hidden, index, index + 1, 1)
        return out

    def loop(
        self,
        hidden: Tensor,
        num_loops: int | Tensor = 1,
        *,
        exit_threshold: float | None = None,
        max_loops: int | None = None,
        done: int = 0,
        total: int | Tensor | None = None,
    ) -> Any:
        """H(k + num_loops) from H(k) [B, L, D]; with `exit_threshold`, (it, loops used int64 [B]).

        Args:
            hidden: of `before` or of `loop`.
            num_loops: loops to add, at least 1: one number or one for each sequence, int64 [B].
            exit_threshold: a sequence stops after a loop that changes its hidden state by less, relative to
                the new state (Frobenius norms over all positions).
            max_loops: with one number for each, none is larger; spares reading them from the device.
            done: k. It makes a difference where something happens between loops.
            total: S of the whole pass, of all or of each sequence; None: done + num_loops. A damped model
                needs it to go on with a loop.
        """
        config = self.model.config
        if config.acts_between_loops:
            return self._loop_by_loop(hidden, num_loops, exit_threshold, done, total)
        return self._run(hidden, config.loop_start, config.loop_end, num_loops, exit_threshold, max_loops)

    def after(self, hidden: Tensor) -> Tensor:
        """The residual stream [B, L, D] that the vocabulary head reads: the blocks behind the loop."""
        config = self.model.config
        out: Tensor = self._run(hidden, config.loop_end, config.num_layers, 1)
        return out

    def states(self, num_loops: int | Tensor) -> list[Tensor]:
        """The residual stream [B, L, D] after the embedding and after each block, block by block.

        A looped block reports the state after its last application; the last one is what `after` returns.

        Args:
            num_loops: of all sequences, or of each, int64 [B].
        """
        config = self.model.config
        each = num_loops if isinstance(num_loops, Tensor) else None
        if each is not None and (each.shape not in ((1,), self.tokens.shape[:1]) or int(each.min()) < 1):
            raise ValueError(f"num_loops: got {each}, expected an int >= 1, or one for each sequence")
        most = positive("num_loops", num_loops if each is None else int(each.max()))
        loop = range(config.loop_start, config.loop_end)
        order = [(0, i) for i in range(config.loop_start)]
        order += [(number, i) for number in range(most) for i in loop]
        order += [(0, i) for i in range(config.loop_end, config.num_layers)]
        x = entered = self.embedded()
        states = [x] * (config.num_layers + 1)
        for application, (number, i) in enumerate(order):
            going = None if number == 0 or each is None else (number < each)[:, None, None]
            if i == config.loop_start:
                if not number:
                    self._begin(x)
                x = entered = _where(going, self._entered(x, number), x)
            after = self.block(x, i, application)
            if i == config.loop_end - 1:
                after = self._left(entered, after, num_loops)
            x, states[i + 1] = _where(going, after, x), _where(going, after, states[i + 1])
        return states

    def subset(self, active: Tensor) -> Stages:
        """The same pass for some of the sequences: `active` holds their numbers int64 [b], or is bool [B]."""
        part = object.__new__(Stages)
        part.__dict__.update(self.__dict__)
        part.tokens = self.tokens[active]
        part._embeds = None if self._embeds is None else self._embeds[active]
        part._first = None if self._first is None else self._first[active]
        part.sigma = None if self.sigma is None else self.sigma[active]
        part._key_mask = None if self._key_mask is None else self._key_mask[active]
        if self._condition.shape[0] > 1:
            config = self.model.config
            bounds = (0, config.loop_start, config.loop_end, config.num_layers)
            part._modulations = {
                (start, end): self._modulation(start, end)[:, active]
                for start, end in pairwise(bounds)
                if start < end and not any(self._called(start, end))
            }
            part._condition = self._condition[active]
        return part

    def calls(self) -> list[LoopedCall | None]:
        """The calls of `looped_blocks` before, in and after the loop; None: there are no blocks.

        Of one loop of a state without values, without dropout and key mask.
        """
        model, length = self.model, self.tokens.shape[1]
        config, embedding = model.config, model.vocab_embed.embedding
        dtype = torch.promote_types(embedding.dtype, torch.float32)
        state = torch.empty(len(self.tokens), length, config.hidden_size, dtype=dtype, device=model.device)
        bounds = (0, config.loop_start, config.loop_end, config.num_layers)
        return [
            LoopedCall(
                *(state, model.block_weights(start, end), self._modulation(start, end), 1, config.num_heads),
                rotary=self._rotary,
                compute_dtype=self._compute_dtype,
            )
            if start < end
            else None
            for start, end in pairwise(bounds)
        ]

    def _modulation(self, start: int, end: int) -> Tensor:
        """Of blocks start..end - 1, [end - start, 1 or B, 6, D]."""
        if (start, end) not in self._modulations:
            self._modulations[start, end] = self._made_modulation(start, end)
        return self._modulations[start, end]

    def _made_modulation(self, start: int, end: int) -> Tensor:
        def made() -> Tensor:
            rows = [by_row(block.adaLN_modulation, self._condition) for block in self._blocks(start, end)]
            return torch.stack(rows).view(end - start, -1, 6, self.model.config.hidden_size)

        alike = self._condition.shape[0] == 1 and not self.model.config.time_conditioning
        return self.model.once(("modulation", start, end, self._compute_dtype), made) if alike else made()

    def _modulation_of(self, index: int, active: Tensor | None) -> Tensor:
        """Of one block and some sequences; made anew: both passes of a checkpoint must make it."""
        modulation = self._made_modulation(index, index + 1)
        return modulation if active is None or modulation.shape[1] == 1 else modulation[:, active]

    def _called(self, start: int, end: int) -> list[bool]:
        """Of blocks start..end - 1, which the op does not compute."""
        if why_global() is not None:
            return [True] * (end - start)
        return [DDiTBlock.why_called(block) is not None for block in self._blocks(start, end)]

    def _blocks(self, start: int, end: int) -> list[DDiTBlock]:
        return [cast(DDiTBlock, self.model.blocks[i]) for i in range(start, end)]

    def _run(
        self,
        x: Tensor,
        start: int,
        end: int,
        loops: int | Tensor,
        exit_threshold: float | None = None,
        max_loops: int | None = None,
    ) -> Any:
        """Blocks start..end - 1, `loops` times."""
        if start == end:
            return x
        called = self._called(start, end)
        if any(called):
            return self._run_modules(x, start, called, loops, exit_threshold)
        modulation = partial(self._modulation, start, end)
        return self._op(x, start, end, loops, modulation, self._key_mask, exit_threshold, max_loops)

    @not_compiled
    def _loop_by_loop(
        self,
        x: Tensor,
        num_loops: int | Tensor,
        exit_threshold: float | None,
        done: int,
        total: int | Tensor | None,
    ) -> Any:
        """`loop` with what happens between loops, of which each is a call of its own."""
        loops = _counted_loops("num_loops", num_loops, x)
        config, whole = self.model.config, loops if total is None else _counted_loops("total", total, x)
        if config.damped and done and total is None:
            raise ValueError(
                "total: got None, but a loop of a damped model goes 1/S of its way; expected S of the pass"
            )

        def one_loop(state: Tensor, active: Tensor | None, loop: int) -> Tensor:
            part = (self if active is None else self.subset(active))._application(done + loop)
            entered = part._entered(state, done + loop)
            new = part._run(entered, config.loop_start, config.loop_end, 1)
            each = whole[active] if isinstance(whole, Tensor) and active is not None else whole
            return part._left(entered, new, each)

        if not done:
            self._begin(x)
        elif config.inject != "none" and self._first is None:
            raise ValueError(f"done: got {done} before any loop, but a model with inject reads H(0) in each")
        # With `recompute` the op keeps no more of a loop than its input.
        out, used = run_loops(one_loop, x, loops, checks.exit_threshold(exit_threshold), recompute=False)
        return out if exit_threshold is None else (out, used)

    def _begin(self, state: Tensor) -> None:
        """Keep H(0) for the loops that read it."""
        self._first = state if self.model.config.inject != "none" else None

    def _entered(self, state: Tensor, done: int) -> Tensor:
        """What the blocks of loop done + 1 get of the state after the loop before it."""
        if not done or not self.model.config.learns_between_loops:
            return state
        entered: Tensor = self.model.between(state, self._first, done)
        return entered

    def _left(self, entered: Tensor, new: Tensor, num_loops: int | Tensor) -> Tensor:
        """The state after a loop of S, whose blocks made `new` of the state that `entered`."""
        return damped_step(entered, new, num_loops) if self.model.config.damped else new

    def _application(self, number: int) -> Stages:
        """The same pass, with dropout masks of that number."""
        if not number or not self._dropout:
            return self
        part = copy.copy(self)
        part._dropout_seed = self._dropout_seed + number
        return part

    def _op(
        self,
        x: Tensor,
        start: int,
        end: int,
        loops: int | Tensor,
        modulation: Callable[[], Tensor],
        key_mask: Tensor | None,
        exit_threshold: float | None = None,
        max_loops: int | None = None,
    ) -> Any:
        """modulation() is of the blocks; made where their weights are whole."""
        model = self.model

        def run(x: Tensor) -> Any:
            return lk.looped_blocks(
                x,
                model.block_weights(start, end),
                modulation(),
                loops,
                num_heads=model.config.num_heads,
                max_loops=max_loops,
                rotary=self._rotary,
                key_mask=key_mask,
                compute_dtype=self._compute_dtype,
                dropout=self._dropout,
                dropout_seed=(self._dropout_seed * model.config.num_layers + start) & _SEED_BITS,
                exit_threshold=exit_threshold,
                recompute=model.recompute,
            )

        return with_whole_weights(self._blocks(start, end), x, run)

    @not_compiled
    def _run_modules(
        self,
        x: Tensor,
        start: int,
        called: Sequence[bool],
        loops: int | Tensor,
        exit_threshold: float | None,
    ) -> Any:
        """Blocks from `start` on, `loops` times: those of `called` module by module, the others by the op."""
        model = self.model
        model.say_cuts()
        if model._fp8_blocks:
            raise ValueError(f"use_fp8_weights: not of blocks that have to be called ({model.cuts()[0]})")
        blocks = self._blocks(start, start + len(called))
        seed = int(self._dropout_seed * model.config.num_layers + start) & _SEED_BITS
        count = len(blocks)

        # The op counts its applications from 0, so where masks are drawn every block is called.
        fused = [not why and not self._dropout for why in called]

        def one_loop(state: Tensor, active: Tensor | None, loop: int) -> Tensor:
            condition, key_mask = self._condition, self._key_mask
            if active is not None:
                condition = condition if len(condition) == 1 else condition[active]
                key_mask = None if key_mask is None else key_mask[active]
            options: dict[str, Any] = {} if key_mask is None else {"key_mask": key_mask}
            for index, block in enumerate(blocks):
                if fused[index]:
                    modulation = partial(self._modulation_of, start + index, active)
                    state = self._op(state, start + index, start + index + 1, 1, modulation, key_mask)
                    continue
                if self._dropout:
                    options["dropout"] = Dropout(self._dropout, seed, application=loop * count + index)
                state = block(state, self._rotary, condition, **options)
            return state

        out, used = run_loops(
            one_loop,
            x,
            _counted_loops("num_loops", loops, x),
            exit_threshold,
            recompute=model.recompute,
            preserve_rng_state=True,
        )
        return out if exit_threshold is None else (out, used)


def _where(going: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """`new` of the sequences that are still going, bool [B, 1, 1]; None: all are."""
    return new if going is None else torch.where(going, new, old)


def _counted_loops(name: str, value: Any, x: Tensor) -> int | Tensor:
    """Loops of all sequences of x [B, L, D], or int64 [B] of each, checked as the op checks them."""
    if isinstance(value, Tensor) and value.shape == (1,) and value.device.type == "cpu":
        value = int(value)  # drawn in a compiled graph: one for all
    if not isinstance(value, Tensor):
        accepted = "at least 1 and below 2^30, an int or an int64 tensor [B]"
        count: int = checks.integer(name, value, 1, _MOST_LOOPS, accepted)
        return count
    checks.tensor(name, value, dtypes=(torch.int64,), shape=x.shape[:1], device=x.device)
    checks.in_range(name, value, 1, _MOST_LOOPS)
    return value
