"""Packing, batches as a pure function of the step, and the cache of packed tokens."""

from __future__ import annotations

import errno
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loopmdm.data.packing import TextData, pack_padded, pack_wrapped
from loopmdm.data.tokenizer import ByteTokenizer, Ids

TOKENIZER = ByteTokenizer()
BOS = EOS = 256
ORDER_OF_8_SEED_7 = [4, 2, 0, 7, 6, 1, 5, 3]


def make(n: int = 10, **options: Any) -> TextData:
    tokens = np.arange(n, dtype=np.uint16)[:, None].repeat(4, axis=1)
    return TextData(tokens, vocab_size=2**16, mask_token_id=2**16 - 1, **options)


def test_wrapped_blocks_are_those_of_the_reference() -> None:
    packed = pack_wrapped(["abc", "de", "fghijk"], TOKENIZER, 6)
    a, b, c, d, e, f, g, h = (ord(x) for x in "abcdefgh")
    assert packed.tolist() == [
        [BOS, a, b, c, EOS, EOS],
        [BOS, d, e, EOS, f, EOS],
        [BOS, g, h, ord("i"), ord("j"), EOS],
    ]
    assert packed.dtype == np.uint16


def test_each_group_drops_its_own_remainder() -> None:
    documents = ["abc", "d", "efg", "h"]  # streams "abc.d." and "efg.h." of 6 tokens each
    packed = pack_wrapped(iter(documents), TOKENIZER, 6, group_size=2)
    assert packed[:, 1:-1].tolist() == [[*b"abc", EOS], [*b"efg", EOS]]
    assert len(pack_wrapped(documents, TOKENIZER, 6)) == 3
    assert pack_wrapped(["a"], TOKENIZER, 6).shape == (0, 6)


def test_default_group_has_1000_documents() -> None:
    packed = pack_wrapped(["ab"] * 2001, TOKENIZER, 1001)
    assert len(packed) == 3 + 3 + 0  # 3000 // 999 blocks a group, none of the last 3 tokens


def test_padded_rows() -> None:
    tokens, lengths = pack_padded(["abc", "defghij", ""], TOKENIZER, 6)
    assert tokens.tolist() == [
        [BOS, *b"abc", EOS, EOS],
        [BOS, *b"defg", EOS],
        [BOS, EOS, EOS, EOS, EOS, EOS],
    ]
    assert lengths.tolist() == [5, 6, 2]
    data = TextData(tokens, vocab_size=258, mask_token_id=257, lengths=lengths)
    ids, mask = data.examples(0, 3)
    assert mask is not None and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [5, 6, 2] and mask[:, 0].all()
    assert not (ids == 257).any()


def test_batches_visit_every_sequence_once_an_epoch() -> None:
    """Over ranks, micro-batches and steps, also where the batch does not divide the epoch."""
    data = make(n=25, seed=5, accumulation=2)
    seen = []
    for step in range(10):
        for micro_step in range(2):
            for rank in range(3):
                ids, mask = data.batch(step, micro_step, rank, 3, 2)
                assert ids.shape == (2, 4) and ids.dtype == torch.int64 and mask is None
                seen += ids[:, 0].tolist()
    epochs = [seen[first : first + 25] for first in range(0, 100, 25)]
    assert all(sorted(epoch) == list(range(25)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_batch_is_a_pure_function() -> None:
    data, again = make(n=50, seed=1), make(n=50, seed=1)
    forward = [data.batch(step, batch_size=8)[0] for step in range(40)]
    backward = [again.batch(step, batch_size=8)[0] for step in reversed(range(40))]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    other = [make(n=50, seed=2).batch(step, batch_size=8)[0] for step in range(6)]
    assert not all(torch.equal(a, b) for a, b in zip(forward, other, strict=False))


def test_order_is_the_same_on_every_machine() -> None:
    """Golden values: a run may be resumed elsewhere, with another numpy."""
    assert make(n=8, seed=7).batch(0, batch_size=16)[0][:8, 0].tolist() == ORDER_OF_8_SEED_7


def test_order_is_uniform() -> None:
    first = Counter(make(n=6, seed=seed).batch(0, batch_size=1)[0][0, 0].item() for seed in range(3000))
    assert all(abs(first[i] - 500) < 5 * (500 * 5 / 6) ** 0.5 for i in range(6))


def test_batch_larger_than_the_data_spans_epochs() -> None:
    ids, _ = make(n=3, batch_size=10).batch(1)
    assert sorted(Counter(ids[:, 0].tolist()).values()) == [3, 3, 4]


def test_one_rank_of_many_equals_a_slice_of_the_global_batch() -> None:
    data = make(n=64)
    whole = data.batch(3, batch_size=16)[0]
    parts = [data.batch(3, 0, rank, 4, 4)[0] for rank in range(4)]
    assert torch.equal(whole, torch.cat(parts))


def test_examples_are_in_stored_order() -> None:
    data = make(n=10)
    assert data.examples(2, 5)[0][:, 0].tolist() == [2, 3, 4]
    assert len(data) == 10 and data.length == 4
    with pytest.raises(ValueError, match="start, stop are 5, 11"):
        data.examples(5, 11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "step is -1"),
        ((0, 1), "micro_step is 1; accepted: 0 to accumulation - 1 = 0"),
        ((0, 0, 2, 2), "rank is 2; accepted: 0 to world_size - 1 = 1"),
        ((0, 0, 0, 0), "world_size is 0"),
        ((0, 0, 0, 1, 0), "batch_size is 0"),
    ],
)
def test_bad_batch_arguments(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().batch(*arguments)


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (9, r"tokens\[5000, 1\] is 9; accepted: ids other than the mask id 9"),
        (10, r"tokens\[5000, 1\] is 10; accepted: 0 to vocab_size - 1 = 9"),
        (-1, r"tokens\[5000, 1\] is -1; accepted: 0 to vocab_size - 1 = 9"),
    ],
)
def test_mask_or_foreign_tokens_in_the_data(token: int, message: str) -> None:
    tokens = np.zeros((6000, 3), dtype=np.int32)
    tokens[5000, 1] = token
    with pytest.raises(ValueError, match=message):
        TextData(tokens, vocab_size=10, mask_token_id=9)


def test_bad_construction() -> None:
    ids = {"vocab_size": 10, "mask_token_id": 9}
    for tokens in (np.zeros((2, 3)), np.zeros(3, dtype=np.int32), np.zeros((0, 3), dtype=np.int32)):
        with pytest.raises(ValueError, match=r"accepted: integers \[N, L\], not empty"):
            TextData(tokens, **ids)
    for lengths in ([1], [0, 1], [1, 4]):
        with pytest.raises(ValueError, match=r"lengths must be \[2\] integers in 1..3"):
            TextData(np.zeros((2, 3), dtype=np.int32), lengths=np.array(lengths), **ids)
    with pytest.raises(ValueError, match="accumulation is 0"):
        make(accumulation=0)
    with pytest.raises(ValueError, match="seed is -1"):
        make(seed=-1)
    with pytest.raises(ValueError, match="length is 2; accepted: at least 3"):
        pack_wrapped(["text"], TOKENIZER, 2)
    with pytest.raises(ValueError, match="group_size is 0"):
        pack_wrapped(["text"], TOKENIZER, 8, group_size=0)
    with pytest.raises(TypeError, match="documents is a str"):
        TextData.from_documents("text", TOKENIZER, 8)
    with pytest.raises(
        ValueError, match="fewer than length - 2 = 126 tokens: not one sequence of length 128"
    ):
        TextData.from_documents(["short"], TOKENIZER, 128)
    with pytest.raises(ValueError, match="fewer than"):
        TextData.from_documents([], TOKENIZER, 128, wrap=False)


class CountingTokenizer(ByteTokenizer):
    """Counts the documents it encodes."""

    encoded = 0

    def encode_batch(self, texts: Any) -> list[Ids]:
        self.encoded += len(texts)
        return super().encode_batch(texts)


DOCUMENTS = [f"document number {i}\n" * (1 + i % 5) for i in range(50)]


@pytest.mark.parametrize("wrap", [True, False])
def test_cache_gives_the_same_data_without_encoding(tmp_path: Path, wrap: bool) -> None:
    tokenizer = CountingTokenizer()
    plain = TextData.from_documents(DOCUMENTS, tokenizer, 32, wrap=wrap)
    assert tokenizer.encoded == 50
    for _ in range(3):
        cached = TextData.from_documents(
            iter(DOCUMENTS), tokenizer, 32, wrap=wrap, cache_dir=tmp_path / "new"
        )
        assert tokenizer.encoded == 100
        np.testing.assert_array_equal(cached.tokens, plain.tokens)
        for a, b in zip(cached.batch(3), plain.batch(3), strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert isinstance(cached.tokens, np.memmap)
    suffixes = sorted("".join(path.suffixes) for path in (tmp_path / "new").iterdir())
    assert suffixes == ([".json", ".tokens.npy"] if wrap else [".json", ".lengths.npy", ".tokens.npy"])


def test_cache_key_covers_content_tokenizer_and_packing(tmp_path: Path) -> None:
    class Other(ByteTokenizer):
        fingerprint = "other"

    def entries() -> int:
        return len(list(tmp_path.glob("*.json")))

    for count, (documents, tokenizer, length, wrap) in enumerate(
        [
            (DOCUMENTS, TOKENIZER, 32, True),
            (DOCUMENTS, TOKENIZER, 33, True),
            (DOCUMENTS, TOKENIZER, 32, False),
            (DOCUMENTS[::-1], TOKENIZER, 32, True),
            (["".join(DOCUMENTS[:2]), *DOCUMENTS[2:]], TOKENIZER, 32, True),
            (DOCUMENTS, Other(), 32, True),
        ],
        start=1,
    ):
        TextData.from_documents(documents, tokenizer, length, wrap=wrap, cache_dir=tmp_path)
        assert entries() == count


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("file", ["*.tokens.npy", "*.lengths.npy", "*.json"])
def test_damaged_cache_is_rebuilt(tmp_path: Path, file: str, damage: Any) -> None:
    whole = TextData.from_documents(DOCUMENTS, TOKENIZER, 32, wrap=False, cache_dir=tmp_path)
    expected = np.array(whole.tokens)
    (path,) = tmp_path.glob(file)
    damage(path)
    tokenizer = CountingTokenizer()
    if file == "*.json" and damage is Path.unlink:  # no entry at all: nothing to warn of
        again = TextData.from_documents(DOCUMENTS, tokenizer, 32, wrap=False, cache_dir=tmp_path)
    else:
        with pytest.warns(UserWarning, match="is damaged and made again"):
            again = TextData.from_documents(DOCUMENTS, tokenizer, 32, wrap=False, cache_dir=tmp_path)
    assert tokenizer.encoded == 50
    np.testing.assert_array_equal(again.tokens, expected)
    TextData.from_documents(DOCUMENTS, tokenizer, 32, wrap=False, cache_dir=tmp_path)
    assert tokenizer.encoded == 50


@pytest.mark.parametrize(
    "index", ["{}", "[]", "null", '"tokens"', '{"tokens": 1}', '{"lengths": {}}', "[" * 100_000, "\x00\xff"]
)
def test_an_index_of_something_else_is_made_again(tmp_path: Path, index: str) -> None:
    whole = TextData.from_documents(DOCUMENTS, TOKENIZER, 32, wrap=False, cache_dir=tmp_path)
    expected = np.array(whole.tokens)
    (path,) = tmp_path.glob("*.json")
    path.write_text(index, encoding="latin-1")
    with pytest.warns(UserWarning, match="is damaged and made again"):
        again = TextData.from_documents(DOCUMENTS, TOKENIZER, 32, wrap=False, cache_dir=tmp_path)
    np.testing.assert_array_equal(again.tokens, expected)
    TextData.from_documents(DOCUMENTS, TOKENIZER, 32, wrap=False, cache_dir=tmp_path)


@pytest.mark.parametrize("size", [0, 1, 6, 8, 10, 60, 100])
def test_any_damage_to_an_array_s_header_is_found(tmp_path: Path, size: int) -> None:
    """What numpy says of a damaged header is of many kinds, a zip file's signature among them."""
    TextData.from_documents(DOCUMENTS, TOKENIZER, 32, wrap=False, cache_dir=tmp_path)
    path = next(tmp_path.glob("*.tokens.npy"))
    data = path.read_bytes()
    for forged in (b"PK\x03\x04" + data[4:], data[:size] + b"\xff(" + data[size + 2 :]):
        path.write_bytes(forged)
        with pytest.warns(UserWarning, match="is damaged and made again"):
            TextData.from_documents(DOCUMENTS, TOKENIZER, 32, wrap=False, cache_dir=tmp_path)
        assert path.read_bytes() == data


def reshaped(path: Path) -> None:
    array = np.load(path)
    np.save(path, array.T if array.ndim == 2 else array[None])


def of_another_type(path: Path) -> None:
    array = np.load(path)
    np.save(path, array.view(np.int16 if array.dtype == np.uint16 else np.uint32))


@pytest.mark.parametrize("damage", [reshaped, of_another_type])
@pytest.mark.parametrize("file", ["*.tokens.npy", "*.lengths.npy"])
def test_the_same_bytes_in_another_shape_or_type_are_damage(tmp_path: Path, file: str, damage: Any) -> None:
    test_damaged_cache_is_rebuilt(tmp_path, file, damage)


def test_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match=r"cannot write .*tokens\.npy.*No space left on device"):
        TextData.from_documents(DOCUMENTS, TOKENIZER, 32, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_large_vocabulary_is_stored_as_int32() -> None:
    class Wide(ByteTokenizer):
        def __init__(self) -> None:
            super().__init__()
            self.vocab_size = 2**16 + 1

    assert pack_wrapped(["text"], Wide(), 4).dtype == np.int32
