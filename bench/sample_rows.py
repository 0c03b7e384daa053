"""sample_rows beside the draw of the reference model in plain PyTorch, on the same rows."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest
import torch

import loopmdm_kernels as lk
from bench import peers
from bench.compare import WITH_BF16_PARAMETERS
from bench.roofline import NAMES, native_dtype
from bench.run import BF16, DTYPES, REAL, Calls, Run, head_in_fp8
from loopmdm_kernels.testing import head_inputs, row_rng
from loopmdm_kernels.types import Head

LENGTH, HIDDEN, VOCAB = 1024, REAL.hidden, REAL.vocab_size


def gpu_calls(run: Run, num_rows: int) -> Calls:
    hidden, head = run.head(1, max(num_rows, 2))
    rows, names = torch.arange(num_rows, device=run.device), run.names(num_rows)
    fused = {}
    if find_spec("flashinfer") is not None:
        fused["FlashInfer"] = partial(run.compiled(peers.flashinfer_rows), hidden, head, rows)
    return {
        "ours": partial(lk.sample_rows, hidden, head, rows, names),
        **fused,
        "compiled, float64 race": partial(run.compiled(peers.sample_rows), hidden, head, rows),
        "compiled, fp32 noise": partial(run.compiled(peers.gumbel_rows), hidden, head, rows),
    }


def fp8_calls(run: Run, batch: int, length: int) -> Calls:
    """With weights in e4m3, beside the same in bf16."""
    hidden, head = run.head(batch, length)
    num_rows = min(64, batch * length)
    rows, names = torch.arange(num_rows, device=run.device), run.names(num_rows)
    return {
        "ours": partial(lk.sample_rows, hidden, head_in_fp8(head), rows, names, compute_dtype=BF16),
        "bf16 weights": partial(lk.sample_rows, hidden, head, rows, names),
    }


NUM_ROWS = pytest.mark.parametrize("num_rows", [1, 16, 256], ids=["R1", "R16", "R256"])


@NUM_ROWS
def test_sample_rows(compare, num_rows):
    """Tokens with the statistics of their rows, beside tokens alone of the reference model's draw."""
    beside_peers(compare, num_rows)


@NUM_ROWS
def test_sample_tokens(compare, num_rows):
    """Tokens alone on both sides; ours reads the weight as bytes."""
    beside_peers(compare, num_rows, statistics=False)


def beside_peers(compare, num_rows, *, statistics=True):
    hidden, exact = head_inputs(1, LENGTH, HIDDEN, VOCAB, excluded_token=VOCAB - 1)
    hidden = hidden.float()
    rows = torch.arange(num_rows) * (LENGTH // num_rows)
    rng = row_rng(num_rows)
    heads = {name: Head(*(t.to(dtype) for t in exact[:4]), VOCAB - 1) for name, dtype in DTYPES.items()}

    def ours(name):
        return partial(lk.sample_rows, hidden, heads[name], rows, rng, statistics=statistics)

    variants = {}
    for name, head in heads.items():
        variants[f"eager {name}"] = partial(peers.sample_rows, hidden, head, rows)
        variants[f"compiled {name}"] = partial(peers.compiled(peers.sample_rows), hidden, head, rows)
    native = native_dtype()
    if native == torch.float32:
        variants[WITH_BF16_PARAMETERS] = ours("bf16")
    with torch.no_grad():
        compare(
            ours(NAMES[native]),
            variants,
            flops=2.0 * num_rows * HIDDEN * VOCAB,
            dtype=native,
            bytes_read=(native.itemsize if statistics else 1) * VOCAB * HIDDEN,
        )
