"""`sample_rows` on Hopper: race and statistics of a row in one pass over the vocabulary, no logits.

Only top_p and top_k need a row's logits together; they are made for a few rows at a time.
"""

from __future__ import annotations

import torch

from loopmdm_kernels.calls import SampleCall
from loopmdm_kernels.cuda import head, head_logits
from loopmdm_kernels.cuda.head import ROW_THREADS, Operands, pointers
from loopmdm_kernels.cuda.head_logits import row_logits
from loopmdm_kernels.cuda.launch import Kernel, launch
from loopmdm_kernels.cuda.parameters import structure
from loopmdm_kernels.reference.sample_rows import sample_in_parts
from loopmdm_kernels.types import SampledRows

SOURCE = "head/sample_rows_sm90.cu"
COMBINE = Kernel("head/sample_rows_combine_sm90.cu", ROW_THREADS)
_RECORD_BYTES = 32
_ROWS_WITH_LOGITS = 256

Parameters = structure(SOURCE, "SampleRowsParameters")
CombineParameters = structure(COMBINE.source, "SampleRowsCombineParameters")


def why_not(call: SampleCall) -> str | None:
    num_rows = call.rows.shape[0]
    if call.draw.restricted:
        return head.why_not(call, head.for_rows(head_logits.SOURCE, num_rows))
    return head.why_not(call, head.for_rows(SOURCE, num_rows), COMBINE)


def run(call: SampleCall) -> SampledRows:
    operands, rng, temperature = Operands(call, call.rows), call.draw.rng, call.draw.temperature
    if call.draw.restricted:
        return sample_in_parts(call, _ROWS_WITH_LOGITS, lambda part: row_logits(operands, part))
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
    out = SampledRows.empty(num_rows, hidden.device)
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
