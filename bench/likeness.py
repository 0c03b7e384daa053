"""What it costs `patch` and `from_mdlm` to try a module, and how clear the verdict is.

python -m bench.likeness: processor time of one thread, medians of calls that take turns; the most memory that
a trial adds; and how many times the rounding of the ops a module is off that computes the same, or not.
"""

from __future__ import annotations

import contextlib
import resource
import warnings
from typing import Any

import torch
from torch import Tensor

from bench.called_modules import medians
from bench.script import arguments
from loopmdm import LoopMDM, patch
from loopmdm.mdlm import likeness
from tests.mdlm.lookalikes import ALIKE, OTHER_BLOCKS
from tests.mdlm.reference_dit import ReferenceDIT, reference_config

SIZES = {
    "64, 5 blocks, V 1000": (64, 5, 1000),
    "384, 12, 1000": (384, 12, 1000),
    "768, 12, 50258": (768, 12, 50258),
}


def network(hidden: int, layers: int, vocab: int) -> Any:
    config = reference_config(hidden_size=hidden, n_blocks=layers, n_heads=hidden // 16, cond_dim=128)
    return ReferenceDIT(config, vocab).eval()


def cost() -> None:
    for name, size in SIZES.items():
        net = network(*size)
        tensors = net.state_dict()
        took = medians(
            {
                "patch": lambda net=net: patch(net),
                "from_mdlm of its tensors": lambda tensors=tensors: LoopMDM.from_mdlm(tensors),
                "from_mdlm of the module": lambda net=net: LoopMDM.from_mdlm(net),
            }
        )
        print(
            f"D {name}:", ", ".join(f"{what} {seconds:.2f} s" for what, seconds in took.items()), flush=True
        )


def memory() -> None:
    net = network(768, 12, 50258)
    held = sum(p.numel() * p.element_size() for p in net.parameters())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    patch(net)
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"memory: the module {held / 2**20:.0f} MB, a trial at most {added / 2**10:.0f} MB more")


def verdicts() -> None:
    """The largest error of each module over the rounding of the ops."""
    worst = 0.0
    compare = likeness._same

    def noted(
        part: str, got: Tensor, made: Any, precision: torch.dtype, owner: str, hint: Any = None
    ) -> None:
        nonlocal worst
        exact, rounded = made(torch.float64), made(precision)
        rounding = (rounded - exact).abs().max() + torch.finfo(precision).eps * exact.abs().max()
        worst = max(worst, float((got - exact).abs().max() / rounding))
        compare(part, got, made, precision, owner, hint)

    likeness._same = noted
    for kind, changes in {"alike": ALIKE, "other": OTHER_BLOCKS}.items():
        ratios = {}
        for name, change in changes.items():
            for dtype in (torch.float32, torch.bfloat16):
                worst, net = 0.0, network(64, 5, 13)
                change(net)
                with contextlib.suppress(ValueError):
                    patch(net.to(dtype))
                ratios[name, dtype] = worst
        least, most = min(ratios, key=ratios.get), max(ratios, key=ratios.get)
        print(f"{kind}: {ratios[least]:.3g} ({least}) to {ratios[most]:.3g} ({most}) times the rounding")
    likeness._same = compare


if __name__ == "__main__":
    arguments(__doc__)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    memory()
    verdicts()
    cost()
