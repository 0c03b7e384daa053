"""After a few calls nothing is compiled, tuned or written any more, whatever R, S and B are."""

from __future__ import annotations

import random
import subprocess
import sys

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


def test_on_the_cpu():
    done = subprocess.run([sys.executable, "-c", ON_THE_CPU], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_of_cuda():
    """Its blocks are compiled for tiles, which small batches choose among; its heads for fixed ones."""
    device = device_of((9, 0), 132, 227 * 1024, name="", measured=measured.table())

    def kernel(batch):
        shape = BlockShape(batch, 128, 768, 12, 3072, 9)
        return tuple(defines(shape, choose(shape, device)).items())

    warm = {kernel(batch) for batch in (1, 2, 4, 8, 512)}
    assert len(warm) <= 5
    draw = random.Random(0)
    assert {kernel(draw.randint(1, 1000)) for _ in range(40)} <= warm
    assert all(isinstance(value, int) for kernel in HEAD_KERNELS for _, value in kernel.macros)
