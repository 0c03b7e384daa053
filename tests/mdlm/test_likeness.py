"""A module that looks like MDLM's and computes something else is refused, by the part that differs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import module as nn_module
from torch.utils.flop_counter import FlopCounterMode

from loopmdm import LoopMDM, patch
from loopmdm.mdlm import DIT, likeness, unpatch
from tests.mdlm.lookalikes import (
    ALIKE,
    OTHER_BLOCKS,
    OTHER_ORDERS,
    OTHER_PARTS,
    Block,
    layer_norm,
    norms,
    pieces,
    rms_norm,
)
from tests.mdlm.reference_dit import HubBackbone, ReferenceDIT, randomise, reference_config

VOCAB = 13
IDS = torch.randint(VOCAB, (3, 11), generator=torch.Generator().manual_seed(5))
SIGMA = torch.tensor([0.02, 0.7, 4.0])
BLOCK_OF = {"causal in block 4": 4, "extra branch": 2, "own forward of an instance": 3}


def network(change: Any = None, kind: Any = ReferenceDIT, **changes: Any) -> Any:
    """As made: adaLN and the head at zero, where nothing that a block does shows in what it returns."""
    torch.manual_seed(0)
    net = kind(reference_config(**changes), VOCAB).eval()
    if change is not None:
        change(net)
    return net


@pytest.mark.parametrize("name", OTHER_BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_blocks_are_refused_by_patch(name: str, dtype: torch.dtype) -> None:
    net = network(OTHER_BLOCKS[name]).to(dtype)
    before = dict(vars(net))
    with pytest.raises(ValueError, match=rf"^reference_module: .*DIT: blocks\.{BLOCK_OF.get(name, 0)} comp"):
        patch(net, num_loops=1)
    assert vars(net) == before


@pytest.mark.parametrize("name", OTHER_BLOCKS)
def test_other_blocks_are_refused_by_from_mdlm(name: str) -> None:
    message = rf"blocks\.{BLOCK_OF.get(name, 0)} computes something else|tensors do not fit"
    with pytest.raises(ValueError, match=message):
        LoopMDM.from_mdlm(network(OTHER_BLOCKS[name]))


@pytest.mark.parametrize("name", OTHER_ORDERS)
def test_other_connections_are_refused(name: str) -> None:
    change, message = OTHER_ORDERS[name]
    with pytest.raises(ValueError, match=message):
        patch(network(change))
    with pytest.raises(ValueError, match=message):
        LoopMDM.from_mdlm(network(change))


@pytest.mark.parametrize("name", OTHER_PARTS)
def test_other_parts_are_refused_where_they_are_replaced(name: str) -> None:
    """`patch` leaves them as they are."""
    change, part = OTHER_PARTS[name]
    net = network(change)
    with pytest.raises(ValueError, match=rf"^path_or_module: .*: {part}"):
        LoopMDM.from_mdlm(net, time_conditioning=True)
    randomise(net)
    before = net(IDS, SIGMA)
    torch.testing.assert_close(patch(net, num_loops=1)(IDS, SIGMA), before)


def test_noise_levels_count_where_they_are_used() -> None:
    """Without time conditioning a network is fed zeros, of which sines and cosines come alone."""
    change, _ = OTHER_PARTS["log of sigma"]
    timeless = lambda net: setattr(net.sigma_map, "__class__", net.sigma_map.__class__)  # noqa: E731
    assert LoopMDM.from_mdlm(network(timeless)).config.time_conditioning is False
    with pytest.raises(ValueError, match="sigma_map computes something else"):
        LoopMDM.from_mdlm(network(change), time_conditioning=True)


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_same_in_another_way_is_taken(name: str, dtype: torch.dtype) -> None:
    net = network(ALIKE[name]).to(dtype)
    if name != "rotary tables":  # its buffers are not MDLM's
        LoopMDM.from_mdlm(net)
    patch(net, num_loops=1)


def test_the_hint_names_what_the_structure_shows() -> None:
    wrong = {
        r"\(\.norm1 is a tests\..*OtherNorm\)": norms(rms_norm, "norm1", "norm2"),
        r"\(has parameters gamma\)": OTHER_BLOCKS["layer scale"],
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            patch(network(change))


def test_nothing_is_changed() -> None:
    net = network(ALIKE["rotary tables"], dropout=0.3)
    randomise(net)
    net.train(), net.blocks[2].eval()
    net(IDS, SIGMA).sum().backward()
    fired: list[Any] = []
    for part in net.modules():
        part.register_forward_hook(lambda *_: fired.append(1))
        part.register_forward_pre_hook(lambda *_: fired.append(1))
    everywhere = nn_module.register_module_forward_hook(lambda *_: fired.append(1))
    kept = net.rotary_emb.kept
    state = {name: (p, p._version, p.clone(), p.grad) for name, p in net.named_parameters()}
    training = {name: part.training for name, part in net.named_modules()}
    members = {name: set(vars(part)) for name, part in net.named_modules()}
    plain = network()
    rng = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FlopCounterMode(display=False) as flops, torch.autocast("cpu", torch.bfloat16):
            likeness.check_blocks(net, range(5), "net")
            LoopMDM.from_mdlm(plain)
            assert torch.is_autocast_enabled("cpu") and torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
        everywhere.remove()
    assert not fired and flops.get_total_flops() == 0 and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), rng)
    assert net.rotary_emb.kept is kept and net.rotary_emb.calls == [11]
    for name, parameter in net.named_parameters():
        same, version, value, grad = state[name]
        assert parameter is same and parameter._version == version and torch.equal(parameter, value)
        assert parameter.grad is grad and (grad is None or torch.isfinite(grad).all())
    assert {name: part.training for name, part in net.named_modules()} == training
    assert {name: set(vars(part)) for name, part in net.named_modules()} == members


def test_a_patched_module_is_read_and_patched_again() -> None:
    net = network()
    randomise(net)
    before = net(IDS, SIGMA)
    patch(patch(net, num_loops=3), num_loops=2)
    model = LoopMDM.from_mdlm(net, time_conditioning=True)
    torch.testing.assert_close(model(IDS, SIGMA), net(IDS, SIGMA))
    torch.testing.assert_close(model(IDS, SIGMA, num_loops=1), before)


def test_a_forward_of_the_instance_comes_back() -> None:
    net = network()
    block = net.blocks[1]

    def own(*args: Any, **options: Any) -> Tensor:
        return type(block).forward(block, *args, **options)

    block.forward = own
    with pytest.raises(ValueError, match=r"blocks\.1 computes"):  # a copy would run the original
        patch(net)
    assert block.forward is own
    block.forward = block.attn_out.forward.__class__(type(block).forward, block)  # a bound method is copied
    bound = vars(block)["forward"]
    patch(net)
    unpatch(net)
    assert vars(block)["forward"] is bound


def test_what_comes_later_is_compared_when_it_is_to_run() -> None:
    """A block that ran as modules, and one with other norms of the same class."""
    net = network(pieces(1, allowed=staticmethod(lambda query, key: key <= query)))
    randomise(net)
    act, net.blocks[1].mlp[1] = net.blocks[1].mlp[1], nn.ReLU()
    patch(net)
    with pytest.warns(UserWarning, match="called one by one"):
        net(IDS, SIGMA)
    net.blocks[1].mlp[1] = act
    with pytest.raises(ValueError, match=r"blocks\.1 computes something else"):
        net(IDS, SIGMA)

    class Norm(nn.Module):
        def __init__(self, eps: float) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(16)), eps

        def forward(self, x: Tensor) -> Tensor:
            return layer_norm(self.eps)(self, x)

    net = network()
    for block in net.blocks:
        block.norm1, block.norm2 = Norm(1e-5), Norm(1e-5)
    before = patch(net)(IDS, SIGMA)
    net.blocks[3].norm2 = Norm(1e-5)
    assert torch.equal(net(IDS, SIGMA), before)
    net.blocks[3].norm2 = Norm(1e-6)
    with pytest.raises(ValueError, match=r"blocks\.3 computes something else than MDLM's \(\.norm1 is"):
        net(IDS, SIGMA)


def only_on_a_gpu(*_: Any) -> Tensor:
    raise RuntimeError("FlashAttention only supports half precision on a GPU\nand more")


def in_half_precision(self: Any, h: Tensor, rotary: Any) -> Tensor:
    if torch.get_autocast_dtype("cpu") != torch.bfloat16 or not torch.is_autocast_enabled("cpu"):
        raise RuntimeError("FlashAttention only supports half precision")
    return Block.attend(self, h, rotary)


def test_what_cannot_run_is_looked_at() -> None:
    for net in (network(pieces(attend=only_on_a_gpu)), network().to("meta")):
        net.blocks[2].mlp[1] = nn.ReLU()  # runs as modules in any case
        with pytest.warns(UserWarning, match=r"could not be run here \(.*(only supports half|meta device)"):
            patch(net)
    with pytest.warns(UserWarning, match="could not be run"):
        LoopMDM.from_mdlm(network(pieces(attend=only_on_a_gpu)))
    with FakeTensorMode():
        fake = network()
        with pytest.warns(UserWarning, match=r"could not be run here \(.*is a Fake"):
            patch(fake)
    for net in (fake, network().to("meta")):
        with pytest.raises(ValueError, match=r"vocab_embed\.embedding holds no values"):
            LoopMDM.from_mdlm(net)

    def eps(net: Any) -> None:
        net.blocks[1].norm2.eps = 1e-6

    def bias(net: Any) -> None:
        net.blocks[1].norm2.bias = nn.Parameter(torch.zeros(16))

    def heads(net: Any) -> None:
        net.blocks[1].n_heads = 4

    def causal(net: Any) -> None:
        net.blocks[1].causal = True

    def gamma(net: Any) -> None:
        net.blocks[1].gamma = nn.Parameter(torch.ones(16))

    wrong = {
        r"blocks\.0\.norm1 is a .*OtherNorm": norms(rms_norm, "norm1", "norm2"),
        r"blocks\.1\.norm2 has eps 1e-06": eps,
        r"blocks\.1\.norm2 has a bias": bias,
        r"blocks\.1 has 4 heads": heads,
        r"causal attention": causal,
        r"blocks\.1 has parameters gamma": gamma,
        r"base 10000": lambda net: net.rotary_emb.inv_freq.mul_(2),
    }
    for message, change in wrong.items():
        net = network(pieces(attend=only_on_a_gpu))
        change(net)
        with pytest.raises(ValueError, match=message):
            patch(net)


def test_a_block_that_needs_autocast_is_compared_under_it() -> None:
    def under_autocast(net: Any, attend: Any) -> None:
        pieces(attend=attend)(net)
        net.trunk_dtype = torch.bfloat16

    patch(network(lambda net: under_autocast(net, in_half_precision)))

    def causal(self: Any, h: Tensor, rotary: Any) -> Tensor:
        self.allowed = lambda query, key: key <= query
        return in_half_precision(self, h, rotary)

    with pytest.raises(ValueError, match=r"blocks\.0 computes something.*where rounding explains 0\.[012]"):
        patch(network(lambda net: under_autocast(net, causal)))


def test_rotary_bases() -> None:
    """`patch` computes with the module's frequencies; where they were rounded, with those of base 1e4."""
    net = network()
    randomise(net)
    net.rotary_emb.inv_freq = 1 / 5e5 ** (torch.arange(4) / 4)
    before = net(IDS, SIGMA)
    torch.testing.assert_close(patch(net, num_loops=1)(IDS, SIGMA), before)
    with pytest.raises(ValueError, match=r"blocks\.0 computes something else"):
        patch(net.bfloat16())


def test_our_own_models() -> None:
    with pytest.raises(TypeError, match="reference_module: DIT loops by itself"):
        patch(DIT(reference_config(), VOCAB))
    patch(network(kind=HubBackbone))
    assert likeness.check_blocks(torch.compile(network()), range(5), "compiled") == []


def test_what_a_copy_of_weights_leaves_behind() -> None:
    for net in (network(), DIT(reference_config(), VOCAB)):
        handle = net.blocks[1].attn_qkv.register_forward_hook(lambda *args: 2 * args[2])
        with pytest.warns(UserWarning, match=r"hooks are not \(those of blocks\.1\.attn_qkv\)"):
            LoopMDM.from_mdlm(net)
        handle.remove()
        handle = net.register_forward_hook(lambda *_: None)
        with pytest.warns(UserWarning, match=r"those of the network\)"):
            LoopMDM.from_mdlm(net)
        handle.remove()
        net.blocks[1].mlp[1] = nn.ReLU()
        with pytest.raises(ValueError, match=r"path_or_module: .*blocks\.1(\.mlp\.1 is| computes)"):
            LoopMDM.from_mdlm(net)


def test_copies_share_nothing() -> None:
    net = patch(network(), num_loops=2)
    twin = copy.deepcopy(net)
    randomise(twin)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(twin(IDS, SIGMA), net(IDS, SIGMA))
