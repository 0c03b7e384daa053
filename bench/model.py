"""The whole model beside plain PyTorch: a forward pass, a training step, and on a GPU a Sudoku.

In the dtype of the processor's fastest product. Compiled block by block; training also as one graph, which
takes a minute to compile. On a forward pass over 1024 tokens that saves nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

import loopmdm_kernels as lk
from bench.compare import WITH_BF16_PARAMETERS
from bench.peers import EAGER, by_openvino, compiled, compiled_head, compiled_pieces, compilers, plain_ops
from bench.roofline import NAMES, native_dtype
from bench.run import Call, Figures, Run
from loopmdm.model import LoopMDM
from loopmdm.model.config import LoopMDMConfig
from loopmdm.model.flops import TRAINING_FACTOR, executed_layers, forward_flops, head_flops, layer_flops
from loopmdm_kernels.cuda import looped_rows

SUDOKU_LOOPS = 12


def token_ids(batch, length, config):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.mask_token_id, (batch, length), generator=generator)


def plainly(call, functions):
    def run():
        with plain_ops(functions):
            return call()

    return run


def plain_variants(call, name):
    ways = {way: compiled_pieces(compile_) for way, compile_ in compilers().items()}
    return {f"{way} {name}": plainly(call, functions) for way, functions in {"eager": EAGER, **ways}.items()}


def test_model(compare, length=1024, vocab_size=50258, num_loops=12):
    config = LoopMDMConfig.preset(
        "small", vocab_size=vocab_size, mask_token_id=vocab_size - 1, dropout=0.0, gate_init=1.0
    )
    torch.manual_seed(0)
    exact = LoopMDM(config).eval()
    rounded = copy.deepcopy(exact).bfloat16()
    ids = token_ids(1, length, config)

    def forward(model):
        return lambda: model(ids, num_loops=num_loops)

    variants = plain_variants(forward(exact), "fp32") | plain_variants(forward(rounded), "bf16")
    variants |= by_openvino(exact, ids, num_loops)
    native = native_dtype()
    if native == torch.float32:
        variants[WITH_BF16_PARAMETERS] = forward(rounded)
    with torch.no_grad():
        compare(
            forward(rounded if native == torch.bfloat16 else exact),
            variants,
            flops=forward_flops(config, length, num_loops),
            dtype=native,
        )


def trained_config(length, num_loops):
    return LoopMDMConfig(
        vocab_size=8192,
        mask_token_id=8191,
        hidden_size=384,
        num_heads=6,
        num_layers=12,
        max_length=length,
        max_loops=num_loops,
        dropout=0.0,
        gate_init=1.0,
    )


def training_step(model, loss, autocast):
    """A call that makes one step; loss(model) is a scalar."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = loss(model)
        value.backward()
        optimizer.step()
        # The fused optimizer does not, and what is kept of a parameter goes by its version.
        torch.autograd.graph.increment_version(model.parameters())
        optimizer.zero_grad()

    return run


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at it
def test_training_step(compare, batch=4, length=512, num_loops=6):
    config = trained_config(length, num_loops)
    torch.manual_seed(0)
    initial = LoopMDM(config)
    ids = token_ids(batch, length, config)

    def loss(model):
        return model.loss(ids, num_loops=num_loops, seed=0).loss

    def step(autocast, whole_graph=False):
        model = copy.deepcopy(initial)
        if whole_graph:  # the loss itself draws masks, reads values and does not trace
            model.hidden = compiled(model.hidden)
        return training_step(model, loss, autocast)

    with mock.patch.object(lk, "masked_cross_entropy", wraps=lk.masked_cross_entropy) as spy:
        loss(initial)
    num_rows = int(spy.call_args.args[3].sum())
    blocks = batch * length * executed_layers(config, num_loops) * layer_flops(config, length)
    peers = plain_variants(step(autocast=False), "fp32") | plain_variants(step(autocast=True), "bf16")
    native = native_dtype()
    narrow = native == torch.bfloat16
    whole = step(autocast=narrow, whole_graph=True)
    peers[f"compiled whole {NAMES[native]}"] = plainly(whole, compiled_head())
    compare(
        step(autocast=narrow),
        peers,
        flops=TRAINING_FACTOR * (blocks + num_rows * head_flops(config)),
        dtype=native,
        rows=num_rows,
    )


def sudoku_call(model: LoopMDM, board: Tensor, *, blocks: str, logits: str) -> Call:
    """Embedding, head, loop, tail and logits, with a backend for the blocks and one for the logits."""

    def call() -> Tensor:
        with lk.use_backend(blocks):
            hidden = model.hidden(board, num_loops=SUDOKU_LOOPS)
        with lk.use_backend(logits):
            out: Tensor = lk.head_logits(hidden, model.head(), compute_dtype=model.compute_dtype)
        return out

    return call


def by_tiles(make: Callable[[], Call]) -> Call:
    """What `make` makes if narrow blocks run the kernel of all others."""
    known = looped_rows.plan_of
    looped_rows.plan_of = lambda *_: None
    looped_rows.kernel_on.cache_clear()
    try:
        return make()
    finally:
        looped_rows.plan_of = known
        looped_rows.kernel_on.cache_clear()


def sudoku_on_gpu(run: Run) -> Figures:
    """A call of the 9x9 model, the smallest network that is shipped, where waiting is all.

    Ours in a CUDA graph, by rows and by tiles, and the reference in eager mode. Weights are random: the
    time does not depend on them.
    """
    torch.manual_seed(0)
    model = LoopMDM(LoopMDMConfig.preset("sudoku")).to(run.device).eval()
    board = torch.randint(0, model.config.vocab_size, (1, model.config.max_length), device=run.device)
    blocks, logits = ("reference", "reference") if run.dry else ("cuda", "triton")
    ours = partial(run.captured, sudoku_call(model, board, blocks=blocks, logits=logits))
    # Weights do not change between calls of a sampler, and what was cast in a graph is gone after it.
    casts = torch.autocast(board.device.type, torch.bfloat16, cache_enabled=False)
    with torch.no_grad(), casts, model.frozen():
        calls, failed = run.made({"cuda": ours, "cuda by tiles": partial(by_tiles, ours)})
        eager = sudoku_call(model, board, blocks="reference", logits="reference")
        return {**failed, **run.times({"reference, eager": eager, **calls})}
