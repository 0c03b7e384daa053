"""Compiles kernels into the cache ahead of their first use, for example on a login node without a GPU.

python -m loopmdm_kernels.cuda.prebuild --hidden 768 --heads 12 --layers 2 --lengths 32 128 1024
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from loopmdm_kernels.cuda import disk_cache
from loopmdm_kernels.cuda.compiler import compile_kernel
from loopmdm_kernels.cuda.looped_blocks import HEAD_DIMS, SOURCE
from loopmdm_kernels.cuda.parameters import defines
from loopmdm_kernels.schedule import BlockShape, choose


def prebuild(shapes: Sequence[BlockShape]) -> int:
    """Compiles what these shapes need and returns the number of different kernels."""
    different = {tuple(defines(shape, choose(shape)).items()) for shape in shapes}
    for macros in sorted(different):
        compile_kernel(SOURCE, dict(macros))
    return len(different)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the Hopper kernels of a model into the cache.")
    parser.add_argument("--hidden", type=int, required=True, help="D")
    parser.add_argument("--heads", type=int, required=True, help="H")
    parser.add_argument("--mlp", type=int, help="F; 4 D if not given")
    parser.add_argument("--layers", type=int, required=True, help="blocks of the stack that is looped")
    parser.add_argument("--batch", type=int, default=1, help="B")
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="L, one or several")
    options = parser.parse_args(arguments)
    if options.hidden % options.heads or options.hidden // options.heads not in HEAD_DIMS:
        parser.error(f"--heads: got {options.heads}, expected heads of size {HEAD_DIMS} in {options.hidden}")
    mlp = options.mlp or 4 * options.hidden
    shapes = [
        BlockShape(options.batch, length, options.hidden, options.heads, mlp, options.layers)
        for length in options.lengths
    ]
    try:
        number = prebuild(shapes)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    print(f"compiled kernels: {number}, in {disk_cache.folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
