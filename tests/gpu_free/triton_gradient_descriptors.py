"""Prints how Triton describes operands that both lie along their outer dimension, as logit gradients do."""

import json
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(left, right, out, rows: tl.constexpr, inner: tl.constexpr, columns: tl.constexpr):
    row, step, column = tl.arange(0, rows), tl.arange(0, inner), tl.arange(0, columns)
    a = tl.load(left + step[:, None] * rows + row[None, :]).trans()
    b = tl.load(right + step[:, None] * columns + column[None, :])
    tl.store(out + row[:, None] * columns + column[None, :], tl.dot(a, b))


signature = {"left": "*bf16", "right": "*bf16", "out": "*fp32"}
constants = {"rows": 64, "inner": 64, "columns": 256}
source = ASTSource(product, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
fields = {int(word) for word in re.findall(r"or\.b64 .*, (\d{15,});", ptx)}
steps = {int(word) for word in re.findall(r"(?:or\.b32|add\.s32) .*, (\d{7,9});", ptx)}
products = re.findall(r"wgmma\.mma_async\S*(m64n\d+k16)\S* .*, (\d), (\d);", ptx)
print(json.dumps({"fields": sorted(fields), "steps": sorted(steps), "products": products}))
