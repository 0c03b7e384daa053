"""Turn a reference (MDLM) checkpoint into a folder with config.json and model.safetensors.

Reads a Lightning .ckpt (the averaged weights, which published figures use), a bare state dict in a torch
file, a safetensors file or folder, or a hub id. Torch files are read without running any code in them. The
weights stay as they are; the loop is configuration only.
"""

from __future__ import annotations

import argparse
from typing import Any

from loopmdm.cli.output import print_json, show
from loopmdm.cli.parser import add_json
from loopmdm.mdlm import convert_checkpoint
from loopmdm.model.loop_law import loop_count
from loopmdm.runs.options import count, loop_range, positive_int, usage_errors
from loopmdm.runs.run_file import RUN_FILE
from loopmdm.train.loop import FILES
from loopmdm_kernels.files import refuse_files

EPILOG = """examples:
  loopmdm convert mdlm.ckpt mdlm-looped --loop 1:3 --max-loops 12
  loopmdm convert kuleshov-group/mdlm-owt mdlm-owt --max-loops 1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="checkpoint file, folder or hub id")
    parser.add_argument("target", metavar="DST", help="folder to write, without a checkpoint or a run in it")
    parser.add_argument(
        "--no-ema", action="store_true", help="take the raw weights of a Lightning checkpoint"
    )
    parser.add_argument(
        "--loop", type=loop_range, metavar="START:END", help="blocks to loop (default: as stored, else 1:3)"
    )
    parser.add_argument(
        "--max-loops",
        type=positive_int,
        metavar="S",
        help="loops if not told otherwise (default: as stored, else 12)",
    )
    parser.add_argument(
        "--max-length", type=positive_int, metavar="L", help="(default: as stored, else 1024)"
    )
    parser.add_argument("--mask-token-id", type=count, metavar="ID", help="(default: that of the vocabulary)")
    parser.add_argument("--num-heads", type=positive_int, metavar="H", help="(default: as stored)")
    add_json(parser, "the configuration")


def run(args: argparse.Namespace) -> int:
    if args.max_loops is not None:
        with usage_errors():
            loop_count("--max-loops", args.max_loops)
    options: dict[str, Any] = {} if args.max_length is None else {"max_length": args.max_length}
    refuse_files(args.target, (*FILES, RUN_FILE), "the converted checkpoint")
    config = convert_checkpoint(
        args.source,
        args.target,
        loop=args.loop,
        ema=not args.no_ema,
        max_loops=args.max_loops,
        mask_token_id=args.mask_token_id,
        num_heads=args.num_heads,
        **options,
    )
    if args.json:
        print_json({"source": args.source, "target": args.target, "config": config.to_dict()})
        return 0
    show(
        f"{args.target}: {config.num_layers} blocks of width {config.hidden_size}, V = {config.vocab_size},"
        f" mask {config.mask_token_id}; blocks {config.loop_start} to {config.loop_end - 1} are looped,"
        f" {config.max_loops} times if not told otherwise"
    )
    return 0
