"""Compiling ahead of time: each kernel once, errors in a line."""

import pytest

from loopmdm_kernels.cuda import looped_blocks_backward as backward
from loopmdm_kernels.cuda import prebuild, prepare
from loopmdm_kernels.cuda.head_kernels import HEAD_KERNELS
from loopmdm_kernels.cuda.parameters import backward_defines, defines
from loopmdm_kernels.cuda.targets import SM80, SM90
from loopmdm_kernels.schedule import BlockShape, choose, choose_backward
from loopmdm_kernels.schedule.device import ASSUMED

SMALL = ["--hidden", "768", "--heads", "12", "--layers", "2", "--lengths"]


@pytest.fixture
def compiled(monkeypatch):
    calls = []
    monkeypatch.setattr(prebuild, "compile_kernel", lambda *arguments: calls.append(arguments) or b"cubin")
    monkeypatch.setattr(prebuild, "compile_into", lambda *arguments: calls.append(arguments))
    return calls


def test_what_the_op_will_ask_for_is_compiled_once(compiled, capsys, monkeypatch):
    monkeypatch.setenv("LOOPMDM_CACHE_DIR", "/somewhere")
    assert prebuild.main([*SMALL, "32", "33", "1024"]) == 0
    number = 3 + len(HEAD_KERNELS)
    assert capsys.readouterr().out == f"compiled kernels: {number}, in /somewhere\n"
    expected = [
        (SM90.source, defines(shape, choose(shape)), "sm_90a")
        for shape in (BlockShape(1, length, 768, 12, 3072, 2) for length in (32, 1024))
    ]
    expected.append((prepare.SOURCE, {}, "sm_90a"))
    expected += [(kernel.source, dict(kernel.macros), "sm_90a") for kernel in HEAD_KERNELS]
    assert sorted(compiled, key=str) == sorted(expected, key=str)


def test_for_other_gpus_stacks_and_places(compiled, capsys, tmp_path):
    arguments = ["--hidden", "768", "--heads", "12", "--layers", "1", "2", "--lengths", "1024"]
    assert prebuild.main([*arguments, "--capability", "8.6", "9.0", "--folder", str(tmp_path)]) == 0
    assert {call[0] for call in compiled} == {tmp_path}
    for layers in (1, 2):
        shape = BlockShape(1, 1024, 768, 12, 3072, layers)
        macros = defines(shape, choose(shape, ASSUMED[8, 6]))
        assert (tmp_path, SM80.source, macros, "sm_86") in compiled
        assert (tmp_path, SM90.source, defines(shape, choose(shape)), "sm_90a") in compiled
    for kernel in HEAD_KERNELS:
        assert (tmp_path, kernel.source, dict(kernel.macros), "sm_90a") in compiled
    number = 6 + len(HEAD_KERNELS)
    assert len(compiled) == number
    assert capsys.readouterr().out == f"compiled kernels: {number}, in {tmp_path}\n"


def test_for_training(compiled):
    assert prebuild.main([*SMALL, "1024", "--training"]) == 0
    shape = BlockShape(1, 1024, 768, 12, 3072, 2)
    assert (backward.SOURCE, backward_defines(shape, choose_backward(shape)), "sm_90a") in compiled
    assert (SM90.source, defines(shape, choose(shape)), "sm_90a") in compiled
    assert len(compiled) == 3 + len(HEAD_KERNELS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", "768", "--heads", "7", "--layers", "2", "--lengths", "8"], "--heads: got 7"),
        (["--hidden", "128", "--heads", "16", "--layers", "2", "--lengths", "8"], "--heads: got 16"),
        ([*SMALL, "8", "--mlp", "100"], "no tiles of"),
        ([*SMALL, "8", "--capability", "9"], "got '9', expected two numbers as in 8.0"),
        ([*SMALL, "8", "--capability", "8.0", "--training"], "--training: the backward pass needs"),
        ([*SMALL, "8", "--capability", "7.5"], "compute capability 8.0 or later"),
    ],
)
def test_errors(compiled, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_status:
        prebuild.main(arguments)
    assert exit_status.value.code == 2 and message in capsys.readouterr().err
    assert not compiled
