import pytest

from loopmdm_kernels import _C
from tests.conftest import USABLE_ISAS


@pytest.fixture(params=USABLE_ISAS)
def isa(request, monkeypatch):
    """Runs the test once for each instruction set this machine has."""
    monkeypatch.setenv("LOOPMDM_CPU_ISA", request.param)
    assert _C.cpu_isa() == request.param
    return request.param
