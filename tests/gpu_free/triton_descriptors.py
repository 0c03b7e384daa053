"""Prints the matrix descriptors in the PTX that Triton makes of a product with keys and one with values."""

import json
import re

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


def descriptors(transposed, keys=128, width=128):
    signature = {"left": "*bf16", "right": "*bf16", "out": "*fp32"}
    constants = {"keys": keys, "width": width, "transposed": transposed}
    source = ASTSource(product, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    fields = sorted({int(word) % 2**64 for word in re.findall(r"or\.b64 .*, (-?\d{15,});", ptx)})
    steps = [int(word) for word in re.findall(r"(?:or\.b32|add\.s32) .*, (67\d{6});", ptx)]
    return {"fields": fields, "steps": steps}


result = {"inner": descriptors(True), "outer": descriptors(False)}
for size in (16, 32):  # heads of a narrow panel: keys [128, size] and values [128, size]
    result[f"inner of {size}"] = descriptors(True, size, 128)
    result[f"outer of {size}"] = descriptors(False, 128, size)
print(json.dumps(result))
