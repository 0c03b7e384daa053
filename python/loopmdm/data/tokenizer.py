"""Tokenizers: bytes, a byte-level BPE trained here, or a Hugging Face `tokenizer.json`.

Every tokenizer has an explicit mask id that no text encodes to. Text is encoded without special tokens, also
where it spells one out; packing adds BOS and EOS.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loopmdm.formats import hub
from loopmdm.printable import printable
from loopmdm_kernels.files import write_files
from loopmdm_kernels.values import parse_json

Ids: TypeAlias = NDArray[np.int32]

CONFIG_FILE = "loopmdm_tokenizer.json"
BACKEND_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
MASK = "<|mask|>"

# Names looked for among the special tokens where no configuration file says which is which.
_KNOWN = {
    "mask": ("[MASK]", "<mask>", MASK),
    "eos": (END_OF_TEXT, "</s>", "[SEP]", "<eos>"),
    "bos": (END_OF_TEXT, "<s>", "[CLS]", "<bos>"),
}
# As in the reference: a BERT-style tokenizer opens with CLS and closes with SEP.
_CONFIG_FIELDS = {
    "mask": ("mask_token",),
    "eos": ("eos_token", "sep_token"),
    "bos": ("bos_token", "cls_token"),
}


# A byte-level vocabulary writes a byte as the Latin-1 character where that is visible, else as U+0100 and up.
_VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = sorted(set(range(256)) - set(_VISIBLE))
_BYTE_OF = {chr(byte): bytes([byte]) for byte in _VISIBLE} | {
    chr(0x100 + i): bytes([byte]) for i, byte in enumerate(_HIDDEN)
}


class Tokenizer(ABC):
    """Text to ids and back; `vocab_size` includes the mask."""

    kind: ClassVar[str]

    def __init__(self, vocab_size: int, mask_token_id: int, bos_token_id: int, eos_token_id: int) -> None:
        for name, value in (("mask", mask_token_id), ("bos", bos_token_id), ("eos", eos_token_id)):
            if not 0 <= value < vocab_size:
                raise ValueError(
                    f"{name}_token_id is {value}; accepted: 0 to vocab_size - 1 = {vocab_size - 1}"
                )
        if mask_token_id in (bos_token_id, eos_token_id):
            raise ValueError(
                f"mask_token_id is {mask_token_id}, the id of BOS or EOS; accepted: an id of its own"
            )
        self.vocab_size = vocab_size
        self.mask_token_id = mask_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Changes whenever an encoding could; part of the key of the packed-token cache."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, without special tokens."""

    @abstractmethod
    def _decode_text(self, ids: list[int]) -> str:
        """Text of ids that are neither the mask, BOS nor EOS."""

    def encode(self, text: str) -> Ids:
        """Ids of a text, int32, without special tokens."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int], *, mask_text: str = "·", special_text: str = "") -> str:
        """Text of ids (a list, an array or a tensor); bytes that are not UTF-8 become U+FFFD.

        `mask_text` stands for each mask, `special_text` for each BOS and EOS.
        """
        shown = {
            self.bos_token_id: special_text,
            self.eos_token_id: special_text,
            self.mask_token_id: mask_text,
        }
        parts = []
        for special, group in groupby(self._checked(ids).tolist(), key=shown.__contains__):
            run = list(group)
            parts.append("".join(shown[i] for i in run) if special else self._decode_text(run))
        return "".join(parts)

    def mark(self, token: int) -> str:
        """How BOS or EOS is written in a text that shows them."""
        return END_OF_TEXT

    def text_bytes(self, ids: Iterable[int]) -> int:
        """UTF-8 bytes of text behind ids: the denominator of bits per byte. Mask, BOS and EOS count 0."""
        return len(self.decode(ids, mask_text="").encode())

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes of an ordinary token, maybe a part of a character; None where tokens are not bytes."""
        return None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer into a folder (made if missing), whole or not at all."""
        write_files({Path(folder, name): text for name, text in self.texts().items()})

    def texts(self) -> dict[str, str]:
        """The files that `save` writes, name to content."""
        config = {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "mask_token_id": self.mask_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
        }
        return {CONFIG_FILE: json.dumps(config, indent=2) + "\n", **self._files()}

    def _files(self) -> dict[str, str]:
        return {}

    def _checked(self, ids: Iterable[int]) -> NDArray[np.int64]:
        array = np.array(ids.tolist() if hasattr(ids, "tolist") else list(ids))
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise TypeError(f"ids is {array.dtype} {list(array.shape)}; accepted: integers [L]")
        wrong = (array < 0) | (array >= self.vocab_size)
        if wrong.any():
            raise ValueError(
                f"ids holds {array[wrong][0]}; accepted: 0 to vocab_size - 1 = {self.vocab_size - 1}"
            )
        return array.astype(np.int64)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes: ids 0-255 are the bytes, 256 is BOS and EOS, 257 the mask."""

    kind = "byte"

    def __init__(self) -> None:
        super().__init__(vocab_size=258, mask_token_id=257, bos_token_id=256, eos_token_id=256)

    @property
    def fingerprint(self) -> str:
        return "byte"

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.int32) for text in texts]

    def text_bytes(self, ids: Iterable[int]) -> int:
        return int((self._checked(ids) < 256).sum())

    def token_bytes(self, token: int) -> bytes | None:
        return bytes([token])

    def _decode_text(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


class _BackedTokenizer(Tokenizer):
    """A tokenizer of the package `tokenizers` with its ids."""

    def __init__(
        self, backend: Any, vocab_size: int, mask_token_id: int, bos_token_id: int, eos_token_id: int
    ) -> None:
        super().__init__(vocab_size, mask_token_id, bos_token_id, eos_token_id)
        largest = max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        if largest >= vocab_size:
            raise ValueError(f"vocab_size is {vocab_size}, the tokenizer has the id {largest}")
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # text that spells out a special token stays text
        self._backend = backend
        decoder = json.loads(backend.to_str())["decoder"] or {}
        self._byte_level = decoder.get("type") == "ByteLevel"

    @property
    def fingerprint(self) -> str:
        ids = [self.vocab_size, self.mask_token_id, self.bos_token_id, self.eos_token_id]
        return hashlib.blake2b(f"{ids}{self._backend.to_str()}".encode(), digest_size=16).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        for text in texts:
            _utf8(text)
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def mark(self, token: int) -> str:
        return self._backend.id_to_token(token) or END_OF_TEXT

    def text_bytes(self, ids: Iterable[int]) -> int:
        if not self._byte_level:
            return super().text_bytes(ids)
        return int(self._byte_lengths[self._checked(ids)].sum())

    @cached_property
    def _byte_lengths(self) -> NDArray[np.int64]:
        """Bytes behind each id of a byte-level tokenizer."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for i in self._backend.get_vocab(with_added_tokens=True).values():
            lengths[i] = len(self.token_bytes(i) or b"")
        lengths[[self.mask_token_id, self.bos_token_id, self.eos_token_id]] = 0
        return lengths

    @cached_property
    def _added(self) -> dict[int, Any]:
        """Tokens that are not of the learned vocabulary, and special ones: plain text, unlike the others.

        One that is in both (a character that stands for a byte, added again) is what text encodes to: a byte.
        """
        learned = set(self._backend.get_vocab(with_added_tokens=False).values())
        added = self._backend.get_added_tokens_decoder()
        return {i: token for i, token in added.items() if token.special or i not in learned}

    def token_bytes(self, token: int) -> bytes | None:
        if not self._byte_level:
            return None
        if token in self._added:
            added = self._added[token]
            return b"" if added.special else _utf8(added.content)
        text: str = self._backend.id_to_token(token) or ""
        return b"".join(_BYTE_OF.get(character) or character.encode() for character in text)

    def _decode_text(self, ids: list[int]) -> str:
        if self._byte_level:
            return b"".join(self.token_bytes(i) or b"" for i in ids).decode("utf-8", "replace")
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text

    def _files(self) -> dict[str, str]:
        return {BACKEND_FILE: self._backend.to_str(pretty=True)}


class BPETokenizer(_BackedTokenizer):
    """A byte-level BPE trained on the user's text; BOS = EOS is the last id but one, the mask the last."""

    kind = "bpe"

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Learn merges until the vocabulary, EOS and mask included, has `vocab_size` entries.

        A small corpus may run out of pairs before; `vocab_size` of the result tells.
        """
        smallest = 256 + 2
        if vocab_size < smallest:
            raise ValueError(
                f"vocab_size is {vocab_size}; accepted: at least {smallest} (256 bytes, EOS, mask)"
            )
        tokenizers = _tokenizers("training a BPE tokenizer")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        if isinstance(documents, str):
            raise TypeError("documents is a str; accepted: an iterable of documents")
        corpus = list(documents)
        if not any(corpus):
            raise ValueError("documents is empty: there is nothing to train on")
        for document in corpus:
            _utf8(document)
        backend.train_from_iterator(corpus, trainer)
        backend.add_special_tokens([END_OF_TEXT, MASK])
        size: int = backend.get_vocab_size()
        return cls(backend, size, mask_token_id=size - 1, bos_token_id=size - 2, eos_token_id=size - 2)


class HFTokenizer(_BackedTokenizer):
    """A Hugging Face tokenizer: a folder with tokenizer.json, that file itself, or a hub id."""

    kind = "hf"

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        mask_token: str | None = None,
        eos_token: str | None = None,
        bos_token: str | None = None,
    ) -> HFTokenizer:
        """Load a tokenizer and settle its special ids.

        The names come from the arguments, else from its configuration files, else from well-known names among
        its special tokens. A tokenizer without a mask token gets one: mask id = vocab_size, vocab_size + 1.
        Tokens added to the vocabulary count as part of it, so the new id is free; the padding token is never
        taken for the mask. A tokenizer without BOS uses EOS in its place.
        """
        tokenizers = _tokenizers("a Hugging Face tokenizer")
        path, configs = _hf_files(source)
        try:
            backend = _parsed(tokenizers, path)
        except Exception as error:
            raise ValueError(f"{path} is not a tokenizer.json: {printable(error)}") from error
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"{path} has an empty vocabulary")
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}

        def find(role: str, chosen: str | None) -> int | None:
            if chosen is not None:
                if chosen not in vocabulary:
                    raise ValueError(f"{role}_token is {chosen!r}, which is not in the vocabulary of {path}")
                return vocabulary[chosen]
            configured = (_token_name(config, f) for f in _CONFIG_FIELDS[role] for config in configs)
            known = (name for name in _KNOWN[role] if name in special)
            return next((vocabulary[n] for n in (*configured, *known) if n in vocabulary), None)

        vocab_size = max(vocabulary.values()) + 1
        mask = find("mask", mask_token)
        if mask is None:
            mask, vocab_size = vocab_size, vocab_size + 1
        eos = find("eos", eos_token)
        if eos is None:
            raise ValueError(f"{path} names no end-of-text token; pass eos_token, one of its vocabulary")
        bos = find("bos", bos_token)
        return cls(backend, vocab_size, mask, eos if bos is None else bos, eos)


def load_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """A tokenizer: "byte", a folder written by `save`, or anything `HFTokenizer.from_pretrained` reads."""
    if source == ByteTokenizer.kind:
        return ByteTokenizer()
    path = Path(source, CONFIG_FILE)
    if not path.is_file():
        return HFTokenizer.from_pretrained(source)
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
        kind, ids = config.pop("kind"), {name: int(value) for name, value in config.items()}
        if kind == ByteTokenizer.kind:
            return ByteTokenizer()
        backed = {cls.kind: cls for cls in (BPETokenizer, HFTokenizer)}[kind]
        tokenizers = _tokenizers(f"the tokenizer in {source}")
        return backed(_parsed(tokenizers, path.with_name(BACKEND_FILE)), **ids)
    except (ImportError, FileNotFoundError):
        raise
    except Exception as error:
        raise ValueError(
            f"the tokenizer in {source} is damaged: {type(error).__name__}: {printable(error)}"
        ) from error


def _parsed(tokenizers: Any, path: Path) -> Any:
    """The tokenizer of a tokenizer.json. A damaged one may make the library panic, which is no Exception."""
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from None


def _hf_files(source: str | os.PathLike[str]) -> tuple[Path, list[dict[str, Any]]]:
    """tokenizer.json and the configuration files that lie beside it, from disk or from the hub."""
    local = Path(source)
    names = ("tokenizer_config.json", "special_tokens_map.json")
    if local.is_dir() or local.is_file():
        path = local / BACKEND_FILE if local.is_dir() else local
        if not path.is_file():
            raise FileNotFoundError(f"folder {local} holds no {BACKEND_FILE} and no {CONFIG_FILE}")
        beside = [path.with_name(name) for name in names]
    else:
        path, *beside = _download(str(source), (BACKEND_FILE, *names))
    configs = []
    for file in beside:
        if file.is_file():
            try:
                configs.append(parse_json(file.read_text(encoding="utf-8")))
            except ValueError as error:
                raise ValueError(f"{file} is damaged: {error}") from None
    return path, configs


def _download(hub_id: str, names: Sequence[str]) -> list[Path]:
    missing = f"source {hub_id!r} is no tokenizer; accepted: 'byte', a folder, a tokenizer.json or a hub id"
    if not hub.is_hub_id(hub_id, owner=False):
        raise FileNotFoundError(missing)
    paths = [hub.fetch(hub_id, names[0], missing=missing)]
    for name in names[1:]:
        with suppress(hub.NoSuchFile):
            paths.append(hub.fetch(hub_id, name, missing=missing))
    return paths


def _token_name(config: dict[str, Any], field: str) -> str | None:
    """A token of a configuration file: its text, or an object that holds it."""
    token = config.get(field)
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _tokenizers(purpose: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            f"{purpose} needs the package tokenizers: pip install 'loopmdm-kernels[train]'"
        ) from None
    return tokenizers


def _utf8(text: str) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"text is a {type(text).__name__}; accepted: a str")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds the lone surrogate {text[error.start]!r} at index {error.start}"
        ) from None
