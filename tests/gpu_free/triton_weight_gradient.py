"""Prints how the PTX that Triton makes of a weight gradient describes its operands."""

import json
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(left, right, out, tokens: tl.constexpr, height: tl.constexpr, width: tl.constexpr):
    rows, inner, columns = tl.arange(0, height), tl.arange(0, tokens), tl.arange(0, width)
    a = tl.load(left + inner[:, None] * height + rows[None, :]).trans()
    b = tl.load(right + inner[:, None] * width + columns[None, :])
    tl.store(out + rows[:, None] * width + columns[None, :], tl.dot(a, b))


signature = {"left": "*bf16", "right": "*bf16", "out": "*fp32"}
constants = {"tokens": 64, "height": 128, "width": 128}
source = ASTSource(product, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
fields = {int(word) for word in re.findall(r"or\.b64 .*, (\d{15,});", ptx)}
steps = {int(word) for word in re.findall(r"(?:or\.b32|add\.s32) .*, (3355\d{4});", ptx)}
across = {(int(a), int(b)) for a, b in re.findall(r"wgmma\.mma_async.*, 1, 1, ([01]), ([01]);", ptx)}
print(json.dumps({"fields": sorted(fields), "steps": sorted(steps), "read across": sorted(across)}))
