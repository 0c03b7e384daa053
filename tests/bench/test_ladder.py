"""Ladders of the CPU kernels are compiled as these are; their figures are shares of what was measured."""

from bench.probes import ladder


def test_an_instruction_set_has_the_flags_of_those_below_it():
    flags = {isa: ladder.flags_of(isa) for isa in ("generic", "avx2", "avx512", "avx512_bf16")}
    assert flags["generic"] == []
    assert flags["avx2"] == ["-mavx2", "-mfma"]
    assert flags["avx512"][:2] == flags["avx2"] and "-mavx512f" in flags["avx512"]
    assert flags["avx512_bf16"] == [*flags["avx512"], "-mavx512bf16", "-mavx512vnni"]


def test_shares_are_of_the_peak_and_of_the_block(tmp_path):
    program = tmp_path / "program"
    lines = r"peak\t1e9\t1e-2\nblock\t5e8\t1e-2\nblock: gelu\t0\t1e-3\n"
    program.write_text(f"#!/bin/sh\nprintf '{lines}'\n")
    program.chmod(0o755)
    peak, block, gelu = ladder.steps_of(program, (256, 4, 81, 81), "fp32", 0.01, "block")
    assert peak["share_of_peak"] == 1 and peak["gflops"] == 100
    assert block["share_of_peak"] == 0.5 and block["part_of_block"] == 1
    assert gelu == {"step": "block: gelu", "microseconds": 1000, "part_of_block": 0.1}
