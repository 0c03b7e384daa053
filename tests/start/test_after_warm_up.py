"""After a few calls nothing is compiled, tuned or written any more, whatever R, S and B are."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest

from loopmdm_kernels.cuda.head_kernels import HEAD_KERNELS
from loopmdm_kernels.cuda.parameters import defines
from loopmdm_kernels.schedule import BlockShape, choose, device_of, measured

ON_THE_CPU = """
import random, sys
import torch
import loopmdm_kernels as lk
from loopmdm_kernels.testing import head_inputs, looped_inputs, row_rng

torch.set_num_threads(1)
D, H, V, L = 32, 2, 97, 6
draw = random.Random(0)

def calls(batch, rows, loops):
    case = looped_inputs(batch, L, D, H, 1).to(torch.float32)
    with torch.no_grad():
        lk.looped_blocks(case.x, case.blocks, case.modulation, loops, num_heads=H, rotary=case.rotary)
    hidden, head = head_inputs(batch, L, D, V)
    head = head._replace(**{n: getattr(head, n).float() for n in ("norm", "weight", "bias", "modulation")})
    hidden = hidden.float()
    chosen = torch.arange(rows) % (batch * L)
    with lk.use_backend("cpu"):
        lk.masked_cross_entropy(hidden, head, torch.zeros(batch, L, dtype=torch.int64), chosen)
        lk.sample_rows(hidden, head, chosen, row_rng(rows))

calls(1, 1, 1)
calls(3, 17, 2)
found = []
WRITES = {"os.rename", "os.mkdir", "os.remove", "subprocess.Popen", "ctypes.dlopen", "import"}

def hook(name, given):
    mode, flags = (given[1], given[2]) if name == "open" else (None, 0)
    if name in WRITES or (isinstance(mode, str) and set(mode) & set("wax+")) or (mode is None and flags & 3):
        found.append((name, str(given)[:200]))

sys.addaudithook(hook)
for _ in range(1000):
    calls(draw.randint(1, 9), draw.randint(1, 200), draw.randint(1, 8))
assert not found, found[:5]
open("/dev/null", "w").close()
assert found, "the hook sees writes"
"""

# What Triton's own launcher tells compilations apart by. Tensors are real, so their alignment is too.
OF_TRITON = """
import json, random, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from loopmdm_kernels.calls import CrossEntropyCall, Draw, HeadCall, LoopedCall, SampleCall
from loopmdm_kernels.testing import head_inputs, looped_inputs, row_rng
from loopmdm_kernels.triton import head_logits, looped_blocks, masked_cross_entropy, sample_rows
from loopmdm_kernels.triton.launch import Processor, recording
from loopmdm_kernels.types import BlockWeights, Head, RowRng

D, H, V, L, BF16 = 64, 2, 200, 27, torch.bfloat16
MOST = 40, 1500, 6  # batch, rows, loops
backend, binders = make_backend(GPUTarget("cuda", 90, 32)), {}
torch.set_num_threads(1)

def leaf(tensor):
    return tensor.to(BF16).detach().requires_grad_()

case = looped_inputs(MOST[0], L, D, H, 1)
blocks = [BlockWeights(*map(leaf, block)) for block in case.blocks]
one = leaf(case.modulation[:, :1])
hidden, head = head_inputs(MOST[0], L, D, V)
head = Head(*map(leaf, head[:4]), V - 1)
rng = row_rng(2 * MOST[1])
choice = torch.zeros(2 * MOST[1], dtype=torch.int64)

def compilation(launch):
    kernel = launch.kernel
    if kernel not in binders:
        binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, told_apart, _ = binders[kernel](**launch.arguments)
    return kernel.__name__, str(told_apart), str(sorted(launch.options.items()))

def compilations(batch, rows, loops, first, trains):
    # `first`: rows and their names are parts of longer vectors.
    x, hid = case.x[:batch].float().requires_grad_(trains), hidden[:batch].float().requires_grad_(trains)
    part = slice(first, first + rows)
    modulation = one if rows % 2 else leaf(case.modulation[:, :1].expand(-1, batch, -1, -1))
    with recording(Processor(90, 4)) as launches, torch.set_grad_enabled(trains):
        call = LoopedCall(x, blocks, modulation, loops, H)
        loss = CrossEntropyCall(hid, head, BF16, choice[: batch * L], choice[part], torch.ones(rows))
        out = looped_blocks.run(call)[0].sum() + masked_cross_entropy.run(loss)[0]
        if trains:
            out.backward()
        else:
            names = RowRng(0, *(name[part] for name in rng[1:]))
            sample_rows.run(SampleCall(hid, head, BF16, choice[part], Draw(names)))
            head_logits.run(HeadCall(hid, head, BF16))
    return set(map(compilation, launches))

seen = set()
for batch, rows, loops in ((2, 6, 2), (2, 7, 2), (MOST[0], MOST[1], 2), (MOST[0], MOST[1] - 1, 2)):
    for trains in (False, True):
        seen |= compilations(batch, rows, loops, 0, trains)
draw, new = random.Random(0), {}
for number in range(1000):
    sizes = [draw.randint(1, most) for most in (*MOST, MOST[1])]
    for found in compilations(*sizes, trains=number % 4 == 0) - seen:
        new.setdefault(str(found), sizes)
print(json.dumps({"kernels": len(seen), "new": list(new.items())[:5]}))
"""


def test_on_the_cpu():
    done = subprocess.run([sys.executable, "-c", ON_THE_CPU], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_of_triton():
    """After a small and a large call, with one modulation and with one a sequence."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", OF_TRITON]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["new"] == [] and 20 < found["kernels"] < 80, found


@pytest.mark.parametrize(
    ("length", "hidden", "heads", "layers"),
    [(128, 768, 12, 9), (81, 128, 4, 2), (81, 128, 4, 1), (36, 64, 4, 1), (36, 64, 2, 1), (36, 128, 2, 1)],
)
def test_of_cuda(length, hidden, heads, layers):
    """Its blocks are compiled for tiles, which small batches choose among; its heads for fixed ones."""
    device = device_of((9, 0), 132, 227 * 1024, name="", measured=measured.table())

    def kernel(batch):
        shape = BlockShape(batch, length, hidden, heads, 4 * hidden, layers)
        return tuple(defines(shape, choose(shape, device)).items())

    warm = {kernel(batch) for batch in (1, 2, 4, 8, 512)}
    assert len(warm) <= 5
    draw = random.Random(0)
    batches = [*range(1, 10), *(draw.randint(10, 1000) for _ in range(30))]
    assert {kernel(batch) for batch in batches} <= warm
    assert all(isinstance(value, int) for kernel in HEAD_KERNELS for _, value in kernel.macros)
