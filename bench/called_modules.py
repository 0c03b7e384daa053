"""What it costs to have modules called: hooks that do nothing, and the look at every module.

python bench/called_modules.py: processor time of one thread, medians of calls that take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from loopmdm import LoopMDM, LoopMDMConfig

ROUNDS = 15


def medians(variants: dict[str, Callable[[], Any]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS + 2):
        for name, call in variants.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def new_model(hidden: int, layers: int, vocab: int) -> LoopMDM:
    torch.manual_seed(0)
    config = LoopMDMConfig(
        vocab_size=vocab,
        mask_token_id=vocab - 1,
        hidden_size=hidden,
        num_heads=hidden // 64,
        num_layers=layers,
        max_length=1024,
        dropout=0.0,
        gate_init=1.0,
    )
    return LoopMDM(config)


def compare(hidden: int, layers: int, vocab: int, batch: int, length: int) -> None:
    plain, hooked = (new_model(hidden, layers, vocab) for _ in range(2))
    for module in hooked.modules():
        module.register_forward_hook(lambda *_: None)
    tokens = torch.randint(vocab - 1, (batch, length))

    def forward(model: LoopMDM) -> Any:
        with torch.no_grad():
            return model.eval()(tokens, num_loops=4)

    def step(model: LoopMDM) -> Any:
        model.train().loss(tokens, seed=0, num_loops=4).loss.backward()

    for name, call in {"forward": forward, "loss and backward": step}.items():
        took = medians({"ops": lambda call=call: call(plain), "modules": lambda call=call: call(hooked)})
        ratio = took["modules"] / took["ops"]
        print(
            f"D {hidden}, B {batch} x L {length}, V {vocab}, {name}:"
            f" {took['ops']:.4f} s, called {ratio:.2f} times"
        )


def look() -> None:
    model = new_model(64, 12, 64)
    repeats = 1000
    took = medians({"look": lambda: [model.cuts() for _ in range(repeats)]})["look"] / repeats
    print(f"the look at 12 blocks and the head: {1e6 * took:.1f} us")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    warnings.filterwarnings("ignore", message=".*called one by one")
    torch.set_num_threads(1)
    look()
    compare(64, 6, 64, 8, 64)
    compare(384, 6, 1000, 4, 256)
    compare(768, 6, 50258, 1, 512)
