"""Turn a reference (MDLM) checkpoint, or a run of several processes, into config.json and model.safetensors.

Reads a Lightning .ckpt (the averaged weights, which published figures use), a bare state dict in a torch
file, a safetensors file or folder, or a hub id. Torch files are read without running any code in them. The
weights stay as they are; the loop is configuration only. Of a run with checkpoints in shards, also while it
goes on, it takes the averaged weights of the newest one; of every run of ours, the tokenizer too.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from loopmdm.cli.output import print_json, show
from loopmdm.cli.parser import add_json
from loopmdm.cli.runs import refuse
from loopmdm.formats.hub import is_hub_id
from loopmdm.mdlm import convert_checkpoint
from loopmdm.runs.export import export_run, tokenizer_copied
from loopmdm.runs.initial import check_raw
from loopmdm.runs.options import UsageError, count, loop_errors, loop_range, num_loops, positive_int
from loopmdm.runs.run_file import RUN_FILE
from loopmdm.train.checkpoints import CHECKPOINTS
from loopmdm.train.loop import FILES
from loopmdm_kernels.files import refuse_files

EPILOG = """examples:
  loopmdm convert mdlm.ckpt mdlm-looped --loop 1:3 --max-loops 12
  loopmdm convert kuleshov-group/mdlm-owt mdlm-owt --max-loops 1
  loopmdm convert kuleshov-group/mdlm-owt mdlm-damped --loop 4:8 --max-loops 4 --damped
  loopmdm convert run out               the newest checkpoint of a run that several processes train
"""

# Options about what a reference checkpoint does not say.
_REFERENCE = {
    "loop": "--loop",
    "max_loops": "--max-loops",
    "max_length": "--max-length",
    "mask_token_id": "--mask-token-id",
    "num_heads": "--num-heads",
    "damped": "--damped",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SRC", help="checkpoint file, folder or hub id; or the folder of a run"
    )
    parser.add_argument("target", metavar="DST", help="folder to write, without a checkpoint or a run in it")
    parser.add_argument(
        "--no-ema", action="store_true", help="take the raw weights of a Lightning checkpoint"
    )
    parser.add_argument(
        "--loop", type=loop_range, metavar="START:END", help="blocks to loop (default: as stored, else 1:3)"
    )
    parser.add_argument(
        "--max-loops",
        type=num_loops,
        metavar="S",
        help="loops if not told otherwise (default: as stored, else 12)",
    )
    parser.add_argument(
        "--max-length", type=positive_int, metavar="L", help="(default: as stored, else 1024)"
    )
    parser.add_argument("--mask-token-id", type=count, metavar="ID", help="(default: that of the vocabulary)")
    parser.add_argument("--num-heads", type=positive_int, metavar="H", help="(default: as stored)")
    parser.add_argument(
        "--damped",
        action="store_true",
        default=None,
        help="each of S loops goes 1/S of its way: looping without training",
    )
    add_json(parser, "the configuration")


def _run_of_shards(args: argparse.Namespace) -> int:
    found, config = export_run(args.source, args.target)
    if args.json:
        print_json({"source": args.source, "target": args.target, "config": config, "step": found.step})
    else:
        show(f"{args.target}: the averaged weights of step {found.step}, from {found.path}")
    return 0


def run(args: argparse.Namespace) -> int:
    given = {"max_length": args.max_length, "damped": args.damped}
    options = {name: value for name, value in given.items() if value is not None}
    refuse_files(args.target, (*FILES, RUN_FILE), "the converted checkpoint")
    if (Path(args.source) / CHECKPOINTS).is_dir():
        refuse(args, _REFERENCE, "the configuration of a run is known")
        if args.no_ema:
            raise UsageError("--no-ema: of a run the averaged weights are taken")
        return _run_of_shards(args)
    if args.no_ema and (os.path.exists(args.source) or is_hub_id(args.source)):
        check_raw(args.source)
    with loop_errors(args.loop), tokenizer_copied(args.source, args.target):
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
        f" {config.max_loops} times{' (damped)' if config.damped else ''} if not told otherwise"
    )
    return 0
