"""What is asked of the kernels on a GPU, as far as it can be tried without one."""

from types import SimpleNamespace

import pytest
import torch

from bench import gpu_checks
from bench.gpu_checks import RIGHT, Compiled, Run
from loopmdm_kernels.cuda import compiler, driver
from loopmdm_kernels.cuda.head_kernels import HEAD_KERNELS


def facts(capability=(9, 0), sms=132, shared=232_448):
    return driver.Facts("a GPU", capability, sms, shared, 30 << 20, 128 << 20)


def test_kernels_of_a_gpu():
    hopper = gpu_checks.kernels_of(facts())
    sources = {kernel.source for kernel in hopper.values()}
    assert {kernel.source for kernel in HEAD_KERNELS} < sources and len(sources) > 8
    assert "forward, 768 wide, 12 heads, 512 tokens" in hopper
    assert "backward, 768 wide, 12 heads, 1024 tokens" in hopper or any("backward" in name for name in hopper)
    assert not any("backward" in name for name in hopper if "128 wide" in name), "heads of 32 have none"
    different = {(kernel.source, *sorted(kernel.macros.items())) for kernel in hopper.values()}
    assert len(different) == len(hopper), "each once"
    older = gpu_checks.kernels_of(facts((8, 0), 108, 166_912))
    assert {kernel.source for kernel in older.values()} == {
        "looped_blocks/looped_blocks_sm80.cu",
        "looped_blocks/prepare_call.cu",
    }
    assert {kernel.threads for kernel in older.values()} == {256}


@pytest.fixture
def loaded(monkeypatch):
    """A driver that finds this in every kernel, and a compiler that fails at those of head_logits."""
    said = {"breach": None}
    kernel = SimpleNamespace(breach=lambda threads: said["breach"] and f"{threads} threads: {said['breach']}")
    monkeypatch.setattr(driver, "Kernel", lambda cubin, name, shared: kernel)
    monkeypatch.setattr(driver, "facts", lambda device: facts())
    monkeypatch.setattr(driver, "why_unavailable", lambda capability: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def compile_kernel(source, macros, architecture):
        assert architecture == "sm_90a"
        if "head_logits" in source:
            raise RuntimeError("it does not compile")
        return b"cubin"

    monkeypatch.setattr(compiler, "compile_kernel", compile_kernel)
    return said


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_contract(loaded):
    found = {name: value for part in gpu_checks.contract(Run(dry=False)) for name, value in part.items()}
    assert set(found) == set(gpu_checks.kernels_of(facts()))
    for name, value in found.items():
        assert value == ("wrong: it does not compile" if name.startswith("head_logits") else RIGHT), name
    loaded["breach"] = "304 bytes of local memory"
    kernel = Compiled("looped_blocks/x.cu", {}, 0, threads=384)
    assert gpu_checks.as_declared(kernel, b"") == "wrong: 384 threads: 304 bytes of local memory"


def test_bits_that_move():
    assert gpu_checks.moved(lambda: [torch.ones(2), torch.zeros(1)], 5) == RIGHT
    numbers = iter([1.0, 1.0, 2.0, 1.0])
    assert gpu_checks.moved(lambda: [torch.tensor(next(numbers))], 4) == "wrong: 1 of 3 calls gave other bits"


def test_tests_are_counted_while_they_run(tmp_path, capsys):
    file = tmp_path / "test_planted.py"
    file.write_text(
        "import pytest\\n\\ndef test_a(): pass\\n\\n@pytest.mark.parametrize('x', ['1 2', '3'])\\n"
        "def test_b(x): assert x == '1 2'\\n\\n@pytest.mark.skip\\ndef test_c(): pass\\n".replace("\\n", "\n")
    )
    parts = list(gpu_checks.tested(Run(dry=False), str(file), "-p", "no:cacheprovider", "--noconftest"))
    found = {name: value for part in parts for name, value in part.items()}
    (failed,) = [name for name in found if "test_b[3]" in name]
    assert found.pop(failed) == "wrong: see the log"
    assert found == {"passed": 2.0, "failed": 1.0, "skipped": 1.0, "pytest": "wrong: it ended with status 1"}
    assert "assert '3' == '1 2'" in capsys.readouterr().out, "the log has the rest"


def test_what_qualify_finds():
    entry = {"op": "attention", "direction": "forward", "dtype": "bfloat16", "backend": "triton", "why": None}
    verdict = {
        "entries": [
            {**entry, "right": True, "speedup": 1.5},
            {**entry, "backend": "cuda", "right": False, "speedup": None, "why": "far off"},
            {**entry, "op": "head_logits", "right": None, "speedup": None, "why": "it does not do this"},
        ]
    }
    assert gpu_checks.found_by_qualify(verdict) == {
        "triton attention forward bfloat16": RIGHT,
        "triton attention forward bfloat16, times plain PyTorch": 1.5,
        "cuda attention forward bfloat16": "wrong: far off",
        "triton head_logits forward bfloat16": "it does not do this",
    }
