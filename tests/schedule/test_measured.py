"""Measured ceilings take the place of assumed ones, for the GPU they were measured on."""

import json

import pytest

from loopmdm_kernels.schedule import BlockShape, Device, choose, device_of, measured

SMALL = BlockShape(1, 1024, 768, 12, 3072, 2)
H200 = ((9, 0), 132, 232_448)


def test_the_shipped_table_is_sound():
    for ceilings in measured.table().values():
        assert set(ceilings) <= set(Device._fields)


def test_ceilings_are_those_of_the_device(tmp_path):
    path = tmp_path / "measured.json"
    assert measured.table(path) == {}
    measured.record("Made-up H200", {"product_flops": 500e12, "wait_seconds": 2e-6}, "results/a.json", path)
    measured.record("Made-up A100", {"l2_bytes": 3e12}, "results/b.json", path)
    table = measured.table(path)
    device = device_of(*H200, name="Made-up H200", measured=table)
    assert device == Device(product_flops=500e12, wait_seconds=2e-6)
    assert device_of(*H200, name="another", measured=table) == Device()
    assert device_of((8, 0), 108, 166_912, name="Made-up A100", measured=table).l2_bytes == 3e12
    assert choose(SMALL, device).loop_seconds > choose(SMALL).loop_seconds
    measured.record("Made-up H200", {"sm_bytes": 1e11}, "results/c.json", path)
    assert measured.table(path)["Made-up H200"] == {"sm_bytes": 1e11}
    assert json.loads(path.read_text())["Made-up H200"]["source"] == "results/c.json"
    assert [file.name for file in tmp_path.iterdir()] == ["measured.json"]


def test_measured_ceilings_may_choose_other_tiles():
    """Where L2 is slow, tiles are large: they read less."""
    table = {"slow L2": {"l2_bytes": 0.2e12}}
    shape = SMALL._replace(length=192)
    assert choose(shape, device_of(*H200)).tiles.rows == 128
    assert choose(shape, device_of(*H200, name="slow L2", measured=table)).tiles.rows == 256


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"flops": 1.0}, "a GPU: got the field 'flops', expected some of"),
        ({"l2_bytes": 0}, "a GPU: l2_bytes: got 0, expected a positive number"),
        ({"l2_bytes": "fast"}, "a GPU: l2_bytes: got 'fast', expected a positive number"),
    ],
)
def test_faults_of_the_table(tmp_path, entry, message):
    path = tmp_path / "measured.json"
    path.write_text(json.dumps({"a GPU": entry}))
    with pytest.raises(ValueError, match=message):
        measured.table(path)
    with pytest.raises(ValueError, match=message):
        measured.record("a GPU", entry, "results/a.json", tmp_path / "other.json")
