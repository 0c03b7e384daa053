"""Solve Sudoku puzzles at several loop counts and watch the digits arrive.

python examples/solve_puzzles.py MODEL_FOLDER

The same from the command line: loopmdm solve puzzles.txt --model MODEL_FOLDER
"""

from __future__ import annotations

import sys

import torch

from loopmdm import LoopMDM, sample
from loopmdm.data.sudoku import NINE, SIX, format_board, generate
from loopmdm.sampling import StepEvent
from loopmdm.solve import solve_puzzles


def main(folder: str, num: int = 20) -> None:
    """Solve `num` held-out puzzles with the model in `folder`; print shares solved and one board."""
    model = LoopMDM.from_pretrained(folder)
    spec = NINE if model.config.max_length == NINE.cells else SIX
    puzzles = generate(spec, num, seed=7, clues=(spec.cells // 3, spec.cells // 2), split="test")

    for order in ("left_to_right", "confidence"):
        for loops in (1, model.config.max_loops):
            result = solve_puzzles(model, puzzles.clues, spec, num_loops=loops, order=order)
            print(
                f"{order:>13}, S = {loops}: {100 * result.accuracy:5.1f} % solved,"
                f" {result.loops.sum()} loops in {result.network_calls.sum()} network calls"
            )

    # The sampler itself: clues are tokens that stay, blanks are masks, `on_step` sees every digit.
    clues = torch.from_numpy(puzzles.clues[0].astype("int64"))
    tokens = torch.where(clues == 0, spec.mask_token_id, clues - 1)

    def say(event: StepEvent) -> None:
        for position, token, confidence in zip(event.positions, event.tokens, event.confidence, strict=True):
            row, column = divmod(int(position), spec.size)
            print(
                f"row {row + 1}, column {column + 1}: {int(token) + 1} (probability {float(confidence):.3f})"
            )

    filled = sample(
        model, num_samples=1, infill=tokens, order="confidence", temperature=0.0, on_step=say, progress=False
    )
    print(
        format_board(spec, (filled.tokens[0] + 1).numpy(), clues=puzzles.clues[0], color=sys.stdout.isatty())
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
