"""The autoregressive model: a law over sequences, causal, saved and loaded strictly."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm.data.batches import Batch
from loopmdm.quality.causal import CausalConfig, CausalLM
from loopmdm.quality.likelihood import evaluate_autoregressive

V, MASK = 5, 4


def random_model(**changes: Any) -> CausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_heads": 2, "num_layers": 2, "max_length": 16}
    model = CausalLM(CausalConfig(V, MASK, **{**sizes, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.7)
    return model


def plain_nll(model: CausalLM, ids: list[int]) -> list[float]:
    """-log p(x_i | x_<i) in float64, one position and one head at a time; rotary as complex numbers."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    config = model.config
    size, width = config.hidden_size, config.hidden_size // config.num_heads
    frequency = 10_000.0 ** (-torch.arange(0, width, 2).double() / width)

    def norm(x: Tensor, name: str) -> Tensor:
        return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * weights[name]

    def turned(x: Tensor, position: int) -> Tensor:
        z = torch.complex(x[: width // 2], x[width // 2 :]) * torch.exp(1j * position * frequency)
        return torch.cat([z.real, z.imag])

    stream = [weights["vocab_embed.embedding"][i] for i in [MASK, *ids[:-1]]]
    for layer in range(config.num_layers):
        at = f"blocks.{layer}."
        qkv = [weights[at + "attn_qkv.weight"] @ norm(x, at + "norm1.weight") for x in stream]
        mixed = []
        for i in range(len(stream)):
            heads = []
            for h in range(config.num_heads):
                q, *_ = (part[h * width : (h + 1) * width] for part in qkv[i].split(size))
                scores, values = [], []
                for j in range(i + 1):
                    _, k, v = (part[h * width : (h + 1) * width] for part in qkv[j].split(size))
                    scores.append(turned(q, i) @ turned(k, j) / math.sqrt(width))
                    values.append(v)
                heads.append(torch.softmax(torch.stack(scores), 0) @ torch.stack(values))
            mixed.append(stream[i] + weights[at + "attn_out.weight"] @ torch.cat(heads))
        stream = []
        for x in mixed:
            up = weights[at + "mlp.0.weight"] @ norm(x, at + "norm2.weight") + weights[at + "mlp.0.bias"]
            up = torch.nn.functional.gelu(up, approximate="tanh")
            stream.append(x + weights[at + "mlp.2.weight"] @ up + weights[at + "mlp.2.bias"])
    result = []
    for x, target in zip(stream, ids, strict=True):
        logits = weights["linear.weight"] @ norm(x, "norm_final.weight") + weights["linear.bias"]
        logits[MASK] = -math.inf
        result.append(-float(torch.log_softmax(logits, 0)[target]))
    return result


def test_values_are_those_of_a_forward_pass_written_out() -> None:
    model = random_model(hidden_size=12, num_layers=3)
    rows = [[0, 3, 1, 1, 2, 0, 3], [2, 2, 0, 1, 3, 3, 3]]
    got = model.token_nll(torch.tensor(rows))
    expected = torch.tensor([plain_nll(model, row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


def test_probabilities_of_all_sequences_sum_to_one() -> None:
    model = random_model().double()
    every = torch.tensor(list(itertools.product(range(MASK), repeat=3)))
    with torch.no_grad():
        total = float((-model.token_nll(every).sum(1)).exp().sum())
    assert total == pytest.approx(1.0, abs=1e-12)


def test_later_tokens_and_padding_change_nothing() -> None:
    model = random_model()
    ids = torch.randint(0, MASK, (3, 10), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % MASK
    assert torch.equal(model.token_nll(ids)[:, :6], model.token_nll(changed)[:, :6])
    mask = torch.arange(10).expand(3, 10) < torch.tensor([4, 10, 7])[:, None]
    out = model.loss(ids, mask)
    pairs = zip(ids, (4, 10, 7), strict=True)
    expected = torch.stack([model.token_nll(row[None, :n]).sum() for row, n in pairs])
    assert int(out.num_tokens) == 21
    torch.testing.assert_close(out.nll_sum, expected.sum().detach())
    torch.testing.assert_close(out.loss.detach(), expected.sum().detach() / 21)
    given = torch.arange(10).expand(3, 10) < 2
    assert int(model.loss(ids, mask, prompt_mask=given).num_tokens) == 15


def test_recomputation_gives_the_same_gradients() -> None:
    ids = torch.randint(0, MASK, (2, 9), generator=torch.Generator().manual_seed(2))
    gradients = []
    for recompute in (False, True):
        model = random_model().train()
        model.recompute = recompute
        model.loss(ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None and bool(one.abs().sum() > 0)
        assert torch.equal(one, other)


def test_held_out_likelihood_is_exact_on_the_counted_tokens() -> None:
    model = random_model()
    ids = torch.randint(0, MASK, (5, 8), generator=torch.Generator().manual_seed(3))
    sizes = torch.tensor([8, 3, 8, 5, 8])
    mask = torch.arange(8) < sizes[:, None]
    result = evaluate_autoregressive(
        model, [Batch(ids[:2], mask[:2]), Batch(ids[2:], mask[2:])], bytes_per_token=2.0
    )
    each = torch.tensor([sum(plain_nll(model, row[:n].tolist())) for row, n in zip(ids, sizes, strict=True)])
    nll = float(each.sum() / sizes.sum())
    assert (result.num_tokens, result.num_sequences, result.num_loops) == (32, 5, 1)
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nll / math.log(2) / 2, rel=1e-5)
    spread = (each - nll * sizes).square().sum()
    assert result.stderr == pytest.approx(math.sqrt(5 / 4 * float(spread)) / 32, rel=1e-4)
    with pytest.raises(ValueError, match="there is no token to evaluate"):
        evaluate_autoregressive(model, [])


def test_saved_and_loaded_strictly(tmp_path: Path) -> None:
    model = random_model()
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[0, 1, 2, 3]])
    assert torch.equal(CausalLM.from_pretrained(tmp_path).token_nll(ids), model.token_nll(ids))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "loopmdm-causal"
    with pytest.raises(ValueError, match=r"this is an autoregressive scorer .* rates samples and makes none"):
        LoopMDM.from_pretrained(tmp_path)
    LoopMDM(LoopMDMConfig(V, MASK, hidden_size=8, num_heads=2, num_layers=2, loop_end=2)).save_pretrained(
        tmp_path / "diffusion"
    )
    with pytest.raises(ValueError, match=r"this is a diffusion model, which LoopMDM.from_pretrained reads"):
        CausalLM.from_pretrained(tmp_path / "diffusion")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["blocks.1.mlp.0.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 of \d+ tensors do not fit"):
        CausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_loops": 3}))
    with pytest.raises(ValueError, match=r"config.json: unknown configuration fields \['max_loops'\]"):
        CausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "values, error, message",
    [
        ({"vocab_size": 5}, ValueError, "missing configuration fields"),
        ({"vocab_size": 5, "mask_token_id": 5}, ValueError, "mask_token_id: got 5, expected 0..4"),
        ({"vocab_size": 5.0, "mask_token_id": 4}, TypeError, "vocab_size must be an int, got 5.0"),
        ({"vocab_size": 5, "mask_token_id": 4, "num_layers": 0}, ValueError, "num_layers: got 0"),
        ({"vocab_size": 5, "mask_token_id": 4, "hidden_size": 10}, ValueError, "hidden_size: got 10"),
    ],
)
def test_bad_configurations(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CausalConfig.from_dict(values)


def test_bad_input() -> None:
    model = random_model()
    for ids, error, message in (
        (torch.zeros(2, 3), TypeError, "expected an int64 tensor"),
        (torch.tensor([[0, V]]), ValueError, r"got ids in 0..5, expected 0..4"),
        (torch.tensor([[0, MASK]]), ValueError, "contains the mask token 4"),
    ):
        with pytest.raises(error, match=message):
            model.token_nll(ids)
    with pytest.raises(ValueError, match="no token is left to count"):
        model.loss(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2))
