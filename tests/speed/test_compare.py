"""What moved between two runs, planted."""

import json

import pytest

from loopmdm.speed import compare

SETTINGS = dict.fromkeys(compare.SETTINGS, 1) | {"backend": "cpu"}


def run(speedup, plain=(10.0, 9.5, 10.5)):
    ours = [plain[0] / value for value in speedup]
    figure = {"speedup": list(speedup), "interval_ms": {"cpu": ours, "reference": list(plain)}}
    return SETTINGS | {"figures": {"op": figure}}


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ((2.0, 1.9, 2.1), (2.05, 1.95, 2.15), "same"),
        ((2.0, 1.9, 2.1), (2.5, 2.4, 2.6), "faster"),
        ((2.0, 1.9, 2.1), (1.5, 1.4, 1.6), "slower"),
        ((2.0, 1.0, 3.0), (2.9, 2.8, 3.5), "same"),  # a noisy run proves nothing
    ],
)
def test_a_kernel_moved_if_the_intervals_are_apart(old, new, verdict):
    (one,) = compare.moved(run(old), run(new))
    assert one.verdict == verdict and not one.machine


def test_a_slower_machine_moves_plain_pytorch_and_no_kernel():
    (one,) = compare.moved(run((2.0, 1.9, 2.1)), run((2.0, 1.9, 2.1), plain=(20.0, 19.0, 21.0)))
    assert one.verdict == "same" and one.machine and one.new_ms == 2 * one.old_ms


def test_kernels_of_one_run_alone_are_left_out():
    old = run((2.0, 1.9, 2.1))
    old["figures"] = {"another": old["figures"]["op"]}
    assert compare.moved(old, run((2.0, 1.9, 2.1))) == []


def test_settings_that_differ_are_named():
    assert compare.differing(SETTINGS, SETTINGS) == []
    (one,) = compare.differing(SETTINGS | {"loops": 12}, SETTINGS)
    assert one == "loops 12 then, 1 now"


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[" * 100_000,
        "[]",
        "{}",
        '{"figures": {}}',
        '{"figures": {"op": {"ms": {"cpu": 1}}}}',
        '{"figures": {"op": {"speedup": [1, 2, 3], "interval_ms": {"cpu": [1, 2, 3]}}}}',
        '{"figures": {"op": {"speedup": [1, 2, "3"], "interval_ms": {"reference": [1, 2, 3]}}}}',
    ],
)
def test_what_is_no_run_is_refused(tmp_path, text):
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"old\.json"):
        compare.read(path)


def test_a_run_is_read(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps(run((2.0, 1.9, 2.1))))
    assert compare.read(path) == run((2.0, 1.9, 2.1))
