"""`likelihood` against laws that can be enumerated, and against its own parts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loopmdm
from loopmdm import LoopMDM, LoopMDMConfig, likelihood
from loopmdm.data.batches import Batch
from loopmdm.model import diffusion
from loopmdm.quality.causal import CausalConfig, CausalLM
from loopmdm.quality.likelihood import evaluate_nll, nll_by_sequence

from .test_likelihood import LENGTH, MASK, TOKENS, Plain, Tabular

WHOLE = torch.arange(LENGTH)


def toy(**options: Any) -> LoopMDM:
    """A small network whose predictions differ by context, and by position where all is masked."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_heads": 2, "num_layers": 3, "cond_dim": 4, "loop_end": 2}
    config = LoopMDMConfig(TOKENS + 1, MASK, max_length=LENGTH, positions="learned", **(sizes | options))
    model = LoopMDM(config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def predictions(model: nn.Module, known: Tensor, num_loops: int, share: float) -> Tensor:
    """log p [L, V] of a text [L] in which masks are unknown, by the definition (SUBS)."""
    sigma = None
    if model.config.time_conditioning:
        sigma = diffusion.sigma(torch.tensor([share], dtype=torch.float64)).float()
    logits = model(known[None], sigma, num_loops=num_loops, attention_mask=None)[0].double()
    logits = logits.index_fill(1, torch.tensor(MASK), -math.inf)
    return logits.log_softmax(1)


def by_hand(model: nn.Module, text: Tensor, order: list[int], num_loops: int) -> Tensor:
    """log p of the text's tokens, revealed one by one in an order; what is not in the order is given."""
    known, total = text.clone(), torch.zeros((), dtype=torch.float64)
    known[order] = MASK
    for step, position in enumerate(order):
        share = (len(order) - step) / len(order)
        total = total + predictions(model, known, num_loops, share)[position, text[position]]
        known[position] = text[position]
    return total


@pytest.mark.parametrize("time_conditioning", [False, True])
@pytest.mark.parametrize("order", ["left_to_right", "random", "confidence"])
def test_the_chain_rule_is_a_law(order: str, time_conditioning: bool) -> None:
    """In every order the probabilities of all texts add to 1, also those of all endings of a beginning."""
    model = toy(time_conditioning=time_conditioning)
    texts = torch.cartesian_prod(*[torch.arange(TOKENS)] * LENGTH)
    if order == "random":  # the same one for all texts
        chosen: Any = torch.tensor([2, 0, 3, 1])
    else:
        chosen = order
    with torch.no_grad():
        found = likelihood(model, texts, method="chain_rule", order=chosen, num_loops=2, max_batch=50)
        assert found.log_prob.exp().sum().item() == pytest.approx(1, abs=1e-10)
        given = torch.tensor([True, False, False, True]).expand(len(texts), -1)
        endings = likelihood(model, texts, given, method="chain_rule", order=chosen, num_loops=2)
    assert endings.log_prob.exp().sum().item() == pytest.approx(TOKENS**2, abs=1e-9)
    assert not found.stderr.any() and found.num_tokens.tolist() == [LENGTH] * len(texts)
    assert endings.num_tokens.tolist() == [2] * len(texts)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("time_conditioning", [False, True])
def test_the_chain_rule_by_hand(time_conditioning: bool, plain: bool) -> None:
    model = toy(time_conditioning=time_conditioning)
    read = Plain(model) if plain else model
    texts = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1], [1, 0, 0, 2]])
    orders = torch.tensor([[0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]])
    given = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 1]]).bool()
    for batch in (1, 2, 100):
        found = likelihood(
            read, texts, given, method="chain_rule", order=orders, num_loops=3, max_batch=batch
        )
        for row, (text, order) in enumerate(zip(texts, orders.tolist(), strict=True)):
            wanted = by_hand(model, text, [p for p in order if not given[row, p]], 3)
            assert found.log_prob[row].item() == pytest.approx(wanted.item(), rel=1e-6)
        assert not found.token_log_prob[given].any()
        assert torch.allclose(found.token_log_prob.sum(1), found.log_prob, rtol=1e-12)
    one = likelihood(read, texts, method="chain_rule", order=orders[1], num_loops=3)
    assert one.log_prob[0].item() == pytest.approx(by_hand(model, texts[0], [3, 1, 0, 2], 3).item(), rel=1e-6)


def test_the_order_of_confidence_looks_at_predictions_alone() -> None:
    model = toy()
    for text in torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]]):
        known, order, wanted = torch.full((LENGTH,), MASK), [], 0.0
        for step in range(LENGTH):
            log_probs = predictions(model, known, 2, (LENGTH - step) / LENGTH)
            sure = log_probs.max(1).values.masked_fill(known != MASK, -math.inf)
            order.append(int(sure.argmax()))
            wanted += log_probs[order[-1], text[order[-1]]].item()
            known[order[-1]] = text[order[-1]]
        found = likelihood(model, text[None], method="chain_rule", order="confidence", num_loops=2)
        same = likelihood(model, text[None], method="chain_rule", order=torch.tensor(order), num_loops=2)
        assert found.log_prob.item() == pytest.approx(wanted, rel=1e-6)
        assert same.log_prob.item() == found.log_prob.item()


def test_every_order_and_bound_of_an_exact_posterior_is_the_law() -> None:
    model = Tabular()
    texts, law = model.sequences[[0, 17, 80]], model.log_law.detach()[[0, 17, 80]]
    for order in ("left_to_right", "random", "confidence", torch.tensor([3, 0, 2, 1])):
        found = likelihood(model, texts, method="chain_rule", order=order, num_loops=2)
        assert torch.allclose(found.log_prob, law, atol=1e-12)
        assert torch.allclose(found.stderr, torch.zeros(3, dtype=torch.float64), atol=1e-12)
    for method in ("mc", "stratified"):
        found = likelihood(model, texts, method=method, num_loops=2, samples=4000)
        assert ((found.log_prob - law).abs() < 4 * found.stderr + 2e-3 * law.abs()).all()
        assert (found.stderr < 0.1 * law.abs()).all()


def test_the_bound_is_the_mean_over_random_orders() -> None:
    """A network without a clock: E over t of the NELBO is the mean of the chain rule over all orders."""
    model, text = toy(), torch.tensor([[0, 2, 1, 1]])
    orders = torch.tensor(list(itertools.permutations(range(LENGTH))))
    with torch.no_grad():
        every = likelihood(
            model, text.expand(len(orders), -1), method="chain_rule", order=orders, num_loops=2
        ).log_prob
        random = likelihood(model, text, method="chain_rule", order="random", samples=400, num_loops=2)
        bound = likelihood(model, text, samples=6000, num_loops=2)
    wanted = every.mean().item()
    assert every.std() > 0.05
    assert random.stderr.item() == pytest.approx(every.std().item() / 20, rel=0.2)
    assert abs(random.log_prob.item() - wanted) < 4 * random.stderr.item()
    assert abs(bound.log_prob.item() - wanted) < 4 * bound.stderr.item() + 2e-3 * abs(wanted)


@pytest.mark.parametrize(("method", "rel"), [("mc", 0.1), ("stratified", 0.15)])
@pytest.mark.parametrize("samples", [2, 7, 8])
def test_standard_errors_are_those_of_repeated_estimates(method: str, rel: float, samples: int) -> None:
    """Neighbouring strata differ, so for few of them the error that is told is too large, never too small."""
    model = Tabular()
    many = likelihood(
        model, model.sequences[17].expand(3000, -1), method=method, num_loops=2, samples=samples
    )
    spread, told = many.log_prob.detach().std().item(), many.stderr.square().mean().sqrt().item()
    assert told > (1 - rel) * spread
    assert told < (1 + rel) * spread or method == "stratified"
    assert samples < 7 or told < 1.5 * spread


@pytest.mark.parametrize("time_conditioning", [False, True])
def test_stratified_is_what_evaluation_measures(time_conditioning: bool) -> None:
    model = toy(time_conditioning=time_conditioning, key_padding_mask=True).float()
    texts = torch.randint(0, TOKENS, (6, LENGTH))
    given = torch.arange(LENGTH).expand(6, -1) < 1
    real = torch.arange(LENGTH).expand(6, -1) < torch.tensor([[2], [3], [4], [4], [4], [2]])
    values, tokens = nll_by_sequence(model, [Batch(texts, real, given)], num_loops=2, num_t=5, seed=3)
    with torch.no_grad():
        found = likelihood(model, texts, given, attention_mask=real, num_loops=2, samples=5, seed=3)
    assert torch.equal(-found.log_prob, values) and torch.equal(found.num_tokens.double(), tokens)
    assert torch.allclose(found.token_log_prob.sum(1), found.log_prob, rtol=1e-12)
    assert not found.token_log_prob[given | ~real].any()
    assert torch.equal(found.samples.mean(1), found.log_prob)


@pytest.mark.parametrize("order", [None, "random", "confidence"])
def test_evaluation_by_the_chain_rule(order: str | None) -> None:
    model = toy()
    texts, real = torch.randint(0, TOKENS, (6, LENGTH)), torch.arange(LENGTH).expand(6, -1) < 3
    batches = [Batch(texts[:4], real[:4]), Batch(texts[4:], real[4:])]
    (result,) = evaluate_nll(model, batches, num_loops=[2], num_t=2, method="chain_rule", order=order)
    with torch.no_grad():
        found = likelihood(
            model,
            texts,
            attention_mask=real,
            method="chain_rule",
            order=order,
            num_loops=2,
            samples=2 if order == "random" else None,
        )
    assert result.nll == pytest.approx(-found.log_prob.sum().item() / 18, rel=1e-12)
    assert (result.method, result.num_tokens) == ("chain_rule", 18)
    assert result.num_t == (2 if order == "random" else 1)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "chain_rule"},
        {"method": "chain_rule", "order": "confidence"},
        {"method": "mc", "samples": 3},
        {"samples": 3},
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_gradients_are_those_of_differences(plain: bool, options: dict[str, Any]) -> None:
    model = toy(num_layers=2)
    read = Plain(model) if plain else model
    texts = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]])
    given = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0]])
    weight = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def value() -> Tensor:
        return (weight * likelihood(read, texts, given, num_loops=2, max_batch=3, **options).log_prob).sum()

    value().backward()
    for parameter in (model.vocab_embed.embedding, model.blocks[0].attn_qkv.weight):
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for step in (1e-4, -2e-4):
                parameter.add_(step * direction)
                values.append(value().item())
            parameter.add_(1e-4 * direction)
        slope = (values[0] - values[1]) / 2e-4
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_gradients_of_a_token_and_of_a_model_that_recomputes() -> None:
    model = toy().float().train()
    text = torch.tensor([[0, 2, 1, 1]])
    found = likelihood(model, text, method="chain_rule", num_loops=3)
    parameter = model.vocab_embed.embedding
    parts = [torch.autograd.grad(part, parameter, retain_graph=True)[0] for part in found.token_log_prob[0]]
    (whole,) = torch.autograd.grad(found.log_prob.sum(), parameter)
    assert torch.allclose(sum(parts, torch.zeros(())), whole, atol=1e-5) and model.training
    model.gradient_checkpointing_enable()
    again = likelihood(model, text, method="chain_rule", num_loops=3)
    (recomputed,) = torch.autograd.grad(again.log_prob.sum(), parameter)
    assert torch.allclose(recomputed, whole, atol=1e-5)
    assert not found.stderr.requires_grad


def test_draws_depend_on_the_seed_and_not_on_the_batch() -> None:
    model = Tabular()
    texts = model.draw(5, 0)
    for options in ({"method": "mc"}, {}, {"method": "chain_rule", "order": "random", "samples": 3}):
        one, two, other = (
            likelihood(model, texts, num_loops=1, max_batch=batch, seed=seed, **options)  # type: ignore[arg-type]
            for batch, seed in ((7, 1), (64, 1), (64, 2))
        )
        assert torch.allclose(one.samples, two.samples, rtol=1e-12)
        assert torch.allclose(two.samples, other.samples) == ("order" in options)  # S = 1 guesses uniformly
    first = likelihood(model, texts[:2], method="mc", num_loops=1)
    assert torch.equal(first.samples, likelihood(model, texts, method="mc", num_loops=1).samples[:2])
    assert loopmdm.likelihood is likelihood


def test_edges() -> None:
    """Nothing to count is certain; one sample has no error; the mask stands for what is unknown."""
    model = toy()
    texts = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]])
    for method in ("mc", "stratified", "chain_rule"):
        for order in (None, "confidence") if method == "chain_rule" else (None,):
            none = likelihood(model, texts, torch.ones(2, LENGTH), method=method, order=order)
            assert not none.log_prob.any() and not none.num_tokens.any()
    assert likelihood(model, texts, samples=1).stderr.isnan().all()
    assert likelihood(model, texts, method="mc").samples.shape == (2, 16)
    assert likelihood(model, texts, method="chain_rule").samples.shape == (2, 1)
    unknown = torch.tensor([[0, MASK, 1, 1]])
    given = torch.tensor([[0, 1, 0, 1]])
    found = likelihood(model, unknown, given, method="chain_rule", num_loops=2)
    assert found.log_prob.item() == pytest.approx(by_hand(model, unknown[0], [0, 2], 2).item(), rel=1e-6)
    default = likelihood(model, texts, method="chain_rule")
    most = likelihood(model, texts, method="chain_rule", num_loops=model.config.max_loops)
    assert torch.equal(default.log_prob, most.log_prob)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": "run"}, TypeError, "model must be a LoopMDM, or a module like one, got str"),
        (
            {"model": CausalLM(CausalConfig(TOKENS + 1, MASK, 32, 2, 1))},
            TypeError,
            "model must be a LoopMDM, or a module like one, got CausalLM",
        ),
        ({"model": nn.Linear(2, 2)}, TypeError, "got Linear"),
        ({"tokens": [[1, 2]]}, TypeError, "tokens: got list, expected an int64 tensor"),
        ({"tokens": torch.zeros(2, 4)}, TypeError, "tokens: got torch.float32"),
        ({"tokens": torch.zeros(4).long()}, ValueError, r"tokens: got shape \(4,\)"),
        ({"tokens": torch.zeros(0, 4).long()}, ValueError, "not empty"),
        ({"tokens": torch.full((2, 4), 9)}, ValueError, r"tokens: got ids in 9\.\.9, expected 0\.\.3"),
        ({"tokens": torch.full((2, 4), MASK)}, ValueError, "a counted token is the mask token 3"),
        ({"given": [1, 0, 0, 0]}, TypeError, "given: got list"),
        ({"given": torch.ones(4)}, ValueError, r"given: got shape \(4,\), expected \(2, 4\)"),
        ({"given": torch.full((2, 4), -1)}, ValueError, "given: got values other than 0 and 1"),
        ({"attention_mask": torch.ones(2, 3)}, ValueError, "attention_mask: got shape"),
        ({"method": "stratifed"}, ValueError, "did you mean 'stratified'"),
        ({"method": None}, ValueError, "unknown method None"),
        ({"method": ["mc"]}, ValueError, "unknown method"),
        ({"order": "random"}, ValueError, "order: given with method 'stratified'"),
        ({"method": "chain_rule", "order": "confidance"}, ValueError, "did you mean 'confidence'"),
        ({"method": "chain_rule", "order": [0, 1, 2, 3]}, ValueError, "unknown order"),
        ({"method": "chain_rule", "order": WHOLE.int()}, ValueError, "order: got torch.int32"),
        ({"method": "chain_rule", "order": WHOLE[:3]}, ValueError, r"expected int64 positions \[4\]"),
        ({"method": "chain_rule", "order": WHOLE.clamp(1)}, ValueError, "every position 0..3 once"),
        ({"method": "chain_rule", "samples": 2}, ValueError, "samples: got 2, but in one order nothing"),
        ({"samples": 0}, ValueError, "samples must be at least 1"),
        ({"samples": 1.5}, TypeError, "samples must be an int"),
        ({"num_loops": 0}, ValueError, "num_loops must be at least 1"),
        ({"max_batch": 0}, ValueError, "max_batch must be at least 1"),
        ({"seed": -1}, ValueError, "seed: got -1"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"model": toy(), "tokens": torch.zeros(2, LENGTH).long()}
    with pytest.raises(error, match=message):
        likelihood(**(arguments | changes))
