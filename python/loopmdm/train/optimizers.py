"""What moves the weights: AdamW alone, or Muon for the matrices of the blocks and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from loopmdm.train.config import TrainConfig
from loopmdm.train.parallel import full, is_split, put


class _GatheredMuon(torch.optim.Muon):
    """Muon for matrices of which ranks hold parts: each is whole for its own update, on every rank.

    The orthogonal matrix that Muon moves along is a function of the whole gradient.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            options = {name: value for name, value in group.items() if name != "params"}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                whole = full(parameter).clone()
                whole.grad = full(parameter.grad)
                one = torch.optim.Muon([whole], **options)
                one.state[whole]["momentum_buffer"] = full(state["momentum_buffer"]).clone()
                one.step()  # type: ignore[no-untyped-call]
                put(parameter, whole)
                put(state["momentum_buffer"], one.state[whole]["momentum_buffer"])


_MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
    _GatheredMuon: ("momentum_buffer",),
}


class Optimizer:
    """One step over all parameters, whatever moves each of them."""

    def __init__(
        self, names: Sequence[str], parameters: Sequence[Tensor], config: TrainConfig, device: torch.device
    ) -> None:
        self._names = dict(zip(parameters, names, strict=True))
        matrices = [p for p in parameters if config.optimizer == "muon" and _is_matrix(self._names[p], p)]
        chosen = set(matrices)
        adamw = torch.optim.AdamW(
            [p for p in parameters if p not in chosen],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        self.parts: list[torch.optim.Optimizer] = [adamw]
        if matrices:
            split = any(is_split(p) for p in matrices)
            muon = (_GatheredMuon if split else torch.optim.Muon)(
                matrices,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
            self.parts.append(muon)

    def step(self, learning_rate: float) -> None:
        """Move the parameters by their gradients, and drop these."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate
            part.step()
            part.zero_grad(set_to_none=True)
        # The fused update does not count as a change of version by itself; caches of the ops are keyed on it.
        torch.autograd.graph.increment_version(list(self._names))

    def moments(self) -> dict[str, Tensor]:
        """The state by `moment.parameter`; empty before the first step."""
        return {
            f"{moment}.{self._names[parameter]}": part.state[parameter][moment]
            for part, parameter, moment in self._kept()
            if moment in part.state[parameter]
        }

    def begin(self, steps: int) -> None:
        """Make the state that `steps` steps leave, with zeros to be written over."""
        for part in self.parts:
            part.state.clear()
        if not steps:
            return
        for part, parameter, moment in self._kept():
            part.state[parameter][moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if isinstance(part, torch.optim.AdamW):
                done = torch.tensor(float(steps), dtype=torch.float32, device=parameter.device)
                part.state[parameter]["step"] = done

    @property
    def steps(self) -> int:
        """Steps done."""
        states = (state for part in self.parts for state in part.state.values())
        return max((int(state["step"]) for state in states if "step" in state), default=0)

    def _kept(self) -> Iterator[tuple[torch.optim.Optimizer, Tensor, str]]:
        for part in self.parts:
            for group in part.param_groups:
                for parameter in group["params"]:
                    for moment in _MOMENTS[type(part)]:
                        yield part, parameter, moment


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon is meant for it: a product within a block, not an embedding, a head or a modulation."""
    return parameter.ndim == 2 and name.startswith("blocks.") and "adaLN" not in name
