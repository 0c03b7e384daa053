"""peft, torchao and bitsandbytes: adapters and quantized layers count."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from loopmdm import sample
from tests.tools.watched import MARKS, TOKENS, lora, new_model

pytestmark = MARKS


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


@pytest.mark.filterwarnings("error:.*called one by one:UserWarning")
@pytest.mark.parametrize("frozen", [False, True])
def test_adapters_are_folded_into_the_ops(frozen: bool) -> None:
    """Nothing is called; values and gradients are those of the modules called one by one, in float64."""
    model = lora(new_model(), init_lora_weights=False).double().train(not frozen)
    base = model.get_base_model()
    assert base.cuts() == []
    folded = base(TOKENS, num_loops=3)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * (5 * 4 + 1 + 2)  # blocks, head, noise level
    grads = torch.autograd.grad(folded.sin().sum(), trained.values())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*called one by one", UserWarning)
        handles = [part.register_forward_hook(lambda *_: None) for part in base.modules()]
        called = base(TOKENS, num_loops=3)
        wanted = torch.autograd.grad(called.sin().sum(), trained.values())
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(folded, called)
    for name, got, right in zip(trained, grads, wanted, strict=True):
        torch.testing.assert_close(got, right, msg=lambda text, name=name: f"{name}: {text}")
        assert got.abs().sum() > 0, name
    with model.disable_adapter():
        assert base.cuts() == [] and not torch.equal(base(TOKENS, num_loops=3), folded)


def test_what_is_more_than_a_sum_of_weights_is_called() -> None:
    assert lora(new_model(), lora_dropout=0.1).train().get_base_model().cuts()
    assert lora(new_model(), lora_dropout=0.1).eval().get_base_model().cuts() == []
    assert len(lora(new_model(), use_dora=True).get_base_model().cuts()) == 6
    biased = peft.LoraConfig(r=2, target_modules=["mlp.0"], lora_bias=True)
    assert len(peft.get_peft_model(new_model(), biased).get_base_model().cuts()) == 5


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
