"""Small models with random weights, on disk and in memory, and text for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from loopmdm.cli import main
from loopmdm.data.sudoku import SIX
from loopmdm.data.tokenizer import ByteTokenizer
from loopmdm.model import LoopMDM
from loopmdm.model.config import LoopMDMConfig
from loopmdm.study import STUDIES

Build = Callable[..., LoopMDM]


def build(seed: int, **fields: Any) -> LoopMDM:
    """A model whose zero-initialised tensors are random too, in eval mode."""
    sizes = {"vocab_size": 7, "mask_token_id": 6, "hidden_size": 16, "num_heads": 2, "num_layers": 4}
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = LoopMDM(LoopMDMConfig(**{**sizes, "max_length": 16, "max_loops": 3, "dropout": 0.0, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.3, generator=generator)
    return model.eval()


@pytest.fixture
def make() -> Build:
    return build


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Folders of models: a, b, c read bytes (c has 3 layers), board solves 6x6 Sudoku, seven has 7 tokens."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = ByteTokenizer()
    text = {"vocab_size": tokenizer.vocab_size, "mask_token_id": tokenizer.mask_token_id}
    board = {"vocab_size": SIX.vocab_size, "mask_token_id": SIX.mask_token_id, "max_length": SIX.cells}
    fields: dict[str, dict[str, Any]] = {
        "a": text,
        "b": text,
        "c": {**text, "num_layers": 3},
        "plain": {**text, "loop_start": 0, "loop_end": 1, "max_loops": 1},
        "board": {**board, "positions": "learned", "num_layers": 3, "loop_end": 2},
        "seven": {},
    }
    for seed, (name, chosen) in enumerate(fields.items()):
        build(seed, **chosen).save_pretrained(root / name)
        if chosen.get("vocab_size") == tokenizer.vocab_size:
            tokenizer.save(root / name)
    return lambda name: str(root / name)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text("".join(f"line {i}: {i * i} is the square of {i}.\n" for i in range(40)))
    return str(file)


@pytest.fixture
def study(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs `loopmdm study` with these words; returns its exit status and standard error."""

    def run(*words: object) -> tuple[int, str]:
        status = main(["study", *map(str, words)])
        return status, capsys.readouterr().err

    return run


def interrupted_after(monkeypatch: pytest.MonkeyPatch, study: str, count: int) -> None:
    """The study is interrupted once, when it asks for the item after `count`; its figures are empty."""
    from loopmdm.study.kit.folder import StudyFolder

    whole = StudyFolder._compute
    done = 0

    def stop(self: StudyFolder, missing: Any, total: int, compute: Any, *rest: Any) -> None:
        def counted(key: str) -> Any:
            nonlocal done
            done += 1
            if done == count + 1:
                raise KeyboardInterrupt
            return compute(key)

        whole(self, missing, total, counted, *rest)

    monkeypatch.setattr(StudyFolder, "_compute", stop)
    monkeypatch.setattr(f"{STUDIES[study]}.draw", lambda rows: Figure())
