import pytest
import torch

from tests.triton.interpreted import interpreted


@pytest.fixture(autouse=True)
def interpreter():
    """Without a GPU the tests run in Triton's interpreter."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        yield
        return
    with interpreted():
        yield


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
