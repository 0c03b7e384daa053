"""Tokenizers: round trips, ids of the special tokens, files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from loopmdm.data.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    HFTokenizer,
    Tokenizer,
    load_tokenizer,
)

TEXTS = ["", "plain", "def f(x):\n\treturn x  # é日本🙂\r\n", "<|endoftext|><|mask|>[MASK]", " a\x00b\x7f "]
CORPUS = ["the cat sat on the mat and the dog sat on the log\n" * 20, "für Übung: 日本語\n" * 20]


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    pytest.importorskip("tokenizers")
    return BPETokenizer.train(CORPUS, 290)


@pytest.fixture(params=["byte", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "byte":
        return ByteTokenizer()
    result: Tokenizer = request.getfixturevalue("bpe")
    return result


@pytest.mark.parametrize("text", [*TEXTS, *CORPUS])
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert not {tokenizer.mask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids.tolist())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids.tolist()) == tokenizer.decode(torch.from_numpy(ids)) == text
    assert tokenizer.text_bytes(ids) == len(text.encode())


def test_batch_equals_single(tokenizer: Tokenizer) -> None:
    for ids, text in zip(tokenizer.encode_batch(TEXTS), TEXTS, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_special_ids() -> None:
    byte = ByteTokenizer()
    assert (byte.vocab_size, byte.mask_token_id, byte.bos_token_id, byte.eos_token_id) == (258, 257, 256, 256)
    np.testing.assert_array_equal(byte.encode("aé"), [97, 0xC3, 0xA9])


def test_trained_ids(bpe: BPETokenizer) -> None:
    assert bpe.vocab_size == 290
    assert (bpe.mask_token_id, bpe.eos_token_id, bpe.bos_token_id) == (289, 288, 288)
    assert len(bpe.encode("the cat")) < 7
    small = BPETokenizer.train(["ab"], 1000)
    assert small.vocab_size == small.mask_token_id + 1 < 1000


def test_decode_shows_masks_and_ends(tokenizer: Tokenizer) -> None:
    mask, eos = tokenizer.mask_token_id, tokenizer.eos_token_id
    ids = [*tokenizer.encode("ab"), mask, mask, *tokenizer.encode("é"), eos, *tokenizer.encode("c")]
    assert tokenizer.decode(ids) == "ab··éc"
    assert tokenizer.decode(ids, mask_text="[M]", special_text="\n") == "ab[M][M]é\nc"
    assert tokenizer.text_bytes(ids) == 5
    cut = tokenizer.encode("é日")[:-1]
    assert tokenizer.decode([*cut, mask]).startswith("é\ufffd")
    assert tokenizer.decode([]) == "" and tokenizer.text_bytes([]) == 0


def test_bad_ids_and_text(tokenizer: Tokenizer) -> None:
    last = tokenizer.vocab_size - 1
    with pytest.raises(ValueError, match=f"ids holds {last + 1}; accepted: 0 to vocab_size - 1 = {last}"):
        tokenizer.decode([0, last + 1])
    with pytest.raises(ValueError, match="ids holds -1"):
        tokenizer.text_bytes([-1])
    with pytest.raises(TypeError, match=r"ids is int64 \[1, 2\]; accepted: integers \[L\]"):
        tokenizer.decode(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="ids is float"):
        tokenizer.decode([0.5])
    with pytest.raises(TypeError, match="text is a bytes; accepted: a str"):
        tokenizer.encode(b"x")
    with pytest.raises(ValueError, match=r"lone surrogate .* at index 1"):
        tokenizer.encode("a\ud800")


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    tokenizer.save(folder)
    tokenizer.save(folder)
    loaded = load_tokenizer(folder)
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint
    ids = ("vocab_size", "mask_token_id", "bos_token_id", "eos_token_id")
    assert [getattr(loaded, i) for i in ids] == [getattr(tokenizer, i) for i in ids]
    for text in (*TEXTS, *CORPUS):
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
    assert not [path for path in folder.iterdir() if path.suffix != ".json"]


def test_fingerprint_tells_tokenizers_apart(bpe: BPETokenizer) -> None:
    other = BPETokenizer.train(CORPUS, 280)
    assert len({ByteTokenizer().fingerprint, bpe.fingerprint, other.fingerprint}) == 3


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("loopmdm_tokenizer.json", "{"),
        ("loopmdm_tokenizer.json", '{"kind": "magic"}'),
        ("loopmdm_tokenizer.json", '{"kind": "bpe", "vocab_size": 300}'),
        ("loopmdm_tokenizer.json", "[]"),
        ("tokenizer.json", '{"version": "1.0"'),
    ],
)
def test_damaged_files(bpe: BPETokenizer, tmp_path: Path, file: str, content: str) -> None:
    bpe.save(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match="is damaged"):
        load_tokenizer(tmp_path)


def test_a_panic_of_the_library_is_a_damaged_file(bpe: BPETokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["continuing_subword_prefix"] = "longer than any token"
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="is damaged"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        HFTokenizer.from_pretrained(path)


def test_wrong_ids_in_a_saved_file(bpe: BPETokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path)
    path = tmp_path / "loopmdm_tokenizer.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "mask_token_id": config["eos_token_id"]}))
    with pytest.raises(ValueError, match="the id of BOS or EOS"):
        load_tokenizer(tmp_path)
    path.write_text(json.dumps({**config, "vocab_size": 289, "mask_token_id": 5}))
    with pytest.raises(ValueError, match="vocab_size is 289, the tokenizer has the id 289"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_bad_training(bpe: BPETokenizer) -> None:
    with pytest.raises(ValueError, match="vocab_size is 257; accepted: at least 258"):
        BPETokenizer.train(CORPUS, 257)
    with pytest.raises(ValueError, match="nothing to train on"):
        BPETokenizer.train(["", ""], 300)
    with pytest.raises(TypeError, match="documents is a str"):
        BPETokenizer.train("text", 300)
    assert BPETokenizer.train(["x"], 258).vocab_size == 258


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"needs the package tokenizers: .*loopmdm-kernels\[train\]"):
        BPETokenizer.train(CORPUS, 300)
    assert load_tokenizer("byte").vocab_size == 258


def hf_folder(folder: Path, special: list[str], config: dict[str, Any] | None, **vocabulary: int) -> Path:
    """A word-level tokenizer.json as transformers would save it."""
    tokenizers = pytest.importorskip("tokenizers")
    words = vocabulary or {"[UNK]": 0, "one": 1, "two": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(special)
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def special_ids(tokenizer: Tokenizer) -> tuple[int, int, int, int]:
    return tokenizer.vocab_size, tokenizer.mask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id


def test_hf_without_mask_gets_the_next_id(tmp_path: Path) -> None:
    """GPT-2's case: mask id = vocab_size, vocab_size + 1, BOS = EOS = <|endoftext|>."""
    folder = hf_folder(tmp_path, ["<|endoftext|>"], None)
    for source in (folder, folder / "tokenizer.json", str(folder)):
        tokenizer = load_tokenizer(source)
        assert special_ids(tokenizer) == (5, 4, 3, 3)
    np.testing.assert_array_equal(
        tokenizer.encode("one two one two"), [1, 2, 1, 2]
    )  # no padding, no truncation
    assert tokenizer.decode([1, 4, 2]) == "one·two"


def test_hf_pad_is_never_the_mask(tmp_path: Path) -> None:
    folder = hf_folder(
        tmp_path, ["<|endoftext|>", "[PAD]"], {"pad_token": "[PAD]", "eos_token": "<|endoftext|>"}
    )
    assert special_ids(load_tokenizer(folder)) == (6, 5, 3, 3)


def test_hf_with_mask_keeps_its_vocabulary(tmp_path: Path) -> None:
    """BERT's case: its own mask inside the vocabulary, CLS and SEP in the place of BOS and EOS."""
    config = {
        "mask_token": {"content": "[MASK]"},
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "bos_token": None,
    }
    folder = hf_folder(tmp_path, ["[CLS]", "[MASK]", "[SEP]", "extra"], config)
    tokenizer = load_tokenizer(folder)
    assert special_ids(tokenizer) == (7, 4, 3, 5)
    assert tokenizer.mask_token_id not in tokenizer.encode("one [MASK] two")
    assert tokenizer.text_bytes([1, 4, 2]) == 6
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert isinstance(copy, HFTokenizer) and special_ids(copy) == (7, 4, 3, 5)


def test_hf_names_may_be_given(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, ["stop", "start", "hide"], None)
    with pytest.raises(ValueError, match="names no end-of-text token; pass eos_token"):
        load_tokenizer(folder)
    tokenizer = HFTokenizer.from_pretrained(folder, eos_token="stop", bos_token="start", mask_token="hide")
    assert special_ids(tokenizer) == (6, 5, 4, 3)
    with pytest.raises(ValueError, match="mask_token is 'nope', which is not in the vocabulary"):
        HFTokenizer.from_pretrained(folder, eos_token="stop", mask_token="nope")


def test_hf_gaps_in_the_vocabulary(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path, [], None, **{"[UNK]": 0, "one": 7})
    assert special_ids(HFTokenizer.from_pretrained(folder, eos_token="one")) == (9, 8, 7, 7)


def test_hf_bad_sources(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json and no loopmdm_tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"source './gone' is no tokenizer; accepted: 'byte', a folder"
    ):
        load_tokenizer("./gone")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_hf_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id fetches tokenizer.json and what configuration files there are."""

    class NotThereError(Exception):
        pass

    folder = hf_folder(tmp_path, ["stop"], {"eos_token": "stop"})
    asked = []

    def download(hub_id: str, name: str) -> str:
        asked.append((hub_id, name))
        if hub_id != "someone/words" or not (folder / name).exists():
            raise NotThereError("404")
        return str(folder / name)

    errors = SimpleNamespace(EntryNotFoundError=NotThereError)
    hub = SimpleNamespace(hf_hub_download=download, errors=errors)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setattr("loopmdm.formats.hub.unreachable", lambda: None)
    assert special_ids(load_tokenizer("someone/words")) == (5, 4, 3, 3)
    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    assert asked == [("someone/words", name) for name in names]
    with pytest.raises(FileNotFoundError, match=r"'someone/else' is no tokenizer.*fetched from the hub: 404"):
        load_tokenizer("someone/else")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"huggingface_hub: pip install 'loopmdm-kernels\[hf\]'"):
        load_tokenizer("someone/words")


def test_added_tokens_of_a_byte_level_tokenizer_are_plain_text(tmp_path: Path) -> None:
    """Also where all their characters stand for bytes in the learned tokens ("éé", "Ġé")."""
    tokenizers = pytest.importorskip("tokenizers")
    added = ["é☃", "éé", "Ġé", "日本", "word"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<extra>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(added)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    for text in (*added, *TEXTS, *CORPUS, "é☃ cat Ġéword日本é 語éé"):
        ids = tokenizer.encode(text)
        assert tokenizer.text_bytes(ids) == len(text.encode()), text
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.token_bytes(int(i)) or b"" for i in ids) == text.encode()
    extra = backend.token_to_id("<extra>")
    assert tokenizer.text_bytes([extra]) == 0 and tokenizer.decode([extra]) == ""
