"""What `qualify` has found on this machine: which backends are right here, and faster than plain PyTorch.

A verdict is a JSON file for each device in the folder of compiled kernels ($LOOPMDM_CACHE_DIR). It holds what
it was found with; once a package, the driver or a source has changed it is void, as is a damaged file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loopmdm_kernels.cuda import disk_cache, sources
from loopmdm_kernels.files import write_files
from loopmdm_kernels.values import parse_json, real
from loopmdm_kernels.version import __version__

FORMAT = 1
DTYPES = ("float32", "bfloat16", "float16")  # of the calls that are tried
Question = tuple[str, str, str]  # op, direction (forward, gradients), dtype
_DRIVER = Path("/proc/driver/nvidia/version")
_MOST_BYTES = 2**22  # of a verdict: a whole one has a hundredth of it
_OFF = ("0", "off", "false", "no", "n", "f")


class Standing(NamedTuple):
    """What is known of a device.

    orders: for each question the backends that are right and faster, the fastest first; None: no verdict.
    speedups: of backends over plain PyTorch, by question and backend. why: one sentence.
    """

    orders: Mapping[Question, tuple[str, ...]] | None
    speedups: Mapping[tuple[Question, str], float]
    why: str


_standings: dict[torch.device, Standing] = {}


def switched_off() -> bool:
    """Whether LOOPMDM_QUALIFY=0 asks for what was done before there were verdicts."""
    return os.environ.get("LOOPMDM_QUALIFY", "").strip().lower() in _OFF


def standing(device: torch.device) -> Standing:
    """Of a device of type cpu or cuda, read once in a process, and again after `forget`."""
    standings = _standings
    known = standings.get(device)
    if known is None:
        known = standings[device] = _read(device)
    return known


def forget() -> None:
    """Read verdicts again at the next call."""
    global _standings
    _standings = {}  # another one: a thread that is reading the verdict before puts it into the old one


def path_of(device: torch.device) -> Path:
    """Named after the device, so that machines that share a home folder keep theirs apart."""
    name = device_name(device)
    readable = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()[:40]
    return disk_cache.folder() / f"verdict-{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.json"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def facts(device: torch.device) -> dict[str, str | None]:
    """With any of these changed, a verdict is void."""
    found = {
        "device": device_name(device),
        "loopmdm-kernels": __version__,
        "sources": fingerprint(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found |= {"capability": f"{major}.{minor}", "CUDA of torch": str(torch.version.cuda)}
        return {
            **found,
            "driver": _driver(),
            "table of tiles": _tiles(),
            **{name: _version(name) for name in ("triton", "cuda-bindings")},
        }
    try:
        from loopmdm_kernels import _C
    except ImportError:
        return {**found, "instruction sets": None}
    return {**found, "instruction sets": _C.usable_cpu_isas()}


@cache
def fingerprint() -> str:
    """Changes with any source of the package, of its kernels for GPUs, and with the compiled module."""
    package = Path(__file__).parent
    files = [*package.rglob("*.py"), *package.glob("_C*"), *package.rglob("*.cubin")]
    with contextlib.suppress(RuntimeError):  # an installation without them has no CUDA kernels
        files += [path for part in ("common", "cuda") for path in (sources.folder() / part).rglob("*.*")]
    digest = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def write(device: torch.device, document: Mapping[str, Any]) -> Path:
    """Put a verdict in the place of the one before."""
    path = path_of(device)
    write_files({path: json.dumps(document, indent=1, allow_nan=False) + "\n"})
    forget()
    return path


def read(device: torch.device) -> tuple[dict[str, Any] | None, str]:
    """The valid verdict on a device, or None; and a sentence about it."""
    try:
        path = path_of(device)
        content = disk_cache.content_of(path, _MOST_BYTES)
        now = facts(device)
    except (FileNotFoundError, NotADirectoryError, disk_cache.NoFolderError):
        return None, "there is no verdict on this device"
    except OSError as error:
        return None, f"the verdict {path} cannot be read: {error.strerror or error}"
    try:
        document = parse_json(content)
        date, machine, form = str(document["date"]), dict(document["machine"]), document["format"]
        entries = [_checked(entry) for entry in document["entries"]] if form == FORMAT else []
    except (ValueError, TypeError, KeyError) as error:
        return None, f"the verdict {path} is damaged ({type(error).__name__}: {error})"
    changed = [
        f"{name} was {machine.get(name)}, is {now.get(name)}"
        for name in dict.fromkeys((*now, *machine))
        if machine.get(name) != now.get(name)
    ]
    if form != FORMAT:
        changed.append(f"its format was {form}, is {FORMAT}")
    if changed:
        return None, f"the verdict of {date} is void: {'; '.join(changed)}"
    return {**document, "entries": entries}, f"verdict of {date}"


def _read(device: torch.device) -> Standing:
    document, why = read(device)
    if document is None:
        return Standing(None, {}, why)
    orders: dict[Question, tuple[str, ...]] = {}
    speedups: dict[tuple[Question, str], float] = {}
    for entry in document["entries"]:
        question = entry["op"], entry["direction"], entry["dtype"]
        orders.setdefault(question, ())
        if entry["backend"] != "reference" and entry["right"] and (entry["speedup"] or 0.0) > 1.0:
            orders[question] += (entry["backend"],)
            speedups[question, entry["backend"]] = entry["speedup"]
    for question, names in orders.items():
        orders[question] = tuple(sorted(names, key=lambda name: -speedups[question, name]))
    return Standing(orders, speedups, why)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    number = real(value)
    return number is not None and 0 <= number < math.inf


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_times(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(times, dict) and all(map(_is_number, times.values())) for times in value.values()
    )


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("op", "direction", "dtype", "backend"), (_is_text, "text")),
    "right": (lambda value: value is None or isinstance(value, bool), "true, false or null"),
    "why": (lambda value: value is None or _is_text(value), "text or null"),
    **dict.fromkeys(("checked", "refused"), (_are_texts, "texts")),
    "speedup": (lambda value: value is None or _is_number(value), "a number of at least 0"),
    "seconds": (_are_times, "seconds by size and by who took them"),
}


def _checked(entry: Any) -> dict[str, Any]:
    for field, (accepted, what) in _FIELDS.items():
        if not accepted(entry[field]):
            raise ValueError(f"{field}: got {entry[field]!r:.100}, expected {what}")
    return dict(entry)


def _driver() -> str | None:
    """Of the GPU: what the system says of its module, else the CUDA version that it is for."""
    try:
        said = re.search(r"\b\d+\.\d+(\.\d+)*\b", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        said = None
    version = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)
    return said[0] if said else str(version())


def _tiles() -> str | None:
    """Fingerprint of the table that LOOPMDM_TRITON_TILES names."""
    path = os.environ.get("LOOPMDM_TRITON_TILES")
    if not path:
        return None
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError as error:
        return str(error)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
