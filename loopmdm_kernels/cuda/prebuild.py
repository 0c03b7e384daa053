"""Compiles kernels into the cache ahead of their first use, for example on a login node without a GPU.

python -m loopmdm_kernels.cuda.prebuild --hidden 768 --heads 12 --layers 2 --lengths 32 128 1024
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from loopmdm_kernels.cuda import disk_cache
from loopmdm_kernels.cuda.compiler import compile_kernel
from loopmdm_kernels.cuda.parameters import defines
from loopmdm_kernels.cuda.targets import target_of, why_none
from loopmdm_kernels.schedule import BlockShape, choose, device_of, measured
from loopmdm_kernels.schedule.cost import nearest


def prebuild(shapes: Sequence[BlockShape], capability: tuple[int, int], name: str = "") -> int:
    """Compiles what these shapes need and returns the number of different kernels.

    Args:
        name: of the GPU, if its ceilings were measured: they may make other tiles the best.
    """
    target, assumed = target_of(capability), nearest(capability)
    device = device_of(capability, assumed.sms, assumed.shared_bytes, name=name, measured=measured.table())
    different = {tuple(defines(shape, choose(shape, device)).items()) for shape in shapes}
    for macros in sorted(different):
        compile_kernel(target.source, dict(macros), target.architecture)
    return len(different)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels of a model into the cache.")
    parser.add_argument("--hidden", type=int, required=True, help="D")
    parser.add_argument("--heads", type=int, required=True, help="H")
    parser.add_argument("--mlp", type=int, help="F; 4 D if not given")
    parser.add_argument("--layers", type=int, required=True, help="blocks of the stack that is looped")
    parser.add_argument("--batch", type=int, default=1, help="B")
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="L, one or several")
    parser.add_argument(
        "--capability", type=_capability, default=(9, 0), help="of the GPU, as 8.0; 9.0 if not given"
    )
    parser.add_argument(
        "--name", choices=sorted(measured.table()), help="of the GPU, if its ceilings were measured"
    )
    options = parser.parse_args(arguments)
    head_dims = target_of(options.capability).head_dims
    if options.hidden % options.heads or options.hidden // options.heads not in head_dims:
        parser.error(f"--heads: got {options.heads}, expected heads of size {head_dims} in {options.hidden}")
    mlp = options.mlp or 4 * options.hidden
    shapes = [
        BlockShape(options.batch, length, options.hidden, options.heads, mlp, options.layers)
        for length in options.lengths
    ]
    try:
        number = prebuild(shapes, options.capability, options.name or "")
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    print(f"compiled kernels: {number}, in {disk_cache.folder()}")
    return 0


def _capability(text: str) -> tuple[int, int]:
    major, dot, minor = text.partition(".")
    if not (dot and major.isdigit() and minor.isdigit()):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected two numbers as in 8.0")
    reason = why_none((int(major), int(minor)))
    if reason:
        raise argparse.ArgumentTypeError(reason)
    return int(major), int(minor)


if __name__ == "__main__":
    sys.exit(main())
