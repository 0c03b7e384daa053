"""Structs of the kernels, as the host reads them in the sources; tests/gpu_free compares offsets."""

import ctypes

import pytest

from loopmdm_kernels.cuda import parameters, sources
from loopmdm_kernels.cuda.parameters import MAP, fields, structure
from loopmdm_kernels.cuda.targets import SM80, SM90


def test_a_struct_is_read_with_its_base_and_what_it_holds():
    ampere, hopper = SM80.parameters, SM90.parameters
    assert ampere.input.offset == hopper.input.offset == 0
    assert fields(ampere, MAP) == [] and len(fields(hopper, MAP)) == 9
    assert hopper.size.size == 12 and hopper.stream.offset % 64 == 0 and ctypes.sizeof(hopper) % 64 == 0
    assert ampere.qkv_weight.offset % 8 == 0
    inside = structure("head/head_logits_sm90.cu", "HeadLogitsParameters")
    assert dict(inside._fields_)["problem"] is structure("head/vocabulary_sm90.cuh", "LogitsProblem")
    assert inside.out.offset == 320


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("struct Other {\n  int32_t a;\n};", "kernel.cu: there is no struct Given"),
        ("struct Given {\n  int32_t a[2];\n};", r"kernel.cu: Given: cannot read 'int32_t a\[2\]'"),
        ("struct Given {\n  double a;\n};", "kernel.cu: there is no struct double"),
    ],
)
def test_what_cannot_be_read_is_refused(text, message, tmp_path, monkeypatch):
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "kernel.cu").write_text(text)
    monkeypatch.setattr(sources, "folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=message):
        parameters._structure.__wrapped__("cuda/kernel.cu", "Given")
