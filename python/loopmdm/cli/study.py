"""Run one of the papers' analyses on models of your own: a table (JSON, CSV) and a figure (PNG).

A study that is interrupted goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from loopmdm.cli.output import print_json
from loopmdm.cli.parser import FOOTER, Parser, add_json, add_runtime, set_up
from loopmdm.runs.options import usage_errors
from loopmdm.runs.provenance import provenance
from loopmdm.runs.text_data import check_apart, located
from loopmdm.study import STUDIES
from loopmdm.study.kit import figures
from loopmdm.study.kit.folder import FIGURE_FILE, TABLE_CSV, TABLE_JSON, StudyFolder
from loopmdm.terminal import note

EPILOG = """example:
  loopmdm study importance heavy light --second-heavy heavy2 --out importance

`loopmdm study NAME --help` explains a study. All of them take --out, --json, --threads, --device, --debug."""
# Options that do not change the figures.
_FREE = {"study", "out", "json", "debug", "threads", "device", "device_object"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    studies = parser.add_subparsers(
        dest="study", metavar="NAME", required=True, title="studies", parser_class=Parser
    )
    for name, path in STUDIES.items():
        module = import_module(path)
        sub = studies.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            epilog=f"{module.EPILOG.rstrip()}\n\n{FOOTER}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.add_argument(
            "--out",
            required=True,
            metavar="DIR",
            help="folder for the table and the figure; holds what is finished, to go on from",
        )
        add_json(sub, "the table")
        add_runtime(sub)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    figures.require_matplotlib()
    check_apart("--out", Path(args.out), located(getattr(args, "data", None) or []))
    args.device_object = set_up(args)
    module: Any = import_module(STUDIES[args.study])
    settings = {name: value for name, value in vars(args).items() if name not in _FREE}
    with usage_errors("--out"):
        folder = StudyFolder(args.out, args.study, settings, provenance())
    with torch.inference_mode():
        rows = module.run(args, folder)
    with figures.style():
        folder.write(rows, module.draw(rows))
    document = folder.document(rows)
    if args.json:
        print_json(document)
        return 0
    for finding in document["findings"]:
        verdict = {True: "holds", False: "does not hold", None: "open"}[finding["holds"]]
        print(f"{finding['id']} {verdict}: {finding['condition']}\n    {finding['outcome']}")
    note(f"wrote {', '.join(str(Path(args.out, name)) for name in (TABLE_JSON, TABLE_CSV, FIGURE_FILE))}")
    return 0
