"""Weighted cross-entropy of the masked rows: sum_r w_r * -log p(x0_r | xt) (MDLM, continuous-time NELBO)."""

from __future__ import annotations

from torch import Tensor

from loopmdm_kernels.calls import CrossEntropyCall
from loopmdm_kernels.reference.head_logits import row_logits, subs_log_probs


def run(call: CrossEntropyCall) -> tuple[Tensor, Tensor]:
    log_probs = subs_log_probs(row_logits(call, call.rows), call.head.excluded_token)
    nll = -log_probs.gather(1, call.targets.flatten()[call.rows][:, None]).squeeze(1)
    return (nll * call.row_weights.to(nll.dtype)).sum(), nll
