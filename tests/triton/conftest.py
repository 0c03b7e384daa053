import warnings

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Without a GPU the tests run in Triton's interpreter, on tensors of the CPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of infinities and NaN
        yield


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
