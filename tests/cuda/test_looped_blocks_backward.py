"""The host side of the backward kernel as far as it needs no GPU: buffers, maps, parameters, refusals."""

import ctypes
import re

import pytest
import torch

from loopmdm_kernels.calls import LoopedCall
from loopmdm_kernels.cuda import looped_blocks as op
from loopmdm_kernels.cuda import looped_blocks_backward as backward
from loopmdm_kernels.cuda.parameters import MAP, fields
from loopmdm_kernels.schedule import BlockShape, build_backward, choose_backward
from loopmdm_kernels.testing import looped_inputs
from tests.cuda import emulated_backward


@pytest.fixture
def inputs():
    return looped_inputs(3, 150, 128, num_heads=2, key_mask=True, per_sequence_modulation=True).to(
        torch.bfloat16
    )


def prepared(inputs, loops=2):
    kept = emulated_backward.keep(inputs, loops, torch.zeros(loops, *inputs.x.shape))
    plan = choose_backward(kept.shape)
    assert plan.blocks == 2 and plan.tiles.rows == 256  # blocks that signal, and their rows
    table, words, counters = backward._table(kept.shape, plan.tiles, torch.device("cpu"))
    grad = torch.ones(inputs.x.shape, dtype=torch.float64)
    return kept, table, words, grad, backward.allocate(table, kept, grad, counters)


def test_what_is_kept_has_the_shape_of_the_call(inputs):
    kept, table, words, _, buffers = prepared(inputs)
    assert kept.shape == table.shape == BlockShape(3, 150, 128, 2, 512, 2)
    assert torch.equal(words, build_backward(kept.shape, table.tiles).encode())
    assert buffers["counters"].tolist() == [2 * number for number in table.initial_counters()]
    buffers["counters"].fill_(7)  # a call raises its own copy
    assert prepared(inputs)[4]["counters"][0] == 0


def test_the_gradient_is_copied_before_it_is_changed(inputs):
    _, _, _, grad, buffers = prepared(inputs)
    assert buffers["grad"].dtype == torch.float32 and torch.equal(buffers["grad"].double(), grad)
    buffers["grad"].zero_()
    assert (grad == 1).all()


def test_sums_begin_at_zero(inputs):
    _, table, _, _, buffers = prepared(inputs)
    rows, weights = backward.sums_of(buffers)
    for sums in (*rows, *weights):
        assert sums.dtype == torch.float32 and not sums.any()
    parts = table.row_tiles * 256 // 16
    assert rows.norms.shape == (2, 2, 2, 3, parts, 128) and parts == 16
    assert weights.mlp_out.shape == (2, 128, 512)


def test_parameters(inputs):
    kept, table, words, _, buffers = prepared(inputs)
    parameters = backward.pack_parameters(table, buffers, words)
    for name in fields(backward.parameters_of_kernel(), ctypes.c_void_p):
        if name not in ("table", "max_loops"):
            assert getattr(parameters, name) == buffers[name].data_ptr(), name
    assert parameters.table == words.data_ptr() and parameters.loop_inputs == kept.loop_inputs.data_ptr()
    assert parameters.max_loops == kept.stop.data_ptr() + 4 * 3
    numbers = (parameters.instructions, parameters.batch, parameters.length, parameters.row_tiles)
    assert numbers == (len(table.loop), 3, 150, 1) and parameters.modulated_sequences == 3
    plain = inputs._replace(rotary=None, key_mask=None, modulation=inputs.modulation[:, :1])
    _, table, words, _, buffers = prepared(plain)
    parameters = backward.pack_parameters(table, buffers, words)
    assert parameters.cosines is None and parameters.sines is None and parameters.key_mask is None
    assert parameters.modulated_sequences == 1


def test_all_maps_have_boxes_of_64_by_64(inputs):
    kept, _, _, _, buffers = prepared(inputs)
    layouts = backward.map_layouts(buffers, kept.weights)
    assert list(layouts) == fields(backward.parameters_of_kernel(), MAP) and len(layouts) == 14
    assert {layout.box for layout in layouts.values()} == {(64, 64)}
    assert {layout.dtype for layout in layouts.values()} == {torch.bfloat16}
    assert layouts["grad_qkv"].sizes == (384, 150, 6) and layouts["gelu"].sizes == (512, 150, 6)
    assert layouts["mlp_out_weight"].sizes == (512, 128, 2)


def test_the_stream_keeps_a_matrix_for_each_loop(inputs):
    shape = op.shape_of(inputs.x, inputs.blocks, 2)
    table = op.build(shape, op.Tiles(128, 64, 64, 64, 64))
    packed = op.packed(inputs.blocks)
    for loops, matrices in ((5, 6), (torch.tensor([2, 4, 1]), 5)):
        arguments = (table, inputs.x, packed, inputs.modulation, loops, None, None)
        kept = op.Buffers.allocate(*arguments, keep=True)
        assert len(kept.stream_values) == matrices and len(op.Buffers.allocate(*arguments).stream_values) == 2


def test_what_has_no_backward_pass(inputs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    inputs.modulation.requires_grad_()
    for heads, message in ((2, "needs compute capability"), (4, r"heads of size \(64, 128\), got 32")):
        reason = op.why_not(LoopedCall(inputs.x, inputs.blocks, inputs.modulation, 2, heads))
        assert re.match(f"its backward pass (has )?{message}", reason)
