"""The backward kernel's source on the CPU, after the forward kernel's: see emulated.py."""

import ctypes

import torch

from loopmdm_kernels.cuda import looped_blocks as op
from loopmdm_kernels.cuda import looped_blocks_backward as backward
from loopmdm_kernels.cuda import weights
from loopmdm_kernels.cuda.parameters import backward_defines
from loopmdm_kernels.cuda.targets import SM90
from loopmdm_kernels.schedule import BackwardTiles, Device, finish, plan
from tests.cuda import emulated


def plan_of(inputs, columns, rows=128):
    shape = op.shape_of(inputs.x, inputs.blocks, inputs.num_heads)
    return shape, plan._backward_plan(shape, Device(), BackwardTiles(rows, columns, rows // 8))


def build(shape, plan, folder, *, optimize=True):
    macros = backward_defines(shape, plan)
    return emulated.compile_kernel(backward.SOURCE, macros, folder, optimize=optimize)


def keep(inputs, loops, loop_inputs):
    """What the forward pass keeps; `loop_inputs` [S, B, L, D] are inputs of the loops."""
    shape = op.shape_of(inputs.x, inputs.blocks, inputs.num_heads)
    columns = max(64, shape.head_dim)
    table = op.build(shape, op.Tiles(128, columns, columns, columns, columns))
    packed = weights.packed(inputs.blocks)
    buffers = op.Buffers.allocate(
        table, inputs.x, packed, inputs.modulation, loops, inputs.rotary, inputs.key_mask
    )
    emulated.run_prepare(table, packed._replace(refresh=None), inputs.modulation, loops, buffers)
    return op.kept_of(buffers._replace(stream_values=loop_inputs), packed, inputs.num_heads)


def run(library, plan, kept, grad, inputs, *, num_blocks=2, seed=0):
    """Gradients as the kernel computes them; what nobody has written is NaN."""
    table, words, counters = backward._table(kept.shape, plan.tiles, torch.device("cpu"))
    buffers = backward.allocate(table, kept, grad, counters)
    inputs_of_kernel = {
        "loop_inputs",
        "mlp_in_bias",
        "mlp_out_bias",
        "affine",
        "gate",
        "cosines",
        "sines",
        "key_mask",
    }
    sums = {"grad", "norms", "gates", "grad_branch", "grad_mlp_in_bias", "counters", "stop"}
    fenced = {}
    for name, tensor in buffers.items():
        if name in inputs_of_kernel | {"counters", "stop"}:
            continue
        fenced[name] = emulated.Fenced.like(tensor)
        if name in sums or name.endswith("_weight"):
            fenced[name].inside.copy_(tensor)
    buffers |= {name: fence.inside for name, fence in fenced.items()}
    parameters = backward.pack_parameters(table, buffers, words)
    layouts = backward.map_layouts(buffers, kept.weights)
    with emulated.placed(parameters, layouts) as address:
        finished = library.run_kernel(ctypes.c_void_p(address), num_blocks * plan.blocks, SM90.threads, seed)
    assert finished, emulated.fault(library)
    assert all(fence.intact() for fence in fenced.values()), "written outside of a buffer"
    return buffers["grad"], *finish(*backward.sums_of(buffers), inputs.blocks, inputs.modulation)
