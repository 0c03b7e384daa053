"""One of two processes of test_parallel.py: python parallel_worker.py BACKEND; prints what it has checked.

Trains a small LoopMDM on its share of a batch, and with the CPU kernels the same model on the whole batch.
"""

from __future__ import annotations

import copy
import os
import re
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import loopmdm_kernels as lk
from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm.model.modules import DDiTBlock

LOOPS, WORLD = 2, 2


def loss_of(module: nn.Module, ids: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return module(ids, labels=ids, num_loops=LOOPS).loss


def new_model(recompute: bool = False) -> LoopMDM:
    config = LoopMDMConfig(
        vocab_size=20,
        mask_token_id=19,
        hidden_size=16,
        num_heads=2,
        num_layers=3,
        cond_dim=8,
        max_length=5,
        loop_start=1,
        loop_end=3,
        mlp_ratio=2,
        dropout=0.0,
    )
    torch.manual_seed(0)
    model = LoopMDM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.recompute = recompute
    return model


def share(step: int, rank: int) -> tuple[Tensor, int]:
    """The sequences of a rank, and its seed."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(19, (2, 5), generator=generator), 100 * step + rank


def train(step_loss: Callable[[int], Tensor], module: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    for step in range(steps):
        optimizer.zero_grad()
        step_loss(step).backward()
        optimizer.step()


def alone(steps: int) -> dict[str, Tensor]:
    """The weights after training on the whole batch in this process."""
    model = new_model()

    def loss(step: int) -> Tensor:
        return torch.stack([loss_of(model, *share(step, rank)) for rank in range(WORLD)]).mean()

    with lk.use_backend("cpu"):
        train(loss, model, steps)
    return {name: value.detach() for name, value in model.named_parameters()}


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def together(case: str, module: nn.Module, model: LoopMDM, steps: int) -> None:
    """Trains on the share of this process and compares."""
    rank, start = dist.get_rank(), dict(new_model().named_parameters())
    train(lambda step: loss_of(module, *share(step, rank)), module, steps)
    moved = 0
    for name, expected in alone(steps).items():
        got = whole(model.get_parameter(name).detach())
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=f"{case}: {name}")
        moved += not torch.equal(got, start[name])
    assert moved > 20, f"{case}: {moved} parameters moved"
    print(case, flush=True)


def ddp(steps: int, *, recompute: bool, static_graph: bool) -> None:
    model = new_model(recompute)
    module = DistributedDataParallel(model, static_graph=static_graph)
    together(f"ddp recompute={recompute} static_graph={static_graph}", module, model, steps)


def fsdp(steps: int, *, each_block: bool, hooked: bool = False) -> None:
    model = new_model(recompute=True)
    if hooked:  # this block is called, the others of its stage stay with the op
        model.blocks[1].attn_qkv.register_forward_hook(lambda *_: None)
    if each_block:
        for block in model.blocks:
            fully_shard(block)
    module = fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    together(f"fsdp each_block={each_block}" + (" hooked" if hooked else ""), module, model, steps)


def fsdp_mixed(*, each_block: bool) -> None:
    """bf16 parameters in the passes; gradients are summed over the ranks, and kept, in fp32."""
    model, rank = new_model(), dist.get_rank()
    plain = new_model()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if each_block:
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
    module = fully_shard(model, mp_policy=policy)
    loss_of(module, *share(0, rank)).backward()
    expected = {}
    for other in range(WORLD):
        narrow = copy.deepcopy(plain)
        for parameter in narrow.parameters():
            parameter.data = parameter.data.bfloat16()
        loss_of(narrow, *share(0, other)).backward()
        for name, parameter in narrow.named_parameters():
            if parameter.grad is not None:
                expected[name] = expected.get(name, 0.0) + parameter.grad.float() / WORLD
    for name, parameter in model.named_parameters():
        if name in expected:
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32
            torch.testing.assert_close(whole(parameter.grad), expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert len(expected) > 20
    print(f"fsdp in bf16 each_block={each_block}", flush=True)


def fsdp1(steps: int, *, each_block: bool, recompute: bool = False) -> None:
    """Blocks that are wrapped are called, once for each loop."""
    module = FullyShardedDataParallel(
        new_model(recompute),
        auto_wrap_policy=ModuleWrapPolicy({DDiTBlock}) if each_block else None,
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )
    rank = dist.get_rank()
    train(lambda step: loss_of(module, *share(step, rank)), module, steps)
    with FullyShardedDataParallel.summon_full_params(module):
        for name, expected in alone(steps).items():
            wrapped = re.sub(r"^(blocks\.\d+)", r"\1._fsdp_wrapped_module", name) if each_block else name
            got = module.module.get_parameter(wrapped).detach()
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=name)
    print(f"fsdp1 each_block={each_block} recompute={recompute}", flush=True)


def refused() -> None:
    """What would give wrong gradients or read a part of a weight ends in one line."""
    ids, _ = share(0, dist.get_rank())

    def message(error: type[Exception], call: Callable[[], object]) -> str:
        try:
            call()
        except error as raised:
            return str(raised).split(";")[0]
        raise AssertionError(f"expected {error.__name__}")

    averaged = DistributedDataParallel(new_model())
    with averaged.no_sync():
        averaged.module.loss(ids, num_loops=1).loss.backward()
    with torch.no_grad():
        averaged.module.loss(ids)
    averaged(ids, labels=ids).loss.backward()
    assert "would not be averaged" in message(RuntimeError, lambda: averaged.module.loss(ids))
    sharded = fully_shard(new_model())
    assert "split over the ranks" in message(ValueError, lambda: sharded.loss(ids))
    register_fsdp_forward_method(sharded, "loss")
    sharded.loss(ids).loss.backward()
    split = new_model()
    for block in split.blocks:
        styles = {"mlp.0": ColwiseParallel(), "mlp.2": RowwiseParallel()}
        parallelize_module(block, init_device_mesh("cpu", (WORLD,)), styles)
    assert "split over the ranks" in message(ValueError, lambda: split(ids, labels=ids))
    print("refused", flush=True)


def main(backend: str) -> None:
    dist.init_process_group("gloo")
    with lk.use_backend(backend):
        if backend == "triton":
            from triton.runtime import interpreter

            from tests.triton.interpreted import PatchOnce

            interpreter._patch_lang = PatchOnce(interpreter._patch_lang)
            ddp(1, recompute=True, static_graph=True)
            fsdp(1, each_block=True)
        else:
            for recompute in (False, True):
                ddp(2, recompute=recompute, static_graph=recompute)
                fsdp(2, each_block=recompute)
                fsdp(2, each_block=recompute, hooked=True)
                fsdp_mixed(each_block=recompute)
                fsdp1(2, each_block=True, recompute=recompute)
            fsdp1(2, each_block=False)
            refused()
    dist.barrier()
    # Not by the interpreter's shutdown: a thread of gloo may then be freeing the tensors of its last work.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
