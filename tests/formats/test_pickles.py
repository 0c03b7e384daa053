"""The allow-list reader: nothing in a file is executed, what is refused is named, damage is a clear error."""

from __future__ import annotations

import collections
import copyreg
import io
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from loopmdm.formats import pickles
from loopmdm.formats.pickles import Opaque, StoredTensor, UnsafePickleError, lookup
from loopmdm.formats.torch_files import TorchFile
from tests.formats.payloads import Call, payloads, torch_zip, write

NAMES = sorted(payloads(Path("x")))
# Refused although nothing in them is outside the allow-list: they misuse what is inside.
MISUSE = {"build sets code", "build sets defaults"}


def test_the_payloads_work(tmp_path: Path) -> None:
    """Control: Python's own reader does execute them."""
    pickle.loads(payloads(tmp_path / "sentinel")["reduce os.system"])
    assert (tmp_path / "sentinel").exists()


@pytest.mark.parametrize("container", ["bare", "zip", "legacy"])
@pytest.mark.parametrize("name", NAMES)
def test_payload_is_refused(tmp_path: Path, name: str, container: str) -> None:
    data = payloads(tmp_path / "sentinel")[name]
    if container == "zip":
        data = torch_zip(data)
    elif container == "legacy":
        header = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
        data = header + data
    with pytest.raises(ValueError) as caught:
        TorchFile(write(tmp_path / "model.ckpt", data))
    assert not (tmp_path / "sentinel").exists()
    assert isinstance(caught.value, UnsafePickleError) or name in {"build on a class"}
    assert "model.ckpt" in str(caught.value)
    if isinstance(caught.value, UnsafePickleError) and name not in MISUSE:
        assert "refused" in str(caught.value) and "accepted are" in str(caught.value)


@pytest.mark.parametrize(
    "package", ["omegaconf", "transformers.models", "numpy.testing", "typing", "lightning"]
)
def test_objects_of_known_libraries_are_inert(tmp_path: Path, package: str) -> None:
    sentinel = tmp_path / "sentinel"
    for name in ("run", "os.system", "sys.modules"):
        data = (
            b"\x80\x04\x8c"
            + bytes([len(package)])
            + package.encode()
            + b"\x8c"
            + bytes([len(name)])
            + name.encode()
        )
        data += b"\x93V" + f"touch {sentinel}".encode() + b"\n\x85R}b."
        record = pickles.load(io.BytesIO(data))
        assert isinstance(record, Opaque) and record.global_name == f"{package}.{name}"
        assert record.args == (f"touch {sentinel}",) and record.state == {}
    assert not sentinel.exists()


def test_a_package_is_not_known_by_a_prefix_of_its_name() -> None:
    with pytest.raises(UnsafePickleError, match=r"numpyx\.run"):
        pickles.load(io.BytesIO(b"cnumpyx\nrun\n."))


def test_registered_extensions_are_refused(tmp_path: Path) -> None:
    """Their cache is process-wide and not seen by find_class."""
    copyreg.add_extension("os", "system", 0xF1)
    try:
        assert pickle.loads(b"\x80\x02\x82\xf1.") is os.system
        with pytest.raises(UnsafePickleError, match="extension code 241"):
            pickles.load(io.BytesIO(b"\x80\x02\x82\xf1V" + f"touch {tmp_path}/x".encode() + b"\n\x85R."))
    finally:
        copyreg.remove_extension("os", "system", 0xF1)
        copyreg.clear_extension_cache()
    assert not (tmp_path / "x").exists()


def test_the_allow_list_cannot_be_altered_by_a_pickle() -> None:
    for name in MISUSE:
        with pytest.raises(UnsafePickleError, match="tries to alter"):
            pickles.load(io.BytesIO(payloads(Path("x"))[name]))


@pytest.mark.parametrize(
    "call", [Call(bytes, 10**15), Call(bytearray, 10**15), Call(range, 10), Call(type, None)]
)
def test_allocating_and_reflective_builtins_are_refused(call: Call) -> None:
    with pytest.raises(UnsafePickleError):
        pickles.load(io.BytesIO(pickle.dumps(call, 2)))


def test_memo_index_beyond_the_file_is_refused() -> None:
    with pytest.raises(UnsafePickleError, match="memo index 4294967280"):
        pickles.load(io.BytesIO(b"\x80\x02Nr\xf0\xff\xff\xff."))


def test_state_dict_metadata_and_plain_containers(tmp_path: Path) -> None:
    state = torch.nn.Linear(2, 3).state_dict()
    tree = {
        "state": state,
        "counts": collections.Counter("aab"),
        "groups": collections.defaultdict(list, {"a": [1]}),
        "misc": [1, 2.5, None, True, "text", b"bytes", b"", (1, 2), {3}, frozenset([4]), 2**70, 1j],
        "size": torch.Size([2, 3]),
        "dtype": torch.float32,
    }
    torch.save(tree, tmp_path / "t.pt")
    file = TorchFile(tmp_path / "t.pt")
    file.close()
    assert file.root["counts"] == {"a": 2, "b": 1} and file.root["groups"] == {"a": [1]}
    assert (
        file.root["misc"] == tree["misc"]
        and file.root["size"] == (2, 3)
        and file.root["dtype"] is torch.float32
    )
    assert all(isinstance(leaf, StoredTensor) for leaf in file.root["state"].values())


def test_configuration_values_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("omegaconf")
    for name in ("DictConfig", "AnyNode"):
        setattr(module, name, type(name, (), {"__module__": "omegaconf"}))
    monkeypatch.setitem(sys.modules, "omegaconf", module)

    def node(value: Any) -> Any:
        record = module.DictConfig() if isinstance(value, dict) else module.AnyNode()
        if isinstance(value, dict):
            record.__dict__ = {
                "_content": {key: node(entry) for key, entry in value.items()},
                "_parent": record,
            }
        else:
            record.__dict__ = {"_val": value, "_parent": None}
        return record

    data = pickle.dumps({"config": node({"model": {"length": 128, "name": "small"}})}, 2)
    monkeypatch.undo()
    tree = pickles.load(io.BytesIO(data))
    assert lookup(tree, "config", "model", "length") == 128
    assert lookup(tree, "config", "model", "name") == "small"
    assert lookup(tree, "config", "absent", "length") is None
    assert lookup(tree, "config", "model") is None


def _text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def _deep(depth: int, opening: bytes, closing: bytes) -> bytes:
    return b"\x80\x02" + opening * depth + closing * depth + b"."


def _doubled(depth: int, ending: bytes) -> bytes:
    """Tuples of three references to the one before, `depth` times."""
    steps = b"".join(b"0" + (b"h" + bytes([i])) * 3 + b"\x87q" + bytes([i + 1]) for i in range(depth))
    return b"\x80\x02N0)q\x00" + steps + b"0" + ending.replace(b"@", b"h" + bytes([depth])) + b"."


def _copies(function: str, items: bytes = b"N" * 20_000) -> bytes:
    name = b"cbuiltins\n" + function.encode() + b"\n"
    return b"\x80\x02]q\x00(" + items + b"e" + name + b"q\x01" + b"h\x01h\x00\x85R" * 1000 + b"."


BOMBS = {
    "tuple as a key": b"\x80\x02})" + b"\x85" * 300_000 + b"Ns.",
    "deep list": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep dict": _deep(5000, b"}N", b"s"),
    "hash of shared tuples": _doubled(60, b"}@Ns"),
    "set of shared tuples": _doubled(60, b"\x8f(@\x90"),
    "frozenset of shared tuples": _doubled(60, b"(@\x91"),
    "str of shared tuples": _doubled(60, b"cbuiltins\nstr\n@\x85R"),
    "int of a tuple": _doubled(60, b"cbuiltins\nint\n@\x85R"),
    "complex of a tuple": _doubled(60, b"cbuiltins\ncomplex\n@\x85R"),
    "copied lists": _copies("list"),
    "copied tuples": _copies("tuple"),
    "copied sets": _copies("set"),
    "copied dicts": b"\x80\x02}q\x00("
    + b"".join(b"J" + i.to_bytes(4, "little") + b"N" for i in range(20_000))
    + b"uccollections\nOrderedDict\nq\x01"
    + b"h\x01h\x00\x85R" * 1000
    + b".",
    "encoded again and again": b"\x80\x02"
    + _text("x" * 10_000)
    + b"q\x00c_codecs\nencode\nq\x01"
    + b"h\x01h\x00\x85R" * 1000
    + b".",
    "huge integer": b"\x80\x02\x8b" + (100_000).to_bytes(4, "little") + b"\xff" * 100_000 + b".",
    "negative size of an integer": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "many digits": b"I" + b"9" * 5000 + b"\n.",
    "many digits, long": b"L" + b"9" * 400_000 + b"L\n.",
    "many digits through int": b"cbuiltins\nint\n" + _text("9" * 4000) + b"\x85R.",
    "colliding keys": b"\x80\x02}("
    + b"".join(b"\x8a\x0e" + (i * (2**61 - 1)).to_bytes(14, "little") + b"N" for i in range(50_000))
    + b"u.",
    "long key": b"\x80\x02}" + _text("k" * 10_000) + b"Ns.",
    "declared length": b"\x80\x02\x8e" + (2**62).to_bytes(8, "little") + b"x.",
    "frame beyond the end": b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"N.",
    "groups without end": b"\x80\x02" + b"(" * 1_000_001 + b".",
    "empty sets": b"\x80\x04" + b"\x8f0" * 1_000_001 + b"N.",
    "call of a call": b"\x80\x02ctorch\nSize\n)R)R.",
    "state of a list": b"\x80\x02]}b.",
    "buffer outside": b"\x80\x05\x97.",
    "newer protocol": b"\x80\x06N.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_pickles_cannot_ask_for_much_work(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        pickles.load(io.BytesIO(BOMBS[name]))
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_names_in_messages_are_printable() -> None:
    with pytest.raises(UnsafePickleError) as caught:
        pickles.load(io.BytesIO(b"\x80\x02c\x1b[2Jos\n" + b"s" * 100_000 + b"\n."))
    assert str(caught.value).isprintable() and r"\x1b[2Jos" in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_the_reader_stays_behind_the_pickle() -> None:
    file = io.BytesIO(b"ab" + pickle.dumps({1: [2]}, 4) + b"tail")
    file.seek(2)
    assert pickles.load(file) == {1: [2]} and file.read() == b"tail"


@pytest.mark.parametrize("protocol", range(6))
def test_all_protocols_read_as_python_does(protocol: int) -> None:
    shared = [
        "x",
        -1,
        255,
        65_000,
        -(2**31),
        2**40,
        -(2**100),
        1.5,
        None,
        True,
        False,
        b"\x00\xff",
        "é\u2028",
    ]
    value = {"a": shared, "b": (shared, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), "c": {"d": {1, 2}, 3: []}}
    value |= {"e": frozenset((1, 2)), "f": collections.OrderedDict(x=1), "g": 2j, "h": list(range(3000))}
    got = pickles.load(io.BytesIO(pickle.dumps(value, protocol)))
    assert got == value and got["a"] is got["b"][0]
