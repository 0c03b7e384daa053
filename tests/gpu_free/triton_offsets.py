"""Prints, as JSON, the 32-bit products of run-time numbers in each kernel, for test_triton_offsets.py."""

from __future__ import annotations

import json
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import ir, make_backend

from bench.probes.triton_resources import Variant, variants


@triton.jit
def narrow_kernel(x_ptr, out_ptr, rows, columns, BLOCK: tl.constexpr):
    """What no kernel may look like: rows times columns beyond 2^31 wraps around, before it is widened too."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * columns, mask=row < rows)
    tl.store(out_ptr + (row * columns).to(tl.int64) + row.to(tl.int64) * columns, x, mask=row < rows)


def ttir(variant: Variant) -> str:
    """The first stage of the compiler, functions inlined; takes a tenth of a second."""
    target = GPUTarget("cuda", variant.arch, 32)
    backend = make_backend(target)
    options = backend.parse_options(dict(variant.options))
    source = ASTSource(variant.kernel, variant.signature, variant.constants, {})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementations = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, implementations, backend.get_module_map(), context)
    return str(backend.make_ttir(module, {}, options, variant.arch))


def narrow_products(text: str) -> list[str]:
    """Multiplications of 32-bit integers, neither of which is a constant."""
    constants = set(re.findall(r"(%\S+) = arith\.constant", text))
    products = re.findall(r"(%\S+) = arith\.muli (%\S+), (%\S+) : (?:i32|tensor<\S*xi32>)", text)
    return [f"{a} * {b}" for _, a, b in products if a not in constants and b not in constants]


def main() -> None:
    example = Variant(
        narrow_kernel,
        {"x_ptr": "*fp32", "out_ptr": "*fp32", "rows": "i32", "columns": "i32", "BLOCK": "constexpr"},
        {"BLOCK": 16},
        (),
        (),
        90,
    )
    found: dict[str, list[str]] = {"narrow_kernel": narrow_products(ttir(example))}
    for variant in variants((90,), ("small",), None).values():
        name = variant.kernel.__name__
        found.setdefault(name, [])
        found[name] = max(found[name], narrow_products(ttir(variant)), key=len)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
