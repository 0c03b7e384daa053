"""How calls choose by a verdict, when one holds, and what is said without one."""

import json
import os
import warnings

import pytest
import torch

import loopmdm_kernels as lk
from loopmdm import LoopMDM, LoopMDMConfig, sample
from loopmdm.cli import main
from loopmdm_kernels import backends, verdicts
from loopmdm_kernels.calls import AttentionCall, HeadCall, LogitsBackwardCall
from loopmdm_kernels.testing import head_inputs

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOPMDM_CACHE_DIR", str(tmp_path))
    for name in ("LOOPMDM_QUALIFY", "LOOPMDM_BACKEND", "LOOPMDM_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backends, "_unqualified", set())
    verdicts.forget()
    yield tmp_path
    verdicts.forget()


def entry(op="attention", direction="forward", dtype="float32", backend="cpu", right=True, speedup=2.0):
    return {**locals(), "why": None, "checked": [], "refused": [], "seconds": {}}


def written(*entries, **changes):
    document = {"format": verdicts.FORMAT, "date": "2026-01-01", "machine": verdicts.facts(CPU)}
    document |= {"threads": 1, "seconds": 1.0, "entries": list(entries), **changes}
    return verdicts.write(CPU, document)


def attending(dtype=torch.float32, device=CPU, grad=False):
    q = torch.zeros(1, 1, 1, 2, dtype=dtype, device=device, requires_grad=grad)
    return AttentionCall(q, q, q)


def chosen(call=None, op="attention"):
    return backends.choose(op, call or attending()).__module__.split(".")[1]


def test_without_a_verdict_all_is_as_it_was():
    assert verdicts.standing(CPU).orders is None
    assert chosen() == "cpu" and chosen(attending(torch.float64)) == "reference"
    assert lk.available_backends(explain=True)["cpu"] == "used (there is no verdict on this device)"


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ({}, "cpu"),
        ({"speedup": 0.9}, "reference"),
        ({"right": False, "speedup": None}, "reference"),
        ({"speedup": None}, "reference"),
        ({"dtype": "bfloat16", "speedup": 0.9}, "cpu"),  # says nothing of this dtype
        ({"direction": "gradients", "speedup": 0.9}, "cpu"),
    ],
    ids=str,
)
def test_a_verdict_chooses(found, name):
    written(entry(**found))
    assert chosen() == name


def test_directions_are_told_apart():
    written(entry(speedup=0.5), entry(direction="gradients"))
    assert chosen() == "reference" and chosen(attending(grad=True)) == "cpu"
    with torch.no_grad():
        assert chosen(attending(grad=True)) == "reference"
    written(entry("head_logits"), entry("head_logits", direction="gradients", speedup=0.5))
    hidden, head = head_inputs()
    hidden, head = hidden.float(), type(head)(*(t.float() for t in head[:4]))
    backward = LogitsBackwardCall(hidden, head, None, torch.zeros(2, 16, 50), [True] * 5)
    assert chosen(HeadCall(hidden, head, None), "head_logits") == "cpu"
    assert backends.choose("head_logits_backward", backward).__module__.startswith(
        "loopmdm_kernels.reference"
    )


def test_the_fastest_comes_first(monkeypatch):
    written(
        entry(backend="triton", speedup=3.0),
        entry(speedup=2.0),
        entry(backend="cuda", right=False, speedup=9.0),
    )
    assert verdicts.standing(CPU).orders["attention", "forward", "float32"] == ("triton", "cpu")
    assert chosen() == "cpu"  # triton cannot be used here


def test_forcing_and_switching_off(monkeypatch):
    written(entry(speedup=0.5))
    assert chosen() == "reference"
    with lk.use_backend("cpu"):
        assert chosen() == "cpu"
    monkeypatch.setenv("LOOPMDM_BACKEND", "cpu")
    assert chosen() == "cpu"
    monkeypatch.delenv("LOOPMDM_BACKEND")
    for word in ("0", "off", "OFF", " False ", "no", "n", "f"):
        monkeypatch.setenv("LOOPMDM_QUALIFY", word)
        assert chosen() == "cpu"
        assert lk.available_backends(explain=True)["cpu"] == "used (LOOPMDM_QUALIFY=0)"
    monkeypatch.setenv("LOOPMDM_QUALIFY", "1")
    assert chosen() == "reference"
    monkeypatch.setenv("LOOPMDM_CPU_ISA", "generic")  # asks for the kernels
    assert chosen() == "cpu"
    monkeypatch.setenv("LOOPMDM_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="LOOPMDM_CPU_ISA"):
        chosen()


@pytest.mark.parametrize("fact", ["device", "loopmdm-kernels", "sources", "torch", "instruction sets", "new"])
def test_a_change_makes_it_void(fact):
    machine = verdicts.facts(CPU)
    written(entry(speedup=0.5), machine=machine | {fact: "other"})
    standing = verdicts.standing(CPU)
    assert standing.orders is None
    assert standing.why == f"the verdict of 2026-01-01 is void: {fact} was other, is {machine.get(fact)}"
    assert chosen() == "cpu"
    assert standing.why in lk.available_backends(explain=True)["cpu"]


def test_another_format_is_void():
    written(entry(speedup=0.5), format=99)
    assert "its format was 99, is 1" in verdicts.standing(CPU).why
    assert chosen() == "cpu"


def damaged():
    whole = json.dumps(
        {"format": 1, "date": "d", "machine": verdicts.facts(CPU), "entries": [entry(speedup=0.5)]}
    )
    yield "empty", b""
    yield "cut", whole[: len(whole) // 2].encode()
    yield "bytes", b"\xff\xfe\x00" * 9
    yield "list", b"[]"
    yield "number", b"3"
    yield "deep", b"[" * 100_000
    yield "no entries", whole.replace("entries", "others").encode()
    yield "text for a number", whole.replace("0.5", '"fast"').encode()
    yield "not finite", whole.replace("0.5", "Infinity").encode()
    yield "not a number", whole.replace("0.5", "NaN").encode()
    yield "negative", whole.replace("0.5", "-1").encode()
    yield "number in text", whole.replace("0.5", '"0.5"').encode()
    yield "beyond all numbers", whole.replace("0.5", "9" * 400).encode()
    yield "digits without end", whole.replace("0.5", "9" * 5000).encode()
    yield "no seconds", whole.replace('"seconds": {}', '"s": {}').encode()
    yield "text for seconds", whole.replace('"seconds": {}', '"seconds": {"T": {"ours": "1"}}').encode()
    yield "list for text", whole.replace('"why": null', '"why": []').encode()
    yield "text for texts", whole.replace('"checked": []', '"checked": "all"').encode()
    yield "a number for text", whole.replace('"attention"', "5").encode()
    yield "entry", whole.replace('"right": true, ', "").encode()
    yield "right", whole.replace('"right": true', '"right": "yes"').encode()


@pytest.mark.parametrize(("kind", "content"), [pytest.param(*each, id=each[0]) for each in damaged()])
def test_a_damaged_file_is_none(kind, content):
    path = verdicts.path_of(CPU)
    path.write_bytes(content)
    standing = verdicts.standing(CPU)
    assert standing.orders is None and standing.why.startswith(f"the verdict {path} is damaged (")
    assert chosen() == "cpu"


@pytest.mark.parametrize("kind", ["folder", "FIFO", "device", "loop", "huge"])
def test_what_is_no_file_is_not_read(kind):
    """A FIFO would be waited for; a device or a huge file would take all memory."""
    path = verdicts.path_of(CPU)
    {
        "folder": path.mkdir,
        "FIFO": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
        "huge": path.touch,
    }[kind]()
    if kind == "huge":
        os.truncate(path, 2**40)
    assert verdicts.standing(CPU).orders is None and chosen() == "cpu"
    assert f"the verdict {path} cannot be read: " in lk.available_backends(explain=True)["cpu"]


@pytest.mark.parametrize("kind", ["no home", "file", "dangling", "a name too long"])
def test_without_a_folder_there_is_no_verdict(kind, folder, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    (folder / "file").touch()
    (folder / "dangling").symlink_to(folder / "nowhere")
    if kind == "no home":
        monkeypatch.delenv("LOOPMDM_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(verdicts.Path, "home", no_home)
    else:
        monkeypatch.setenv("LOOPMDM_CACHE_DIR", str(folder / (kind * 100 if "long" in kind else kind)))
    assert verdicts.standing(CPU).orders is None and chosen() == "cpu"


def test_a_source_that_cannot_be_read_leaves_no_verdict(monkeypatch):
    written(entry(speedup=0.5))

    def facts(device):
        raise PermissionError(13, "Permission denied", "source.cu")

    monkeypatch.setattr(verdicts, "facts", facts)
    assert verdicts.standing(CPU).orders is None and chosen() == "cpu"


def test_a_backend_that_nobody_knows_does_nothing():
    written(entry(backend="tpu", speedup=9.0))
    assert chosen() == "reference"
    assert lk.attention(*[torch.zeros(1, 1, 2, 2)] * 3).shape == (1, 1, 2, 2)


def test_who_reads_the_verdict_before_does_not_keep_it(monkeypatch):
    """One thread reads while another writes: calls after that go by the new one."""
    written(entry(speedup=0.5))
    read = verdicts._read

    def while_written(device):
        monkeypatch.setattr(verdicts, "_read", read)
        before = read(device)
        written(entry(speedup=3.0))
        return before

    monkeypatch.setattr(verdicts, "_read", while_written)
    assert chosen() == "reference"
    assert chosen() == "cpu"


def test_a_gpu_without_a_verdict_says_so_once(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(
        verdicts, "standing", lambda device: verdicts.Standing(None, {}, "there is no verdict")
    )
    usable = {"triton": None, "cuda": "no"}
    monkeypatch.setattr(backends, "_why_unavailable", lambda name: usable.get(name))
    with pytest.warns(
        UserWarning, match=r"cuda:0: plain PyTorch is used: there is no verdict. `loopmdm qualify`"
    ):
        backends._say_unqualified(gpu, "there is no verdict")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends._say_unqualified(gpu, "there is no verdict")
        backends._unqualified.clear()
        usable["triton"] = "no"
        backends._say_unqualified(gpu, "there is no verdict")  # nothing that could be used
        backends._unqualified.clear()
        usable["triton"] = None
        monkeypatch.setenv("LOOPMDM_QUALIFY", "0")
        backends._say_unqualified(gpu, "there is no verdict")


def test_a_gpu_is_asked_for_its_verdict(monkeypatch):
    """The tensors are stand-ins: what matters is the device that they name."""
    gpu = torch.device("cuda", 0)
    orders = {("attention", "forward", "float32"): ("triton",)}
    standing = verdicts.Standing(orders, {(next(iter(orders)), "triton"): 2.0}, "verdict of today")
    monkeypatch.setattr(verdicts, "standing", lambda device: {gpu: standing}[device])

    class OnGpu(AttentionCall):
        first = property(lambda self: type("Tensor", (), {"device": gpu}))

    call = OnGpu(*attending().leaves)
    assert backends._preferred("attention", call) == ("triton",)
    monkeypatch.setattr(backends, "_why_not", lambda name, op, call: None if name == "triton" else "no")
    with backends.recorded() as used:
        assert backends.choose("attention", call).__module__ == "loopmdm_kernels.triton.attention"
    assert used == {"attention": {"triton": "verdict of today: right, 2.00 times as fast as plain PyTorch"}}


def test_a_gpu_of_which_a_verdict_says_too_little(monkeypatch):
    gpu = torch.device("cuda", 0)
    standing = verdicts.Standing({("sample_rows", "forward", "float32"): ()}, {}, "verdict of today")
    monkeypatch.setattr(verdicts, "standing", lambda device: standing)
    monkeypatch.setattr(backends, "_why_unavailable", lambda name: None)

    class OnGpu(AttentionCall):
        first = property(lambda self: type("Tensor", (), {"device": gpu}))

    assert backends._preferred("attention", OnGpu(*attending(torch.float64).leaves)) == backends.PREFERENCE
    with pytest.warns(UserWarning, match="the verdict of today says nothing of attention, forward, float32"):
        assert backends._preferred("attention", OnGpu(*attending().leaves)) == backends.PREFERENCE


def test_a_gpu_is_known_by_its_table_of_tiles_too(monkeypatch, tmp_path):
    gpu, table = torch.device("cuda", 0), tmp_path / "tiles.json"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = [verdicts.facts(gpu)]
    for content in ("{}", "{ }"):
        table.write_text(content)
        monkeypatch.setenv("LOOPMDM_TRITON_TILES", str(table))
        found.append(verdicts.facts(gpu))
    assert found[0]["capability"] == "9.0" and found[0]["table of tiles"] is None
    assert len({facts.pop("table of tiles") for facts in found}) == 3
    assert found[0] == found[1] == found[2]


def test_results_say_what_was_used():
    model = LoopMDM(LoopMDMConfig.preset("sudoku6"))
    options = {"num_samples": 1, "steps": 2, "plan": 1, "progress": False}
    result = sample(model, **options)
    assert result.backends["looped_blocks"] == {"cpu": "there is no verdict on this device"}
    assert result.backends["sample_rows"] == {"cpu": "there is no verdict on this device"}
    written(entry("looped_blocks"), entry("sample_rows", speedup=0.5))
    result = sample(model, **options)
    assert result.backends == {
        "looped_blocks": {"cpu": "verdict of 2026-01-01: right, 2.00 times as fast as plain PyTorch"},
        "sample_rows": {"reference": "verdict of 2026-01-01: no backend is right and faster"},
    }
    with lk.use_backend("reference"):
        assert sample(model, **options).backends["sample_rows"] == {"reference": "forced"}


def test_a_refusal_is_a_reason():
    with backends.recorded() as used:
        chosen(attending(torch.float64))
    reason = used["attention"]["reference"]
    assert reason.endswith("cpu: q must be float32 or bfloat16, got torch.float64")
    chosen()
    assert list(used["attention"]) == ["reference"]  # outside nothing is written down


def test_the_command_line(capsys, monkeypatch):
    asked = {}

    def qualify(device, **options):
        asked.update(options, device=device)
        entries = [entry() | {"seconds": {"T": {"ours": 1.0, "eager": 2.0, "compiled": 1.5}}}]
        entries += [entry("sample_rows", right=False, speedup=None) | {"why": "33 rows: it is wrong"}]
        return {"machine": {"device": "a processor"}, "path": "file.json", "entries": entries}

    monkeypatch.setattr(lk, "qualify", qualify)
    words = ["qualify", "--device", "cpu", "--op", "attention", "--dtype", "float32", "--no-compiled"]
    assert main(words) == 1
    assert asked["ops"] == ["attention"] and list(asked["dtypes"]) == ["float32"] and not asked["compiled"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["attention", "forward", "float32", "cpu", "yes", "2.00", "1.50"]
    assert lines[3].split("  ")[-1] == "33 rows: it is wrong" and " no " in lines[3]
    assert lines[-1] == "a processor: file.json"
    assert main([*words, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["entries"]) == 2
    assert asked["anew"] is True
    assert main([*words, "--if-needed"]) == 1
    assert asked["anew"] is False
    for word in ("0", "-1", "nan", "inf", "1e300", "soon", ""):
        assert main(["qualify", f"--time-limit={word}"]) == 2
        assert "--time-limit: got" in capsys.readouterr().err


def test_doctor_says_why(capsys):
    written(entry())
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["backends"]
    rate = "2.00 to 2.00 times as fast as plain PyTorch"
    assert told["cpu"]["chosen"] == f"used for 1 of 1 kinds of calls (verdict of 2026-01-01: right, {rate})"
