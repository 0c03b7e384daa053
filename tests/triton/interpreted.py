"""Triton's interpreter, in which its kernels run on the CPU: faster, and with rows like those of a GPU."""

import warnings
from contextlib import contextmanager

import numpy as np
import pytest


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


def indices_of_one_element(patch_tensor):
    """Triton 3.6 counts loops by arrays of one element, which numpy takes for numbers until 2.3."""

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patched


@contextmanager
def interpreted():
    """Inside, the interpreter can be used; the kernels are bound to it when they are imported."""
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"), warnings.catch_warnings():
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(interpreter, "_patch_lang", PatchOnce(interpreter._patch_lang))
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_by_rows)
        patch_tensor = indices_of_one_element(interpreter._patch_lang_tensor)
        patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor)
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of infinities and NaN
        yield
