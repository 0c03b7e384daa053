"""The text of positions is the text of the tokenizer, and safe to show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loopmdm.data.sudoku import NINE
from loopmdm.data.tokenizer import BPETokenizer, ByteTokenizer, HFTokenizer, Tokenizer
from loopmdm.view import BoardSymbols, IdSymbols, TextSymbols
from loopmdm.view.symbols import printable

TEXT = "Möwen, naïve 日本語 🙂\n\tdef main(x):  return x\n"


def whole(tokenizer: Tokenizer, row: list[int]) -> str:
    return printable(tokenizer.decode(row, mask_text="·", special_text="⟨eos⟩"))


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train([TEXT * 3, "some more words to merge: main main main"], 300)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_pieces_join_to_the_text(kind: str, bpe: BPETokenizer) -> None:
    tokenizer = ByteTokenizer() if kind == "byte" else bpe
    symbols, mask = TextSymbols(tokenizer), tokenizer.mask_token_id
    row = [tokenizer.bos_token_id, *tokenizer.encode(TEXT).tolist(), tokenizer.eos_token_id]
    assert "".join(symbols.pieces(row, mask)) == f"⟨eos⟩{TEXT}⟨eos⟩" == whole(tokenizer, row)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        drawn = torch.randint(tokenizer.vocab_size, (60,), generator=generator)
        drawn[torch.rand(60, generator=generator) < 0.2] = mask
        for hidden in (drawn.tolist(), [mask if i % 7 == 3 else t for i, t in enumerate(row)]):
            pieces = symbols.pieces(hidden, mask)
            assert len(pieces) == len(hidden) and "".join(pieces) == whole(tokenizer, hidden)


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_bytes_of_a_token(kind: str, bpe: BPETokenizer) -> None:
    tokenizer = ByteTokenizer() if kind == "byte" else bpe
    ids = tokenizer.encode(TEXT).tolist()
    assert b"".join(tokenizer.token_bytes(i) or b"" for i in ids) == TEXT.encode()


def test_a_character_of_several_tokens_stands_at_its_last() -> None:
    symbols = TextSymbols(ByteTokenizer())
    assert symbols.pieces([*"aé🙂".encode(), 257], 257) == ["a", "", "é", "", "", "", "🙂", "·"]
    assert symbols.pieces([0xC3, 257, 0xA9], 257) == ["\ufffd", "·", "\ufffd"]
    assert symbols.pieces([65, 66, -1, -1], 257) == ["A", "B", "", ""]
    assert symbols.pieces([], 257) == []


def test_tokens_that_are_not_bytes(tmp_path: Path) -> None:
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]", "token", "##ized", "text"]
    ids = {word: i for i, word in enumerate(vocabulary)}
    special = [
        {"id": ids[w], "content": w, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
        for w in vocabulary[:5]
    ]
    document = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": ids,
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = HFTokenizer.from_pretrained(tmp_path)
    assert tokenizer.token_bytes(5) is None
    row = [1, 5, 6, 7, 3, 2]
    assert TextSymbols(tokenizer).pieces(row, 3) == ["⟨bos⟩", " token", "ized", " text", "·", "⟨eos⟩"]


def test_control_characters_are_replaced() -> None:
    dangerous = "\x1b]0;x\x07 \x9b31m \r \x00 \x7f \u202e \u2067 \u2028"
    assert not {c for c in printable(dangerous) if c not in "]0;x31m \ufffd"}
    assert printable("a\tb\nc é\xa0日") == "a\tb\nc é\xa0日"
    assert TextSymbols(ByteTokenizer()).pieces([27, 91, 13, 10, 9], 257) == [
        "\ufffd",
        "[",
        "\ufffd",
        "\n",
        "\t",
    ]


def test_numbers_and_digits() -> None:
    assert IdSymbols().pieces([5, 7, 11], 11) == ["5", "7", "·"]
    assert BoardSymbols(NINE).pieces([0, 8, 9], 9) == ["1", "9", "·"]
