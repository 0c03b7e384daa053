"""Compiled kernels on disk: keys, damage, and many processes at once."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loopmdm_kernels.cuda import compiler, disk_cache, sources
from loopmdm_kernels.cuda.head_kernels import HEAD_KERNELS


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPMDM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def must_not_run():
    raise AssertionError("compiled again")


def test_a_kernel_is_made_once():
    assert disk_cache.cached("one", lambda: b"cubin") == b"cubin"
    assert disk_cache.cached("one", must_not_run) == b"cubin"
    assert disk_cache.cached("two", lambda: b"other") == b"other"


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:-1] + b"?"])
def test_a_damaged_file_is_replaced(cache_folder, damage):
    disk_cache.cached("one", lambda: b"cubin")
    path = cache_folder / "one.cubin"
    path.write_bytes(damage(path.read_bytes()))
    assert disk_cache.cached("one", lambda: b"cubin") == b"cubin"
    assert disk_cache.cached("one", must_not_run) == b"cubin"


def test_a_failed_compilation_leaves_nothing(cache_folder):
    def fail():
        raise RuntimeError("does not compile")

    with pytest.raises(RuntimeError, match="does not compile"):
        disk_cache.cached("one", fail)
    assert list(cache_folder.iterdir()) == []
    assert disk_cache.cached("one", lambda: b"cubin") == b"cubin"


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOOPMDM_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert disk_cache.cached("one", lambda: b"cubin") == b"cubin"


def test_a_full_disk_is_no_error(cache_folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk_cache.os, "replace", full)
    assert disk_cache.cached("one", lambda: b"cubin") == b"cubin"
    assert list(cache_folder.iterdir()) == []


PROCESS = """
import sys, time, types
from pathlib import Path

# A package without its __init__, which would import torch; that takes longer than the test.
sys.modules["loopmdm_kernels"] = package = types.ModuleType("loopmdm_kernels")
package.__path__ = [sys.argv[2]]
sys.modules["loopmdm_kernels.cuda"] = package = types.ModuleType("loopmdm_kernels.cuda")
package.__path__ = [sys.argv[2] + "/cuda"]
from loopmdm_kernels.cuda import disk_cache

def make():
    with Path(sys.argv[1]).open("a") as log:
        log.write("made\\n")
    time.sleep(0.3)
    return b"cubin" * 100_000

assert disk_cache.cached("one", make) == b"cubin" * 100_000
"""


def test_many_processes_compile_once(tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", PROCESS, str(log), str(Path(disk_cache.__file__).parents[1])]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert log.read_text() == "made\n"


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources' shape: a kernel, a header it includes, and one it does not."""
    files = {
        "cuda/kernel.cu": '#include "cuda/used.cuh"\n',
        "cuda/used.cuh": '#  include "common/deep.h"\n',
        "common/deep.h": "#include <stdint.h>\n",
        "cuda/unused.cuh": "",
    }
    for name, text in files.items():
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).write_text(text)
    return tmp_path / "csrc"


def key(tree, options=("-DA=1",), architecture="sm_90a", version="nvrtc 13.0"):
    return compiler.cache_key("kernel.cu", list(options), architecture, version, tree)


def test_keys_change_with_all_that_matters_and_nothing_else(tree):
    first = key(tree)
    assert first.startswith("kernel-")
    others = [
        key(tree, options=("-DA=2",)),
        key(tree, options=("-DA=1", "-DB=1")),
        key(tree, options=("-DA=1-DB=1",)),
        key(tree, architecture="sm_100a"),
        key(tree, version="nvrtc 13.1"),
    ]
    for name in ("cuda/kernel.cu", "cuda/used.cuh", "common/deep.h"):
        text = (tree / name).read_text()
        (tree / name).write_text(text + "// changed\n")
        others.append(key(tree))
        (tree / name).write_text(text)
    assert len({first, *others}) == 1 + len(others)
    (tree / "cuda/unused.cuh").write_text("// changed\n")
    assert key(tree) == first


def test_the_kernel_consists_of_headers_that_exist():
    names = {path.name for path in sources.closure("cuda/looped_blocks/looped_blocks_sm90.cu")}
    assert {"wgmma.cuh", "tma.cuh", "mbarrier.cuh", "schedule.h", "swizzle.h"} <= names
    before = {path.name for path in sources.closure("cuda/looped_blocks/looped_blocks_sm80.cu")}
    assert {"mma.cuh", "async_copy.cuh"} <= before and not {"wgmma.cuh", "tma.cuh"} & before
    others = ("prepare_call", "looped_blocks_backward_sm90", "looped_rows_sm90")
    others = [f"looped_blocks/{name}.cu" for name in others]
    for source in (*others, *(kernel.source for kernel in HEAD_KERNELS)):
        names |= before | {path.name for path in sources.closure(f"cuda/{source}")}
    everything = {path.name for path in Path(sources.folder() / "cuda").rglob("*.cu*")}
    assert everything <= names, "a device source that no kernel uses"


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A package with one cubin, and a compiler that takes notes."""
    compiled = []

    def compile_one(source, options, architecture):
        compiled.append((source.name, options[1:], architecture))
        return f"compiled {len(compiled)}".encode()

    monkeypatch.setattr(compiler, "_compiler", lambda: ("a compiler", compile_one))
    monkeypatch.setattr(compiler, "PACKAGED", tmp_path / "cubins")
    compiler.compile_into(compiler.PACKAGED, "looped_blocks/prepare_call.cu", {"A": 1}, "sm_80")
    assert compiled.pop() == ("prepare_call.cu", ["-DA=1"], "sm_80")
    (file,) = compiler.PACKAGED.iterdir()
    assert file.stat().st_mode & 0o777 == 0o644
    return compiled


def test_a_cubin_of_the_package_is_used(packaged, cache_folder):
    for _ in range(2):
        assert compiler.compile_kernel("looped_blocks/prepare_call.cu", {"A": 1}, "sm_80") == b"compiled 1"
    assert not packaged and not cache_folder.exists()


def test_a_cubin_of_other_options_or_architecture_is_not(packaged):
    assert compiler.compile_kernel("looped_blocks/prepare_call.cu", {"A": 2}, "sm_80") == b"compiled 1"
    assert compiler.compile_kernel("looped_blocks/prepare_call.cu", {"A": 1}, "sm_86") == b"compiled 2"
    assert packaged == [
        ("prepare_call.cu", ["-DA=2"], "sm_80"),
        ("prepare_call.cu", ["-DA=1"], "sm_86"),
    ]


def test_a_cubin_of_other_sources_is_not(packaged, tmp_path, monkeypatch):
    copy = tmp_path / "csrc"
    shutil.copytree(sources.folder(), copy)
    header = copy / "cuda" / "ptx" / "memory.cuh"
    header.write_text(header.read_text() + "// changed\n")
    monkeypatch.setattr(sources, "folder", lambda: copy)
    compiler.compile_kernel("looped_blocks/prepare_call.cu", {"A": 1}, "sm_80")
    assert len(packaged) == 1


def test_a_damaged_cubin_of_the_package_is_not(packaged):
    (file,) = compiler.PACKAGED.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    compiler.compile_kernel("looped_blocks/prepare_call.cu", {"A": 1}, "sm_80")
    assert len(packaged) == 1
