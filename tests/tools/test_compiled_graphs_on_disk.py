"""Graphs that torch.compile keeps on disk belong to one state of the package."""

import os
import shutil
import subprocess
import sys

import torch

from loopmdm_kernels.ops.library import NAMESPACE, PACKAGE, installed

COMPILED = """
import sys
import torch
import loopmdm_kernels as lk
from loopmdm_kernels.types import Head
from torch._dynamo.utils import counters

torch.compiler.config.cache_key_tag += sys.argv[1]
head = Head.of(torch.eye(8))
torch.compile(lambda hidden: lk.head_logits(hidden, head) * 2, fullgraph=True)(torch.ones(1, 2, 8))
print(counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"])
"""


def test_the_key_of_the_cache_names_the_package():
    assert torch.compiler.config.cache_key_tag.count(f"{NAMESPACE} ") == 1
    assert installed() in torch.compiler.config.cache_key_tag


def test_a_changed_file_is_another_state(tmp_path):
    copy = tmp_path / "package"
    copy.mkdir()
    for name in ("ops", "version.py"):
        source = PACKAGE / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, copy / name)
    before = installed(copy)
    assert installed(copy) == before
    changed = copy / "ops" / "library.py"
    stat = changed.stat()
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert installed(copy) != before
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert installed(copy) == before
    changed.write_text(changed.read_text() + "\n")
    assert installed(copy) != before


def test_a_graph_is_taken_in_its_own_state_alone(tmp_path):
    def run(tag):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", COMPILED, tag], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert run("") == ["0", "1"]
    assert run("") == ["1", "0"]
    assert run("another state") == ["0", "1"]
