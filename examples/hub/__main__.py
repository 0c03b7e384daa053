"""Writes the Triton ops as a kernel of the Hugging Face Hub.

python -m examples.hub FOLDER [--repo-id ORGANISATION/loopmdm-triton]

FOLDER gets what `kernel-builder` takes (build.toml, flake.nix, CARD.md, benchmarks/, torch-ext/), and the
variant that it would build (build/torch-cuda/), which `kernels.get_local_kernel` loads. The modules are those
of this tree that the ops need. Their imports are made relative, so that a process can load several versions.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from loopmdm_kernels.files import write_files
from loopmdm_kernels.version import __version__

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGE = "loopmdm_kernels"
NAME, PYTHON_NAME, VERSION = "loopmdm-triton", "loopmdm_triton", 1
OPS = ("attention", "head_logits", "looped_blocks", "masked_cross_entropy", "sample_rows")
OWN = {"__init__", "backends", "layers"}  # modules of the kernel that stand in the folder kernel
BACKEND = "cuda"
BUILD_TOML = """[general]
name = "{name}"
version = {version}
edition = 5
license = "Apache-2.0"
backends = ["{backend}"]
{hub}
[torch-noarch]
"""
FLAKE = """{
  description = "Triton kernels of looped masked diffusion language models";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs = { self, kernel-builder, ... }:
    kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""
# kernel-builder writes this module too; its name of the ops has its commit.
OPS_MODULE = '''"""The namespace of this build's operators."""

import torch

NAMESPACE = "{id}"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{{NAMESPACE}}::{{op_name}}"
'''
NAMESPACE_HERE = 'NAMESPACE = "loopmdm"\n'
NAMESPACE_THERE = 'NAMESPACE = add_op_namespace_prefix("").removesuffix("::")\n'
IMPORT = re.compile(rf"^(\s*)from {PACKAGE}((?:\.\w+)*) import ", re.MULTILINE)


def place(module: str) -> Path:
    """The file of a module of the package, which may be a package itself."""
    path = ROOT / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(module: str) -> Iterator[str]:
    """Modules of the package that a module imports, in functions too."""
    for node in ast.walk(ast.parse(place(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if place(whole).is_file() else str(node.module)


def needed() -> set[str]:
    """The modules that the ops and their Triton kernels need, beside those of the folder kernel."""
    own = {PACKAGE, *(f"{PACKAGE}.{name}" for name in OWN)}
    found: set[str] = set()
    todo = [f"{PACKAGE}.{room}.{op}" for room in ("ops", "triton") for op in OPS]
    while todo:
        module = todo.pop()
        if module in found or module in own:
            continue
        found.add(module)
        parent = module.rpartition(".")[0]
        todo += [*imported(module), parent]
    return found


def rewritten(module: str) -> str:
    """The source with relative imports, and with operators in the namespace of the build."""
    path = place(module)
    depth = module.count(".") + (path.name == "__init__.py")

    def relative(match: re.Match[str]) -> str:
        return f"{match[1]}from {'.' * depth}{match[2][1:]} import "

    text = IMPORT.sub(relative, path.read_text(encoding="utf-8"))
    if module == f"{PACKAGE}.ops.library":
        if text.count(NAMESPACE_HERE) != 1:
            raise ValueError(f"{path}: expected one line {NAMESPACE_HERE.strip()!r}")
        text = text.replace(NAMESPACE_HERE, NAMESPACE_THERE)
        text = text.replace("from .. import", "from .._ops import add_op_namespace_prefix\nfrom .. import", 1)
    return text


def sources() -> dict[str, str]:
    """Files of the kernel's package, by their paths in it."""
    files = {f"{name}.py": (HERE / "kernel" / f"{name}.py").read_text(encoding="utf-8") for name in OWN}
    files["__init__.py"] = files["__init__.py"].format(version=__version__)
    for module in needed():
        files[place(module).relative_to(ROOT / PACKAGE).as_posix()] = rewritten(module)
    return dict(sorted(files.items()))


def metadata(identity: str, files: dict[str, str]) -> str:
    def digest(text: str) -> str:
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    said = {
        "id": identity,
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": BACKEND},
        "digest": {"algorithm": "sha256", "files": {name: digest(text) for name, text in files.items()}},
    }
    return json.dumps(said, indent=2) + "\n"


def generate(folder: Path, repo_id: str | None = None) -> Path:
    """Writes the kernel to a folder that is new or empty; its built variant."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty")
    files = sources()
    package = folder / "torch-ext" / PYTHON_NAME
    write_files({package / name: text for name, text in files.items()})
    hub = f'\n[general.hub]\nrepo-id = "{repo_id}"\n' if repo_id else ""
    toml = BUILD_TOML.format(name=NAME, version=VERSION, backend=BACKEND, hub=hub)
    card = (HERE / "CARD.md").read_text(encoding="utf-8")
    write_files({folder / "build.toml": toml, folder / "flake.nix": FLAKE, folder / "CARD.md": card})
    shutil.copytree(HERE / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    # The identity is that of the sources: equal sources, equal operators.
    content = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:10]
    identity = f"_{PYTHON_NAME}_{BACKEND}_{content}"
    files["_ops.py"] = OPS_MODULE.format(id=identity)
    variant = folder / "build" / f"torch-{BACKEND}"
    built = files | {"metadata.json": metadata(identity, files)}
    write_files({variant / name: text for name, text in built.items()})
    return variant


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.hub",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repo-id", metavar="ORGANISATION/NAME", help="where kernel-builder uploads it")
    options = parser.parse_args()
    variant = generate(options.folder, options.repo_id)
    files = [path for path in variant.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"{variant}: {len(files)} files, {size / 1e3:.0f} kB; kernels.get_local_kernel loads it")


if __name__ == "__main__":
    main()
