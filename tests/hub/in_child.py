"""Run in Triton's interpreter: in_child.py (ops | benchmarks | kernelize) FOLDER."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import torch

import loopmdm_kernels as lk
import loopmdm_kernels.types
from loopmdm_kernels.testing import head_inputs, looped_inputs, row_rng

torch.set_num_threads(1)
L, D, H, V = 5, 64, 2, 41


def load(path: Path, name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def results(ops: types.ModuleType, tuples: types.ModuleType) -> list[torch.Tensor]:
    """Values and gradients of all ops, as a module that has them computes them."""
    case = looped_inputs(2, L, D, H, 2)
    x, modulation = case.x.float().requires_grad_(), case.modulation.float().requires_grad_()
    blocks = [tuples.BlockWeights(*(w.float().requires_grad_() for w in block)) for block in case.blocks]
    out = ops.looped_blocks(x, blocks, modulation, 2, num_heads=H)
    leaves = [x, modulation, *blocks[0]]
    found = [out, *torch.autograd.grad(out.square().sum(), leaves)]
    hidden, head = head_inputs(2, L, D, V)
    hidden = hidden.float().requires_grad_()
    head = tuples.Head(*(t.float().detach().requires_grad_() for t in head[:4]), head.excluded_token)
    rows = torch.tensor([0, 3, 7])
    total, nll = ops.masked_cross_entropy(hidden, head, torch.ones(2, L, dtype=torch.int64), rows)
    found += [total, nll, *torch.autograd.grad(total, [hidden, *head[:4]])]
    logits = ops.head_logits(hidden, head)
    found += [logits, *torch.autograd.grad(logits.square().sum(), [hidden, head.weight])]
    with torch.no_grad():
        found += ops.sample_rows(hidden, head, rows, tuples.RowRng(*row_rng(len(rows))))
    q, k, v = torch.randn(3, 2, H, L, 16, generator=torch.Generator().manual_seed(0)).unbind()
    return [*found, ops.attention(q, k, v)]


def same_bits(folder: Path) -> None:
    kernel = load(folder / "build/torch-cuda/__init__.py", "another_name")
    with lk.use_backend("triton"):
        ours = results(lk, loopmdm_kernels.types)
    theirs = results(kernel, kernel)
    assert len(ours) == len(theirs) == 28
    assert all(map(torch.equal, ours, theirs))
    assert kernel.looped_blocks.__module__ == "another_name.ops.looped_blocks"
    assert sys.modules["another_name.ops.library"].NAMESPACE.startswith("_loopmdm_triton_cuda_")
    try:
        kernel.attention(*torch.randn(3, 1, 1, 2, 1024).unbind())
    except RuntimeError as error:
        assert "head size" in str(error), error
    else:
        raise AssertionError("a head of 1024 was not refused")
    compiled = torch.compile(kernel.masked_cross_entropy, backend="eager", fullgraph=True)
    hidden, head = head_inputs(1, L, D, V)
    inputs = hidden.float(), kernel.Head(*(t.float() for t in head[:4]), head.excluded_token)
    more = torch.ones(1, L, dtype=torch.int64), torch.tensor([2])
    assert torch.equal(compiled(*inputs, *more)[1], kernel.masked_cross_entropy(*inputs, *more)[1])


def benchmarks(folder: Path) -> None:
    """Each at small sizes: what it times is what it verifies."""
    if importlib.util.find_spec("kernels") is None:
        sys.modules["kernels"] = types.ModuleType("kernels")
        sys.modules["kernels.benchmark"] = stand_in = types.ModuleType("kernels.benchmark")
        stand_in.Benchmark = type("Benchmark", (), {"device": "cpu"})
    module = load(folder / "benchmarks/benchmark.py", "benchmark")
    module.LENGTH, module.HIDDEN, module.HEADS, module.VOCABULARY, module.LOOPS = 6, 64, 2, 97, 2
    kinds = [
        kind for name, kind in vars(module).items() if name.endswith("Benchmark") and name != "Benchmark"
    ]
    assert len(kinds) == 2
    kernel = load(folder / "build/torch-cuda/__init__.py", "another_name")
    for kind in kinds:
        torch.manual_seed(kind.seed)
        benchmark = kind()
        benchmark.device = "cpu"
        benchmark.kernel = kernel
        benchmark.setup()
        benchmark.benchmark_base()
        assert torch.allclose(benchmark.out, benchmark.verify_base(), atol=1e-2), kind


def kernelize(folder: Path) -> None:
    """A model whose blocks and head are replaced through the `kernels` package, with gradients."""
    import kernels

    from loopmdm import LoopMDM, LoopMDMConfig
    from loopmdm.model.modules import DDiTBlock, OutputLayer

    config = LoopMDMConfig(
        vocab_size=V, mask_token_id=V - 1, hidden_size=D, num_heads=H, num_layers=3, dropout=0.0
    )
    torch.manual_seed(0)
    model = LoopMDM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens = torch.arange(2 * L).reshape(2, L) % (V - 1)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        loss = model.loss(tokens, num_loops=2, seed=0).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    with lk.use_backend("reference"):
        before = step()
    variant, mapping = folder / "build/torch-cuda", {}
    for layer in (DDiTBlock, OutputLayer):
        kernels.replace_kernel_forward_from_hub(layer, layer.__name__)
        repository = kernels.LocalLayerRepository(variant, layer_name=layer.__name__)
        mapping[layer.__name__] = {"cpu": repository}
    with kernels.use_kernel_mapping(mapping):
        mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
        kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
    block = next(module for module in model.modules() if isinstance(module, DDiTBlock))
    assert block.forward.__func__.__module__.startswith("_loopmdm_triton_cuda_")
    kernel = kernels.get_local_kernel(variant)
    calls = []
    kernel.layers.looped_blocks, original = (
        lambda *a, **o: calls.append(1) or original(*a, **o),
        (kernel.layers.looped_blocks),
    )
    after = step()
    assert len(calls) >= 3 and len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    {"ops": same_bits, "benchmarks": benchmarks, "kernelize": kernelize}[sys.argv[1]](Path(sys.argv[2]))
