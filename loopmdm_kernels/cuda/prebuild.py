"""Compiles kernels ahead of their first use: into the cache, or into a folder that becomes part of a wheel.

python -m loopmdm_kernels.cuda.prebuild --hidden 768 --heads 12 --layers 1 2 9 --lengths 32 128 1024
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loopmdm_kernels.cuda import disk_cache, prepare
from loopmdm_kernels.cuda.compiler import compile_into, compile_kernel
from loopmdm_kernels.cuda.head_kernels import HEAD_KERNELS
from loopmdm_kernels.cuda.looped_blocks import kernel_of
from loopmdm_kernels.cuda.looped_blocks_backward import CAPABILITY
from loopmdm_kernels.cuda.looped_blocks_backward import SOURCE as BACKWARD_SOURCE
from loopmdm_kernels.cuda.parameters import backward_defines
from loopmdm_kernels.cuda.targets import SM90, target_of, why_none
from loopmdm_kernels.schedule import BlockShape, choose_backward, device_of, measured
from loopmdm_kernels.schedule.device import nearest


def prebuild(
    shapes: Sequence[BlockShape],
    capability: tuple[int, int],
    *,
    name: str = "",
    folder: Path | None = None,
    training: bool = False,
) -> int:
    """Compiles what these shapes and any head need and returns the number of different kernels.

    Args:
        name: of the GPU, if its ceilings were measured: they may make other tiles the best.
        folder: for a package, instead of the cache.
        training: the backward pass too.
    """
    target, assumed = target_of(capability), nearest(capability)
    device = device_of(capability, assumed.sms, assumed.shared_bytes, name=name, measured=measured.table())
    device = target.used_of(device)
    different = {kernel_of(shape, target, device) for shape in shapes}
    kernels: list[tuple[str, dict[str, int]]] = [
        (prepare.SOURCE, {}),
        *((kernel.source, dict(kernel.macros)) for kernel in sorted(different)),
    ]
    if training:
        backward = {
            tuple(backward_defines(shape, choose_backward(shape, device)).items()) for shape in shapes
        }
        kernels += [(BACKWARD_SOURCE, dict(macros)) for macros in sorted(backward)]
    if target is SM90:
        kernels += [(kernel.source, dict(kernel.macros)) for kernel in HEAD_KERNELS]

    def compile_one(kernel: tuple[str, dict[str, int]]) -> None:
        if folder is None:
            compile_kernel(*kernel, target.architecture)
        else:
            compile_into(folder, *kernel, target.architecture)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compilers let other threads run
        list(pool.map(compile_one, kernels))
    return len(kernels)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels of a model ahead of their use.")
    parser.add_argument("--hidden", type=int, required=True, help="D")
    parser.add_argument("--heads", type=int, required=True, help="H")
    parser.add_argument("--mlp", type=int, help="F; 4 D if not given")
    parser.add_argument(
        "--layers", type=int, nargs="+", required=True, help="blocks of a stack: looped, or before and after"
    )
    parser.add_argument("--batch", type=int, default=1, help="B")
    parser.add_argument("--lengths", type=int, nargs="+", required=True, help="L, one or several")
    parser.add_argument(
        "--capability",
        type=_capability,
        nargs="+",
        default=[(9, 0)],
        help="of the GPU, as 8.0; 9.0 if not given",
    )
    parser.add_argument(
        "--name", choices=sorted(measured.table()), help="of the GPU, if its ceilings were measured"
    )
    parser.add_argument("--folder", type=Path, help="where to, for a package; the cache if not given")
    parser.add_argument("--training", action="store_true", help="the backward pass too; needs 9.0")
    options = parser.parse_args(arguments)
    if options.training and options.capability != [CAPABILITY]:
        parser.error("--training: the backward pass needs compute capability 9.0 (H100, H200)")
    mlp = options.mlp or 4 * options.hidden
    shapes = [
        BlockShape(options.batch, length, options.hidden, options.heads, mlp, layers)
        for layers in options.layers
        for length in options.lengths
    ]
    number = 0
    for capability in options.capability:
        head_dims = target_of(capability).head_dims
        if options.hidden % options.heads or options.hidden // options.heads not in head_dims:
            parser.error(
                f"--heads: got {options.heads}, expected heads of size {head_dims} in {options.hidden}"
            )
        try:
            number += prebuild(
                shapes, capability, name=options.name or "", folder=options.folder, training=options.training
            )
        except (ValueError, RuntimeError) as error:
            parser.error(str(error))
    print(f"compiled kernels: {number}, in {options.folder or disk_cache.folder()}")
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
