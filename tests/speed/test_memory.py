"""Memory that a call takes."""

import sys

import pytest
import torch

from loopmdm.speed.measure import peak_bytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the pages' maximum is Linux's")
def test_the_most_that_is_taken_at_once():
    def call():
        first = torch.ones(16 * 2**20)  # 64 MiB
        second = first + 1
        del first
        return float((second + 1)[0])

    taken = peak_bytes(call, torch.device("cpu"))
    assert taken is None or 0.95 * 2**27 < taken < 1.3 * 2**27
