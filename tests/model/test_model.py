"""The model: names, counts, loops, masks, loss."""

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm import LoopMDM, LoopMDMConfig
from loopmdm.model.config import PRESETS


def small_config(**changes) -> LoopMDMConfig:
    values = {
        "vocab_size": 23,
        "mask_token_id": 22,
        "hidden_size": 32,
        "num_heads": 4,
        "num_layers": 4,
        "cond_dim": 8,
        "max_length": 24,
        "dropout": 0.0,
        "max_loops": 5,
    }
    return LoopMDMConfig(**{**values, **changes})


def randomized(config: LoopMDMConfig, dtype=torch.float64) -> LoopMDM:
    """A model in which nothing is zero: at initialisation every block is the identity."""
    torch.manual_seed(0)
    model = LoopMDM(config).to(dtype)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "adaLN" in name or name.startswith("output_layer.linear"):
                value.normal_(0, 0.3)
    return model.eval()


def ids(config, batch=3, length=16, seed=0):
    return torch.randint(0, config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def meta_model(name, **overrides):
    with torch.device("meta"):
        return LoopMDM(LoopMDMConfig.preset(name, **overrides))


@pytest.mark.parametrize(
    ("preset", "vocab", "names", "count"),
    [
        ("small", 50258, 131, 169_627_218),
        ("small", 30522, 131, 139_292_986),
        ("small", 35, 131, 92_434_467),
        ("tiny", 50258, 91, 80_061_266),
        ("medium", 50258, 251, 424_477_010),
    ],
)
def test_e3_parameter_counts(preset, vocab, names, count):
    model = meta_model(preset, vocab_size=vocab, mask_token_id=vocab - 1)
    assert len(model.state_dict()) == names
    assert sum(p.numel() for p in model.parameters()) == count


def test_e3_parameters_do_not_depend_on_loops():
    counts = {
        loops: {n: tuple(p.shape) for n, p in LoopMDM(small_config(max_loops=loops)).state_dict().items()}
        for loops in (1, 5, 24)
    }
    assert counts[1] == counts[5] == counts[24]


def test_loss_at_initialisation_is_uniform_over_the_vocabulary():
    config = small_config()
    out = LoopMDM(config).loss(ids(config) % 22, seed=0, t=torch.full((3,), 0.5))
    expected = torch.log(torch.tensor(22.0)) / 0.5
    masked = out.loss / expected  # share of masked tokens
    assert torch.isclose(masked * 48, (masked * 48).round(), atol=1e-3) and 0.2 < masked < 0.8


def test_e1_one_loop_is_the_plain_stack():
    config = small_config()
    looped = randomized(config, torch.float32)
    plain = randomized(small_config(loop_start=0, loop_end=4), torch.float32)
    tokens = ids(config)
    assert torch.equal(looped(tokens, num_loops=1), plain(tokens, num_loops=1))


@pytest.mark.parametrize("num_loops", [2, 3, 7])
def test_e2_logits_and_gradients_equal_the_unrolled_stack(num_loops):
    config = small_config()
    model = randomized(config)
    deep = randomized(small_config(num_layers=2 + 2 * num_loops, loop_start=0, loop_end=1))
    origin = [0, *([1, 2] * num_loops), 3]
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("blocks.")}
    for i, source in enumerate(origin):
        prefix = f"blocks.{source}."
        state |= {
            f"blocks.{i}.{k[len(prefix) :]}": v for k, v in model.state_dict().items() if k.startswith(prefix)
        }
    deep.load_state_dict(state)
    tokens = ids(config)
    first, second = model(tokens, num_loops=num_loops), deep(tokens, num_loops=1)
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)
    first.square().sum().backward()
    second.square().sum().backward()
    for i in range(4):
        for name, parameter in model.blocks[i].named_parameters():
            copies = [
                dict(deep.blocks[j].named_parameters())[name].grad for j, o in enumerate(origin) if o == i
            ]
            torch.testing.assert_close(parameter.grad, sum(copies), rtol=1e-7, atol=1e-9)


def test_e4_any_number_of_loops():
    config = small_config()
    model = randomized(config)
    tokens = ids(config)
    outputs = {loops: model(tokens, num_loops=loops) for loops in (1, 2, 5, 6, 24, 100)}
    assert all(out.isfinite().all() for out in outputs.values())
    assert torch.equal(model(tokens), outputs[config.max_loops])  # eval mode: max_loops
    per_sequence = model(tokens, num_loops=torch.tensor([24, 1, 5]))
    for i, loops in enumerate((24, 1, 5)):
        torch.testing.assert_close(per_sequence[i], outputs[loops][i], rtol=1e-9, atol=1e-9)


def test_training_draws_the_loop_count():
    config = small_config()
    model = LoopMDM(config).train()
    drawn = {model.loss(ids(config) % 22, seed=s).num_loops for s in range(60)}
    assert drawn == {1, 2, 3, 4, 5}
    assert model.eval().loss(ids(config) % 22, seed=1).num_loops == 5


def test_e4_compiled_model_keeps_few_graphs():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = randomized(small_config(), torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    tokens = ids(model.config)
    with torch.no_grad():
        for loops in (1, 2, 3, 4, 9):
            torch.testing.assert_close(compiled(tokens, num_loops=loops), model(tokens, num_loops=loops))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_time_conditioning_is_off_by_default():
    plain, conditioned = (randomized(small_config(time_conditioning=c)) for c in (False, True))
    tokens = ids(plain.config)
    a, b = torch.tensor([0.1, 1.0, 3.0]).double(), torch.tensor([0.1, 2.0, 3.0]).double()
    assert torch.equal(plain(tokens, a), plain(tokens, b))
    first, second = conditioned(tokens, a), conditioned(tokens, b)
    assert torch.equal(first[[0, 2]], second[[0, 2]]) and not torch.allclose(first[1], second[1])


def test_learned_positions_break_and_rotary_positions_see_order():
    for positions in ("learned", "rotary"):
        model = randomized(small_config(positions=positions))
        tokens = ids(model.config)
        turned = tokens.flip(1)
        assert not torch.allclose(model(tokens), model(turned).flip(1))
    names = set(randomized(small_config(positions="learned")).state_dict()) - set(
        randomized(small_config()).state_dict()
    )
    assert names == {"position_embed.embedding"}


def test_key_padding_mask_hides_keys_only_when_asked():
    model = randomized(small_config())
    tokens = ids(model.config)
    mask = torch.ones_like(tokens)
    mask[:, 12:] = 0
    short = model(tokens[:, :12])
    torch.testing.assert_close(model(tokens, attention_mask=mask)[:, :12], short, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(tokens)[:, :12], short)
    t = torch.full((3,), 0.9)
    clean = tokens % 22
    other = torch.where(mask.bool(), clean, (clean + 1) % 22)
    for attends, config in ((True, small_config()), (False, small_config(key_padding_mask=True))):
        model = randomized(config)
        losses = [model.loss(x, mask, num_loops=2, seed=4, t=t).loss for x in (clean, other)]
        assert bool(torch.isclose(*losses, rtol=1e-9)) is not attends


def test_bf16_autocast_computes_in_bf16_and_keeps_the_stream():
    model = randomized(small_config(), torch.float32)
    tokens = ids(model.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.compute_dtype == torch.bfloat16
        assert model.hidden(tokens).dtype == torch.float32
        logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    exact = model(tokens)
    error = (logits.float() - exact).abs().max()
    assert 0 < error < 0.1 * exact.abs().max()


def test_dropout_acts_in_training_only_and_follows_the_seed():
    config = small_config(dropout=0.3)
    model = randomized(config, torch.float32)
    clean = ids(config) % 22
    t = torch.full((3,), 0.9)
    eval_loss = [model.loss(clean, num_loops=2, seed=1, t=t).loss for _ in range(2)]
    model.train()
    losses = [model.loss(clean, num_loops=2, seed=s, t=t).loss for s in (1, 1)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], eval_loss[0])
    assert not torch.equal(model(clean, num_loops=1), model(clean, num_loops=1))


def test_loss_equals_the_formula():
    """sum over masked of 1/t * -log p, over all counted tokens."""
    config = small_config()
    model = randomized(config)
    clean = ids(config) % 22
    prompt = torch.zeros_like(clean, dtype=torch.bool)
    prompt[:, :4] = True
    real = torch.ones_like(clean)
    real[0, 12:] = 0
    t = torch.tensor([0.3, 0.6, 0.9])
    out = model.loss(clean, real, num_loops=3, seed=7, prompt_mask=prompt, t=t)
    generator = torch.Generator().manual_seed(7)
    frozen = prompt | (real == 0)
    masked = (torch.rand(clean.shape, generator=generator) < 0.999 * t[:, None]) & ~frozen
    logits = model(torch.where(masked, 22, clean), num_loops=3)
    logits[..., 22] = -torch.inf
    nll = -torch.log_softmax(logits, -1).gather(-1, clean[..., None])[..., 0]
    expected = (torch.where(masked, nll, 0.0) / t[:, None].double()).sum()
    assert int(out.num_tokens) == int((~frozen).sum())
    torch.testing.assert_close(out.nll_sum, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.loss, expected / (~frozen).sum(), rtol=1e-6, atol=0)


def test_presets_build():
    for name, values in PRESETS.items():
        overrides = {} if "vocab_size" in values else {"vocab_size": 50258, "mask_token_id": 50257}
        config = LoopMDMConfig.preset(name, **overrides)
        assert LoopMDMConfig.from_dict(config.to_dict()) == config
    assert sum(p.numel() for p in meta_model("sudoku6").parameters()) == 165_719


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": torch.zeros(2, 4)}, TypeError, "input_ids: got torch.float32"),
        ({"input_ids": [1, 2]}, TypeError, "input_ids: got list"),
        ({"input_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, r"input_ids: got shape \(4,\)"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, ValueError, "not empty"),
        ({"input_ids": torch.full((1, 4), 23)}, ValueError, r"ids in 23..23, expected 0..22"),
        ({"input_ids": torch.full((1, 4), -1)}, ValueError, r"ids in -1..-1"),
        (
            {"input_ids": torch.zeros(1, 25, dtype=torch.int64)},
            ValueError,
            "length 25 is beyond max_length 24",
        ),
        ({"num_loops": 0}, ValueError, "num_loops: got 0, expected at least 1"),
        ({"num_loops": -3}, ValueError, "num_loops: got -3"),
        ({"attention_mask": torch.ones(2, 5)}, ValueError, r"attention_mask: got shape \(2, 5\)"),
        ({"timesteps": torch.ones(3)}, ValueError, r"timesteps: got shape \(3,\), expected \[2\]"),
    ],
)
def test_bad_forward_input(arguments, error, message):
    model = LoopMDM(small_config()).eval()
    with pytest.raises(error, match=message):
        model(**{"input_ids": torch.zeros(2, 4, dtype=torch.int64), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.full((2, 4), 22)}, "contains the mask token 22"),
        ({"t": torch.tensor([0.0, 0.5])}, "t: got shape"),
        ({"t": torch.tensor([0.5])}, "t: got shape"),
        ({"prompt_mask": torch.ones(2, 4, dtype=torch.bool)}, "no token is left to count"),
        ({"prompt_mask": torch.ones(2, 3, dtype=torch.bool)}, "prompt_mask: got shape"),
        ({"num_loops": 0}, "num_loops: got 0"),
    ],
)
def test_bad_loss_input(arguments, message):
    model = LoopMDM(small_config())
    with pytest.raises(ValueError, match=message):
        model.loss(**{"input_ids": torch.zeros(2, 4, dtype=torch.int64), **arguments})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask_token_id": 23}, ValueError, "mask_token_id: got 23, expected 0..22"),
        ({"hidden_size": 30}, ValueError, "hidden_size: got 30, expected a multiple of 2 \\* num_heads"),
        ({"loop_start": 3, "loop_end": 3}, ValueError, "loop_start, loop_end: got \\(3, 3\\)"),
        ({"loop_end": 9}, ValueError, "loop_start, loop_end"),
        ({"max_loops": 0}, ValueError, "max_loops: got 0"),
        ({"dropout": 1.0}, ValueError, "dropout: got 1.0"),
        ({"positions": "sinus"}, ValueError, "positions: got 'sinus'"),
        ({"vocab_size": "23"}, TypeError, "vocab_size: got '23', expected int"),
        ({"num_layers": True}, TypeError, "num_layers: got True"),
    ],
)
def test_bad_config(changes, error, message):
    with pytest.raises(error, match=message):
        small_config(**changes)


def test_unknown_preset_and_fields():
    with pytest.raises(ValueError, match="preset: got 'huge', expected one of"):
        LoopMDMConfig.preset("huge")
    with pytest.raises(ValueError, match=r"unknown configuration fields \['widht'\]"):
        LoopMDMConfig.preset("sudoku", widht=3)
    with pytest.raises(ValueError, match=r"missing configuration fields \['mask_token_id', 'vocab_size'\]"):
        LoopMDMConfig.preset("small")


def test_backend_can_be_forced_for_the_whole_model():
    model = randomized(small_config(), torch.float32)
    tokens = ids(model.config)
    with torch.no_grad():
        default = model(tokens)
        with lk.use_backend("cpu"):
            assert torch.equal(model(tokens), default)
        with lk.use_backend("reference"):
            plain = model(tokens)
    assert not torch.equal(plain, default)  # other sums, the same model
    torch.testing.assert_close(plain, default, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_logits_may_be_written_into(backend: str) -> None:
    """As the reference's training step does, which hides the mask token in place."""
    torch.manual_seed(0)
    model = LoopMDM(LoopMDMConfig(20, 19, hidden_size=16, num_heads=2, num_layers=3, cond_dim=8, dropout=0.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.randint(19, (2, 8))
    with lk.use_backend(backend):
        logits = model(tokens, num_loops=2)
        hidden = torch.zeros(20).index_fill(0, torch.tensor([19]), -1e6)
        expected = torch.autograd.grad(
            (logits + hidden).log_softmax(-1)[..., 3].sum(), model.vocab_embed.embedding
        )
        logits = model(tokens, num_loops=2)
        logits[:, :, 19] += -1e6
        got = torch.autograd.grad(logits.log_softmax(-1)[..., 3].sum(), model.vocab_embed.embedding)
    torch.testing.assert_close(got[0], expected[0])
