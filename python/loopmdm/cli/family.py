"""`loopmdm train --family light=2,3,4,5 heavy=6`: plain models of several depths, for plans that mix them.

Every member is the run that `loopmdm train --layers N --loop 0:1 --max-loops 1` gives with the same options,
in a folder of its own. Members with the same seed see the same batches in the same order.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loopmdm.cli.output import print_json, print_table, show
from loopmdm.cli.parser import set_up
from loopmdm.cli.processes import process_group
from loopmdm.cli.runs import described_run, refuse, train_run
from loopmdm.data.batches import Batch
from loopmdm.formats.folders import read_json
from loopmdm.model import LoopMDM
from loopmdm.quality.likelihood import nll_by_sequence, ratio_of_sums
from loopmdm.runs import text_data
from loopmdm.runs.boards import blanks, held_out_puzzles
from loopmdm.runs.held_out import held_out_text
from loopmdm.runs.models import load_model, sudoku_spec
from loopmdm.runs.options import UsageError
from loopmdm.runs.provenance import provenance
from loopmdm.runs.run_file import RUN_FILE, RunFile
from loopmdm.terminal import note
from loopmdm.train import TrainConfig, read_metrics
from loopmdm.train.checkpoints import has_checkpoint, newest
from loopmdm.train.metrics import METRICS_FILE
from loopmdm_kernels.files import kind_of, write_files

FAMILY_FILE = "family.json"
COLUMNS = (
    *("model", "layers", "seed", "parameters", "training FLOPs", "NLL/token", "± s.e."),
    *("more than heavy", "± s.e. (paired)"),
)
ROLES = ("light", "heavy")
_PLAIN = {"loop": (0, 1), "max_loops": 1}
# As `loopmdm eval` measures where nothing else is asked for.
_WINDOWS, _PUZZLES, _TIMES, _SEED = 64, 100, 16, 0


class Member(NamedTuple):
    role: str
    layers: int
    repetition: int  # 0 for the first model of this depth

    @property
    def name(self) -> str:
        return f"{self.role}{self.layers}" + (f"-seed{self.repetition}" if self.repetition else "")


def parse_members(words: list[str]) -> list[Member]:
    """Members from words such as light=2,3,4,5 and heavy=6,6.

    Raises:
        UsageError: unknown or missing kinds, counts that are no integers, a light one not the shallower.
    """
    members: list[Member] = []
    for word in words:
        role, _, counts = word.partition("=")
        if role not in ROLES or any(member.role == role for member in members):
            raise UsageError(f"--family: got {word!r}, expected light=N,... and heavy=N,..., each once")
        seen: Counter[int] = Counter()
        for text in counts.split(","):
            if not text.isdecimal() or int(text) < 1:
                raise UsageError(f"--family: got {text!r} in {word!r}, expected counts of layers such as 2,3")
            members.append(Member(role, int(text), seen[int(text)]))
            seen[int(text)] += 1
    depths = {role: [member.layers for member in members if member.role == role] for role in ROLES}
    for role in ROLES:
        if not depths[role]:
            raise UsageError(f"--family: no {role} model; give {role}=N, N layers")
    if max(depths["light"]) >= min(depths["heavy"]):
        raise UsageError(
            f"--family: light={max(depths['light'])} is not shallower than heavy={min(depths['heavy'])}"
        )
    return members


def train(args: argparse.Namespace) -> int:
    """Train what is not trained yet of a family, then compare all its members on the same masks."""
    members = parse_members(args.family)
    refuse(
        args,
        {"num_layers": "--layers", "autoregressive": "--autoregressive"},
        "--family sets the layers of diffusion models",
    )
    text_data.check_apart("--out", args.out, text_data.located(args.data or []))
    device = set_up(args)
    _refuse_foreign(args.out / FAMILY_FILE)
    with process_group(device) as (rank, device):
        for member in members:
            options = member_options(args, member)
            if _finished(options):
                if rank == 0:
                    note(f"{options.out} is trained already")
                continue
            if rank == 0:
                note(f"training {options.out}")
            trained = train_run(options, rank, device)
            if trained.signal is not None:
                if rank == 0:
                    note(
                        f"stopped {options.out} after step {trained.steps} of {trained.job.config.steps};"
                        " the same command continues"
                    )
                return 0 if rank else trained.status
        if rank == 0:
            _report(args, members, device)
    return 0


def _refuse_foreign(path: Path) -> None:
    """Complain before the training about a file that the report would replace and no family has written."""
    kind = kind_of(path)
    if kind is not None or (path.exists() and "members" not in read_json(path)):
        raise ValueError(
            f"{path} is {kind or 'not of a family'} and would be replaced; choose another folder"
        )


def member_options(args: argparse.Namespace, member: Member) -> argparse.Namespace:
    """The options of the single run that a member is."""
    out = args.out / member.name
    plain = {name: value for name, value in _PLAIN.items() if getattr(args, name) is None}
    # The default seed of every preset is 0.
    seed = args.seed if not member.repetition else (args.seed or 0) + member.repetition
    own = {"out": out, "num_layers": member.layers, "seed": seed, "resume": _begun(out)}
    return argparse.Namespace(**{**vars(args), **plain, **own})


def _begun(folder: Path) -> bool:
    return has_checkpoint(folder) or (folder / RUN_FILE).is_file()


def _finished(options: argparse.Namespace) -> bool:
    """Whether the run is trained to its end; with other options it is left to `train_run`, which refuses."""
    found = newest(options.out)
    if found is None:
        return False
    config = TrainConfig.from_dict(described_run(options).training)
    return found.step >= config.steps and not TrainConfig.from_dict(found.metadata["config"]).differences(
        config
    )


def _report(args: argparse.Namespace, members: list[Member], device: torch.device) -> None:
    folders = [args.out / member.name for member in members]
    models = [load_model(str(folder), device) for folder in folders]
    source, batches = _held_out(folders[0], models[0], args.threads or 1)
    rows = []
    sums: list[torch.Tensor] = []
    for member, folder, model in zip(members, folders, models, strict=True):
        row = _trained(member, folder, model)
        if batches:
            loops = model.config.max_loops
            values, tokens = nll_by_sequence(model, batches, num_loops=loops, num_t=_TIMES, seed=_SEED)
            sums.append(values)
            row["nll"], row["stderr"] = ratio_of_sums(values, tokens)
        rows.append(row)
    if len({row["data"] for row in rows}) > 1:
        raise ValueError(f"{args.out} holds members that were trained on different text; they are no family")
    heavy = next(index for index, member in enumerate(members) if member.role == "heavy")
    for index, values in enumerate(sums):
        if index != heavy:
            pair = ratio_of_sums(values - sums[heavy], tokens)
            rows[index]["more_than_heavy"], rows[index]["more_than_heavy_stderr"] = pair
    document = {
        "members": rows,
        "heavy": members[heavy].name,
        "held_out": {"source": source, "num_t": _TIMES, "seed": _SEED},
        **provenance(),
    }
    text = json.dumps(document, indent=2, default=str) + "\n"
    write_files({args.out / FAMILY_FILE: text})
    if args.json:
        print_json(document)
        return
    print_table(COLUMNS, [_cells(row) for row in rows])
    if batches:
        show(
            f"\nNELBO in nats per token on {source}, averaged weights, {_TIMES} times a sequence, the same"
            f" masks for every model; differences are from {members[heavy].name}, paired over sequences."
        )
    show(f"FLOPs: vocabulary head included. All of this is in {args.out / FAMILY_FILE}.")


def _trained(member: Member, folder: Path, model: LoopMDM) -> dict[str, Any]:
    run = RunFile.read(folder)
    assert run is not None
    losses = [record for record in read_metrics(folder / METRICS_FILE) if "loss" in record]
    last = losses[-1] if losses else {}
    return {
        "name": member.name,
        "role": member.role,
        "layers": member.layers,
        "seed": run.training["seed"],
        "folder": str(folder),
        "data": run.fingerprint,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": run.training["steps"],
        **{name: last.get(name) for name in ("tokens", "flops", "seconds", "cpu_seconds")},
    }


def _held_out(folder: Path, model: LoopMDM, threads: int) -> tuple[str, list[Batch]]:
    """What all members are measured on: what `loopmdm eval` takes for one of them."""
    spec = sudoku_spec(model)
    if spec is not None:
        puzzles = held_out_puzzles(spec, _PUZZLES, threads)
        return f"the blanks of {_PUZZLES} held-out {spec} puzzles", blanks(puzzles.clues, puzzles.solutions)
    run = RunFile.read(folder)
    assert run is not None
    if not run.validation:
        return "nothing: no document is held out", []
    same = argparse.Namespace(data=None, part=None, length=None, tokenizer=None)
    text = held_out_text(same, model, str(folder))
    windows = text_data.windows(text.data, text.tokenizer, _WINDOWS)
    num = sum(len(batch.input_ids) for batch in windows.batches)
    return f"{num} windows of {text.length} tokens, {text.description}", windows.batches


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def figure(name: str) -> str:
        value = row.get(name)
        return "-" if value is None or math.isnan(value) else f"{value:.4f}"

    flops = "-" if row["flops"] is None else f"{row['flops']:.3g}"
    names = ("nll", "stderr", "more_than_heavy", "more_than_heavy_stderr")
    return (
        *(row["name"], str(row["layers"]), str(row["seed"]), f"{row['parameters']:,}", flops),
        *map(figure, names),
    )
