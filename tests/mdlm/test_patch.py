"""`patch` loops a reference module in place and leaves everything else of it alone."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from loopmdm import patch
from loopmdm.mdlm import DIT, unpatch
from tests.mdlm.reference_dit import Diffusion, HubBackbone, ReferenceDIT, randomise, reference_config

VOCAB = 13
ORDER_OF_3 = [0, 1, 2, 1, 2, 1, 2, 3, 4]


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(VOCAB, (3, 11), generator=generator), torch.tensor(
        [0.02, 0.7, 4.0], dtype=torch.float64
    )


def module_and_oracle(kind: type[Any] = ReferenceDIT, **changes: Any) -> tuple[Any, Any]:
    module = kind(reference_config(**changes), VOCAB).double().eval()
    randomise(module)
    return module, copy.deepcopy(module)


def test_it_loops() -> None:
    module, oracle = module_and_oracle()
    ids, sigma = inputs()
    assert patch(module, num_loops=3) is module
    oracle.order = ORDER_OF_3
    torch.testing.assert_close(module(ids, sigma), oracle(ids, sigma))
    module.num_loops = 1
    oracle.order = [0, 1, 2, 3, 4]
    torch.testing.assert_close(module(ids, sigma), oracle(ids, sigma))


@pytest.mark.parametrize("loop", [(0, 5), (0, 2), (3, 5), (2, 3)])
def test_any_range(loop: tuple[int, int]) -> None:
    module, oracle = module_and_oracle()
    ids, sigma = inputs()
    patch(module, 2, loop)
    oracle.order = [*range(loop[0]), *range(*loop), *range(*loop), *range(loop[1], 5)]
    torch.testing.assert_close(module(ids, sigma), oracle(ids, sigma))


def test_default_is_twelve_loops_of_blocks_1_and_2() -> None:
    module, _ = module_and_oracle()
    ids, sigma = inputs()
    oracle = DIT(reference_config(num_loops=12), VOCAB).double().eval()
    oracle.load_state_dict(module.state_dict())
    torch.testing.assert_close(patch(module)(ids, sigma), oracle(ids, sigma))


def test_parameters_names_and_optimizer_stay() -> None:
    module, _ = module_and_oracle()
    module.train()
    before = dict(module.named_parameters())
    names = list(module.state_dict())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    patch(module, num_loops=2)
    after = dict(module.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in after)
    assert list(module.state_dict()) == names
    assert isinstance(module, ReferenceDIT)
    old = {name: parameter.detach().clone() for name, parameter in after.items()}
    ids, sigma = inputs()
    module(ids, sigma).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(old[name], parameter) for name, parameter in after.items())


def test_gradients() -> None:
    module, oracle = module_and_oracle(dropout=0.0)
    patch(module, num_loops=3)
    oracle.order = ORDER_OF_3
    ids, sigma = inputs()
    for each in (module, oracle):
        each(ids, sigma).square().mean().backward()
    expected = dict(oracle.named_parameters())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-9, atol=1e-12)


def test_dropout_follows_train_and_eval() -> None:
    module, _ = module_and_oracle(dropout=0.5)
    patch(module, num_loops=2)
    ids, sigma = inputs()
    assert torch.equal(module(ids, sigma), module(ids, sigma))
    module.train()
    assert not torch.equal(module(ids, sigma), module(ids, sigma))
    torch.manual_seed(3)
    first = module(ids, sigma)
    torch.manual_seed(3)
    assert torch.equal(module(ids, sigma), first)


def test_wrapper_with_a_backbone() -> None:
    module, oracle = module_and_oracle(Diffusion)
    ids, sigma = inputs()
    names = list(module.state_dict())
    patch(module, num_loops=5)
    module.num_loops = 3
    oracle.backbone.order = ORDER_OF_3
    torch.testing.assert_close(module.backbone(ids, sigma), oracle.backbone(ids, sigma))
    assert list(module.state_dict()) == names


@pytest.mark.parametrize("num_loops", [1, 3])
def test_hub_form_still_returns_its_states(num_loops: int) -> None:
    module, oracle = module_and_oracle(HubBackbone)
    ids, sigma = inputs()
    patch(module, num_loops)
    oracle.order = [0, *[1, 2] * num_loops, 3, 4]
    logits, states = module(ids, sigma, output_hidden_states=True)
    expected, every = oracle(ids, sigma, output_hidden_states=True)
    torch.testing.assert_close(logits, expected)
    last = [every[0], every[1], *every[-4:]]  # of the looped blocks, the last application
    assert len(states) == len(last) == 6
    for state, wanted in zip(states, last, strict=True):
        torch.testing.assert_close(state, wanted)
    torch.testing.assert_close(module(ids, sigma)[0], expected)
    assert module(ids, sigma)[1] == []


def test_unpatch_and_patching_twice() -> None:
    module, oracle = module_and_oracle()
    ids, sigma = inputs()
    patch(module, num_loops=7)
    patch(module, num_loops=2, loop=(0, 1))
    oracle.order = [0, 0, 1, 2, 3, 4]
    torch.testing.assert_close(module(ids, sigma), oracle(ids, sigma))
    unpatch(module)
    oracle.order = [0, 1, 2, 3, 4]
    assert torch.equal(module(ids, sigma), oracle(ids, sigma))
    assert not hasattr(module, "num_loops") and set(vars(module)) == set(vars(oracle))
    assert unpatch(module) is module


def test_copies_and_pickles_are_patched_on_their_own() -> None:
    module, _ = module_and_oracle()
    ids, sigma = inputs()
    patch(module, num_loops=3)
    looped = module(ids, sigma)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        twin.num_loops = 1
        assert not torch.equal(twin(ids, sigma), looped)
        twin.num_loops = 3
        with torch.no_grad():
            twin.vocab_embed.embedding.zero_()
        assert not torch.equal(twin(ids, sigma), looped)
    assert torch.equal(module(ids, sigma), looped)


def test_bad_arguments() -> None:
    module, oracle = module_and_oracle()
    ids, sigma = inputs()
    with pytest.raises(TypeError, match="vocab_embed, sigma_map, rotary_emb, blocks, output_layer"):
        patch(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"loop: got \(1, 9\), expected 0 <= start < end <= 5"):
        patch(module, loop=(1, 9))
    for bad, kind in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(kind, match="num_loops"):
            patch(module, num_loops=bad)  # type: ignore[arg-type]
    assert torch.equal(module(ids, sigma), oracle(ids, sigma))
    patch(module)
    module.num_loops = 0
    with pytest.raises(ValueError, match="num_loops must be at least 1, got 0"):
        module(ids, sigma)
    module.num_loops = 2
    with pytest.raises(ValueError, match="takes"):
        module.blocks[0](torch.zeros(1, 2, 16), None, torch.zeros(1, 8), seqlens=[3])
    del module.blocks[0].adaLN_modulation
    with pytest.raises(TypeError, match=r"blocks\.0\.adaLN_modulation"):
        patch(module)


def test_frequencies_rounded_to_bf16_are_not_used() -> None:
    """They would turn far positions by whole radians."""
    module, oracle = module_and_oracle()
    ids, sigma = inputs()
    patch(module, num_loops=1)
    module.rotary_emb.inv_freq = module.rotary_emb.inv_freq.bfloat16()
    torch.testing.assert_close(module(ids, sigma), oracle(ids, sigma), rtol=1e-5, atol=1e-5)
