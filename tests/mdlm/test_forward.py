"""The specified forward: DIT and LoopMDM against an independent float64 computation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loopmdm import LoopMDM, LoopMDMConfig, patch
from loopmdm.mdlm import DIT
from tests.mdlm import independent_forward
from tests.mdlm.reference_dit import ReferenceDIT, randomise, reference_config

VOCAB = 13
LOOP = (1, 3)


def independent(module: torch.nn.Module, ids: Tensor, sigma: Tensor, num_loops: int, timed: bool) -> Tensor:
    state = {name: tensor.double().numpy() for name, tensor in module.state_dict().items()}
    logits = independent_forward.forward(
        state, ids.numpy(), sigma.double().numpy(), loop=LOOP, num_loops=num_loops, time_conditioning=timed
    )
    return torch.from_numpy(logits)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(VOCAB, (3, 11), generator=generator), torch.tensor([0.02, 0.7, 4.0])


def config(num_loops: int, timed: bool) -> LoopMDMConfig:
    return LoopMDMConfig(
        vocab_size=VOCAB,
        mask_token_id=VOCAB - 1,
        hidden_size=16,
        num_heads=2,
        num_layers=5,
        cond_dim=8,
        max_length=32,
        max_loops=num_loops,
        time_conditioning=timed,
    )


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("num_loops", [1, 3, 12])
def test_loopmdm_float64(num_loops: int, timed: bool) -> None:
    model = LoopMDM(config(num_loops, timed)).double().eval()
    randomise(model)
    ids, sigma = inputs()
    expected = independent(model, ids, sigma, num_loops, timed)
    torch.testing.assert_close(model(ids, sigma), expected, rtol=1e-10, atol=1e-10)
    assert expected.std() > 0.1
    other = independent(model, ids, sigma + 0.5, num_loops, timed)
    assert torch.equal(other, expected) != timed


@pytest.mark.parametrize("num_loops", [1, 3, 12])
def test_dit_float64(num_loops: int) -> None:
    """DIT feeds sigma as given: zeros are the caller's way to turn time conditioning off."""
    model = DIT(reference_config(num_loops=num_loops), VOCAB).double().eval()
    randomise(model)
    ids, sigma = inputs()
    expected = independent(model, ids, sigma, num_loops, True)
    torch.testing.assert_close(model(ids, sigma), expected, rtol=1e-10, atol=1e-10)
    expected = independent(model, ids, sigma, num_loops, False)
    torch.testing.assert_close(model(ids, torch.zeros(3)), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_loops", [1, 3, 12])
@pytest.mark.parametrize("kind", ["DIT", "LoopMDM"])
def test_float32_error_is_that_of_plain_pytorch(kind: str, num_loops: int) -> None:
    reference = ReferenceDIT(reference_config(), VOCAB).eval()
    randomise(reference)
    reference.order = [0, *[1, 2] * num_loops, 3, 4]
    model: Any = (
        DIT(reference_config(num_loops=num_loops), VOCAB)
        if kind == "DIT"
        else LoopMDM(config(num_loops, True))
    )
    model.load_state_dict(reference.state_dict())
    ids, sigma = inputs()
    exact = independent(reference, ids, sigma, num_loops, True)
    theirs = (reference(ids, sigma).double() - exact).abs().max()
    ours = (model.eval()(ids, sigma).double() - exact).abs().max()
    assert ours <= 2 * theirs + torch.finfo(torch.float32).eps * exact.abs().max()


def bfloat16_squared_errors(kind: str, num_loops: int, seed: int) -> Tensor:
    """Mean squared errors of our logits and of the reference's, for the weights of `seed`."""
    reference = ReferenceDIT(reference_config(), VOCAB).eval()
    randomise(reference, seed)
    reference.order = [0, *[1, 2] * num_loops, 3, 4]
    reference.trunk_dtype = torch.bfloat16
    ids, sigma = inputs()
    exact = independent(reference, ids, sigma, num_loops, True)
    theirs = reference(ids, sigma)
    if kind == "patch":
        reference.order = [0, 1, 2, 3, 4]
        ours = patch(reference, num_loops)(ids, sigma)
    else:
        model: Any = LoopMDM(config(num_loops, True))
        if kind == "DIT":
            model = DIT(reference_config(num_loops=num_loops), VOCAB)
        model.load_state_dict(reference.state_dict())
        with torch.autocast("cpu", torch.bfloat16):
            ours = model.eval()(ids, sigma)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    return torch.stack([(logits.double() - exact).square().mean().detach() for logits in (ours, theirs)])


@pytest.mark.parametrize("num_loops", [1, 3, 12])
@pytest.mark.parametrize("kind", ["DIT", "LoopMDM", "patch"])
def test_bfloat16_error_is_that_of_the_reference_s_rounding_points(kind: str, num_loops: int) -> None:
    """Blocks and head in bf16, everything else in fp32, as on a GPU; the residual stream stays fp32.

    Loops carry one rounding error through all logits, so those of one model are few independent draws, and
    which way they fall differs with the order of sums of the machine. Of many models it averages out.
    """
    errors = torch.stack([bfloat16_squared_errors(kind, num_loops, seed) for seed in range(16)])
    error, allowed = errors.mean(0).sqrt()
    assert 0 < error <= 1.2 * allowed


def test_the_stand_in_is_the_specified_forward() -> None:
    reference = ReferenceDIT(reference_config(), VOCAB).double().eval()
    randomise(reference)
    ids, sigma = inputs()
    exact = independent(reference, ids, sigma, 1, True)
    torch.testing.assert_close(reference(ids, sigma.double()), exact, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_the_reference() -> None:
    """Also of adaLN, whose conditioning vector is one for all rows, and of the embedding."""
    reference = ReferenceDIT(reference_config(dropout=0.0), VOCAB).double()
    randomise(reference)
    reference.order = [0, 1, 2, 1, 2, 1, 2, 3, 4]
    model = DIT(reference_config(dropout=0.0, num_loops=3), VOCAB).double()
    model.load_state_dict(reference.state_dict())
    ids, sigma = inputs()
    weight = torch.randn(3, 11, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for module in (reference, model):
        (module(ids, torch.zeros_like(sigma, dtype=torch.float64)) * weight).sum().backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        expected = theirs[name].grad
        assert expected is not None and expected.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-9)


def test_dropout_is_active_in_training_only_and_before_the_gate() -> None:
    ids, sigma = inputs()
    model = DIT(reference_config(dropout=0.5, num_loops=2), VOCAB)
    randomise(model)
    model.eval()
    assert torch.equal(model(ids, sigma), model(ids, sigma))
    kept = model(ids, sigma)
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(ids, sigma), kept)
    assert not torch.equal(model(ids, sigma), model(ids, sigma))
    with torch.no_grad():
        for block in model.blocks:  # closed gates: no branch, so no dropout can show
            block.adaLN_modulation.weight.zero_()
            block.adaLN_modulation.bias.view(6, -1)[[2, 5]] = 0
    assert torch.equal(model(ids, sigma), model.eval()(ids, sigma))


class Node(dict[str, Any]):
    """Attribute and item access, as OmegaConf's nodes have."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def test_constructor_takes_dicts_objects_and_nodes() -> None:
    fields = vars(reference_config().model)
    models = [
        DIT(given, VOCAB)
        for given in (
            reference_config(),
            {"model": fields},
            Node(model=Node(fields)),
            {"model": Node(fields)},
        )
    ]
    names = list(ReferenceDIT(reference_config(), VOCAB).state_dict())
    for model in models:
        assert model.config == models[0].config
        assert list(model.state_dict()) == names
        assert model.num_loops == 1
    assert models[0].config.dropout == 0.1 and models[0].config.max_length == 32


def test_parameter_order_and_init_are_the_reference_s() -> None:
    torch.manual_seed(0)
    reference = ReferenceDIT(reference_config(), VOCAB)
    torch.manual_seed(0)
    model = DIT(reference_config(), VOCAB)
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in reference.named_parameters()
    ]
    for name, tensor in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_constructor_errors() -> None:
    with pytest.raises(ValueError, match="n_blocks"):
        DIT({"model": {"hidden_size": 16}}, VOCAB)
    with pytest.raises(ValueError, match="no field 'model'"):
        DIT({}, VOCAB)
    with pytest.raises(TypeError, match="vocab_size"):
        DIT(reference_config())
    with pytest.raises(ValueError, match="num_heads"):
        DIT(reference_config(n_heads=3), VOCAB)
    with pytest.raises(ValueError, match="max_loops"):
        DIT(reference_config(num_loops=0), VOCAB)
    learned = LoopMDMConfig.preset("sudoku6")
    with pytest.raises(ValueError, match="positions"):
        DIT(learned)


def test_loop_of_dit_can_be_moved_and_changed() -> None:
    ids, sigma = inputs()
    model = DIT(reference_config(loop_start=2, loop_end=5, num_loops=2), VOCAB).double().eval()
    randomise(model)
    reference = ReferenceDIT(reference_config(), VOCAB).double().eval()
    reference.load_state_dict(model.state_dict())
    reference.order = [0, 1, 2, 3, 4, 2, 3, 4]
    torch.testing.assert_close(model(ids, sigma), reference(ids, sigma.double()))
    model.num_loops = 1
    reference.order = [0, 1, 2, 3, 4]
    torch.testing.assert_close(model(ids, sigma), reference(ids, sigma.double()))
    model.num_loops = 0
    for call in (model, model.forward_with_states):
        with pytest.raises(ValueError, match="num_loops must be at least 1, got 0"):
            call(ids, sigma)


def test_small_has_the_published_names_and_size() -> None:
    """E3: 131 names and 169,627,218 parameters, whatever the number of loops."""
    for num_loops in (1, 12):
        with torch.device("meta"):
            small = {"hidden_size": 768, "cond_dim": 128, "n_blocks": 12, "n_heads": 12, "dropout": 0.1}
            model = DIT({"model": {**small, "num_loops": num_loops}}, 50258)
        assert len(model.state_dict()) == 131
        assert sum(parameter.numel() for parameter in model.parameters()) == 169_627_218
    for vocab, count in ((30522, 139_292_986), (35, 92_434_467)):
        with torch.device("meta"):
            model = DIT({"model": small}, vocab)
        assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert DIT({"model": {**small, "hidden_size": 24, "n_blocks": 1}}, 30522).config.mask_token_id == 103


def test_numpy_oracle_has_no_loop_of_its_own_making() -> None:
    """S loops of the oracle equal the stack written out with copied weights."""
    reference = ReferenceDIT(reference_config(), VOCAB).double()
    randomise(reference)
    ids, sigma = inputs()
    state = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    unrolled = {name: value for name, value in state.items() if not name.startswith("blocks.")}
    for position, source in enumerate([0, 1, 2, 1, 2, 3, 4]):
        for name, value in state.items():
            if name.startswith(f"blocks.{source}."):
                unrolled[name.replace(f"blocks.{source}.", f"blocks.{position}.", 1)] = value
    arguments: dict[str, Any] = {"time_conditioning": True}
    looped = independent_forward.forward(
        state, ids.numpy(), sigma.double().numpy(), loop=(1, 3), num_loops=2, **arguments
    )
    flat = independent_forward.forward(
        unrolled, ids.numpy(), sigma.double().numpy(), loop=(0, 1), num_loops=1, **arguments
    )
    np.testing.assert_array_equal(looped, flat)
