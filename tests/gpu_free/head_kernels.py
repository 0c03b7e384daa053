"""The kernels of the vocabulary head: what is compiled, and how their parameters must lie."""

from hopper import layout

from loopmdm_kernels.cuda import head, head_logits, masked_cross_entropy, sample_rows
from loopmdm_kernels.cuda.head import with_logits

# By the name in head_contract.json.
KERNELS = {
    "modulated_rows": head.MODULATED_ROWS,
    "sample_rows, 64 rows": with_logits(sample_rows.SOURCE, 64),
    "sample_rows, 128 rows": with_logits(sample_rows.SOURCE, 128),
    "sample_rows_combine": sample_rows.COMBINE,
    "head_logits, 64 rows": with_logits(head_logits.SOURCE, 64),
    "head_logits, 128 rows": with_logits(head_logits.SOURCE, 128),
    "cross_entropy, 64 rows": with_logits(masked_cross_entropy.FORWARD, 64),
    "cross_entropy, 128 rows": with_logits(masked_cross_entropy.FORWARD, 128),
    "cross_entropy_combine": masked_cross_entropy.COMBINE,
    "cross_entropy_backward": masked_cross_entropy.BACKWARD,
    "gradient_product, rows": masked_cross_entropy.OF_ROWS,
    "gradient_product, weight": masked_cross_entropy.OF_WEIGHT,
    "modulated_rows_backward": masked_cross_entropy.ROWS_BACKWARD,
}

PARAMETERS = {
    "modulated_rows": head.ModulatedRowsParameters,
    "sample_rows, 128 rows": sample_rows.Parameters,
    "sample_rows_combine": sample_rows.CombineParameters,
    "head_logits, 128 rows": head_logits.Parameters,
    "cross_entropy, 128 rows": masked_cross_entropy.ForwardParameters,
    "cross_entropy_combine": masked_cross_entropy.CombineParameters,
    "cross_entropy_backward": masked_cross_entropy.BackwardParameters,
    "gradient_product, weight": masked_cross_entropy.ProductParameters,
    "modulated_rows_backward": masked_cross_entropy.RowsBackwardParameters,
}
# Bytes of shared memory as the kernel counts them.
SHARED = {"LOOPMDM_ROWS": "Vocabulary::Ring::kBytes", "LOOPMDM_OF_WEIGHT": "GradientProduct::Ring::kBytes"}


def assertions(name: str) -> list[str]:
    """Lines behind the source: its parameters lie, and its shared memory is, as they are written here."""
    kernel, lines = KERNELS[name], []
    if name in PARAMETERS:
        written = PARAMETERS[name]
        lines += layout(written, f"loopmdm::{written.__name__}")
    for macro, _ in kernel.macros:
        lines.append(f"static_assert(loopmdm::{SHARED[macro]} == {kernel.shared_bytes});")
    return lines
