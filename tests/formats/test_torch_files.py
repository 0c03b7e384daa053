"""Files of `torch.save`: tensors as Python reads them, damage and layouts that reach too far refused."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from loopmdm.formats.pickles import UnsafePickleError
from loopmdm.formats.torch_files import TorchFile
from loopmdm.printable import shown
from tests.formats.payloads import read_all, torch_zip, write


def example() -> dict[str, torch.Tensor]:
    base = torch.arange(24, dtype=torch.float32)
    return {
        "plain": torch.randn(3, 4),
        "half": torch.randn(5).bfloat16(),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "ids": torch.tensor([1, -2, 3]),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "transposed": base.view(4, 6).t(),
        "slice of the same storage": base[3:9:2],
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_torch_save(tmp_path: Path, zipped: bool) -> None:
    tensors = example()
    torch.save(tensors, tmp_path / "t.pt", _use_new_zipfile_serialization=zipped)
    loaded = read_all(tmp_path / "t.pt")
    assert list(loaded) == list(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor.data), name


def stored(
    offset: Any = 0, shape: Any = (2,), stride: Any = (1,), numel: int = 4, data: bytes = b"\0" * 16
) -> bytes:
    """A torch file with one fp32 tensor of the given layout."""

    class Place:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, (STORAGE, offset, shape, stride, False, {})

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if obj is STORAGE else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"w": Place()})
    return torch_zip(buffer.getvalue(), **{"0": data})


def shared_tuple(depth: int) -> tuple[Any, ...]:
    """A few objects, which are 2^depth for whoever walks all paths to them."""
    value: tuple[Any, ...] = (0,)
    for _ in range(depth):
        value = (value, value)
    return value


class _Storage:
    pass


STORAGE = _Storage()


@pytest.mark.parametrize(
    "layout",
    [
        {"shape": (5,)},
        {"offset": 3},
        {"offset": -1},
        {"stride": (-1,)},
        {"stride": (4,)},
        {"shape": (10**9, 10**9), "stride": (0, 0)},
        {"shape": (10**6,) * 10**5, "stride": (0,) * 10**5},
        {"offset": 10**5000},
        {"shape": (2,), "stride": (1, 1)},
        {"numel": 10**12},
        {"numel": -4},
        {"data": b"\0" * 12},
    ],
    ids=lambda layout: shown(layout),
)
def test_layouts_outside_the_storage_are_refused(tmp_path: Path, layout: dict[str, Any]) -> None:
    assert read_all(write(tmp_path / "good.pt", stored()))["w"].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"layout|does not fit|bytes"):
        read_all(write(tmp_path / "bad.pt", stored(**layout)))


@pytest.mark.parametrize(
    "layout",
    [{"shape": (2.5,)}, {"shape": (shared_tuple(60),)}, {"stride": (shared_tuple(60),)}, {"offset": None}],
    ids=lambda layout: shown(layout),
)
def test_layouts_that_are_no_numbers_are_refused_at_once(tmp_path: Path, layout: dict[str, Any]) -> None:
    """Records of tensors are looked up, which takes for ever with a few objects in each other."""
    with pytest.raises(UnsafePickleError, match="no whole number"):
        TorchFile(write(tmp_path / "bad.pt", stored(**layout)))


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    """A zip bomb must compress; torch.save never does."""
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)
    with pytest.raises(ValueError, match="compressed"):
        TorchFile(tmp_path / "bomb.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_truncation_anywhere_is_one_clear_error(tmp_path: Path, zipped: bool) -> None:
    torch.save(example(), tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "whole.pt").read_bytes()
    for end in {0, 1, 3, 5, 20, *range(50, len(whole), 97), len(whole) - 1}:
        with pytest.raises(ValueError, match=r"cut\.pt"):
            read_all(write(tmp_path / "cut.pt", whole[:end]))


@pytest.mark.parametrize("zipped", [True, False])
def test_damage_gives_a_value_error_or_a_result(tmp_path: Path, zipped: bool) -> None:
    torch.save(example(), tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "whole.pt").read_bytes()
    chance = random.Random(0)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            read_all(write(tmp_path / "damaged.pt", bytes(data)))
        except ValueError:
            refused += 1
        except (AttributeError, TypeError) as error:
            assert "has no attribute" in str(error) or "StoredTensor" in str(
                error
            )  # the tree's root or leaves changed
    assert refused > 40


@pytest.mark.parametrize("data", [b"", b"hello world, this is text", b"PK\x03\x04", b"\x80\x02]q\x00."])
def test_other_files(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match="torch file"):
        TorchFile(write(tmp_path / "other.bin", data))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        TorchFile(tmp_path / "none.pt")


def test_tensors_of_one_storage_share_memory(tmp_path: Path) -> None:
    """As after vector_to_parameters: the file is mapped once, not read once for each view."""
    flat = torch.arange(1000, dtype=torch.float32)
    torch.save({f"w{i}": flat[10 * i : 10 * i + 10] for i in range(100)}, tmp_path / "flat.pt")
    loaded = read_all(tmp_path / "flat.pt")
    assert torch.equal(torch.cat(list(loaded.values())), flat)
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values()}) == 1


def test_few_bytes_cannot_pose_as_many_tensors(tmp_path: Path) -> None:
    flat = torch.zeros(1000)
    torch.save({f"w{i}": flat[i : i + 900] for i in range(20)}, tmp_path / "repeated.pt")
    with pytest.raises(ValueError, match="repeat the 1000 elements of storage"):
        read_all(tmp_path / "repeated.pt")
    torch.save({f"w{i}": flat for i in range(20)}, tmp_path / "tied.pt")
    assert len({tensor.data_ptr() for tensor in read_all(tmp_path / "tied.pt").values()}) == 1


def test_files_without_checksums(tmp_path: Path) -> None:
    tensors = example()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "t.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    loaded = read_all(tmp_path / "t.pt")
    assert list(loaded) == list(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor.data), name


def test_a_changed_byte_is_seen(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(64.0)}, tmp_path / "t.pt")
    data = bytearray((tmp_path / "t.pt").read_bytes())
    place = bytes(data).index(torch.arange(64.0).numpy().tobytes())
    data[place + 100] ^= 1
    with pytest.raises(ValueError, match="CRC-32"):
        read_all(write(tmp_path / "changed.pt", bytes(data)))


def test_overlapping_members_are_refused(tmp_path: Path) -> None:
    """Two entries of the directory on the same bytes would let a small file hold any number of tensors."""
    data = torch_zip(b"\x80\x02}.", **{"0": b"a" * 64, "1": b"b" * 64})
    offsets = [info.header_offset for info in zipfile.ZipFile(io.BytesIO(data)).infolist()]
    directory = data.index(b"PK\x01\x02")
    shifted = data[:directory] + data[directory:].replace(
        offsets[2].to_bytes(4, "little"), offsets[1].to_bytes(4, "little")
    )
    with pytest.raises(ValueError, match=r"overlap"):
        TorchFile(write(tmp_path / "overlap.pt", shifted))
