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


def dot_by_rows(builder, a, b, d, input_precision, max_num_imprecise_acc):
    """tl.dot with the bits that a GPU's has: a row of the result does not depend on how many rows there are.

    The interpreter's own multiplies the whole tile by numpy's BLAS, which on some processors sums a row in
    another order where the tile has more rows. Here every row is a product of its own shape.
    """
    from triton.runtime.interpreter import TensorHandle

    rows, columns = a.data, b.data
    assert a.dtype.primitive_bitwidth > 8, "no kernel multiplies numbers of 8 bits"
    product = np.matmul(rows[..., :, None, :], columns[..., None, :, :], dtype=d.data.dtype)
    return TensorHandle(product[..., 0, :] + d.data, d.dtype.scalar)


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
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_by_rows)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of infinities and NaN
        yield


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
