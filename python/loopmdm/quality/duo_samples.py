"""The file of samples of Duo's `mode=sample_eval`, and the two figures in it as Duo computes them.

The file is JSON: `generated_seqs`, the texts with the tokens that begin and end them written out, and two
figures: `generative_ppl` and `entropy`. What is written here also has `token_ids`, which texts do not always
encode back to, the `tokenizer` that they belong to, and facts of the run.
"""

from __future__ import annotations

import json
import math
import os
import re
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loopmdm.data.tokenizer import Tokenizer
from loopmdm.quality.samples import check_samples, lengths
from loopmdm.quality.scorer import BATCH, CausalScorer, TransformersScorer
from loopmdm_kernels.files import write_file
from loopmdm_kernels.values import parse_json, real


class SamplesFile(NamedTuple):
    """What a file of samples holds."""

    tokens: Tensor  # [N, L] int64, -1 behind the end of a sample
    generative_ppl: float | None  # as the file states it; None where it was not computed
    entropy: float | None
    facts: dict[str, Any]  # everything else in it
    encoded: bool  # whether the tokens are those of texts, which may be others than were drawn


def read_samples(path: str | os.PathLike[str], tokenizer: Tokenizer) -> SamplesFile:
    """Samples of a file that Duo or `write_samples` wrote.

    Texts are encoded with `tokenizer`, unless the file holds the ids of that very tokenizer.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file.
    """
    try:
        document = parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    texts = document.get("generated_seqs") if isinstance(document, dict) else None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{path}: no file of samples: expected texts in `generated_seqs`")
    rows = document.get("token_ids") if document.get("tokenizer") == tokenizer.fingerprint else None
    encoded = rows is None
    if rows is None:
        rows = []
        for index, text in enumerate(texts):
            try:
                rows.append(_encoded(text, tokenizer))
            except ValueError as error:
                raise ValueError(f"{path}: generated_seqs: text {index}: {error}") from error
    if not _are_ids(rows, tokenizer.vocab_size) or len(rows) != len(texts):
        raise ValueError(
            f"{path}: token_ids: expected ids below {tokenizer.vocab_size} of each of {len(texts)} texts"
        )
    if not all(rows):
        raise ValueError(f"{path}: the text {next(i for i, row in enumerate(rows) if not row)} is empty")
    tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True, padding_value=-1
    )
    perplexity, entropy = (real(document.get(name)) for name in ("generative_ppl", "entropy"))
    own = ("generative_ppl", "entropy", "generated_seqs", "token_ids")
    facts = {name: value for name, value in document.items() if name not in own}
    return SamplesFile(tokens, perplexity, entropy, facts, encoded)


def is_samples(path: Path) -> bool:
    """Whether a file is empty, or of samples."""
    try:
        text = path.read_text(encoding="utf-8")
        document = parse_json(text) if text else {"generated_seqs": []}
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and "generated_seqs" in document


def write_samples(
    path: str | os.PathLike[str],
    tokens: Tensor,
    tokenizer: Tokenizer,
    *,
    generative_ppl: float | None,
    entropy: float,
    facts: dict[str, Any],
) -> None:
    """Write samples [N, L], -1 behind the end of one, in Duo's form, with `facts` beside."""
    document = {
        "generative_ppl": generative_ppl,
        "entropy": entropy,
        "generated_seqs": texts_of(tokens, tokenizer),
        "token_ids": _rows(tokens),
        "tokenizer": tokenizer.fingerprint,
        **facts,
    }
    write_file(path, json.dumps(document, indent=4) + "\n")


def texts_of(tokens: Tensor, tokenizer: Tokenizer) -> list[str]:
    """Texts of samples [N, L] with the tokens that begin and end a text written out, as Duo keeps them."""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id)

    def text(row: list[int]) -> str:
        parts = [(is_mark, list(part)) for is_mark, part in groupby(row, key=special.__contains__)]
        return "".join(
            "".join(map(tokenizer.mark, part)) if is_mark else tokenizer.decode(part)
            for is_mark, part in parts
        )

    return [text(row) for row in _rows(tokens)]


def duo_perplexity(
    scorer: CausalScorer | TransformersScorer, tokens: Tensor, tokenizer: Tokenizer, length: int
) -> float:
    """`generative_ppl` of samples [N, L] as Duo's `record_generative_perplexity` has it.

    exp of the mean over all counted tokens, so that long samples weigh more. Texts are encoded by the
    scorer's tokenizer, to `length` tokens at most (Duo's `model.length`), and read in pieces of its context
    that know nothing of each other. Counted are the tokens behind the first of a piece; of those that end a
    text only the first, which may be the padding behind a text shorter than the longest. A scorer with the
    tokenizer of the samples reads them as they are. (Duo leaves out samples that do not fill a batch of
    `perplexity_batch_size`.)
    """
    tokens = check_samples(tokens, tokenizer.mask_token_id)
    rows = scorer.rows_of(tokens, texts_of(tokens, tokenizer), length)
    pieces = [piece for row in rows for piece in torch.split(row, scorer.context)]
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(pieces), BATCH):
            part = pieces[start : start + BATCH]
            filler = next(i for i in (0, 1) if i != scorer.refused_id)
            ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=filler)
            sizes = torch.tensor([len(piece) for piece in part])
            end = torch.zeros_like(ids, dtype=torch.bool)
            if scorer.eos_token_id is not None:
                end = ids == scorer.eos_token_id
            counted = torch.arange(ids.shape[1]) < sizes[:, None]
            counted &= ~end | (end.cumsum(1) == 1)
            counted[:, 0] = False
            nll = scorer.token_nll(ids, counted).double().cpu()
            total += float(nll[counted].sum())
            count += int(counted.sum())
    return math.exp(total / count) if count else math.nan


def _rows(tokens: Tensor) -> list[list[int]]:
    tokens = check_samples(tokens)
    return [row[:size] for row, size in zip(tokens.tolist(), lengths(tokens).tolist(), strict=True)]


def _encoded(text: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text in which the tokens that begin and end it are written out."""
    ids_of = {tokenizer.mark(i): i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id)}
    ids: list[int] = []
    for part in re.split("(" + "|".join(map(re.escape, ids_of)) + ")", text):
        ids += [ids_of[part]] if part in ids_of else tokenizer.encode(part).tolist()
    return ids


def _are_ids(rows: Any, vocab_size: int) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, list) and all(type(i) is int and 0 <= i < vocab_size for i in row) for row in rows
    )
