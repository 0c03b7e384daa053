import warnings

import numpy as np
import pytest
import torch


class PatchOnce:
    """Triton's interpreter patches its language at each call of a device function: half of the time here."""

    def __init__(self, patch):
        self.patch, self.scopes = patch, {}

    def __call__(self, function):
        module = id(function.__globals__)
        if module not in self.scopes:
            self.scopes[module] = self.patch(function)
        return self

    def restore(self):
        for scope in reversed(self.scopes.values()):
            scope.restore()
        self.scopes.clear()


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Without a GPU the tests run in Triton's interpreter, on tensors of the CPU."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(interpreter, "_patch_lang", PatchOnce(interpreter._patch_lang))
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of infinities and NaN
        yield


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
