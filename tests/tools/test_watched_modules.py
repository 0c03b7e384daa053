"""Modules that are hooked, wrapped or replaced are honoured: against the reference model changed alike."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm
from torch.utils.flop_counter import FlopCounterMode

import loopmdm_kernels as lk
from loopmdm import ComputePlan, LoopMDM, LoopMDMConfig, patch, sample
from loopmdm.causal import CausalConfig, CausalLM
from loopmdm.exits import HiddenChange
from loopmdm.mdlm import DIT
from loopmdm.sampling.graphs import check_graphs
from tests.mdlm.reference_dit import HubBackbone, ReferenceDIT, randomise, reference_config

VOCAB, LOOPS = 13, 3
ORDER = [0, 1, 2, 1, 2, 1, 2, 3, 4]
SAID = "called one by one"

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{SAID}:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]
IDS = torch.randint(VOCAB - 1, (3, 11), generator=torch.Generator().manual_seed(5))
SIGMA = torch.tensor([0.02, 0.7, 4.0], dtype=torch.float64)
# Every module that the reference calls inside a looped block and the head.
INSIDE = ["norm1", "attn_qkv", "attn_out", "norm2", "mlp", "mlp.0", "mlp.1", "mlp.2", "adaLN_modulation"]
PATHS = [
    "vocab_embed",
    "sigma_map.mlp.0",
    "blocks.1",
    *(f"blocks.1.{name}" for name in INSIDE),
    "output_layer",
    *(f"output_layer.{name}" for name in ("norm_final", "linear", "adaLN_modulation")),
]


def of_ours() -> tuple[Any, Any]:
    """A model in float64, and the reference with its weights."""
    oracle = ReferenceDIT(reference_config(), VOCAB).double().eval()
    randomise(oracle)
    oracle.order = ORDER
    model = DIT(reference_config(num_loops=LOOPS), VOCAB).double().eval()
    model.load_state_dict(oracle.state_dict())
    return model, oracle


def of_patched() -> tuple[Any, Any]:
    module = ReferenceDIT(reference_config(), VOCAB).double().eval()
    randomise(module)
    oracle = copy.deepcopy(module)
    oracle.order = ORDER
    return patch(module, LOOPS), oracle


def assert_alike(model: nn.Module, oracle: nn.Module) -> Tensor:
    """Logits and the gradients of what both train."""
    out, expected = model(IDS, SIGMA), oracle(IDS, SIGMA)
    torch.testing.assert_close(out, expected)
    pairs = dict(model.named_parameters())
    assert list(pairs) == [name for name, _ in oracle.named_parameters()]
    trained = [name for name, parameter in pairs.items() if parameter.requires_grad]
    wanted = dict(oracle.named_parameters())
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((out * weights).sum(), [pairs[n] for n in trained], allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), [wanted[n] for n in trained], allow_unused=True)
    for name, got, right in zip(trained, ours, theirs, strict=True):
        torch.testing.assert_close(got, right, msg=lambda text, name=name: f"{name}: {text}")
    return expected.detach()


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def replaced(net: Any) -> None:
    old = net.blocks[1].attn_qkv
    new = Doubled(old.in_features, old.out_features, bias=False).double()
    new.load_state_dict(old.state_dict())
    net.blocks[1].attn_qkv = new


def with_bias(net: Any) -> None:
    torch.manual_seed(2)
    for name in ("attn_qkv", "attn_out"):
        linear = getattr(net.blocks[2], name)
        linear.bias = nn.Parameter(torch.randn(linear.out_features, dtype=torch.float64))


def without_bias(net: Any) -> None:
    net.blocks[1].mlp[0].bias = None


def relu(net: Any) -> None:
    net.blocks[1].mlp[1] = nn.ReLU()


def exact_gelu(net: Any) -> None:
    net.blocks[1].mlp[1].approximate = "none"


def longer_mlp(net: Any) -> None:
    net.blocks[2].mlp.append(nn.Tanh())


def rms_norm(net: Any) -> None:
    net.blocks[1].norm2 = nn.RMSNorm(16, eps=1e-5).double()


def own_forward(net: Any) -> None:
    linear = net.blocks[1].mlp[2]
    linear.forward = lambda x: 0.5 * F.linear(x, linear.weight, linear.bias)


def pruned(net: Any) -> None:
    torch.manual_seed(3)
    for linear in (net.blocks[1].attn_qkv, net.blocks[2].mlp[2], net.output_layer.linear):
        prune.random_unstructured(linear, "weight", amount=0.5)


def weight_normed(net: Any) -> None:
    torch.nn.utils.weight_norm(net.blocks[1].attn_out)
    torch.nn.utils.weight_norm(net.output_layer.linear)
    with torch.no_grad():
        net.blocks[1].attn_out.weight_g.mul_(1.5)
        net.output_layer.linear.weight_g.mul_(1.5)


def spectrally_normed(net: Any) -> None:
    torch.manual_seed(4)
    spectral_norm(net.blocks[1].mlp[0])


def parametrized(net: Any) -> None:
    class Squared(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.square()

    parametrize.register_parametrization(net.blocks[1].attn_qkv, "weight", Squared())
    parametrizations.weight_norm(net.blocks[1].mlp[0])


def adapted(net: Any, **options: Any) -> None:
    torch.manual_seed(6)
    targets = ["attn_qkv", "attn_out", "mlp.0", "mlp.2", "adaLN_modulation", "output_layer.linear"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)
    peft.inject_adapter_in_model(config, net)
    net.double()


CHANGES = [
    replaced,
    with_bias,
    without_bias,
    relu,
    exact_gelu,
    longer_mlp,
    rms_norm,
    own_forward,
    pruned,
    weight_normed,
    spectrally_normed,
    parametrized,
    adapted,
]


@pytest.mark.parametrize("make", [of_ours, of_patched])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module_counts(make: Callable[[], tuple[Any, Any]], change: Callable[[Any], None]) -> None:
    model, oracle = make()
    plain = oracle(IDS, SIGMA)
    change(model), change(oracle)
    changed = assert_alike(model, oracle)
    assert (changed - plain).abs().max() > 1e-5


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_changed_before_patch_counts(change: Callable[[Any], None]) -> None:
    if change is rms_norm:
        pytest.skip("another norm is another model, not a changed one")
    module = ReferenceDIT(reference_config(), VOCAB).double().eval()
    randomise(module)
    oracle = copy.deepcopy(module)
    oracle.order = ORDER
    change(module), change(oracle)
    assert_alike(patch(module, LOOPS), oracle)


@pytest.mark.parametrize("path", PATHS)
def test_forward_hooks(path: str) -> None:
    model, oracle = of_ours()
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for number, net in enumerate((model, oracle)):
        module = net.get_submodule(path)
        module.register_forward_pre_hook(lambda _, args, n=number: seen[n].append(args[0].double()))
        module.register_forward_hook(lambda _, args, out: 1.5 * out)
    plain = of_ours()[1](IDS, SIGMA)
    changed = assert_alike(model, oracle)
    assert (changed - plain).abs().max() > 1e-5
    if path.startswith("sigma_map"):
        seen[0] = seen[0][1:]  # blocks and head ask for the condition, each
    assert len(seen[0]) == len(seen[1]) == (LOOPS if path.startswith("blocks") else 1)
    for ours, theirs in zip(seen[0], seen[1], strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("path", [f"blocks.1.{name}" for name in INSIDE])
def test_forward_hooks_of_a_patched_module(path: str) -> None:
    model, oracle = of_patched()
    fired: list[Any] = []
    for net in (model, oracle):
        net.get_submodule(path).register_forward_hook(lambda *a, net=net: fired.append(net) or 1.5 * a[2])
    assert_alike(model, oracle)
    assert fired.count(model) == fired.count(oracle) == LOOPS


def test_hooks_on_blocks_of_a_patched_module() -> None:
    model, oracle = of_patched()
    for net in (model, oracle):
        for index in (0, 3, 4):
            net.blocks[index].register_forward_hook(lambda *a: 1.5 * a[2])
    assert_alike(model, oracle)
    handle = model.blocks[2].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"blocks\.2 has forward hooks.*once for all its loops"):
        model(IDS, SIGMA)
    model.num_loops, oracle.order = 1, [0, 1, 2, 3, 4]
    assert_alike(model, oracle)
    handle.remove()
    model.num_loops, oracle.order = LOOPS, ORDER
    assert_alike(model, oracle)


@pytest.mark.parametrize("path", ["blocks.1", "blocks.1.attn_qkv", "blocks.1.norm1", "output_layer.linear"])
def test_backward_hooks(path: str) -> None:
    model, oracle = of_ours()
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    for number, net in enumerate((model, oracle)):
        module = net.get_submodule(path)
        module.register_full_backward_pre_hook(lambda _, grads, n=number: seen[n].append(grads[0]))
        module.register_full_backward_hook(
            lambda _, into, out: tuple(g if g is None else 2 * g for g in into)
        )
    assert_alike(model, oracle)
    assert len(seen[0]) == len(seen[1]) == (LOOPS if path.startswith("blocks") else 1)
    for ours, theirs in zip(seen[0], seen[1], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_global_hooks() -> None:
    model, oracle = of_ours()
    names: list[str] = []
    hook = nn_module.register_module_forward_hook(lambda module, *_: names.append(type(module).__name__))
    try:
        model(IDS, SIGMA)
        ours = sorted(names)
        names.clear()
        oracle(IDS, SIGMA)
    finally:
        hook.remove()
    for asked_twice in ("SigmaEmbedding", "Sequential", "Linear", "SiLU", "Linear"):
        ours.remove(asked_twice)  # as above
    renamed = {
        "DIT": "ReferenceDIT",
        "TokenEmbedding": "EmbeddingLayer",
        "SigmaEmbedding": "TimestepEmbedder",
        "RotaryEmbedding": "Rotary",
        "ScaleNorm": "LayerNorm",
        "OutputLayer": "FinalLayer",
    }
    assert sorted(renamed.get(name, name) for name in ours) == sorted(names)


def test_states_after_each_block() -> None:
    oracle = HubBackbone(reference_config(), VOCAB).double().eval()
    randomise(oracle)
    model = DIT(reference_config(num_loops=1), VOCAB).double().eval()
    model.load_state_dict(oracle.state_dict())
    relu(model), relu(oracle)
    expected, states = oracle(IDS, SIGMA, output_hidden_states=True)
    logits, ours = model.forward_with_states(IDS, SIGMA)
    torch.testing.assert_close((logits, ours), (expected, states))


def new_model(**changes: Any) -> LoopMDM:
    values = dict(vocab_size=29, mask_token_id=28, hidden_size=32, num_heads=2, num_layers=5, cond_dim=8)
    values |= dict(max_length=16, max_loops=4, dropout=0.0, gate_init=1.0)
    torch.manual_seed(0)
    model = LoopMDM(LoopMDMConfig(**{**values, **changes})).eval()
    randomise(model)
    return model


TOKENS = torch.randint(28, (4, 16), generator=torch.Generator().manual_seed(2))
NOISE = torch.rand(4, generator=torch.Generator().manual_seed(3))


def watch(module: nn.Module) -> list[Any]:
    return [part.register_forward_hook(lambda *_: None) for part in module.modules()]


def both(model: LoopMDM, call: Callable[[], Any], where: Callable[[LoopMDM], nn.Module]) -> tuple[Any, Any]:
    """call() by the ops, then with hooks that change nothing."""
    plain = call()
    handles = watch(where(model))
    with_hooks = call()
    for handle in handles:
        handle.remove()
    return plain, with_hooks


WHERE = {
    "all": lambda model: model,
    "one block": lambda model: model.blocks[1],
    "head": lambda m: m.output_layer,
}


@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
@pytest.mark.parametrize("changes", [{}, {"time_conditioning": True}, {"positions": "learned"}], ids=str)
@pytest.mark.parametrize("num_loops", [1, 3, torch.tensor([3, 1, 4, 2])], ids=["1", "3", "each"])
@pytest.mark.parametrize("padded", [False, True])
def test_hooks_that_change_nothing(where: Any, changes: Any, num_loops: Any, padded: bool) -> None:
    model = new_model(**changes)
    mask = torch.ones_like(TOKENS)
    mask[1, 9:] = 0
    options = {"num_loops": num_loops, "attention_mask": mask if padded else None}
    sigma = NOISE if model.config.time_conditioning else None
    plain, hooked = both(model, lambda: model(TOKENS, sigma, **options), where)
    torch.testing.assert_close(hooked, plain, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("where", WHERE.values(), ids=WHERE)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3}, {"time_conditioning": True}], ids=str)
def test_loss_and_gradients(where: Any, recompute: bool, changes: Any) -> None:
    """The same masks of dropout too."""
    model = new_model(**changes).train()
    model.recompute = recompute

    def call() -> tuple[Tensor, ...]:
        loss = model.loss(TOKENS, seed=7, num_loops=3).loss
        return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    plain, hooked = both(model, call, where)
    for ours, theirs in zip(hooked, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_precision(dtype: torch.dtype, autocast: bool) -> None:
    """As far from float64 as the ops are, within twice the error of plain PyTorch in that dtype."""
    model = new_model().to(dtype)
    exact = copy.deepcopy(model).double()(TOKENS, num_loops=3)

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(TOKENS, num_loops=3)

    with lk.use_backend("reference"):
        baseline = call()
    hooked = both(model, call, WHERE["all"])[1]
    assert hooked.dtype == baseline.dtype
    error, bound = ((out.double() - exact).abs().max() for out in (hooked, baseline))
    assert error <= 2 * bound + torch.finfo(hooked.dtype).eps * exact.abs().max()


@pytest.mark.parametrize("rule", [0.2, HiddenChange(0.2)], ids=["threshold", "rule"])
@pytest.mark.parametrize("changes", [{}, {"time_conditioning": True}], ids=str)
@torch.no_grad()
def test_exits(rule: Any, changes: Any) -> None:
    model = new_model(**changes)
    sigma = NOISE if changes else None

    def call() -> Any:
        if isinstance(rule, float):
            stages = model.stages(TOKENS, sigma)
            return stages.loop(stages.head(), 4, exit_threshold=rule)
        return model.hidden(TOKENS, sigma, num_loops=4, exit=rule)

    (plain, used), (hooked, hooked_used) = both(model, call, WHERE["all"])
    assert torch.equal(used, hooked_used)
    torch.testing.assert_close(hooked, plain, rtol=2e-5, atol=2e-5)


def lora(model: nn.Module, **options: Any) -> Any:
    targets = ["attn_qkv", "attn_out", "mlp.0", "mlp.2", "output_layer.linear"]
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **options))


def test_lora_trains_the_adapters_only() -> None:
    model = new_model().train()
    frozen = {name: value.clone() for name, value in model.named_parameters()}
    adapted = lora(model)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    losses = []
    for _ in range(30):
        loss = adapted(TOKENS, labels=TOKENS).loss if len(losses) % 2 else adapted.loss(TOKENS, seed=1).loss
        loss.backward()
        assert all(p.grad is not None for p in trained)
        losses.append(adapted.loss(TOKENS, seed=1, num_loops=2).loss.item())
        optimizer.step(), optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    for name, value in adapted.named_parameters():
        plain = name.replace("base_model.model.", "").replace(".base_layer", "")
        if plain in frozen:
            assert torch.equal(value, frozen[plain]), name


@pytest.mark.parametrize("order", ["ancestral", "confidence", "first_hitting", "left_to_right"])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 3}], ids=str)
def test_samples_are_of_the_adapted_model(order: str, options: dict[str, Any]) -> None:
    """Merged into the weights it is a plain model, which the kernels sample from."""
    model = lora(new_model(time_conditioning=True), init_lora_weights=False).eval()
    run: dict[str, Any] = {"num_samples": 4, "length": 12, "order": order, "seed": 3, "progress": False}
    # Where every position is masked the network predicts the same everywhere, and rounding rates them.
    run |= {"prompt": torch.tensor([4, 9, 1])} | ({} if order == "first_hitting" else {"steps": 6}) | options
    base = model.get_base_model()
    drawn = sample(base, **run).tokens
    with model.disable_adapter():
        assert not torch.equal(sample(base, **run).tokens, drawn)
    assert torch.equal(sample(model.merge_and_unload(), **run).tokens, drawn)


def test_modules_to_save() -> None:
    model = new_model()
    config = peft.LoraConfig(
        r=2, target_modules=["attn_qkv"], modules_to_save=["vocab_embed", "output_layer"]
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "modules_to_save" in name:
                value.mul_(1.5)
    exact = copy.deepcopy(adapted).merge_and_unload()
    torch.testing.assert_close(adapted(TOKENS, num_loops=2), exact(TOKENS, num_loops=2), rtol=2e-5, atol=2e-5)


def test_a_causal_model() -> None:
    model = CausalLM(CausalConfig(vocab_size=29, mask_token_id=28, hidden_size=32, num_heads=2, num_layers=2))
    randomise(model)
    plain = model.token_nll(TOKENS)
    model.linear.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model.token_nll(TOKENS), plain, rtol=2e-5, atol=2e-5)
    model.norm_final.register_forward_hook(lambda *args: 2 * args[2])
    expected = torch.log_softmax(
        F.linear(
            2 * model.norm_final.forward(model.hidden(TOKENS)), model.linear.weight, model.linear.bias
        ).index_fill(-1, torch.tensor([28]), -torch.inf),
        -1,
    )
    expected = -expected.gather(-1, TOKENS[..., None])[..., 0]
    torch.testing.assert_close(model.token_nll(TOKENS), expected, rtol=2e-5, atol=2e-5)


def is_quantized(module: nn.Module, name: str) -> bool:
    """Layers of widths that 16 divides."""
    return (
        isinstance(module, nn.Linear)
        and name.startswith(("blocks", "output_layer.linear"))
        and "adaLN" not in name
    )


def test_torchao_quantization() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, dequantized = new_model(), new_model()
    with torch.no_grad():
        plain = model(TOKENS, num_loops=2)
        quantize_(model, Int8WeightOnlyConfig(), is_quantized)
        for name, module in dequantized.named_modules():
            if is_quantized(module, name):
                module.weight.copy_(model.get_submodule(name).weight.dequantize())
        quantized = model(TOKENS, num_loops=2)
        torch.testing.assert_close(quantized, dequantized(TOKENS, num_loops=2), rtol=1e-4, atol=1e-4)
    assert (quantized - plain).abs().max() > 1e-3


def test_torchao_quantization_aware_training() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model = new_model().train()
    plain = model(TOKENS, num_loops=2)
    weights = IntxFakeQuantizeConfig(torch.int4, group_size=16)
    quantize_(model, QATConfig(weight_config=weights, step="prepare"), is_quantized)
    assert (model(TOKENS, num_loops=2) - plain).abs().max() > 1e-3
    model.loss(TOKENS, seed=1).loss.backward()
    assert all(block.attn_qkv.weight.grad.abs().sum() > 0 for block in model.blocks)


def in_4_bits(bnb: Any, linear: nn.Linear) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    kind = bnb.nn.Linear4bit(32, 128, compute_dtype=torch.float32, quant_type="nf4")
    return kind, lambda done: bnb.functional.dequantize_4bit(done.weight.data, done.weight.quant_state)


def in_8_bits(bnb: Any, linear: nn.Linear) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    kind = bnb.nn.Linear8bitLt(32, 128, has_fp16_weights=False)
    scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
    return kind, lambda _: (linear.weight.detach() / scale).round() * scale


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes.*")
@pytest.mark.parametrize("bits, tolerance", [(in_4_bits, 1e-4), (in_8_bits, 0.05)])
def test_bitsandbytes(bits: Any, tolerance: float) -> None:
    """int8 rounds what is multiplied too, hence its tolerance."""
    bnb = pytest.importorskip("bitsandbytes")
    model, dequantized = new_model(), new_model()
    with torch.no_grad():
        plain = model(TOKENS, num_loops=2)
        for block, exact in zip(model.blocks, dequantized.blocks, strict=True):
            kind, weight_of = bits(bnb, block.mlp[0])
            kind.load_state_dict(block.mlp[0].state_dict())
            block.mlp[0] = kind.to("cpu")
            exact.mlp[0].weight.copy_(weight_of(kind).view(128, 32))
        expected = dequantized(TOKENS, num_loops=2)
        quantized = model(TOKENS, num_loops=2)
    assert (quantized - expected).abs().max() < tolerance * expected.abs().max()
    assert not torch.equal(quantized, plain)


def test_it_is_said_once() -> None:
    model = new_model()
    model.blocks[1].attn_qkv.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"LoopMDM: .*blocks\.1\.attn_qkv has forward hooks$"):
        model(TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(TOKENS)
        model.blocks[2].mlp[1] = nn.ReLU()
        with pytest.warns(UserWarning, match=r"blocks\.2\.mlp\.1 is a torch\..*ReLU"):
            model(TOKENS)
        model(TOKENS)


def test_what_reads_weights_alone_stays_with_the_ops() -> None:
    """Parametrized weights, merged adapters, hooks of PyTorch's own counters."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = new_model()
        parametrizations.weight_norm(model.blocks[1].attn_qkv)
        lora(model).merge_and_unload()
        assert model.cuts() == []
        with FlopCounterMode(display=False):
            assert model.cuts() == []
        assert torch.isfinite(model(TOKENS)).all()
        prune.l1_unstructured(model.blocks[0].attn_out, "weight", amount=0.5)
        assert model.cuts() == ["blocks.0.attn_out has forward hooks"]
        prune.remove(model.blocks[0].attn_out, "weight")
        assert model.cuts() == []


def test_a_called_head_computes_masked_rows_only() -> None:
    model = new_model()
    rows: list[int] = []
    model.output_layer.linear.register_forward_hook(lambda *args: rows.append(args[1][0][..., 0].numel()))
    t = torch.full((4,), 0.3)
    model.loss(TOKENS, seed=1, t=t)
    assert len(rows) == 1 and 0 < rows[0] < TOKENS.numel() / 2


def test_what_needs_the_weights_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model()
    relu(model)
    with pytest.raises(ValueError, match=r"block\.mlp\.1 is a .*ReLU.*call the block"):
        model.blocks[1].weights()
    model.use_fp8_weights(head=False)
    with torch.no_grad(), pytest.raises(ValueError, match=r"use_fp8_weights: .*blocks\.1\.mlp\.1"):
        model(TOKENS)
    model = new_model()
    model.output_layer.linear.register_forward_hook(lambda *_: None)
    model.use_fp8_weights(blocks=False)
    with torch.no_grad(), pytest.raises(ValueError, match=r"use_fp8_weights: .*output_layer\.linear"):
        model(TOKENS)
    monkeypatch.setattr("loopmdm_kernels.graphs.why_not", lambda device: None)
    with pytest.raises(ValueError, match=r"cuda_graphs: .*output_layer\.linear has forward hooks"):
        check_graphs([model], ComputePlan.constant(2))


def test_hooks_that_come_during_a_run() -> None:
    """As from the start, as far as they are there."""
    fired: list[int] = []

    def on_step(_: Any) -> None:
        if not fired:
            model.output_layer.linear.register_forward_hook(lambda *_: fired.append(1))

    model = new_model(time_conditioning=True)
    sample(model, num_samples=2, length=8, steps=8, seed=1, progress=False, on_step=on_step)
    assert len(fired) > 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled() -> None:
    torch._dynamo.reset()
    model = new_model().train()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS, num_loops=2), model(TOKENS, num_loops=2))
    fired: list[int] = []
    model.blocks[1].attn_qkv.register_forward_hook(lambda *args: fired.append(1) or 2 * args[2])
    model.output_layer.linear.register_forward_hook(lambda *args: 2 * args[2])
    torch.testing.assert_close(compiled(TOKENS, num_loops=3), model(TOKENS, num_loops=3))
    assert len(fired) == 6
    torch.manual_seed(1)
    loss = compiled(TOKENS, labels=TOKENS).loss
    torch.manual_seed(1)
    torch.testing.assert_close(loss, model(TOKENS, labels=TOKENS).loss)
    torch._dynamo.reset()
