"""What it costs that something happens between loops: the op is called once a loop, not once for all loops.

python -m bench.between_loops: seconds of a forward pass and of a loss with its gradients, medians of calls
that take turns.
"""

from __future__ import annotations

from typing import Any

import torch

from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm_kernels.testing import interleaved_medians

ROUNDS = 5
SIZES: dict[str, Any] = {
    "hidden_size": 384,
    "num_heads": 6,
    "num_layers": 12,
    "dropout": 0.0,
    "gate_init": 1.0,
}
BATCH, LENGTH, VOCAB, LOOPS = 1, 512, 1024, 12
VARIANTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "damped": {"damped": True},
    "inject add": {"inject": "add"},
    "parcae, embedding, norm": {"inject": "parcae", "loop_embedding": 11, "carry_norm": True},
}


def new_model(changes: dict[str, Any]) -> LoopMDM:
    torch.manual_seed(0)
    return LoopMDM(LoopMDMConfig(VOCAB, VOCAB - 1, **SIZES, **changes))


def main() -> None:
    tokens = torch.randint(VOCAB - 1, (BATCH, LENGTH))
    models = {name: new_model(changes) for name, changes in VARIANTS.items()}

    def forward(model: LoopMDM) -> Any:
        with torch.no_grad():
            return model.eval()(tokens, num_loops=LOOPS)

    def step(model: LoopMDM) -> None:
        model.train().loss(tokens, seed=0, num_loops=LOOPS).loss.backward()

    print(f"D 384, 12 blocks of which 2 loop, S {LOOPS}, B {BATCH} x L {LENGTH}, fp32, V {VOCAB}")
    for kind, call in {"forward": forward, "loss and backward": step}.items():
        timed = {name: lambda call=call, m=m: call(m) for name, m in models.items()}
        took = interleaved_medians(timed, repeats=ROUNDS, warmup=1)
        for name, seconds in took.items():
            print(f"{kind}, {name}: {seconds:.4f} s, {seconds / took['nothing']:.3f} times")


if __name__ == "__main__":
    main()
