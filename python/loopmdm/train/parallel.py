"""The ranks of a run: how they share the model, and which micro-batches of a step each computes."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from loopmdm.data.batches import Batch
from loopmdm.model.checkpoint import Trainable

Form = Literal["ddp", "fsdp2", "hsdp"]
FORMS: tuple[str, ...] = get_args(Form)


def check_compiled_form(form: str | None) -> None:
    """Raise a ValueError where passes of this form cannot be compiled."""
    if form in ("fsdp2", "hsdp"):
        raise ValueError(f"compile: not with {form}, whose hooks around blocks a graph leaves out; use ddp")


@dataclass(frozen=True)
class Layout:
    """The micro-batches of an optimizer step, and those of them that one rank computes.

    They are numbered as the ranks that began the run took them. What a micro-batch holds and draws follows
    from its number, so any number of ranks that divides them computes the same step.
    """

    accumulation: int  # micro-batches of a rank when the run began
    began_with: int  # ranks when the run began
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.total % self.world_size:
            raise ValueError(
                f"a step of this run is {self.total} micro-batches (accumulation {self.accumulation} on"
                f" {self.began_with} ranks), which {self.world_size} ranks cannot share evenly; start a"
                f" number of processes that divides {self.total}"
            )

    @property
    def total(self) -> int:
        """Micro-batches of a step over all ranks."""
        return self.accumulation * self.began_with

    @property
    def own(self) -> int:
        """Micro-batches of a step on this rank."""
        return self.total // self.world_size

    def number(self, index: int) -> int:
        """The number within the step of this rank's micro-batch `index`."""
        return index * self.world_size + self.rank

    def place(self, index: int) -> tuple[int, int, int]:
        """(micro_step, rank, world_size) by which a `BatchSource` knows this rank's micro-batch `index`."""
        return *divmod(self.number(index), self.began_with), self.began_with


class _Loss(nn.Module):
    """`model.loss` as a forward pass, which is what DistributedDataParallel can wrap."""

    def __init__(self, model: Trainable) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, num_loops: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        out = self.model.loss(
            batch.input_ids, batch.attention_mask, num_loops, seed, prompt_mask=batch.prompt_mask
        )
        return out.loss, out.nll_sum, out.num_tokens


class Ranks:
    """One process alone, or all of `torch.distributed` with the model in one of the forms.

    - ddp: every rank holds the whole model, gradients are averaged (DistributedDataParallel);
    - fsdp2: parameters, gradients and the optimizer's state are split over all ranks, block by block
      (`fully_shard`);
    - hsdp: split over `shard_size` ranks, as those of a node, and copied over the groups of them.

    Every rank begins with the weights of rank 0. In bf16 the sharded forms gather parameters in bf16 and sum
    gradients in fp32; the others run under autocast.
    """

    def __init__(
        self,
        model: Trainable,
        form: Form | None,
        *,
        bf16: bool = False,
        shard_size: int | None = None,
        unused_parameters: bool = False,
        compiled: bool = False,
    ) -> None:
        """Take a model on its device; the sharded forms split it in place.

        form: None: ddp under `torch.distributed`, else nothing.
        shard_size: of hsdp; None: the ranks of this node (LOCAL_WORLD_SIZE).
        unused_parameters: some get no gradient in some steps, which DistributedDataParallel has to know.
        compiled: the passes, by torch.compile.
        """
        self.distributed = dist.is_available() and dist.is_initialized()
        if form is not None and form not in FORMS:
            raise ValueError(f"parallel: got {form!r}, expected one of {', '.join(FORMS)}")
        if form is not None and not self.distributed:
            raise ValueError(f"parallel: {form} needs the processes that torchrun starts")
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1
        self.form: Form | None = form or ("ddp" if self.distributed else None)
        self.sharded = self.form in ("fsdp2", "hsdp")
        self._device = next(model.parameters()).device
        self._mesh: DeviceMesh | None = None
        # While a rank has long work of its own, such as an evaluation, the others wait in this group, as long
        # as torch.distributed waits by default and longer than for a step.
        self._patient = dist.new_group(backend="gloo") if self.distributed else None
        self._bf16, self._whole = bf16, cast(Trainable, None)
        self._loss: Any = _Loss(model)
        self._compiled = compiled
        if compiled:
            check_compiled_form(self.form)
            self._loss = torch.compile(self._loss)
        if self.sharded:
            self._whole = copy.deepcopy(model).to("meta")
            self._shard(model, bf16, shard_size)
        elif self.distributed:
            # gives all ranks the weights of rank 0
            self._loss = nn.parallel.DistributedDataParallel(
                self._loss, find_unused_parameters=unused_parameters
            )
        self._model = model

    def _shard(self, model: Trainable, bf16: bool, shard_size: int | None) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
        self._mesh = self._new_mesh(shard_size)
        options: dict[str, Any] = {"mesh": self._mesh, "mp_policy": policy}
        for block in getattr(model, "blocks", ()):
            fully_shard(block, **options)
        fully_shard(model, **options)
        register_fsdp_forward_method(model, "loss")

    def _new_mesh(self, shard_size: int | None) -> DeviceMesh:
        kind = self._device.type
        if self.form == "fsdp2":
            return init_device_mesh(kind, (self.world_size,), mesh_dim_names=("shard",))
        size = shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        if size < 1 or self.world_size % size:
            raise ValueError(
                f"shard_size: got {size}, expected a number that divides the {self.world_size} ranks"
            )
        shape = (self.world_size // size, size)
        return init_device_mesh(kind, shape, mesh_dim_names=("copies", "shard"))

    def wait_at_most(self, timeout: timedelta) -> None:
        """From now on, for a rank in a collective of a step."""
        if not self.distributed:
            return
        groups = [dist.group.WORLD, *([] if self._mesh is None else self._mesh.get_all_groups())]
        for group in groups:
            dist.distributed_c10d._set_pg_timeout(timeout, group)

    def loss(self, batch: Batch, num_loops: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, NLL sum, tokens) of a micro-batch, each a scalar."""
        autocast = self._bf16 and not self.sharded
        # As a tensor S is one graph for all its values; as a number, 1 would be one of its own.
        loops: Any = torch.tensor([num_loops]) if self._compiled else num_loops
        with torch.autocast(self._device.type, torch.bfloat16, enabled=autocast):
            out: tuple[Tensor, Tensor, Tensor] = self._loss(batch, loops, seed)
            return out

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Inside are the passes of a micro-batch; gradients travel in those of the last one only."""
        if self.sharded:
            model = cast(Any, self._model)
            model.set_requires_gradient_sync(last)
            yield
        elif self.distributed and not last:
            with self._loss.no_sync():
                yield
        else:
            yield

    def add_up(self, figures: Tensor) -> None:
        """Make `figures` the sum over the ranks."""
        if self.distributed:
            dist.all_reduce(figures)

    def agreed(self, value: Any, patiently: bool = False) -> Any:
        """What rank 0 has for `value`, on every rank.

        patiently: a rank may have long work of its own before.
        """
        if not self.distributed:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, group=self._patient if patiently else None)
        return box[0]

    def gathered(self, value: Any) -> list[Any] | None:
        """What the ranks have for `value`, on rank 0; they may have long work of their own before."""
        if not self.distributed:
            return [value]
        values: list[Any] | None = None if self.rank else [None] * self.world_size
        dist.gather_object(value, values, dst=0, group=self._patient)
        return values

    def refuse_together(self, complaint: str | None) -> None:
        """Raise a ValueError on every rank if one has a complaint: the first of them."""
        complaints: list[str | None] = [complaint]
        if self.distributed:
            complaints = [None] * self.world_size
            dist.all_gather_object(complaints, complaint)
        for one in complaints:
            if one is not None:
                raise ValueError(one)

    def whole_model(self, averages: Mapping[str, Tensor], everywhere: bool) -> Trainable | None:
        """Of sharded forms: an unsharded model with these parameters, on rank 0 or on all; None on others.

        Every rank has to call it.
        """
        tensors = {}
        for name, value in {**self._model.state_dict(), **averages}.items():
            gathered = full(value)  # a collective, so on every rank
            if everywhere or self.rank == 0:
                tensors[name] = gathered
        if self.rank and not everywhere:
            return None
        whole = copy.deepcopy(self._whole)
        whole.load_state_dict(tensors, assign=True)
        return whole.eval()


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which a rank may hold a part; every rank has to call it."""
    return cast(Any, tensor).full_tensor() if is_split(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, which is the same memory."""
    return cast(Any, tensor).to_local() if is_split(tensor) else tensor


def put(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor, which every rank has, into one of which a rank may hold a part."""
    if is_split(target):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = cast(Any, target).device_mesh, cast(Any, target).placements
        value = distribute_tensor(value.to(target.device), mesh, placements, src_data_rank=None)
    local(target).copy_(local(value))


def is_split(tensor: Tensor) -> bool:
    """Whether the tensor is one of `fully_shard` (its class is imported where there is one)."""
    return type(tensor).__name__ == "DTensor"
