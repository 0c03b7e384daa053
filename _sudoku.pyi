import numpy as np
from numpy.typing import NDArray

def generate(
    box_rows: int,
    box_cols: int,
    *,
    seed: int,
    first: int,
    num: int,
    fewest: int,
    most: int,
    minimal: bool,
    split: int,
    threads: int,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]: ...
def augment(
    box_rows: int,
    box_cols: int,
    clues: NDArray[np.uint8],
    solutions: NDArray[np.uint8],
    *,
    seed: int,
    num: int,
    threads: int,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]: ...
def solve(
    box_rows: int, box_cols: int, clues: NDArray[np.uint8], *, limit: int, threads: int
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]: ...
def difficulty(
    box_rows: int, box_cols: int, clues: NDArray[np.uint8], *, threads: int
) -> NDArray[np.float32]: ...
def grid_ids(
    box_rows: int, box_cols: int, grids: NDArray[np.uint8], *, threads: int
) -> NDArray[np.uint64]: ...
def in_test_split(ids: NDArray[np.uint64]) -> NDArray[np.bool_]: ...
