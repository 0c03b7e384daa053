"""What happens between loops, against the formula in plain PyTorch; whatever loops a model can do it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loopmdm import LoopMDM, LoopMDMConfig, likelihood, sample
from loopmdm.exits import ArgmaxStable, HiddenChange
from loopmdm.model import draws, flops
from loopmdm.model.between import Between
from loopmdm.plan import ComputePlan
from loopmdm.sampling.graphs import check_graphs
from loopmdm.train import TrainConfig
from loopmdm_kernels import graphs
from loopmdm_kernels.testing import assert_matches_oracle

MASK = 22
DAMPED: dict[str, Any] = {"damped": True}
ALL: dict[str, Any] = {"damped": True, "inject": "parcae", "loop_embedding": 2, "carry_norm": True}
KINDS = {
    "damped": DAMPED,
    "add": {"inject": "add"},
    "parcae": {"inject": "parcae"},
    "embedding": {"loop_embedding": 3},
    "norm": {"carry_norm": True},
    "all": ALL,
}
VARIANTS = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
SOME = pytest.mark.parametrize("changes", [DAMPED, {"inject": "add"}, ALL], ids=["damped", "add", "all"])


def make(**changes: Any) -> LoopMDM:
    values: dict[str, Any] = {
        "vocab_size": 23,
        "mask_token_id": MASK,
        "hidden_size": 32,
        "num_heads": 4,
        "num_layers": 5,
        "cond_dim": 32,
        "max_length": 24,
        "max_loops": 5,
        "gate_init": 1.0,
        "dropout": 0.0,
    }
    torch.manual_seed(0)
    model = LoopMDM(LoopMDMConfig(**{**values, **changes})).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "adaLN" in name or "output_layer" in name or name.startswith("between."):
                value.add_(torch.randn(value.shape, generator=generator) * 0.2)
    return model


def tokens(batch: int = 3, length: int = 12) -> Tensor:
    ids = torch.randint(0, MASK, (batch, length), generator=torch.Generator().manual_seed(1))
    ids[:, ::2] = MASK
    return ids


class Plain:
    """The model with S loops, written out; `weights` are leaves that it is differentiated by."""

    def __init__(self, model: LoopMDM, dtype: torch.dtype) -> None:
        self.config = model.config
        self.weights = {
            name: value.detach().to(dtype).requires_grad_() for name, value in model.named_parameters()
        }
        self.inv_freq = model.rotary_emb.inv_freq.to(dtype)

    def hidden(self, ids: Tensor, num_loops: int) -> Tensor:
        return self.tail(self.states(ids, num_loops)[-1])

    def states(self, ids: Tensor, num_loops: int) -> list[Tensor]:
        """H(0) to H(S)."""
        config = self.config
        x = self.blocks(self.weights["vocab_embed.embedding"][ids], range(config.loop_start))
        states = [x]
        for loop in range(num_loops):
            if loop:
                x = self.carried(x, states[0], loop)
            new = self.blocks(x, range(config.loop_start, config.loop_end))
            x = x + (new - x) / num_loops if config.damped else new
            states.append(x)
        return states

    def carried(self, x: Tensor, first: Tensor, loop: int) -> Tensor:
        """What loop + 1 begins with, of H(loop) and H(0)."""
        config, w = self.config, self.weights
        if config.inject == "add":
            x = x + w["between.gain"] * first
        if config.inject == "parcae":
            step = torch.log1p(w["between.step"].exp())
            e = (first - first.mean(-1, keepdim=True)) / (
                first.var(-1, correction=0, keepdim=True) + 1e-5
            ).sqrt()
            x = torch.exp(-step * w["between.log_decay"].exp()) * x + step * w["between.gain"] * e
        if config.loop_embedding:
            x = x + w["between.embedding"][min(loop, config.loop_embedding) - 1]
        if config.carry_norm:
            x = F.layer_norm(x, x.shape[-1:]) * w["between.norm.weight"]
        return x

    def nelbo(self, x: Tensor, clean: Tensor, masked: Tensor, t: Tensor) -> Tensor:
        """Of H(k) [B, L, D], summed."""
        w = {
            key.removeprefix("output_layer."): value
            for key, value in self.weights.items()
            if key.startswith("output_layer.")
        }
        made = F.linear(self.condition(), w["adaLN_modulation.weight"], w["adaLN_modulation.bias"])
        shift, scale = made[:, None].chunk(2, dim=2)
        x = self.tail(x)
        h = F.layer_norm(x, x.shape[-1:]) * w["norm_final.weight"] * (1 + scale) + shift
        logits = F.linear(h, w["linear.weight"], w["linear.bias"])
        others = torch.arange(logits.shape[-1]) == self.config.mask_token_id
        log_p = logits.masked_fill(others, -torch.inf).log_softmax(-1)
        nll = -log_p.gather(2, clean[..., None])[..., 0]
        return (nll * masked / t[:, None]).sum()

    def tail(self, x: Tensor) -> Tensor:
        return self.blocks(x, range(self.config.loop_end, self.config.num_layers))

    def blocks(self, x: Tensor, indices: range) -> Tensor:
        for index in indices:
            x = self.block(x, f"blocks.{index}.")
        return x

    def condition(self) -> Tensor:
        w, half = self.weights, 128
        features = torch.cat([self.inv_freq.new_ones(1, half), self.inv_freq.new_zeros(1, half)], dim=1)
        c = F.silu(F.linear(features, w["sigma_map.mlp.0.weight"], w["sigma_map.mlp.0.bias"]))
        return F.silu(F.linear(c, w["sigma_map.mlp.2.weight"], w["sigma_map.mlp.2.bias"]))

    def block(self, x: Tensor, name: str) -> Tensor:
        w = {key.removeprefix(name): value for key, value in self.weights.items() if key.startswith(name)}
        made = F.linear(self.condition(), w["adaLN_modulation.weight"], w["adaLN_modulation.bias"])
        shift1, scale1, gate1, shift2, scale2, gate2 = made[:, None].chunk(6, dim=2)
        batch, length, hidden = x.shape
        h = F.layer_norm(x, (hidden,)) * w["norm1.weight"] * (1 + scale1) + shift1
        heads = F.linear(h, w["attn_qkv.weight"]).view(batch, length, 3, self.config.num_heads, -1)
        angle = torch.outer(torch.arange(length, dtype=x.dtype), self.inv_freq)[None, :, None]
        q, k, v = heads.unbind(2)
        q, k = (
            torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)
            for a, b in (part.chunk(2, dim=-1) for part in (q, k))
        )
        scores = torch.einsum("blhd,bmhd->bhlm", q, k) / q.shape[-1] ** 0.5
        mixed = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v).reshape(batch, length, hidden)
        x = x + gate1 * F.linear(mixed, w["attn_out.weight"])
        h = F.layer_norm(x, (hidden,)) * w["norm2.weight"] * (1 + scale2) + shift2
        h = F.gelu(F.linear(h, w["mlp.0.weight"], w["mlp.0.bias"]), approximate="tanh")
        return x + gate2 * F.linear(h, w["mlp.2.weight"], w["mlp.2.bias"])


@VARIANTS
@pytest.mark.parametrize("num_loops", [1, 2, 12])
@pytest.mark.parametrize("recompute", [False, True])
def test_values_and_gradients_are_the_formulas(
    changes: dict[str, Any], num_loops: int, recompute: bool
) -> None:
    model, ids = make(**changes), tokens()
    wide = make(**changes).double()
    wide.recompute = model.recompute = recompute
    direction = torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(2)).double()
    oracle, baseline = Plain(model, torch.float64), Plain(model, torch.float32)
    ours, exact = (one.hidden(ids, num_loops=num_loops) for one in (model, wide))
    plain, formula = (one.hidden(ids, num_loops) for one in (baseline, oracle))
    torch.testing.assert_close(exact, formula, rtol=1e-7, atol=1e-7)
    assert_matches_oracle(ours.detach(), plain.detach(), formula.detach())
    for out in (ours, exact, plain, formula):
        (out * direction.to(out.dtype)).sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), wide.parameters(), strict=True):
        expected = oracle.weights[name].grad
        if expected is None or parameter.grad is None:
            assert expected is parameter.grad is other.grad is None, name
            continue
        torch.testing.assert_close(other.grad, expected, rtol=1e-7, atol=1e-7 * float(expected.abs().max()))
        # The largest of few errors is luck: plain PyTorch in another order is off by 3 times as much.
        error, allowed = (
            float((one.double() - expected).norm()) for one in (parameter.grad, baseline.weights[name].grad)
        )
        assert error <= 2 * allowed + 1e-7 * float(expected.norm()), name


@VARIANTS
@torch.no_grad()
def test_one_loop_is_the_plain_model_bit_for_bit(changes: dict[str, Any]) -> None:
    plain, model, ids = make(), make(**changes), tokens()
    found = model.load_state_dict(plain.state_dict(), strict=False)
    assert all(name.startswith("between.") for name in found.missing_keys) and not found.unexpected_keys
    assert torch.equal(model(ids, num_loops=1), plain(ids, num_loops=1))
    each = torch.tensor([1, 3, 1])
    mixed = model(ids, num_loops=each)
    assert torch.equal(mixed[each == 1], plain(ids, num_loops=1)[each == 1])


@VARIANTS
@torch.no_grad()
def test_a_sequence_does_not_depend_on_its_batch(changes: dict[str, Any]) -> None:
    """One S for all, one each, and sequences alone: the same bits; also the states by block."""
    model, ids = make(**changes), tokens(4)
    each = torch.tensor([3, 1, 5, 2])
    together = model.hidden(ids, num_loops=each)
    for index, loops in enumerate(each.tolist()):
        assert torch.equal(together[index], model.hidden(ids, num_loops=loops)[index])
        assert torch.equal(together[index], model.hidden(ids[index : index + 1], num_loops=loops)[0])
    for loops in (1, 4, each):
        states = model.stages(ids).states(loops)
        torch.testing.assert_close(states[-1], model.hidden(ids, num_loops=loops))


@VARIANTS
@torch.no_grad()
def test_loops_can_be_cut_anywhere(changes: dict[str, Any]) -> None:
    model, ids = make(**changes), tokens()
    stages = model.stages(ids)
    whole = stages.loop(stages.before(), 5)
    for cut in (1, 4):
        state = stages.loop(stages.before(), cut, total=5)
        assert torch.equal(stages.loop(state, 5 - cut, done=cut, total=5), whole)


@VARIANTS
@torch.no_grad()
def test_exits_stop_the_same_loops(changes: dict[str, Any]) -> None:
    """An exit rule that never stops is the whole pass; one that does, stops at the state it was shown."""
    model, ids = make(**changes), tokens()
    whole = model.hidden(ids, num_loops=4)
    for rule in (HiddenChange(0.0), ArgmaxStable(9)):
        out, used = model.hidden(ids, num_loops=4, exit=rule, min_loops=2)
        assert torch.equal(out, whole) and used.tolist() == [4, 4, 4]
    stages = model.stages(ids)
    states = [stages.before()]
    for loop in range(4):
        states.append(stages.loop(states[-1], done=loop, total=4))
    ratio = [(b - a).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1) for a, b in pairwise(states)]
    eps = float(torch.stack(ratio)[2].max()) * 1.001
    out, used = model.hidden(ids, num_loops=4, exit=HiddenChange(eps), min_loops=3)
    assert used.tolist() == [3, 3, 3] and torch.equal(out, stages.after(states[3]))


@VARIANTS
def test_the_last_loops_are_differentiated_alone(changes: dict[str, Any]) -> None:
    model, ids = make(**changes), tokens()
    with torch.no_grad():
        whole = model.hidden(ids, num_loops=5)
    model.backprop_loops = 2
    out = model.hidden(ids, num_loops=5)
    assert torch.equal(out, whole)
    out.sum().backward()
    assert model.vocab_embed.embedding.grad is None
    assert bool(model.blocks[1].attn_qkv.weight.grad.any())


def test_dropout_draws_new_masks_in_each_loop() -> None:
    """Masks are a function of the seed and of the loop."""
    model, ids = make(**DAMPED, dropout=0.3).train(), tokens()
    first, again = (model.hidden(ids, num_loops=3, dropout_seed=5) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, model.hidden(ids, num_loops=3, dropout_seed=6))
    stages = model.stages(ids, dropout_seed=5)
    assert not torch.equal(
        stages.loop(stages.before(), done=1, total=3), stages.loop(stages.before(), total=3)
    )


@SOME
@torch.no_grad()
def test_modules_that_are_watched_compute_the_same(changes: dict[str, Any]) -> None:
    model, ids = make(**changes), tokens()
    fused = model.hidden(ids, num_loops=4)
    calls = []
    model.blocks[1].attn_qkv.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="called one by one"):
        torch.testing.assert_close(model.hidden(ids, num_loops=4), fused, rtol=1e-4, atol=1e-5)
    assert len(calls) == 4


@VARIANTS
@torch.no_grad()
def test_it_is_saved_and_loaded(changes: dict[str, Any], tmp_path: Any) -> None:
    model, ids = make(**changes), tokens()
    model.save_pretrained(tmp_path)
    again = LoopMDM.from_pretrained(tmp_path)
    assert again.config == model.config and again.config.acts_between_loops
    assert torch.equal(again(ids, num_loops=3), model(ids, num_loops=3))


@SOME
def test_sampling_and_likelihoods_take_it(changes: dict[str, Any]) -> None:
    """Any plan, the same tokens in any batch; the ledger counts the loops."""
    model = make(**changes)
    for plan in (4, ComputePlan.parse("S1:3,S5:3"), ComputePlan.adaptive(0.05, 5)):
        steps = {"steps": 6} if isinstance(plan, int) else {}
        options: dict[str, Any] = {"length": 10, "seed": 3, "plan": plan, **steps}
        whole = sample(model, num_samples=3, **options)
        parts = sample(model, num_samples=3, max_batch=1, **options)
        assert torch.equal(whole.tokens, parts.tokens) and torch.equal(whole.loops, parts.loops)
    found = likelihood(model, tokens().masked_fill(tokens() == MASK, 3), num_loops=4, samples=4)
    assert bool(found.log_prob.isfinite().all())


@SOME
def test_what_it_cannot_do_is_said(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make(**changes), tokens()
    stages = model.stages(ids)
    for loops in (0, torch.tensor([1, 0, 2])):
        with pytest.raises(ValueError, match="num_loops"):
            stages.loop(stages.before(), loops)
    for loops in (2.0, True, torch.tensor([1.0, 2.0, 3.0])):
        with pytest.raises(TypeError, match="num_loops"):
            stages.loop(stages.before(), loops)
    with pytest.raises(ValueError, match="exit_threshold"):
        stages.loop(stages.before(), 2, exit_threshold=-1.0)
    monkeypatch.setattr(graphs, "why_not", lambda device: None)
    with pytest.raises(ValueError, match="cuda_graphs: what happens between loops"):
        check_graphs([model], ComputePlan.constant(2))


def test_a_damped_loop_has_to_know_how_many_there_are() -> None:
    stages = make(**DAMPED).stages(tokens())
    with pytest.raises(ValueError, match="total: got None"):
        stages.loop(stages.loop(stages.before(), total=2), done=1)


def test_configurations_say_whether_it_is_on() -> None:
    assert not LoopMDMConfig(9, 8).acts_between_loops
    assert LoopMDMConfig.from_dict(make().config.to_dict()) == make().config
    with pytest.raises(TypeError, match="damped"):
        LoopMDMConfig(9, 8, damped=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"inject: got 'ad', expected one of .*; did you mean 'add'"):
        LoopMDMConfig(9, 8, inject="ad")
    with pytest.raises(ValueError, match="loop_embedding: got -1"):
        LoopMDMConfig(9, 8, loop_embedding=-1)
    with pytest.raises(TypeError, match="carry_norm"):
        LoopMDMConfig(9, 8, carry_norm="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"inject": "add"}, {"loop_embedding": 2}], ids=["add", "embedding"])
@torch.no_grad()
def test_new_weights_change_nothing_at_first(changes: dict[str, Any]) -> None:
    plain, ids = make(), tokens()
    model = LoopMDM(LoopMDMConfig.from_dict(plain.config.to_dict() | changes)).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(model(ids, num_loops=4), plain(ids, num_loops=4))


@torch.no_grad()
def test_parcae_begins_near_the_plain_loop_and_stays_stable() -> None:
    model = LoopMDM(LoopMDMConfig(23, MASK, hidden_size=32, num_heads=4, num_layers=3, inject="parcae"))
    state = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.between(state, state, 1), 0.99 * state, rtol=1e-4, atol=1e-6)
    for name, value in model.between.named_parameters():
        value.normal_(std=3.0, generator=torch.Generator().manual_seed(len(name)))
    kept = model.between(state, torch.zeros_like(state), 1) / state
    assert bool(((kept >= 0) & (kept <= 1)).all())


def test_weights_between_loops_have_no_gradient_of_one_loop() -> None:
    model, ids = make(**ALL), tokens()
    model.hidden(ids, num_loops=1).sum().backward()
    assert all(parameter.grad is None for parameter in model.between.parameters())


def test_later_loops_need_what_they_read() -> None:
    with pytest.raises(ValueError, match="a model with inject reads H\\(0\\)"):
        stages = make(inject="add").stages(tokens())
        stages.loop(stages.before(), done=1)


@pytest.mark.parametrize("changes", [{"inject": "parcae"}, {"loop_embedding": 2, "carry_norm": True}])
def test_a_reference_checkpoint_gets_them(changes: dict[str, Any]) -> None:
    """It says nothing of them, so they are new; of our own model they are read."""
    plain, ids = make(), tokens()
    state = {f"backbone.{name}": value for name, value in plain.state_dict().items()}
    options: dict[str, Any] = {"loop": (1, 3), "mask_token_id": MASK, "max_loops": 4, "dropout": 0.0}
    model = LoopMDM.from_mdlm(state, **options, **changes)
    with torch.no_grad():
        assert torch.equal(model(ids, num_loops=1), plain(ids, num_loops=1))
    fresh = Between(model.config).state_dict()
    assert fresh and all(torch.equal(model.between.state_dict()[name], fresh[name]) for name in fresh)
    ours = make(**changes)
    again = LoopMDM.from_mdlm(ours)
    assert again.config.to_dict() | {"gate_init": 1.0} == ours.config.to_dict()
    with torch.no_grad():
        assert torch.equal(again(ids, num_loops=3), ours(ids, num_loops=3))


@pytest.mark.parametrize("num_loops", [1, 2, 12])
@pytest.mark.parametrize("kind", ["mean", "linear"])
def test_a_loss_of_every_loop_is_the_formula(kind: str, num_loops: int) -> None:
    """Its value and the gradient of every parameter; the NLL that is told is that of the last loop."""
    model = make().double().train()
    clean = torch.randint(0, MASK, (3, 12), generator=torch.Generator().manual_seed(3))
    t, masked, _ = draws.corruption(torch.zeros_like(clean, dtype=torch.bool), None, False, 5)
    formula = Plain(model, torch.float64)
    states = formula.states(torch.where(masked, MASK, clean), num_loops)[1:]
    each = torch.stack([formula.nelbo(state, clean, masked, t.double()) for state in states])
    k = torch.arange(1, num_loops + 1, dtype=torch.float64)
    weights = torch.ones_like(k) if kind == "mean" else k
    expected = (each * weights / weights.sum()).sum() / clean.numel()
    expected.backward()
    model.loop_loss = kind
    out = model.loss(clean, num_loops=num_loops, seed=5)
    torch.testing.assert_close(out.loss, expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.nll_sum, each[-1].detach(), rtol=1e-6, atol=0)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        want = formula.weights[name].grad
        torch.testing.assert_close(parameter.grad, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))
    with torch.no_grad():
        plain = model.loss(clean, num_loops=num_loops, seed=5)
    torch.testing.assert_close(plain.loss, out.nll_sum / clean.numel(), rtol=1e-12, atol=0)


def test_losses_that_make_no_sense_are_refused() -> None:
    ids = tokens().masked_fill(tokens() == MASK, 1)
    for changes, attributes, message in (
        ({}, {"loop_loss": "first"}, "loop_loss: got 'first', expected one of last, mean, linear"),
        (DAMPED, {"loop_loss": "mean"}, "a damped loop is a part of one step"),
        ({}, {"loop_loss": "linear", "backprop_loops": 2}, "got backprop_loops 2"),
    ):
        model = make(**changes).train()
        for name, value in attributes.items():
            setattr(model, name, value)
        with pytest.raises(ValueError, match=message):
            model.loss(ids, num_loops=3)
    with pytest.raises(ValueError, match="compile and loop_loss mean"):
        TrainConfig(3, compile=True, loop_loss="mean")
    with pytest.raises(ValueError, match="backprop_loops 1"):
        TrainConfig(3, backprop_loops=1, loop_loss="mean")


def test_reading_out_a_loop_is_counted() -> None:
    config = make().config
    for convention, heads in (("blocks", 0), ("blocks+head", 1), ("blocks+head+embedding", 1)):
        layers = (config.num_layers - config.loop_end) * flops.layer_flops(config, 12)
        expected = 12 * (layers + heads * flops.head_flops(config))
        assert flops.readout_flops(config, 12, convention) == expected
