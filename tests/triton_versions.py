"""The Triton kernels under other versions of Triton: compiled for GPUs that are not here, and interpreted.

    python tests/triton_versions.py 3.6.0 3.9.0

Each version is installed into a folder of its own under build/, in front of the environment's. Compiled is
every launch of the small preset, for compute capability 8.0, 9.0 and 10.0; interpreted are the tests of the
kernels and the tests of values of all ops.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("attention", "head_logits", "looped_blocks", "masked_cross_entropy", "sample_rows", "triton")
COMPILE = ("-m", "bench.probes.triton_resources", "--json", "--shape", "small")
INTERPRET = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton and not dry_run")


def installed(version: str) -> Path:
    """The folder of a version of Triton, which is brought there unless it is there already."""
    folder = ROOT / "build" / f"triton-{version}"
    if not folder.exists():
        pip = (sys.executable, "-m", "pip", "install", "--no-deps")
        subprocess.run([*pip, "--target", folder, f"triton=={version}"], check=True)
    return folder


def run(folder: Path, *arguments: str) -> str:
    """Standard output of Python with this Triton."""
    paths = ":".join(map(str, (folder, ROOT, ROOT / "python")))
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": f"{folder}-cache"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}\n{folder.name}: {' '.join(arguments)} failed")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    for version in parser.parse_args().versions:
        folder = installed(version)
        found = run(folder, "-c", "import triton; print(triton.__version__)").strip()
        compiled = json.loads(run(folder, *COMPILE))
        spilled = [name for name, used in compiled.items() if used["spills"]]
        print(f"triton {found}: {len(compiled)} kernels compiled, {len(spilled)} with spills", flush=True)
        told = run(folder, *INTERPRET, *(f"tests/{name}" for name in FOLDERS))
        print(f"triton {found}: {told.strip().splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()
