"""Run lm-evaluation-harness (the package lm_eval) with the model name `loopmdm`.

All words are those of its own command `lm-eval`: `run`, `ls` and `validate` with their options, such as
--output_path for a JSON document. Of --model_args, pretrained= is a folder of `loopmdm train`; method=,
order=, samples=, num_loops= and seed= are those of `loopmdm.likelihood`; decoding=, plan= and steps= say how
text is written. batch_size is how many corrupted copies of a text one network call reads. The model name
`dlm` has the options of Duo's harness by its names and, with the same weights, its figures.
"""

from __future__ import annotations

import argparse
import sys

EPILOG = """examples:
  loopmdm lm-eval run --model loopmdm --model_args pretrained=run,num_loops=8 --tasks hellaswag
  loopmdm lm-eval run --model loopmdm --model_args pretrained=run,method=chain_rule --tasks piqa
  loopmdm lm-eval run --model dlm --model_args checkpoint_path=mdlm.ckpt,num_mc_samples=2048 --tasks piqa
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("command", metavar="COMMAND", help="run, ls or validate")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="its options")


def run(args: argparse.Namespace) -> int:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise ImportError(f"lm-eval needs the package lm_eval: pip install lm_eval ({error})") from error
    import loopmdm.harness  # noqa: F401 - registers the model

    before = sys.argv
    sys.argv = ["lm-eval", args.command, *args.words]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0
