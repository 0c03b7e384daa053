"""What LoRA adapters cost in the kernels, beside the kernels without any and peft on the reference's module.

python -m bench.adapters [result]: medians of calls that take turns, in the processor's fastest dtype, with
adapters on every product of blocks and head. `result` is a JSON file to write.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from bench.roofline import NAMES, native_dtype
from bench.script import arguments
from loopmdm.mdlm import DIT
from loopmdm.model import diffusion
from loopmdm.runs.provenance import provenance
from loopmdm_kernels.files import write_file
from loopmdm_kernels.testing import interleaved_medians
from tests.mdlm.reference_dit import ReferenceDIT, randomise, reference_config

SIZES = {"hidden_size": 384, "n_heads": 6, "n_blocks": 12, "cond_dim": 128, "length": 256, "dropout": 0.0}
VOCAB, BATCH, LENGTH, LOOPS, RANK, PASSES, ROUNDS = 8192, 2, 256, 4, 16, 8, 5
ORDER = [0, *[1, 2] * LOOPS, *range(3, 12)]
TARGETS = ["attn_qkv", "attn_out", "mlp.0", "mlp.2", "output_layer.linear"]
PLAIN, ADAPTED, PEFT = "kernels, no adapters", "kernels, LoRA", "peft on the reference's module"


def adapted(module: nn.Module) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=RANK, target_modules=TARGETS, init_lora_weights=False)
    return peft.get_peft_model(module, config)


def reference_loss(network: Any, tokens: Tensor, noisy: Tensor, t: Tensor) -> Tensor:
    """Cross-entropy of the masked tokens, of whose rows alone log-probabilities are made."""
    masked = noisy == VOCAB - 1
    logits = network(noisy, torch.zeros_like(t))[masked].float()
    logits[:, VOCAB - 1] = -torch.inf
    nll = nn.functional.cross_entropy(logits, tokens[masked], reduction="none")
    weight = diffusion.loss_weight(t)[:, None].expand_as(tokens)[masked]
    return (nll * weight).sum() / tokens.numel()


def cases(dtype: torch.dtype) -> dict[str, dict[str, Callable[[], Any]]]:
    """Variants of a forward pass and of a training step of the adapters."""
    config = reference_config(**SIZES)
    reference = ReferenceDIT(config, VOCAB)
    randomise(reference)
    reference.order = ORDER
    plain, base = (DIT(reference_config(**SIZES, num_loops=LOOPS), VOCAB) for _ in range(2))
    for model in (plain, base):
        model.load_state_dict(reference.state_dict())
    ours, theirs = adapted(base), adapted(reference)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB - 1, (BATCH, LENGTH), generator=generator)
    t = (torch.arange(BATCH) + 0.5) / BATCH
    masked = diffusion.draw_mask(t, torch.zeros_like(tokens, dtype=torch.bool), generator)
    noisy, none = tokens.masked_fill(masked, VOCAB - 1), torch.zeros(BATCH)
    narrow = dtype != torch.float32
    reference.trunk_dtype = dtype if narrow else None

    def autocast() -> Any:
        return torch.autocast("cpu", dtype) if narrow else nullcontext()

    def forward(model: Any) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad(), autocast():
                return model.eval()(noisy, none)

        return call

    def step(model: Any, loss: Callable[[], Tensor]) -> Callable[[], None]:
        def call() -> None:
            model.train().zero_grad()
            with autocast():
                value = loss()
            value.backward()

        return call

    def fused(model: Any) -> Callable[[], Tensor]:
        return lambda: model.loss(tokens, seed=0, t=t, num_loops=LOOPS).loss

    def passes(model: Any, frozen: Any) -> Callable[[], None]:
        def call() -> None:
            with frozen():
                for _ in range(PASSES):
                    forward(model)()

        return call

    return {
        "forward pass": {PLAIN: forward(plain), ADAPTED: forward(ours), PEFT: forward(theirs)},
        f"{PASSES} forward passes with frozen weights, as in sampling": {
            PLAIN: passes(plain, plain.frozen),
            ADAPTED: passes(ours, base.frozen),
            PEFT: passes(theirs, nullcontext),
        },
        "training step": {
            PLAIN: step(plain, fused(plain)),
            ADAPTED: step(ours, fused(base)),
            PEFT: step(theirs, lambda: reference_loss(theirs, tokens, noisy, t)),
        },
    }


def main(result: str | None = None) -> None:
    dtype = native_dtype()
    figures = {}
    for name, variants in cases(dtype).items():
        found = interleaved_medians(variants, repeats=ROUNDS, warmup=1)
        ratios = {other: found[other] / found[ADAPTED] for other in (PLAIN, PEFT)}
        print(f"{name}, {NAMES[dtype]}: LoRA in the kernels {1000 * found[ADAPTED]:.0f} ms", end="")
        print("".join(f"; {other}: {ratio:.2f} times that" for other, ratio in ratios.items()))
        figures[name] = {"seconds": found, "over_lora_in_kernels": ratios}
    if result is not None:
        known = provenance()
        known["versions"]["peft"] = peft.__version__
        document = {
            **known,
            "command": "python -m bench.adapters RESULT",
            "sizes": {**SIZES, "vocab": VOCAB, "batch": BATCH, "num_loops": LOOPS, "rank": RANK},
            "dtype": NAMES[dtype],
            "rounds": ROUNDS,
            "figures": figures,
        }
        write_file(Path(result), json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main(*arguments(__doc__, "[result]"))
