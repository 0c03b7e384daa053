"""Every kernel of the vocabulary head, for compiling them ahead: they serve all widths and vocabularies."""

from __future__ import annotations

from loopmdm_kernels.cuda import head, head_logits, masked_cross_entropy, sample_rows

HEAD_KERNELS = (
    head.MODULATED_ROWS,
    *(
        head.with_logits(source, rows)
        for source in (sample_rows.SOURCE, head_logits.SOURCE, masked_cross_entropy.FORWARD)
        for rows in head.ROWS_OF_TILE
    ),
    sample_rows.COMBINE,
    masked_cross_entropy.COMBINE,
    masked_cross_entropy.BACKWARD,
    masked_cross_entropy.OF_ROWS,
    masked_cross_entropy.OF_WEIGHT,
    masked_cross_entropy.ROWS_BACKWARD,
)
