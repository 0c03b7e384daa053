"""Compiles the Triton kernels for GPUs that are not there, and tells what they take of the processor.

    python -m bench.probes.triton_resources      all presets on sm_80, sm_90 and sm_100, to the table
    python -m bench.probes.triton_resources --arch 90 --kernel linear_kernel    a part, to the terminal

Needs no GPU. The table, tests/gpu_free/triton_resources.json, is what the tests compare with: a kernel that
takes more than it says fails them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.probes.triton_launches import SHAPES, all_launches
from loopmdm_kernels.files import write_file
from loopmdm_kernels.triton.launch import Launch

TABLE = Path(__file__).parents[2] / "tests/gpu_free/triton_resources.json"
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may have
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}


class Resources(NamedTuple):
    registers: int  # of a thread
    shared: int  # bytes of a block
    spills: int  # loads and stores of local memory in the machine code
    tensor_core_products: int  # instructions in the PTX


class Variant(NamedTuple):
    """One compilation: types, constants and alignments as a launch would have them."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]
    arch: int

    @property
    def name(self) -> str:
        """Tells the variants of a shape apart, and is the same from day to day."""
        sizes = [f"{k}={v}" for k, v in self.constants.items() if k.isupper()]
        absent = [k[:-4] for k, v in self.constants.items() if v is None and k.endswith("_ptr")]
        types = [t[1:] for t in self.signature.values() if t.startswith("*")]
        ones = [k for k, v in self.constants.items() if k.islower() and v == 1]
        parts = [
            self.kernel.__name__,
            f"sm_{self.arch}",
            ",".join(sizes),
            "no " + ",".join(absent) if absent else "",
            " ".join(f"{k}=1" for k in ones),
            ",".join(types),
        ]
        return " ".join(part for part in parts if part)


def variant_of(launch: Launch) -> Variant:
    """What Triton's own launcher makes of these arguments."""
    signature, constants, aligned = {}, {}, []
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        fixed = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (_is_int(value) and value == 1 and not fixed):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            anywhere = fixed or parameter.do_not_specialize_on_alignment
            multiple = not anywhere and value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            signature[name], multiple = "fp32", False
        else:
            signature[name] = parameter.annotation_type or ("i32" if -(2**31) <= value < 2**31 else "i64")
            multiple = value % 16 == 0 and not fixed
        if multiple:
            aligned.append(index)
    options = tuple(sorted(launch.options.items()))
    return Variant(launch.kernel, signature, constants, tuple(aligned), options, launch.processor.arch)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def compile_variant(variant: Variant) -> Resources:
    source = ASTSource(
        variant.kernel,
        variant.signature,
        variant.constants,
        {(index,): [["tt.divisibility", 16]] for index in variant.aligned},
    )
    options = {**dict(variant.options), "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options=options)
    told = _cuobjdump(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+)", told)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers:\n{told[:1000]}")
    return Resources(
        registers=int(found.group(1)),
        shared=compiled.metadata.shared,
        spills=len(re.findall(r"\b(?:STL|LDL)\b", told)),
        tensor_core_products=compiled.asm["ptx"].count(TENSOR_CORES[variant.arch]),
    )


def _cuobjdump(cubin: bytes) -> str:
    """What the kernel takes, and its machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def variants(archs: tuple[int, ...], shapes: tuple[str, ...], kernel: str | None) -> dict[str, Variant]:
    """By shape and name, each compilation once (under the first shape that needs it)."""
    found: dict[str, Variant] = {}
    seen = set()
    for shape, launch in all_launches(archs, shapes):
        if kernel is not None and launch.kernel.__name__ != kernel:
            continue
        variant = variant_of(launch)
        identity = repr(variant._replace(kernel=launch.kernel.__name__))
        if identity not in seen:
            seen.add(identity)
            key = f"{shape} {variant.name}"
            while key in found:  # alike but for alignments
                key += "'"
            found[key] = variant
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_LIMIT))
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES))
    parser.add_argument("--kernel", help="only this one")
    parser.add_argument("--names", type=Path, help="JSON list: compile these entries of the table only")
    parser.add_argument(
        "--json", action="store_true", help="print the resources instead of writing the table"
    )
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("TRITON_INTERPRET is set: the kernels would be interpreted, not compiled")
    part = any((args.arch, args.shape, args.kernel, args.names, args.json))
    found = variants(tuple(args.arch or SHARED_LIMIT), tuple(args.shape or SHAPES), args.kernel)
    if args.names:
        differ = set(found) ^ set(json.loads(TABLE.read_text()))
        if differ:
            sys.exit(f"{TABLE.name} lists other launches than are made; they differ in {sorted(differ)}")
        found = {name: found[name] for name in json.loads(args.names.read_text())}
    table = {}
    for number, (name, variant) in enumerate(found.items(), 1):
        table[name] = compile_variant(variant)._asdict()
        print(f"{number}/{len(found)} {name} {table[name]}", file=sys.stderr, flush=True)
    text = json.dumps(table, indent=1) + "\n"
    if part:
        print(text)
        return
    write_file(TABLE, text)


if __name__ == "__main__":
    main()
