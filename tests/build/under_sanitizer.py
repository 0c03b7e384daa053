"""What `sanitize.py` starts under a sanitizer: under_sanitizer.py KIND LIBRARY [arguments of pytest].

`python -m pytest` would put the current folder first, where the ordinary modules are.
"""

from __future__ import annotations

import sys

import pytest
import torch

from loopmdm_kernels import _C

KERNEL_THREADS = 3


def keep_torch_on_one_thread() -> None:
    """Whatever number of threads a test asks for goes to the kernels only.

    torch's own threads belong to libgomp, whose locks ThreadSanitizer does not see: whatever two of them do
    would be a race.
    """
    assert torch.get_num_threads() == 1, torch.get_num_threads()
    threads = KERNEL_THREADS

    def set_num_threads(number: int) -> None:
        nonlocal threads
        threads = number

    torch.set_num_threads = set_num_threads
    torch.get_num_threads = lambda: threads
    assert _C.thread_runtime() == "std::thread"
    assert _C.debug_parallel(torch.get_num_threads(), 10) == [10 * KERNEL_THREADS] * KERNEL_THREADS


if __name__ == "__main__":
    kind, library, *arguments = sys.argv[1:]
    assert _C.__file__.startswith(library), _C.__file__
    if kind == "thread":
        keep_torch_on_one_thread()
    sys.exit(pytest.main(arguments))
