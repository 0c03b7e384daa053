"""A fuzzer whose cases end the process, hang and fail: what the long form must tell of."""

from __future__ import annotations

import os
import time
from collections import Counter


def case(seed: int) -> Counter[str]:
    if seed == 3:
        os.abort()
    if seed == 5:
        time.sleep(600)
    if seed == 7:
        raise ValueError("no")
    time.sleep(0.01)
    return Counter(calls=1)
