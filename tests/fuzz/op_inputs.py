"""Random calls of the public ops: small shapes, any dtype, options at their edges; and views."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import loopmdm_kernels as lk
from loopmdm_kernels.types import BlockWeights, Head, Rotary, RowRng, SampledRows

KERNEL_DTYPES = (torch.float32, torch.bfloat16)
OTHER_DTYPES = (torch.float16, torch.float64)


class Problem(NamedTuple):
    """One call of an op. `leaves` are its float tensors, `given` all else, by the names its `call` reads."""

    op: str
    leaves: dict[str, Tensor]
    given: dict[str, Any]

    def describe(self) -> str:
        def text(value: Any) -> str:
            if isinstance(value, Tensor):
                small = value.numel() <= 8 and not value.is_floating_point()
                return f"{str(value.dtype)[6:]}{list(value.shape)}" + (f"={value.tolist()}" if small else "")
            return repr(value)

        parts = {**self.leaves, **{k: v for k, v in self.given.items() if v is not None}}
        return f"{self.op}(" + ", ".join(f"{name}: {text(value)}" for name, value in parts.items()) + ")"


class Op(NamedTuple):
    make: Callable[[Draw], Problem]
    call: Callable[[Problem], dict[str, Tensor]]
    part: Callable[[Problem, Draw], tuple[Problem, Callable[[str, Tensor], Tensor | None]] | None]


class Draw:
    """All random choices of a case."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed % 2**63)

    def one(self, *values: Any) -> Any:
        return self.random.choice(values)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def size(self, *sizes: int, rare: tuple[int, ...] = ()) -> int:
        return self.random.choice(rare) if rare and self.chance(0.03) else self.random.choice(sizes)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Sometimes constant along a dimension, so that it can be an expanded view."""
        if self.chance(0.1) and shape:
            along = self.random.randrange(len(shape))
            narrow = [1 if i == along else size for i, size in enumerate(shape)]
            return (torch.randn(narrow, generator=self.generator) * scale).expand(shape).contiguous()
        return torch.randn(shape, generator=self.generator) * scale

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def dtype(self) -> torch.dtype:
        kind: torch.dtype = self.one(*OTHER_DTYPES) if self.chance(0.04) else self.one(*KERNEL_DTYPES)
        return kind

    def mask(self, *shape: int) -> Tensor | None:
        if self.chance(0.6):
            return None
        kept = torch.rand(shape, generator=self.generator) < self.random.random()
        kept[torch.arange(shape[0]), self.integers(0, shape[1], shape[0])] = True
        return kept


def rotary_of(draw: Draw, length: int, head_dim: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if head_dim % 2 or draw.chance(0.4):
        return None, None
    angle = draw.normal(length, head_dim // 2, scale=draw.one(1.0, 100.0))
    kind = draw.one(torch.float32, torch.float32, torch.bfloat16, torch.float64)
    return angle.cos().to(kind), angle.sin().to(kind)


def make_attention(draw: Draw) -> Problem:
    batch, heads = draw.size(1, 1, 2, 3), draw.size(1, 2, 3)
    length = draw.size(1, 2, 3, 5, 7, 8, 9, 15, 16, 17, rare=(31, 33, 64, 65, 130))
    head_dim = draw.size(1, 2, 3, 4, 6, 7, 8, 12, 16, 17, rare=(32, 48, 64, 72, 128))
    dtype, scale = draw.dtype(), draw.one(0.0, 1e-20, 0.1, 1.0, 1.0, 1.0, 4.0)
    wide = 1.0 if dtype == torch.float16 else 1e12
    leaves = {
        name: draw.normal(batch, heads, length, head_dim, scale=size).to(dtype)
        for name, size in (("q", scale), ("k", 1.0), ("v", draw.one(1.0, 1.0, wide, 1 / wide)))
    }
    cos, sin = rotary_of(draw, length, head_dim)
    return Problem("attention", leaves, {"key_mask": draw.mask(batch, length), "cos": cos, "sin": sin})


def call_attention(problem: Problem) -> dict[str, Tensor]:
    given = problem.given
    rotary = None if given["cos"] is None else Rotary(given["cos"], given["sin"])
    leaves = problem.leaves
    out = lk.attention(leaves["q"], leaves["k"], leaves["v"], key_mask=given["key_mask"], rotary=rotary)
    return {"out": out}


def part_attention(problem: Problem, draw: Draw) -> Any:
    one = _one_of(draw, problem.leaves["q"].shape[0])
    mask = problem.given["key_mask"]
    given = {**problem.given, "key_mask": None if mask is None else mask[one]}
    leaves = {name: leaf[one] for name, leaf in problem.leaves.items()}
    return problem._replace(leaves=leaves, given=given), lambda name, out: out[one]


def make_looped_blocks(draw: Draw) -> Problem:
    batch, length = draw.size(1, 1, 2, 3), draw.size(1, 2, 3, 5, 8, 9, rare=(16, 17, 40))
    heads, half = draw.size(1, 2, 3), draw.size(1, 2, 3, 4, rare=(8, 16))
    half = max(
        half, 3 - heads
    )  # a norm makes two numbers +-1: the gradient before it is what rounding leaves
    hidden, width = 2 * heads * half, draw.size(1, 2, 5, 8, 16, 17, rare=(64, 96))
    num_blocks, dtype = draw.size(1, 1, 2), draw.dtype()
    stream = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {"x": draw.normal(batch, length, hidden, scale=draw.one(1.0, 1.0, 1e-3, 30.0)).to(stream)}
    if draw.chance(0.1):
        # Not so large that fp32 loses what a block adds: a constant row then stays one, with other gradients.
        leaves["x"][draw.random.randrange(batch)] *= draw.one(0.0, 1e-15, 1e3)
    rows = draw.one(1, batch)
    leaves["modulation"] = draw.normal(num_blocks, rows, 6, hidden, scale=0.3).to(dtype)
    shapes = (
        (hidden,), (3 * hidden, hidden), (hidden, hidden), (hidden,),
        (width, hidden), (width,), (hidden, width), (hidden,),
    )  # fmt: skip
    for index in range(num_blocks):
        for name, shape in zip(BlockWeights._fields, shapes, strict=True):
            value = draw.normal(*shape, scale=shape[-1] ** -0.5 if len(shape) == 2 else 0.1)
            value = 1 + value if name.startswith("norm") else value
            leaves[f"{index}.{name}"] = value.to(draw.one(dtype, dtype, stream) if len(shape) == 1 else dtype)
    compute = draw.one(None, None, *KERNEL_DTYPES)
    most = 4 if (compute or dtype) in (torch.float32, torch.float64) else 2
    loops: int | Tensor = draw.random.randint(1, most)
    max_loops = None
    if draw.chance(0.3):
        loops = draw.integers(1, most + 1, batch)
        max_loops = draw.one(None, int(loops.max()), most + 5) if batch > 1 else None
    cos, sin = rotary_of(draw, length, 2 * half)
    dropped = isinstance(loops, int) and draw.chance(0.2)
    return Problem(
        "looped_blocks",
        leaves,
        {
            "num_loops": loops,
            "max_loops": max_loops,
            "num_heads": heads,
            "cos": cos,
            "sin": sin,
            "key_mask": draw.mask(batch, length),
            "compute_dtype": compute,
            "dropout": draw.one(0.1, 0.5, 1 - 2.0**-24) if dropped else 0.0,
            "dropout_seed": draw.random.randrange(2**63) if dropped else 0,
            "exit_threshold": None if dropped or draw.chance(0.8) else draw.one(0.0, 0.3, 1.0, float("inf")),
            "recompute": draw.chance(0.4),
        },
    )


def call_looped_blocks(problem: Problem) -> dict[str, Tensor]:
    leaves, given = problem.leaves, dict(problem.given)
    cos, sin = given.pop("cos"), given.pop("sin")
    count = sum(name.endswith(".qkv") for name in leaves)
    blocks = [BlockWeights(*(leaves[f"{i}.{name}"] for name in BlockWeights._fields)) for i in range(count)]
    out = lk.looped_blocks(
        leaves["x"],
        blocks,
        leaves["modulation"],
        given.pop("num_loops"),
        rotary=None if cos is None else Rotary(cos, sin),
        **given,
    )
    return {"out": out} if isinstance(out, Tensor) else {"out": out[0], "used": out[1]}


def part_looped_blocks(problem: Problem, draw: Draw) -> Any:
    given, leaves = dict(problem.given), dict(problem.leaves)
    if given["dropout"]:  # its masks are by the place in the batch
        return None
    one = _one_of(draw, leaves["x"].shape[0])
    leaves["x"] = leaves["x"][one]
    if leaves["modulation"].shape[1] > 1:
        leaves["modulation"] = leaves["modulation"][:, one]
    for name in ("num_loops", "key_mask"):
        if isinstance(given[name], Tensor):
            given[name] = given[name][one]
    return problem._replace(leaves=leaves, given=given), lambda name, out: out[one]


def make_head(draw: Draw) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """hidden [B, L, D] and a head [V, D], of which parts may be missing."""
    batch, length = draw.size(1, 1, 2, 3), draw.size(1, 2, 3, 5, 9, rare=(17, 40))
    width = draw.size(1, 2, 3, 4, 7, 8, 15, 16, 17, 32, rare=(48, 96, 100))
    vocab = draw.size(2, 3, 5, 8, 15, 16, 17, 33, 64, rare=(95, 96, 97, 200, 3073))
    dtype = draw.dtype()
    stream = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {"hidden": draw.normal(batch, length, width, scale=draw.one(1.0, 1.0, 5.0)).to(stream)}
    bare = draw.chance(0.15)
    if draw.chance(0.1) and not bare:
        # Constant rows stay small: of eight times 1e15 plain PyTorch finds no variance of 0, in float64 too.
        constant = bool((leaves["hidden"] == leaves["hidden"][..., :1]).all())
        scale = draw.one(0.0, 1e-15, 1e6, 1e15)
        leaves["hidden"][draw.random.randrange(batch)] *= min(scale, 1e3) if constant else scale
    if not bare and draw.chance(0.85):
        leaves["norm"] = (1 + draw.normal(width, scale=0.1)).to(draw.one(dtype, stream))
    elif float(leaves["hidden"].abs().max()) > 100:  # without a norm such rows leave fp32
        leaves["hidden"] = leaves["hidden"].clamp(-5, 5)
    leaves["weight"] = draw.normal(vocab, width, scale=draw.one(0.5, 2.0, 4.0) * width**-0.5).to(dtype)
    if not bare:
        leaves["bias"] = draw.normal(vocab, scale=draw.one(0.0, 0.1, 3.0)).to(draw.one(dtype, stream))
        leaves["modulation"] = draw.normal(draw.one(1, batch), 2, width, scale=0.3).to(dtype)
    excluded = -1 if bare else draw.one(-1, 0, vocab - 1, draw.random.randrange(vocab))
    return leaves, {"excluded": excluded, "compute_dtype": draw.one(None, None, *KERNEL_DTYPES)}


def head_of(problem: Problem) -> Head | Tensor:
    leaves = problem.leaves
    if "bias" not in leaves:
        bare = leaves["weight"]
        return bare if "norm" not in leaves else Head.of(bare, norm=leaves["norm"])
    excluded = problem.given.get("excluded", -1)
    return Head(leaves.get("norm"), leaves["weight"], leaves["bias"], leaves["modulation"], excluded)


def make_head_logits(draw: Draw) -> Problem:
    return Problem("head_logits", *make_head(draw))


def call_head_logits(problem: Problem) -> dict[str, Tensor]:
    dtype = problem.given["compute_dtype"]
    return {"logits": lk.head_logits(problem.leaves["hidden"], head_of(problem), compute_dtype=dtype)}


def part_head_logits(problem: Problem, draw: Draw) -> Any:
    leaves = dict(problem.leaves)
    one = _one_of(draw, leaves["hidden"].shape[0])
    leaves["hidden"] = leaves["hidden"][one]
    if "modulation" in leaves and leaves["modulation"].shape[0] > 1:
        leaves["modulation"] = leaves["modulation"][one]
    return problem._replace(leaves=leaves), lambda name, out: out[one]


def make_masked_cross_entropy(draw: Draw) -> Problem:
    leaves, given = make_head(draw)
    batch, length, _ = leaves["hidden"].shape
    vocab, excluded = leaves["weight"].shape[0], given["excluded"]
    targets = draw.integers(0, vocab - (excluded >= 0), batch, length)
    targets += (targets >= excluded) & (excluded >= 0)
    form = draw.one("rows", "rows", "mask", None)
    if form == "rows":
        given["rows"] = draw.integers(0, batch * length, draw.size(0, 1, 2, 5, 12, rare=(70,)))
        chosen = given["rows"]
    elif form == "mask":
        given["rows"] = torch.rand(batch, length, generator=draw.generator) < draw.random.random()
        chosen = given["rows"].flatten().nonzero().squeeze(1)
    else:
        given["rows"], chosen = None, torch.arange(batch * length)
    unread = torch.ones(batch * length, dtype=torch.bool)
    unread[chosen] = False
    targets.view(-1)[unread] = draw.one(0, -100, 2**62)  # targets are read at the rows only
    given["targets"] = targets
    if draw.chance(0.7):
        shape = (batch, length) if given["rows"] is None else tuple(given["rows"].shape)
        kind = draw.one(torch.float32, torch.float32, torch.float64, torch.bfloat16)
        leaves["row_weights"] = draw.normal(*(shape if form else (batch * length,))).abs().to(kind)
    return Problem("masked_cross_entropy", leaves, given)


def call_masked_cross_entropy(problem: Problem) -> dict[str, Tensor]:
    leaves, given = problem.leaves, problem.given
    total, nll = lk.masked_cross_entropy(
        leaves["hidden"], head_of(problem), given["targets"], given["rows"], leaves.get("row_weights"),
        compute_dtype=given["compute_dtype"],
    )  # fmt: skip
    return {"total": total, "nll": nll}


def part_masked_cross_entropy(problem: Problem, draw: Draw) -> Any:
    rows = problem.given["rows"]
    if rows is None or rows.dtype == torch.bool or not rows.numel():
        return None
    one = _one_of(draw, rows.numel())
    leaves = dict(problem.leaves)
    if "row_weights" in leaves:
        leaves["row_weights"] = leaves["row_weights"][one]
    given = {**problem.given, "rows": rows[one]}
    return problem._replace(leaves=leaves, given=given), lambda name, out: out[one] if name == "nll" else None


def make_sample_rows(draw: Draw) -> Problem:
    leaves, given = make_head(draw)
    batch, length, _ = leaves["hidden"].shape
    vocab = leaves["weight"].shape[0]
    count = draw.size(0, 1, 2, 4, 9, rare=(70,))
    given["rows"] = draw.integers(0, batch * length, count)
    given["seed"] = draw.one(0, 2**63 - 1, draw.random.randrange(2**63))
    for name, limit in (("sequence", 2**32), ("step", 2**30), ("position", 2**31)):
        given[name] = draw.integers(draw.one(0, limit - 1), limit, count)
    given["temperature"] = draw.one(0.0, 1e-20, 1e20, 0.3, 1.0, 1.0, 1.7)
    given["top_p"] = draw.one(1.0, 1.0, 0.9, 0.5, 1e-30, 1 - 2.0**-53)
    given["top_k"] = draw.one(None, None, 1, 2, vocab - 1, vocab, vocab + 1, 2**62)
    return Problem("sample_rows", leaves, given)


def call_sample_rows(problem: Problem) -> dict[str, Tensor]:
    given = problem.given
    rng = RowRng(given["seed"], given["sequence"], given["step"], given["position"])
    options = {name: given[name] for name in ("temperature", "top_p", "top_k", "compute_dtype")}
    out: SampledRows = lk.sample_rows(
        problem.leaves["hidden"], head_of(problem), given["rows"], rng, **options
    )
    return out._asdict()


def part_sample_rows(problem: Problem, draw: Draw) -> Any:
    if not problem.given["rows"].numel():
        return None
    one = _one_of(draw, problem.given["rows"].numel())
    names = ("rows", "sequence", "step", "position")
    given = {**problem.given, **{name: problem.given[name][one] for name in names}}
    return problem._replace(given=given), lambda name, out: out[one]


def _one_of(draw: Draw, count: int) -> slice:
    start = draw.random.randrange(count)
    return slice(start, draw.random.randint(start + 1, count))


OPS = {
    name: Op(*(globals()[f"{part}_{name}"] for part in ("make", "call", "part")))
    for name in ("attention", "looped_blocks", "head_logits", "masked_cross_entropy", "sample_rows")
}


# Views whose memory is not what they show; each has the values of its argument.


def negative(x: Tensor) -> Tensor:
    return x if x.dtype == torch.bool else torch._neg_view(-x)


def imaginary(x: Tensor) -> Tensor:
    if x.dtype not in (torch.float32, torch.float64):
        return negative(x)
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def transposed(x: Tensor) -> Tensor:
    return x if x.ndim < 2 else x.transpose(0, -1).contiguous().transpose(0, -1)


def spaced(x: Tensor) -> Tensor:
    return torch.stack((x, torch.ones_like(x)), dim=-1).flatten(-2)[..., ::2] if x.ndim else x


def offset(x: Tensor) -> Tensor:
    return torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape) if x.numel() else x


def inside(x: Tensor) -> Tensor:
    """A block out of the middle of a larger tensor."""
    if not x.ndim:
        return x
    large = torch.ones([size + 2 for size in x.shape], dtype=x.dtype)
    middle = large[tuple(slice(1, 1 + size) for size in x.shape)]
    return middle.copy_(x)


def expanded(x: Tensor) -> Tensor:
    """A stride of 0 where the values are equal along a dimension."""
    for along in range(x.ndim):
        if x.shape[along] > 1 and torch.equal(x, x.narrow(along, 0, 1).expand_as(x)):
            return x.narrow(along, 0, 1).clone().expand_as(x)
    return x


DISGUISES = (negative, imaginary, transposed, spaced, offset, inside, expanded)


def disguised(problem: Problem, draw: Draw) -> Problem:
    """The same call with another memory behind some of its tensors."""

    def of(value: Any) -> Any:
        if not isinstance(value, Tensor) or draw.chance(0.4):
            return value
        return draw.one(*DISGUISES)(value)

    leaves = {name: of(leaf) for name, leaf in problem.leaves.items()}
    return problem._replace(leaves=leaves, given={name: of(value) for name, value in problem.given.items()})
