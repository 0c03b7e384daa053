"""`sample_rows` on Hopper: race and statistics of a row in one pass over the vocabulary, no logits.

Only top_p and top_k need a row's logits together; they are made for a few rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loopmdm_kernels.cuda.head import ROW_THREADS, Operands, pointers, why_not
from loopmdm_kernels.cuda.head_logits import row_logits
from loopmdm_kernels.cuda.launch import Kernel, launch
from loopmdm_kernels.cuda.parameters import structure
from loopmdm_kernels.reference.sample_rows import sample_logits
from loopmdm_kernels.types import Head, RowRng, SampledRows

SOURCE = "head/sample_rows_sm90.cu"
COMBINE = Kernel("head/sample_rows_combine_sm90.cu", ROW_THREADS)
_RECORD_BYTES = 32
_ROWS_WITH_LOGITS = 256

Parameters = structure(SOURCE, "SampleRowsParameters")
CombineParameters = structure(COMBINE.source, "SampleRowsCombineParameters")


def supports(*, hidden: Tensor, head: Head, compute_dtype: torch.dtype | None = None) -> str | None:
    """Why these arguments need another backend, or None."""
    return why_not(hidden, head, compute_dtype)


def sample_rows(
    hidden: Tensor,
    head: Head,
    rows: Tensor,
    rng: RowRng,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> SampledRows:
    operands = Operands(hidden, head, rows)
    if temperature > 0 and (top_p < 1.0 or top_k is not None):
        parts = []
        for part in operands.parts(_ROWS_WITH_LOGITS):
            logits = row_logits(operands, part)
            names = RowRng(rng.seed, *(name[part] for name in rng[1:]))
            parts.append(
                sample_logits(
                    logits, head.excluded_token, names, temperature=temperature, top_p=top_p, top_k=top_k
                )
            )
        return SampledRows(*(torch.cat(fields) for fields in zip(*parts, strict=True)))
    return _race(operands, rng, temperature)


def _race(operands: Operands, rng: RowRng, temperature: float) -> SampledRows:
    race, hidden = temperature > 0, operands.hidden
    num_rows, chunks, vocab_size = operands.num_rows, operands.chunks, operands.vocab_size
    records = hidden.new_empty(chunks, num_rows, _RECORD_BYTES, dtype=torch.uint8)
    operands.reduce_logits(
        operands.with_logits(SOURCE),
        Parameters,
        **{name: value.contiguous() for name, value in rng._asdict().items() if name != "seed"},
        records=records,
        seed=rng.seed,
        inverse_temperature=1.0 / temperature if race else 0.0,
    )
    out = SampledRows(
        *(
            hidden.new_empty(num_rows, dtype=torch.int64 if name.endswith("token") else torch.float32)
            for name in SampledRows._fields
        )
    )
    last = vocab_size - 1
    parameters = CombineParameters(
        records=records.data_ptr(),
        **pointers(out._asdict()),
        num_rows=num_rows,
        chunks=chunks,
        fallback=last - 1 if operands.excluded_token == last else last,
        race=int(race),
    )
    launch(COMBINE, parameters, operands.row_blocks, operands.device)
    return out
