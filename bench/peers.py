"""What users have today: the same arithmetic in plain PyTorch, eager and compiled.

The blocks are those of the reference. Its vocabulary head computes in fp32, for accuracy; here it computes
in the weights' dtype, as the reference model does under autocast and as is fastest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loopmdm_kernels as lk
from loopmdm_kernels.calls import LoopedCall
from loopmdm_kernels.reference.looped_blocks import Dropout, norm_modulate
from loopmdm_kernels.types import Head

Functions = Mapping[str, Callable[..., Any]]
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]
_LOOPED_BLOCKS = import_module("loopmdm_kernels.reference.looped_blocks")


def row_logits(hidden: Tensor, head: Head, rows: Tensor | None, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits [R, V] of some rows, or of all, in `dtype`; one modulation for all rows."""
    shift, scale = head.modulation[0].to(dtype)
    flat = hidden.flatten(0, 1)
    h = norm_modulate(flat if rows is None else flat[rows], head.norm, shift, scale).to(dtype)
    return F.linear(h, head.weight.to(dtype), bias.to(dtype))


def possible(head: Head) -> Tensor:
    """The bias, with -inf at the excluded token: costs no pass over the logits."""
    token = torch.tensor([head.excluded_token], device=head.bias.device)
    return head.bias.index_fill(0, token, float("-inf"))


def looped_blocks(*args: Any, **kwargs: Any) -> Any:
    """The arithmetic alone, without the checks of the public op."""
    call = LoopedCall(*args, **kwargs)
    out, used = _LOOPED_BLOCKS.run(call)
    return out if call.exit_threshold is None else (out, used)


def head_logits(hidden: Tensor, head: Head, *, compute_dtype: torch.dtype | None = None) -> Tensor:
    logits = row_logits(hidden, head, None, head.bias, compute_dtype or head.weight.dtype)
    return logits.view(*hidden.shape[:2], -1)


def masked_cross_entropy(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    rows: Tensor,
    row_weights: Tensor,
    *,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    logits = row_logits(hidden, head, rows, possible(head), compute_dtype or head.weight.dtype)
    nll = F.cross_entropy(logits.float(), targets.flatten()[rows], reduction="none")
    return (nll * row_weights).sum(), nll


def sample_rows(hidden: Tensor, head: Head, rows: Tensor) -> Tensor:
    """MDLM's draw: softmax, then the argmax of p over exponential noise, in float64."""
    logits = row_logits(hidden, head, rows, possible(head), head.weight.dtype)
    probs = torch.softmax(logits.float(), -1).double()
    noise = 1e-10 - (torch.rand_like(probs) + 1e-10).log()
    return (probs / noise).argmax(-1)


def gumbel_rows(hidden: Tensor, head: Head, rows: Tensor) -> Tensor:
    """fp32 noise on logits in memory, as serving libraries sample."""
    logits = row_logits(hidden, head, rows, possible(head), head.weight.dtype).float()
    return (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)


def flashinfer_rows(hidden: Tensor, head: Head, rows: Tensor) -> Tensor:
    """FlashInfer's kernel that draws from logits in memory."""
    from flashinfer.sampling import sampling_from_logits

    logits = row_logits(hidden, head, rows, possible(head), head.weight.dtype).float()
    drawn: Tensor = sampling_from_logits(logits)
    return drawn


def linear_losses(
    hidden: Tensor, head: Head, targets: Tensor, rows: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """torch's linear_cross_entropy on these rows, without the norm: plain, and in chunks by each policy.

    Empty where torch has no such function.
    """
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        return {}
    wanted = targets.flatten()[rows]

    def loss(options: Any) -> Tensor:
        narrow = hidden.flatten(0, 1)[rows].to(head.weight.dtype)
        out: Tensor = function(
            narrow, head.weight, wanted, linear_bias=head.bias, reduction="sum", options=options
        )
        return out

    choices = {"plain": None}
    for policy in ("auto", "accurate", "balanced", "compact"):
        with suppress(AttributeError, ValueError):  # not every version has all
            choices[policy] = torch.nn.LinearCrossEntropyOptions(acc_policy=policy)
    return {f"linear_cross_entropy, {name}": partial(loss, options) for name, options in choices.items()}


def liger_loss(hidden: Tensor, head: Head, targets: Tensor) -> Callable[[], Tensor] | None:
    """Liger's fused linear cross-entropy on all rows, without the norm; None where it is not installed."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss = LigerFusedLinearCrossEntropyLoss()
    narrow = hidden.flatten(0, 1).to(head.weight.dtype)
    return lambda: loss(head.weight, narrow, targets.flatten(), head.bias)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def compilers() -> dict[str, Compile]:
    """Ways to compile a function: torch's own, or in its place zentorch's, AMD's, where that is installed.

    Importing zentorch adds its passes to torch's own compiler, which is not what it was then. The pass that
    fuses two operations with a product is left out: of `x + gate * linear(h)` it asks for an argument that is
    not there and ends in an IndexError (2.13.0.2, 2.14.0.1).
    """
    if find_spec("zentorch") is None:
        return {"compiled": compiled}
    import_module("zentorch")  # registers itself
    import_module("zentorch._optimize").zentorch_binary_binary_post_op_fusions = lambda graph: graph
    return {"zentorch": partial(torch.compile, backend="zentorch", dynamic=False)}


def by_openvino(model: nn.Module, ids: Tensor, num_loops: int) -> dict[str, Callable[[], Any]]:
    """The logits of `model`, given in fp32, through OpenVINO's CPU plug-in, as one graph with all its loops.

    By the dtype of the products. Empty where OpenVINO is not installed.
    """
    if find_spec("openvino") is None:
        return {}
    openvino = import_module("openvino")

    class Unrolled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.model(ids, num_loops=num_loops)
            return logits

    with plain_ops(EAGER), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of tracing: shapes and numbers of loops are constants, as they should be
        graph = openvino.convert_model(Unrolled(), example_input=ids)

    def call(hint: str) -> Callable[[], Any]:
        options = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = openvino.compile_model(graph, "CPU", options).create_infer_request()
        return lambda: request.infer([ids.numpy()], share_inputs=True, share_outputs=True)

    return {f"OpenVINO {name}": call(hint) for name, hint in {"fp32": "f32", "bf16": "bf16"}.items()}


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return run


def _of_mask(function: Callable[..., Any]) -> Callable[..., Any]:
    """The loss with rows given as the model gives them, [B, L] True at some: they are looked up outside."""

    def run(*args: Any, compute_dtype: torch.dtype | None) -> Any:
        *given, mask, row_weights = args
        rows = mask.flatten().nonzero().squeeze(1)
        return function(*given, rows, row_weights.flatten()[rows], compute_dtype=compute_dtype)

    return _without_autocast(run)


EAGER: Functions = {
    "block": _LOOPED_BLOCKS.block,
    "looped_blocks": _without_autocast(looped_blocks),
    "head_logits": _without_autocast(head_logits),
    "masked_cross_entropy": _of_mask(masked_cross_entropy),
}


def compiled_head(compile_: Compile = compiled) -> Functions:
    """Everything but the blocks compiled."""
    return {
        **EAGER,
        "head_logits": _without_autocast(compile_(head_logits)),
        "masked_cross_entropy": _of_mask(compile_(masked_cross_entropy)),
    }


def compiled_pieces(compile_: Compile = compiled) -> Functions:
    """The blocks too: one block is one graph, however often it is applied."""
    fast_block = compile_(_LOOPED_BLOCKS.block)

    def one_block(x: Tensor, *args: Any, dropout: Dropout, **kwargs: Any) -> Tensor:
        # Without dropout the number of the application is not used, and must not be compiled in.
        return fast_block(x, *args, dropout=dropout._replace(application=0), **kwargs)

    return {**compiled_head(compile_), "block": one_block}


@contextmanager
def plain_ops(functions: Functions) -> Iterator[None]:
    """Inside, a model computes with these functions instead of the ops."""
    ops = dict(functions)
    block = ops.pop("block")
    with mock.patch.object(_LOOPED_BLOCKS, "block", block), mock.patch.multiple(lk, **ops):
        yield
