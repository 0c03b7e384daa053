"""Which backend a call gets, and what happens when one is forced."""

import asyncio
import contextlib
import gc
import json
import re
import sys
import threading

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm.cli import main
from loopmdm_kernels import _C, backends
from loopmdm_kernels.calls import AttentionCall, Draw, HeadCall, SampleCall
from loopmdm_kernels.testing import head_inputs, reference, row_rng
from loopmdm_kernels.types import Head

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.delenv("LOOPMDM_BACKEND", raising=False)


def arguments(dtype=torch.float32, **options):
    hidden, head = head_inputs()
    head = Head(*(t.to(dtype) for t in head[:4]), head.excluded_token)
    return {"hidden": hidden.to(dtype), "head": head, "compute_dtype": None, **options}


def sampling(device=CPU, **options):
    call = arguments(**options)
    rows = torch.arange(6, device=device)
    call["hidden"] = call["hidden"].to(device)
    return SampleCall(**call, rows=rows, draw=Draw(row_rng(6)))


def attending(dtype=torch.float32):
    q = torch.zeros(1, 1, 1, 2, dtype=dtype)
    return AttentionCall(q, q, q)


def chosen(**options):
    return backends.choose("sample_rows", sampling(**options))


def run_of(backend, op="sample_rows"):
    return backends.kernel(backend, op)


def test_available_backends():
    status = lk.available_backends()
    assert list(status) == ["reference", "cpu", "triton", "cuda"]
    assert status["reference"] is True
    assert status["cpu"] == _C.cpu_isa()
    if not torch.cuda.is_available():
        assert status["triton"] == status["cuda"] == "no GPU"


def test_interpreted_triton_is_for_those_who_ask(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert lk.available_backends()["triton"] is True
    assert chosen() is run_of("cpu")
    with lk.use_backend("triton"):
        assert chosen().__module__ == "loopmdm_kernels.triton.sample_rows"
        with pytest.raises(RuntimeError, match="hidden must be float32"):
            chosen(dtype=torch.float64)
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert lk.available_backends()["triton"] == "Triton is not installed"


def test_an_older_gpu_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert lk.available_backends()["triton"].endswith("8.0 or later, got 7.5")


def test_compiled_kernel_where_it_can_and_reference_elsewhere():
    assert chosen() is run_of("cpu")
    assert chosen(dtype=torch.float64) is run_of("reference")
    assert chosen(compute_dtype=torch.float16) is run_of("reference")
    assert backends.choose("attention", attending()) is run_of("cpu", "attention")
    assert backends.choose("attention", attending(torch.float16)) is run_of("reference", "attention")
    assert backends.choose("sample_rows", sampling("meta")) is run_of("reference")


def test_use_backend():
    with lk.use_backend("reference"):
        assert chosen() is run_of("reference")
        with lk.use_backend("cpu"):
            assert chosen() is run_of("cpu")
        assert chosen() is run_of("reference")
    assert chosen() is run_of("cpu")


def test_use_backend_ends_with_an_exception():
    with pytest.raises(KeyError), lk.use_backend("reference"):
        raise KeyError
    assert chosen() is run_of("cpu")


def test_forced_backend_never_falls_back(monkeypatch):
    monkeypatch.setitem(backends._KERNELS, "cpu", ("attention", "sample_rows"))
    with lk.use_backend("cpu"):
        with pytest.raises(RuntimeError, match=r"sample_rows: backend 'cpu' .* hidden must be float32"):
            chosen(dtype=torch.float64)
        with pytest.raises(RuntimeError, match=r"head_logits: backend 'cpu' .* no kernel for head_logits"):
            backends.choose("head_logits", HeadCall(**arguments()))
        with pytest.raises(RuntimeError, match=r"attention: backend 'cpu' .* q must be float32 or bfloat16"):
            backends.choose("attention", attending(torch.float64))
        with pytest.raises(RuntimeError, match="must be on a cpu device, got meta"):
            chosen(device="meta")


def test_environment_forces(monkeypatch):
    monkeypatch.setenv("LOOPMDM_BACKEND", "reference")
    assert chosen() is run_of("reference")
    with lk.use_backend("cpu"):
        assert chosen() is run_of("cpu")
    monkeypatch.setenv("LOOPMDM_BACKEND", "tpu")
    with pytest.raises(
        ValueError, match="LOOPMDM_BACKEND: got 'tpu', expected one of reference, cpu, triton, cuda"
    ):
        chosen()


def test_unknown_or_unavailable_name():
    with pytest.raises(ValueError, match="use_backend: got 'tpu'"), lk.use_backend("tpu"):
        pass
    if not torch.cuda.is_available():
        with (
            pytest.raises(RuntimeError, match="'triton' cannot be used here: no GPU"),
            lk.use_backend("triton"),
        ):
            pass


def test_choice_belongs_to_the_thread():
    seen = []
    with lk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == [run_of("cpu")]


def test_choice_belongs_to_the_task():
    async def work(name, expected):
        with lk.use_backend(name):
            await asyncio.sleep(0.01)
            return chosen() is expected

    async def both():
        return await asyncio.gather(work("reference", run_of("reference")), work("cpu", run_of("cpu")))

    assert asyncio.run(both()) == [True, True]


def test_without_the_extension(monkeypatch):
    monkeypatch.setitem(sys.modules, "loopmdm_kernels._C", None)
    assert "the extension is not built" in str(lk.available_backends()["cpu"])
    assert chosen() is run_of("reference")
    with pytest.raises(RuntimeError, match="the extension is not built"), lk.use_backend("cpu"):
        pass


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx2 ", "avx512,avx2"])
def test_wrong_instruction_set_is_an_error_of_every_op(monkeypatch, name):
    monkeypatch.setenv("LOOPMDM_CPU_ISA", name)
    accepted = f"LOOPMDM_CPU_ISA: got '{name}'; this machine accepts: {_C.usable_cpu_isas()}"
    assert lk.available_backends()["cpu"] == accepted
    for op, call in {"sample_rows": sampling(), "attention": attending()}.items():
        with pytest.raises(ValueError, match=re.escape(accepted)):
            backends.choose(op, call)
    with pytest.raises(ValueError, match="LOOPMDM_CPU_ISA"):
        chosen(dtype=torch.float64)
    with pytest.raises(RuntimeError, match=re.escape(accepted)):
        lk.use_backend("cpu")
    with lk.use_backend("reference"):
        assert chosen() is run_of("reference")
    monkeypatch.setenv("LOOPMDM_BACKEND", "cpu,reference")
    with pytest.raises(ValueError, match="LOOPMDM_CPU_ISA"):
        chosen()
    monkeypatch.delenv("LOOPMDM_BACKEND")
    monkeypatch.setenv("LOOPMDM_CPU_ISA", "")
    assert chosen() is run_of("cpu")


def test_wrong_instruction_set_on_the_command_line(monkeypatch, capsys):
    monkeypatch.setenv("LOOPMDM_CPU_ISA", "sse9")
    assert main(["solve", "1" + 80 * ".", "--loops", "1"]) == 1
    said = capsys.readouterr().err
    assert "error: LOOPMDM_CPU_ISA: got 'sse9'; this machine accepts: generic" in said
    assert main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert "got 'sse9'" in json.dumps(told)


def test_use_backend_checks_its_names_when_called():
    with pytest.raises(ValueError, match="use_backend: got 'foo'"):
        lk.use_backend("foo")
    with pytest.raises(ValueError, match="use_backend: got no backend"):
        lk.use_backend()


def test_use_backend_that_is_not_entered_says_so():
    with pytest.warns(RuntimeWarning, match=r"use_backend\('reference'\): does nothing by itself"):
        lk.use_backend("reference")
        gc.collect()
    assert chosen() is run_of("cpu")


def test_use_backend_as_a_decorator_and_again():
    @lk.use_backend("reference")
    def inside(dtype):
        return chosen(dtype=dtype)

    assert inside(torch.float32) is inside(dtype=torch.float32) is run_of("reference")
    assert chosen() is run_of("cpu")
    again = lk.use_backend("reference")
    with again, again:
        assert chosen() is run_of("reference")
    with again:
        assert chosen() is run_of("reference")
    assert chosen() is run_of("cpu")


def test_public_op_goes_through_the_dispatch():
    call = arguments()
    rows = torch.arange(6)
    inputs = (call["hidden"], call["head"], rows, row_rng(6))
    expected = reference.sample_rows(*inputs)
    for name in ("reference", "cpu"):
        with lk.use_backend(name):
            assert lk.sample_rows(*inputs).token.tolist() == expected.token.tolist()


@pytest.mark.gpu
def test_cuda_tensors_draw_the_same_tokens():
    call = arguments()
    rows = torch.arange(32)
    expected = lk.sample_rows(call["hidden"], call["head"], rows, row_rng(32))
    head = Head(*(t.cuda() for t in call["head"][:4]), call["head"].excluded_token)
    rng = row_rng(32)
    rng = rng._replace(sequence=rng.sequence.cuda(), step=rng.step.cuda(), position=rng.position.cuda())
    out = lk.sample_rows(call["hidden"].cuda(), head, rows.cuda(), rng)
    assert out.token.tolist() == expected.token.tolist()


@pytest.fixture
def nothing_said(monkeypatch):
    monkeypatch.setattr(backends, "_passed_over", set())


@pytest.mark.parametrize("by_environment", [True, False])
def test_the_first_of_several_that_can_do_a_call_does_it_and_says_so_once(
    monkeypatch, nothing_said, by_environment
):
    monkeypatch.setattr(
        backends, "_why_unavailable", lambda name: "too old a driver" if name == "cuda" else None
    )
    if by_environment:
        monkeypatch.setenv("LOOPMDM_BACKEND", "cuda, cpu,reference")
        forced = contextlib.nullcontext()
    else:
        forced = lk.use_backend("cuda", "cpu", "reference")
    with forced:
        said = r"sample_rows: backend 'cuda' cannot do this \(too old a driver\), 'cpu' does"
        with pytest.warns(UserWarning, match=said) as record:
            assert chosen() is run_of("cpu")
        assert len(record) == 1
        assert chosen() is run_of("cpu")  # warnings are errors
        with pytest.warns(UserWarning, match="backend 'cpu' cannot do this"):
            assert chosen(dtype=torch.float64) is run_of("reference")


def test_several_of_which_none_can(monkeypatch, nothing_said):
    monkeypatch.setattr(backends, "_why_unavailable", lambda name: None if name == "cpu" else "no GPU")
    with (
        lk.use_backend("cuda", "cpu"),
        pytest.raises(RuntimeError, match=r"'cuda'.*no GPU; backend 'cpu' was"),
    ):
        chosen(dtype=torch.float64)
    with (
        pytest.raises(RuntimeError, match="'cuda' cannot be used here: no GPU; backend 'triton'"),
        lk.use_backend("cuda", "triton"),
    ):
        pass
    with pytest.raises(ValueError, match="got no backend"), lk.use_backend():
        pass
    monkeypatch.setenv("LOOPMDM_BACKEND", "cpu,gpu")
    with pytest.raises(ValueError, match="LOOPMDM_BACKEND: got 'gpu'"):
        chosen()
