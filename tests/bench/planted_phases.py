"""Phases that fail in every way, run by the mechanism of the GPU scripts: test_phases.py."""

import os
import signal
import subprocess
import sys
import time

from bench.phases import RIGHT, LeftOut, Phase, Script, main


def some_then(last):
    def call(run):
        yield {
            "first": RIGHT,
            "time": {"ms": 1.5, "cold ms": 2.0, "trials": [1.4, 1.5, 1.6], "MHz": [1980.0, 1755.0]},
        }
        yield {"first": "wrong: far off"} if last is None else {}
        if last is not None:
            last()

    return call


def hang():
    subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"], check=False)


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def leave_a_child_and_end():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    os._exit(3)


def fail():
    print("what it printed")
    raise RuntimeError("no kernel image\nand a long story")


def nothing_to_do():
    raise LeftOut("needs an H100")


PHASES = {
    "right": Phase(lambda run: {"value": 2.0, "run": str(run)}, 300, quick=True),
    "hangs": Phase(some_then(hang), 8),
    "crashes": Phase(some_then(crash), 300),
    "ends": Phase(some_then(leave_a_child_and_end), 300),
    "fails": Phase(some_then(fail), 300, quick=True),
    "is left out": Phase(some_then(nothing_to_do), 300),
    "is wrong": Phase(some_then(None), 300),
    "last": Phase(lambda run: {"value": 3.0}, 300, dry=False),
    "waits": Phase(lambda run: time.sleep(float(os.environ.get("PLANTED_WAIT", "0"))) or {}, 600),
}


def conclude(figures):
    met = {"the last is 3": figures["last"]["value"] == 3.0} if "last" in figures else {}
    return {"targets": {"of nothing": None, "too high": False, **met}}


def keep(result):
    print(f"kept: {result['phases']['right']['figures']}")


def why_not():
    return os.environ.get("PLANTED_REASON")


if __name__ == "__main__":
    sys.exit(main(Script("planted", PHASES, str, why_not, conclude, keep), __doc__))
