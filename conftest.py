"""What tests and benchmarks have in common."""

import importlib
import os
from importlib.util import find_spec

import pytest
import torch


def _import_interpreted_kernels() -> None:
    """Without a GPU, Triton kernels are tested in its interpreter, which they are bound to when imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        for op in ("attention", "head_logits", "looped_blocks", "masked_cross_entropy", "sample_rows"):
            importlib.import_module(f"loopmdm_kernels.triton.{op}")
    finally:
        del os.environ["TRITON_INTERPRET"]


if not torch.cuda.is_available() and find_spec("triton") is not None:
    _import_interpreted_kernels()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))
