"""Say what works on this machine, and why the rest does not.

Checks that every backend that can be used draws the same rows as the plain PyTorch reference, and that the
shipped checkpoints load. --self-test compares every op of every backend, values and gradients, with float64.
Exit status 1 if something that should work does not.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import loopmdm_kernels as lk
from loopmdm.cli.output import print_json, print_table
from loopmdm.cli.parser import add_json
from loopmdm.runs.models import SHIPPED, load_model, shipped_folder
from loopmdm.runs.provenance import processor
from loopmdm.terminal import note
from loopmdm_kernels.backends import Refused
from loopmdm_kernels.qualification import QUESTIONS
from loopmdm_kernels.qualification.checks import usual_call
from loopmdm_kernels.types import Head, RowRng

EPILOG = """examples:
  loopmdm doctor --json
  loopmdm doctor --self-test
"""
_PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "triton",
    "cuda-bindings",
    "tokenizers",
    "pyarrow",
    "matplotlib",
)
_ROWS = (2, 24, 64, 515)  # B, L, D, V of the self-check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="also compare every op of every backend that can be used with float64 (seconds on a CPU)",
    )
    add_json(parser, "the findings")


def run(args: argparse.Namespace) -> int:
    backends = {name: _check_backend(name, status) for name, status in lk.available_backends().items()}
    for name, why in lk.available_backends(explain=True).items():
        backends[name]["chosen"] = why
    checkpoints = {name: _check_checkpoint(name) for name in SHIPPED}
    usable = [name for name, finding in backends.items() if finding["usable"] and name != "reference"]
    tests = _self_test(usable) if args.self_test else None
    problems = [
        f"{kind} {name}: {finding['problem']}"
        for kind, findings in (("backend", backends), ("checkpoint", checkpoints), ("self-test", tests or {}))
        for name, finding in findings.items()
        if finding["problem"]
    ]
    document = {
        "versions": _versions(),
        "package": _package(),
        "machine": _machine(),
        "backends": backends,
        "checkpoints": checkpoints,
        "self_test": tests,
        "problems": problems,
    }
    if args.json:
        print_json(document)
    else:
        _print(document)
    return 1 if problems else 0


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"loopmdm": lk.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {**versions, "nvcc": _nvcc()}


def _package() -> dict[str, Any]:
    """Where this installation lies, and the size of its files without what Python has compiled."""
    folders = {name: Path(str(files(name))) for name in ("loopmdm_kernels", "loopmdm")}
    sizes = {
        name: [p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"]
        for name, folder in folders.items()
    }
    return {
        "folders": [str(folder) for folder in folders.values()],
        "files": sum(map(len, sizes.values())),
        "bytes": {name: sum(found) for name, found in sizes.items()},
        "total": f"{sum(map(sum, sizes.values())) / 1e6:.1f} MB",
    }


def _nvcc() -> str | None:
    compiler = shutil.which("nvcc")
    if compiler is None:
        return None
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return next((line.strip() for line in said.splitlines() if "release" in line), compiler)


def _machine() -> dict[str, Any]:
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "thread_runtime": _thread_runtime(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "forced_backend": os.environ.get("LOOPMDM_BACKEND"),
    }


def _thread_runtime() -> str | None:
    """The library whose threads the compiled kernels run on."""
    try:
        from loopmdm_kernels import _C

        return _C.thread_runtime()
    except ImportError:
        return None
    except RuntimeError as error:  # a bad LOOPMDM_CPU_THREADS
        return str(error)


def _check_backend(name: str, status: bool | str) -> dict[str, Any]:
    """Whether a backend can be used, its status, and whether it draws what the reference draws."""
    usable = True
    try:
        with lk.use_backend(name):
            pass
    except RuntimeError:
        usable = False
    finding = {"usable": usable, "status": status, "checked": False, "problem": None}
    # A compiled module is part of every installation: without it something went wrong.
    if not usable:
        return finding | {"problem": status if name == "cpu" else None}
    device = torch.device("cuda" if name in ("triton", "cuda") else "cpu")
    try:
        finding["problem"] = _compare(name, device)
        finding["checked"] = True
    except RuntimeError as error:
        if "cannot do this" not in str(error):  # it says so of other dtypes and GPUs than its kernels are for
            finding["problem"] = str(error)
    return finding


def _self_test(backends: list[str]) -> dict[str, dict[str, Any]]:
    """For each backend, op, direction and dtype, whether it was tested, and what is wrong."""
    found: dict[str, dict[str, Any]] = {}
    for backend, (op, direction, dtype) in itertools.product(backends, QUESTIONS):
        device = torch.device("cuda" if backend in ("triton", "cuda") else "cpu")
        finding: dict[str, Any] = {"tested": False, "problem": None}
        try:
            finding["problem"] = usual_call(backend, op, direction, getattr(torch, dtype), device)
            finding["tested"] = True
        except Refused:
            pass  # not among what it does, in this dtype or on this GPU
        except RuntimeError as error:
            finding["problem"] = str(error)
        found[f"{backend} {op} {direction} {dtype}"] = finding
    return found


def _compare(name: str, device: torch.device) -> str | None:
    """How the rows a backend draws differ from the reference's, or None."""
    batch, length, hidden_size, vocab_size = _ROWS
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    head = Head(
        1 + 0.1 * normal(hidden_size),
        normal(vocab_size, hidden_size) / hidden_size**0.5,
        0.1 * normal(vocab_size),
        0.1 * normal(batch, 2, hidden_size),
        vocab_size - 1,
    )
    rows = torch.arange(0, batch * length, 2, device=device)
    rng = RowRng(11, rows // length, torch.full_like(rows, 3), rows % length)
    hidden = normal(batch, length, hidden_size)
    with lk.use_backend("reference"):
        expected = lk.sample_rows(hidden, head, rows, rng)
    with lk.use_backend(name):
        got = lk.sample_rows(hidden, head, rows, rng)
    for field in expected._fields:
        mine, theirs = getattr(got, field), getattr(expected, field)
        same = torch.equal(mine, theirs) if "token" in field else torch.allclose(mine, theirs, 1e-4, 1e-5)
        if not same:
            return (
                f"sample_rows: {field} differs from the reference by up to {(mine - theirs).abs().max():.3g}"
            )
    return None


def _check_checkpoint(name: str) -> dict[str, Any]:
    finding: dict[str, Any] = {"folder": None, "sha256": None, "parameters": None, "problem": None}
    try:
        folder = shipped_folder(name)
        finding["folder"] = str(folder)
        finding["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        model = load_model(str(folder), torch.device("cpu"))
        finding["parameters"] = sum(p.numel() for p in model.parameters())
        with torch.inference_mode():
            model(torch.full((1, model.config.max_length), model.config.mask_token_id))
    except (OSError, ValueError, RuntimeError) as error:
        finding["problem"] = str(error)
    return finding


def _print(document: dict[str, Any]) -> None:
    for part in ("versions", "package", "machine"):
        print_table(
            (part, ""), [(name, _shown(value)) for name, value in document[part].items()], align="left"
        )
        print()
    rows = [
        (
            name,
            "usable" if finding["usable"] else "not usable",
            "" if finding["status"] is True else str(finding["status"]),
            finding["problem"] or ("equals the reference" if finding["checked"] else "not checked"),
        )
        for name, finding in document["backends"].items()
    ]
    print_table(("backend", "", "", "self-check"), rows, align="left")
    print()
    chosen = [(name, finding["chosen"]) for name, finding in document["backends"].items()]
    print_table(("backend", "unasked"), chosen, align="left")
    print()
    rows = [
        (
            name,
            "ok" if not finding["problem"] else "failed",
            f"{finding['parameters'] or 0:,} parameters",
            f"sha256 {(finding['sha256'] or '-')[:16]}",
        )
        for name, finding in document["checkpoints"].items()
    ]
    print_table(("checkpoint", "", "", ""), rows, align="left")
    if document["self_test"] is not None:
        print()
        print_table(
            ("self-test", ""),
            [
                (name, finding["problem"] or ("right" if finding["tested"] else "not done by this backend"))
                for name, finding in document["self_test"].items()
            ],
            align="left",
        )
    for problem in document["problems"]:
        note(f"loopmdm doctor: {problem}")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {number:,}" for name, number in value.items())
    return "-" if value is None else str(value)
