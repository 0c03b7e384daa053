"""The kernels' sources on the CPU: see tests/csrc/emulated_gpu/emulator.h."""

import ctypes
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm_kernels import backends
from loopmdm_kernels.cuda import looped_blocks as op
from loopmdm_kernels.cuda import looped_rows, prepare, sources, weights
from loopmdm_kernels.cuda.parameters import MAP, defines, fields
from loopmdm_kernels.cuda.targets import SM90
from loopmdm_kernels.schedule import Device, plan, rows

EMULATOR = Path(__file__).parents[1] / "csrc" / "emulated_gpu"
ALIGNMENT = 64  # of the kernel's parameters
FENCE = 64 * 1024  # elements


class Fenced(NamedTuple):
    """A tensor of NaN, and memory on both sides of it that nobody may write to."""

    whole: torch.Tensor
    inside: torch.Tensor

    @classmethod
    def like(cls, tensor):
        whole = torch.full((tensor.numel() + 2 * FENCE,), torch.nan, dtype=tensor.dtype)
        whole[:FENCE] = whole[-FENCE:] = 5.0
        return cls(whole, whole[FENCE:-FENCE].view(tensor.shape))

    def intact(self):
        return bool((self.whole[:FENCE] == 5.0).all() and (self.whole[-FENCE:] == 5.0).all())


def on_cuda(op):
    """The public op by these kernels, wherever its tensors are."""

    def run(*arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends, "choose", lambda name, call: backends.kernel("cuda", name))
            return getattr(lk, op)(*arguments, **options)

    return run


def plan_of(inputs, tiles, target=SM90, device=Device()):  # noqa: B008 - immutable
    shape = op.shape_of(inputs.x, inputs.blocks, inputs.num_heads)
    return shape, plan.plan_with(shape, device, tiles)


def build(shape, plan, folder, *, target=SM90, optimize=True):
    """The kernel for this shape's widths and these tiles, as a library."""
    return compile_kernel(target.source, defines(shape, plan), folder, optimize=optimize)


def compile_kernel(source, macros, folder, *, optimize=True):
    """A library of this one kernel of csrc/cuda."""
    macros = {**macros, "LOOPMDM_SOURCE": f'"cuda/{source}"', "LOOPMDM_KERNEL": Path(source).stem}
    loaded = compile_source("kernel", macros, folder, optimize=optimize)
    loaded.loaded_weight_bytes.restype = ctypes.c_int64
    return loaded


def fault(library):
    """What ended the library's last run."""
    library.fault.restype = ctypes.c_char_p
    return f"fault: {library.fault().decode()}"


def compile_source(name, macros, folder, *, optimize=True):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = folder / f"{name}.so"
    flags = [
        "-std=gnu++17",
        "-O2" if optimize else "-O1",
        "-fPIC",
        "-shared",
        "-Wno-unknown-pragmas",
        "-Wno-psabi",
    ]
    include = [f"-I{EMULATOR}", f"-I{sources.folder()}", "-include", "emulator.h"]
    flags += [f"-D{key}={value}" for key, value in macros.items()]
    command = [compiler, *flags, *include, str(EMULATOR / f"{name}.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@cache
def prepare_library():
    with tempfile.TemporaryDirectory() as folder:
        return compile_kernel(prepare.SOURCE, {}, Path(folder))


def run_prepare(table, packed, modulation, loops, buffers):
    prepare_call(op.counters_of(table), packed, modulation, loops, buffers)


def prepare_call(counted, packed, modulation, loops, buffers):
    """What `buffers` begins with, and weights brought up to date."""
    modulation = prepare.modulation_for_kernel(modulation)
    arguments = prepare.arguments_of(counted, packed, modulation, loops, **prepare.written(buffers))
    library, blocks = prepare_library(), prepare.blocks_of(arguments)
    finished = library.run_kernel(ctypes.byref(arguments), blocks, prepare.THREADS, 0)
    assert finished, fault(library)


def encode(layout):
    """A map as the emulation reads it."""
    numbers = (layout.address, layout.dtype.itemsize, *layout.sizes, *layout.strides, *layout.box)
    return bytes((ctypes.c_uint64 * 16)(*numbers))


@contextmanager
def placed(parameters, layouts):
    """The address of the kernel's parameters, aligned and with these maps."""
    size = ctypes.sizeof(parameters)
    memory = torch.zeros(size + ALIGNMENT, dtype=torch.uint8)
    aligned = memory.data_ptr() + -memory.data_ptr() % ALIGNMENT
    for name, layout in layouts.items():
        getattr(parameters, name)[:] = encode(layout)
    ctypes.memmove(aligned, ctypes.addressof(parameters), size)
    yield aligned


@contextmanager
def fenced(buffers, *names):
    """With room around what the kernel writes that nobody may write to."""
    written = {
        name: Fenced.like(tensor)
        for name, tensor in buffers._asdict().items()
        if tensor is not None and (name.endswith("_values") or name in ("output", *names))
    }
    yield buffers._replace(**{name: fenced.inside for name, fenced in written.items()})
    assert all(fenced.intact() for fenced in written.values()), "written outside of a buffer"


def run(library, inputs, plan, loops, **options):
    """(H(S), loops used) as the kernel computes them; what nobody has written is NaN."""
    buffers = run_buffers(library, inputs, plan, loops, **options)
    return buffers.output, buffers.stop[: len(inputs.x)].long()


def run_buffers(
    library, inputs, plan, loops, *, target=SM90, exit_threshold=None, num_blocks=2, seed=0, keep=False
):
    shape = op.shape_of(inputs.x, inputs.blocks, inputs.num_heads)
    table = op.build(shape, plan.tiles, adaptive=exit_threshold is not None)
    words = table.encode()
    packed = weights.packed(inputs.blocks)
    buffers = op.Buffers.allocate(
        table,
        inputs.x,
        packed,
        inputs.modulation,
        loops,
        inputs.rotary,
        inputs.key_mask,
        keep=keep,
    )
    run_prepare(table, packed._replace(refresh=None), inputs.modulation, loops, buffers)
    with fenced(buffers, "statistics1", "statistics2", "change") as buffers:
        parameters = op.pack_parameters(target, table, buffers, packed, words, exit_threshold)
        maps = op.map_layouts(shape, plan, buffers, packed) if fields(target.parameters, MAP) else {}
        blocks = num_blocks * plan.blocks
        with placed(parameters, maps) as address:
            finished = library.run_kernel(ctypes.c_void_p(address), blocks, target.threads, seed)
        assert finished, fault(library)
    return buffers


def rows_plan(inputs, device=Device()):  # noqa: B008 - immutable
    """Of the kernel for narrow blocks."""
    shape = op.shape_of(inputs.x, inputs.blocks, inputs.num_heads)
    return shape, rows.rows_plan(shape, device, plan.choose(shape, device).tiles.mlp_out_parts)


def build_rows(shape, plan, folder, *, optimize=True):
    return compile_kernel(looped_rows.SOURCE, looped_rows.defines(shape, plan), folder, optimize=optimize)


def run_rows(library, inputs, plan, loops, *, exit_threshold=None, clusters=1, seed=0, keep=False):
    """All buffers of a call; what nobody has written is NaN."""
    packed = weights.packed(inputs.blocks)
    given = (inputs.modulation, loops, inputs.rotary, inputs.key_mask)
    buffers = looped_rows.Buffers.allocate(plan, inputs.x, packed, *given, keep=keep)
    counted = looped_rows.counters_of(len(inputs.x), adaptive=exit_threshold is not None)
    prepare_call(counted, packed._replace(refresh=None), inputs.modulation, loops, buffers)
    with fenced(buffers, "change") as buffers:
        parameters = looped_rows.pack_parameters(buffers, exit_threshold)
        with placed(parameters, looped_rows.map_layouts(plan, buffers, packed)) as address:
            finished = library.run_kernel(
                ctypes.c_void_p(address), clusters * plan.blocks, plan.threads, seed
            )
        assert finished, fault(library)
    return buffers
