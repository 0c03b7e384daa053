"""Prints how the PTX that Triton makes of a kind of products describes their operands, as JSON."""

import json
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(left, right, out, keys: tl.constexpr, width: tl.constexpr, transposed: tl.constexpr):
    rows, inner, columns = tl.arange(0, 64), tl.arange(0, keys), tl.arange(0, width)
    a = tl.load(left + rows[:, None] * keys + inner[None, :])
    if transposed:
        b = tl.load(right + columns[:, None] * keys + inner[None, :]).trans()
    else:
        b = tl.load(right + inner[:, None] * width + columns[None, :])
    tl.store(out + rows[:, None] * width + columns[None, :], tl.dot(a, b))


@triton.jit
def gradient(left, right, out, height: tl.constexpr, steps: tl.constexpr, width: tl.constexpr):
    """Both operands lie along their outer dimension."""
    rows, inner, columns = tl.arange(0, height), tl.arange(0, steps), tl.arange(0, width)
    a = tl.load(left + inner[:, None] * height + rows[None, :]).trans()
    b = tl.load(right + inner[:, None] * width + columns[None, :])
    tl.store(out + rows[:, None] * width + columns[None, :], tl.dot(a, b))


def described(kernel, steps, *numbers):
    """Constant fields, steps of addresses by their pattern, and shapes and transpositions of products."""
    constants = dict(zip(kernel.arg_names[3:], numbers, strict=True))
    types = {"left": "*bf16", "right": "*bf16", "out": "*fp32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(kernel, types, constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    return {
        "fields": sorted({int(word) % 2**64 for word in re.findall(r"or\.b64 .*, (-?\d{15,});", ptx)}),
        "steps": sorted({int(word) for word in re.findall(rf"(?:or\.b32|add\.s32) .*, ({steps});", ptx)}),
        "products": re.findall(r"wgmma\.mma_async\S*(m64n\d+k16)\S* .*, (\d), (\d);", ptx),
    }


def attention():
    """A product with keys and one with values; in heads of a narrow panel too."""
    found = {"inner": described(product, r"67\d{6}", 128, 128, True)}
    found["outer"] = described(product, r"67\d{6}", 128, 128, False)
    for size in (16, 32):  # keys [128, size] and values [128, size]
        found[f"inner of {size}"] = described(product, r"67\d{6}", size, 128, True)
        found[f"outer of {size}"] = described(product, r"67\d{6}", 128, size, False)
    return found


KINDS = {
    "attention": attention,
    "weight_gradient": lambda: described(gradient, r"3355\d{4}", 128, 64, 128),
    "logit_gradients": lambda: described(gradient, r"\d{7,9}", 64, 64, 256),
}
print(json.dumps(KINDS[sys.argv[1]]()))
