import math

import pytest

from loopmdm_kernels import _C


def test_rates_are_those_of_a_processor(isa):
    fp32, bf16 = (max(_C.cpu_peak_flops(kind, 1, 2.0) for _ in range(3)) for kind in (False, True))
    for rate in (fp32, bf16):
        assert math.isfinite(rate) and 1e8 < rate < 1e13


@pytest.mark.parametrize(("threads", "milliseconds"), [(0, 1.0), (1, 0.0), (1, math.nan), (1, math.inf)])
def test_bad_arguments(threads, milliseconds):
    with pytest.raises(ValueError, match="num_threads" if threads == 0 else "milliseconds"):
        _C.cpu_peak_flops(False, threads, milliseconds)
