"""Whether the draws of `sample_rows` are those of float64, up to what rounding of the logits can turn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loopmdm_kernels.calls import HeadCall
from loopmdm_kernels.philox import race_times
from loopmdm_kernels.reference.head_logits import row_logits, subs_log_probs
from loopmdm_kernels.testing.tolerance import max_error, rounding_step
from loopmdm_kernels.types import Head
from tests.fuzz.harness import Wrong
from tests.fuzz.op_inputs import KERNEL_DTYPES, Problem, head_of


def check(problem: Problem, out: dict[str, Tensor]) -> None:
    given, rows = problem.given, problem.given["rows"]
    if not rows.numel():
        return
    head = head_of(problem)
    head = Head.of(head) if isinstance(head, Tensor) else head
    vocab, excluded = head.weight.shape[0], head.excluded_token
    hidden = problem.leaves["hidden"]
    plain = subs_log_probs(row_logits(HeadCall(hidden, head, given["compute_dtype"]), rows), excluded)
    wide = Head(None if head.norm is None else head.norm.double(), *(t.double() for t in head[1:4]), excluded)
    exact = subs_log_probs(row_logits(HeadCall(hidden.double(), wide, None), rows), excluded)
    slack = 2 * max_error(plain, exact) + 2.0**-20 * (1 + float(exact[exact.isfinite()].abs().max()))
    _check_statistics(out, exact, plain, slack)
    for name in ("token", "top1_token"):
        token = out[name]
        if bool(((token < 0) | (token >= vocab) | (token == excluded)).any()):
            raise Wrong(f"{name}: {token.tolist()} of {vocab} tokens without {excluded}")
    _check_best(out["top1_token"], exact, slack, head, "top1_token")
    if given["temperature"] == 0:
        _check_best(out["token"], exact, slack, head, "token at temperature 0")
    else:
        _check_race(problem, out["token"], exact, slack)


def _check_statistics(out: dict[str, Tensor], exact: Tensor, plain: Tensor, slack: float) -> None:
    def statistics(log_probs: Tensor) -> dict[str, Tensor]:
        probs = log_probs.exp()
        top = probs.topk(min(2, probs.shape[1]), dim=1).values
        product = torch.where(probs > 0, probs * log_probs, torch.zeros_like(probs))
        return {
            "log_prob": log_probs.gather(1, out["token"][:, None]).squeeze(1),
            "top1_prob": top[:, 0],
            "top2_prob": top[:, 1],
            "entropy": -product.sum(dim=1),
        }

    want, rounded = statistics(exact), statistics(plain)
    for name, value in want.items():
        step = rounding_step(value, out[name].dtype)
        # A statistic is off by what its logits are off by, as those of the reference are.
        allowed = 2 * max_error(rounded[name], value) + step + (1 + math.log(exact.shape[1])) * slack
        error = max_error(out[name], value)
        if not (error <= allowed and bool(out[name].isfinite().all() | ~value.isfinite().all())):
            raise Wrong(f"{name}: error {error:.3e}, allowed {allowed:.3e}")


def _check_best(token: Tensor, exact: Tensor, slack: float, head: Head, name: str) -> None:
    chosen = exact.gather(1, token[:, None]).squeeze(1)
    if bool((chosen < exact.amax(dim=1) - 2 * slack).any()):
        raise Wrong(f"{name}: {token.tolist()} are not the most probable")
    for best in token.tolist():
        equal = (head.weight == head.weight[best]).all(dim=1) & (head.bias == head.bias[best])
        equal[max(head.excluded_token, 0)] &= head.excluded_token < 0
        # Plain PyTorch, which other dtypes go to, may round the same product in two ways.
        if int(equal.nonzero()[0]) != best and head.weight.dtype in KERNEL_DTYPES:
            raise Wrong(f"{name}: {best}, of equal ones the lowest is {int(equal.nonzero()[0])}")


def _check_race(problem: Problem, token: Tensor, exact: Tensor, slack: float) -> None:
    """The winner in float64 has at most a little more than the token, among what may surely be drawn."""
    given, vocab = problem.given, exact.shape[1]
    temperature = given["temperature"]
    loose, strict = _restrictions(exact, given["top_k"], given["top_p"], temperature, slack)
    drawn = token[:, None]
    if not bool(loose.gather(1, drawn).all()):
        raise Wrong(f"token: {token.tolist()}, not all among those that top_k and top_p allow")
    times = race_times(
        given["seed"], given["sequence"], given["step"], given["position"], vocab, torch.float64
    )
    scores = exact / temperature - times.log()
    best = scores.masked_fill(~strict, -math.inf).amax(dim=1)
    score = scores.gather(1, drawn).squeeze(1)
    allowed = 2 * slack / temperature + 1e-5 + 2.0**-20 * best.abs().nan_to_num(0, 0, 0)
    if bool((score < best - allowed).any()):
        raise Wrong(f"token: {token.tolist()} lost the race by {(best - score).tolist()}")


def _restrictions(
    exact: Tensor, top_k: int | None, top_p: float, temperature: float, slack: float
) -> tuple[Tensor, Tensor]:
    """Boolean [R, V]: what may be drawn for some logits within `slack` of `exact`, and for all of them."""
    possible = exact > -math.inf
    loose, strict = possible.clone(), possible.clone()
    ordered = exact.sort(dim=1, descending=True).values
    if top_k is not None and top_k < exact.shape[1]:
        loose &= exact >= ordered[:, top_k - 1 : top_k] - 2 * slack
        strict &= exact > ordered[:, top_k : top_k + 1] + 2 * slack
    if top_p < 1:
        kept = exact if top_k is None else exact.masked_fill(~loose, -math.inf)
        probs = torch.softmax(kept / temperature, dim=1)
        order = kept.argsort(dim=1, descending=True)
        total = torch.nn.functional.pad(probs.gather(1, order).cumsum(dim=1), (1, 0))
        ascending = -kept.gather(1, order)
        above = torch.searchsorted(ascending.contiguous(), (-kept - 2 * slack).contiguous())
        not_below = torch.searchsorted(ascending.contiguous(), (-kept + 2 * slack).contiguous(), right=True)
        blurred = min(1.0, 4 * slack / temperature + 1e-6)
        if top_k is not None:
            blurred = min(1.0, blurred + float((probs * (loose & ~strict)).sum(dim=1).max()))
        loose &= total.gather(1, above) < top_p + blurred
        strict &= total.gather(1, not_below) - probs < top_p - blurred
    return loose, strict
