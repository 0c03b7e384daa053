"""Held-out likelihood against laws whose entropy is known (E7), and its bookkeeping."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm.data.batches import Batch
from loopmdm.exits import HiddenChange
from loopmdm.quality.causal import CausalConfig, CausalLM
from loopmdm.quality.likelihood import evaluate_autoregressive, evaluate_nll, nll_by_time_bin
from loopmdm.quality.scorer import CausalScorer

LENGTH, TOKENS, MASK = 4, 3, 3


class Tabular(nn.Module):
    """The exact posterior of a random law over 3^4 sequences; with S = 1 a uniform guess."""

    def __init__(self) -> None:
        super().__init__()
        self.config = LoopMDMConfig(TOKENS + 1, MASK, hidden_size=4, num_heads=1, num_layers=2, loop_end=2)
        generator = torch.Generator().manual_seed(0)
        self.sequences = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))
        logits = 2 * torch.randn(len(self.sequences), generator=generator, dtype=torch.float64)
        self.log_law = nn.Parameter(logits.log_softmax(0))
        self.inputs: list[Tensor] = []

    def entropy(self) -> float:
        return float(-(self.log_law.detach().exp() * self.log_law.detach()).sum())

    def draw(self, count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return self.sequences[
            torch.multinomial(self.log_law.detach().exp(), count, True, generator=generator)
        ]

    def forward(self, input_ids: Tensor, timesteps: None, *, num_loops: int, attention_mask: None) -> Tensor:
        assert not self.training and timesteps is None and attention_mask is None
        self.inputs.append(input_ids)
        logits = torch.zeros(*input_ids.shape, TOKENS + 1, dtype=torch.float64)
        if num_loops > 1:
            fits = ((input_ids[:, None] == self.sequences) | (input_ids[:, None] == MASK)).all(-1)
            weights = fits * self.log_law.exp()
            one_hot = nn.functional.one_hot(self.sequences, TOKENS).double()
            logits[..., :TOKENS] = torch.einsum("bn,nlv->blv", weights, one_hot).clamp_min(1e-300).log()
        return logits


def test_e7_exact_posterior_scores_the_entropy() -> None:
    model = Tabular()
    (result,) = evaluate_nll(model, model.draw(6000, 1).split(500), num_loops=[2])
    assert result.num_tokens == 6000 * LENGTH and result.num_sequences == 6000 and result.num_t == 16
    assert result.stderr < 0.01
    assert abs(result.nll - model.entropy() / LENGTH) < 3 * result.stderr
    assert result.perplexity == pytest.approx(math.exp(result.nll))


def test_each_sequence_scores_its_own_log_probability() -> None:
    """The chain rule holds in every order, so with exact posteriors NELBO(x) = -log p(x)."""
    model = Tabular()
    for index in (0, 17, 80):
        (result,) = evaluate_nll(model, [model.sequences[index].expand(3000, -1)], num_loops=[3], num_t=8)
        expected = -float(model.log_law[index].detach()) / LENGTH
        # 1e-3 of the range of t is left out.
        assert abs(result.nll - expected) < 3 * result.stderr + 2e-3 * expected
        assert 0 < result.stderr < 0.02 * expected


def test_uniform_guess_and_bits_per_byte() -> None:
    model = Tabular()
    guess, exact = evaluate_nll(model, [model.draw(4000, 2)], num_loops=[1, 2], bytes_per_token=2.5)
    assert (guess.num_loops, exact.num_loops) == (1, 2)
    assert abs(guess.nll - 0.999 * math.log(TOKENS)) < 3 * guess.stderr
    assert exact.nll < guess.nll
    assert guess.bits_per_byte == pytest.approx(guess.nll / math.log(2) / 2.5)


def test_standard_error_is_that_of_repeated_evaluations() -> None:
    model = Tabular()
    results = [
        evaluate_nll(model, [model.draw(60, s)], num_loops=[2], num_t=4, seed=s)[0] for s in range(150)
    ]
    spread = torch.tensor([r.nll for r in results], dtype=torch.float64).std().item()
    reported = torch.tensor([r.stderr for r in results], dtype=torch.float64).mean().item()
    assert reported == pytest.approx(spread, rel=0.2)


def test_same_corruption_for_every_loop_count_and_batch_size() -> None:
    model = Tabular()
    data = model.draw(12, 3)
    two, four = evaluate_nll(model, [data], num_loops=[2, 4])
    assert two.nll == four.nll and two.stderr == four.stderr
    (again,) = evaluate_nll(model, data.split(5), num_loops=[2])
    assert again.nll == pytest.approx(two.nll, rel=1e-12)
    (other,) = evaluate_nll(model, [data], num_loops=[2], seed=1)
    assert other.nll != two.nll


def test_prompt_and_padding_are_neither_masked_nor_counted() -> None:
    model = Tabular()
    data = model.draw(40, 4)
    prompt = torch.arange(LENGTH).expand(40, -1) < 1
    real = torch.arange(LENGTH).expand(40, -1) < torch.randint(2, LENGTH + 1, (40, 1))
    (result,) = evaluate_nll(model, [Batch(data, real.long(), prompt)], num_loops=[2])
    assert result.num_tokens == int((real & ~prompt).sum())
    masked = torch.stack(model.inputs) == MASK
    assert not masked[:, prompt | ~real].any()
    assert masked[:, real & ~prompt].float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_time_bins_average_to_the_nelbo() -> None:
    model = Tabular()
    data = model.draw(2000, 5)
    guess, exact = nll_by_time_bin(model, [data], num_loops=[1, 2], num_bins=8)
    (whole,) = evaluate_nll(model, [data], num_loops=[2], num_t=8)
    assert sum(b.nll for b in exact) / 8 == pytest.approx(whole.nll, rel=1e-12)
    assert exact[0].t_low == pytest.approx(1e-3) and exact[-1].t_high == pytest.approx(1.0)
    assert all(a.t_high == b.t_low for a, b in itertools.pairwise(exact))
    assert all(b.cross_entropy == pytest.approx(math.log(TOKENS)) for b in guess)
    for number, b in enumerate(exact):
        share = b.num_masked / (2000 * LENGTH)
        assert share == pytest.approx(0.999 * (number + 0.5) / 8, abs=0.02)
    # Less context, more to guess.
    assert exact[0].cross_entropy < exact[3].cross_entropy < exact[7].cross_entropy


class Plain(nn.Module):
    """Hides that a model is a LoopMDM."""

    def __init__(self, model: LoopMDM) -> None:
        super().__init__()
        self.inner, self.config = model, model.config

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        logits: Tensor = self.inner(*args, **kwargs)
        return logits


@pytest.mark.parametrize("time_conditioning", [False, True])
def test_loopmdm_equals_its_logits(time_conditioning: bool) -> None:
    torch.manual_seed(0)
    config = LoopMDMConfig(
        9,
        8,
        hidden_size=16,
        num_heads=2,
        num_layers=3,
        cond_dim=4,
        loop_end=2,
        time_conditioning=time_conditioning,
        key_padding_mask=True,
    )
    model = LoopMDM(config).train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    batch = Batch(torch.randint(0, 8, (6, 10)), torch.arange(10).expand(6, -1) < 8)
    fast = evaluate_nll(model, [batch], num_loops=[1, 4], num_t=4)
    slow = evaluate_nll(Plain(model), [batch], num_loops=[1, 4], num_t=4)
    for one, other in zip(fast, slow, strict=True):
        assert one.nll == pytest.approx(other.nll, rel=1e-5)
    assert fast[0].nll != fast[1].nll
    assert model.training and all(p.grad is None for p in model.parameters())


def test_an_exit_rule_ends_loops() -> None:
    """eps = inf stops after the first loop that may be the last, 0 never."""
    torch.manual_seed(3)
    config = LoopMDMConfig(12, 11, hidden_size=16, num_heads=2, num_layers=3, cond_dim=8, max_length=8)
    model = LoopMDM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    batches = torch.randint(0, 11, (6, 8)).split(3)
    fixed = {
        result.num_loops: result for result in evaluate_nll(model, batches, num_loops=[1, 2, 5], num_t=3)
    }
    for eps, least, loops in ((math.inf, 1, 1), (math.inf, 2, 2), (0.0, 1, 5)):
        (result,) = evaluate_nll(
            model, batches, num_loops=[5], num_t=3, exit=HiddenChange(eps), min_loops=least
        )
        assert result.nll == pytest.approx(fixed[loops].nll, rel=1e-6) and result.mean_loops == loops
    assert fixed[5].mean_loops is None
    used = []
    for eps in (0.5, 0.05):
        (result,) = evaluate_nll(model, batches, num_loops=[5], num_t=3, exit=HiddenChange(eps))
        assert result.mean_loops is not None
        used.append(result.mean_loops)
    assert 1 <= used[0] < used[1] <= 5
    with pytest.raises(TypeError, match="exit: given with a Tabular"):
        evaluate_nll(Tabular(), batches, num_loops=[1], exit=HiddenChange(0.1))


def test_results_are_json() -> None:
    model = Tabular()
    (result,) = evaluate_nll(model, [model.draw(1, 0)], num_loops=[1])
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert values["stderr"] is None and values["num_loops"] == 1 and values["num_sequences"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_loops": []}, "num_loops must be a list of integers of at least 1"),
        ({"num_loops": [0]}, "num_loops must be"),
        ({"num_loops": [1.5]}, "num_loops must be"),
        ({"num_t": 0}, "num_t must be at least 1"),
        ({"bytes_per_token": 0.0}, "bytes_per_token must be positive"),
        ({"batches": []}, "batches is empty"),
        ({"batches": [Batch(torch.zeros(2, 4).long(), torch.zeros(2, 4))]}, "there is none to count"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    model = Tabular()
    arguments: dict[str, Any] = {"batches": [model.draw(2, 0)], "num_loops": [2]}
    with pytest.raises(ValueError, match=message):
        evaluate_nll(model, **(arguments | changes))


def test_every_submodule_keeps_its_mode() -> None:
    """A part frozen in eval mode comes back so, also after an error."""
    model = LoopMDM(LoopMDMConfig(8, 7, hidden_size=16, num_heads=2, num_layers=4, cond_dim=8))
    model.train()
    model.blocks[2].eval()
    modes = [module.training for module in model.modules()]
    ids = torch.arange(6)[None]
    evaluate_nll(model, [ids], num_loops=[1], num_t=2)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="ids in"):
        evaluate_nll(model, [ids + 5], num_loops=[1], num_t=2)
    assert [module.training for module in model.modules()] == modes

    scorer = CausalLM(CausalConfig(8, 7, hidden_size=16, num_heads=2, num_layers=2)).train()
    scorer.blocks[1].eval()
    modes = [module.training for module in scorer.modules()]
    first = evaluate_autoregressive(scorer, [ids])
    assert first == evaluate_autoregressive(scorer, [ids])
    CausalScorer(scorer).nll(ids)
    assert [module.training for module in scorer.modules()] == modes
