"""The training loop: AdamW, warm-up, clipping, EMA, a drawn loop count, exact resumption."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loopmdm.data.batches import Batch
from loopmdm.formats.folders import CONFIG_FILE as MODEL_CONFIG_FILE
from loopmdm.formats.folders import WEIGHTS_FILE, read_json
from loopmdm.model import flops
from loopmdm.model.checkpoint import Trainable
from loopmdm.model.loop_law import LoopLaw
from loopmdm.model.modes import evaluating
from loopmdm.model.seeds import derive_seed
from loopmdm.train.batches import Prefetcher, batch_source
from loopmdm.train.config import TrainConfig
from loopmdm.train.ema import EMA
from loopmdm.train.folder import RunFolder
from loopmdm.train.metrics import METRICS_FILE, MetricsLog, keep_until
from loopmdm.train.progress import Progress, describe_evaluation
from loopmdm.train.state import STATE_FILE, read_metadata, read_state, staged, write_state
from loopmdm_kernels.files import refuse_files, write_files

CONFIG_FILE = "train_config.json"
FILES = (STATE_FILE, WEIGHTS_FILE, MODEL_CONFIG_FILE, CONFIG_FILE, METRICS_FILE)


class NonFiniteError(RuntimeError):
    """The loss or its gradient is infinite or not a number."""


@dataclass
class Counters:
    """What a run has done so far, over all ranks and across resumptions."""

    step: int = 0  # optimizer steps
    tokens: int = 0  # tokens counted by the loss
    flops: float = 0.0  # training FLOPs by the ledger, vocabulary head included
    seconds: float = 0.0  # wall time in `train`
    cpu_seconds: float = 0.0  # processor time of rank 0 in `train`, all threads


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


@dataclass
class _Step:
    """A step whose figures may still be on their way from the device."""

    record: dict[str, Any]
    figures: Tensor  # [5] float64: loss, NLL sum, tokens, stop requests, gradient norm
    arrived: torch.cuda.Event | None


class Trainer:
    """Trains a model and writes everything a run leaves behind into one folder.

    The loss of a step is the mean over ranks and micro-batches of their losses per token, as in the
    reference. One loop count S is drawn per step and shared by all ranks and micro-batches; times, masks and
    dropout are drawn per rank and micro-batch. Everything random is a function of (seed, step, micro-batch,
    rank), so a run resumed from a checkpoint computes what the uninterrupted one would have (on a CPU, bit
    for bit).

    Under `torchrun` (an initialised `torch.distributed`) gradients are averaged over the ranks, and rank 0
    writes. The folder holds training_state.safetensors (to resume from), config.json and model.safetensors
    (the averaged weights, for `from_pretrained`), train_config.json and metrics.jsonl.
    """

    def __init__(
        self,
        model: Trainable,
        data: Any,
        config: TrainConfig,
        out_dir: str | Path | RunFolder,
        on_log: Callable[[dict[str, Any]], None] | None = None,
        *,
        evaluate: Callable[[Any], dict[str, Any]] | None = None,
        show_progress: bool = True,
    ) -> None:
        """Prepare a run; nothing is written before `train`.

        Args:
            model: on its device, in the state to start from.
            data: a SudokuData, a TextData, or a function (see `loopmdm.train.batch_source`).
            config: hyper-parameters.
            out_dir: folder of the run. `resume` and `train` lock it until `train` returns; of a `RunFolder`
                the caller holds the lock.
            on_log: called on rank 0 with every record that goes into metrics.jsonl.
            evaluate: called on rank 0 every `eval_every` steps and at the end with the model in eval mode and
                the averaged weights in it; what it returns (JSON values) is logged under "evaluation".
                `plot_loss` draws the `NLLResult.to_dict()`s it finds there in a list under "held_out".
            show_progress: report on stderr.
        """
        if config.eval_every and evaluate is None:
            raise ValueError("eval_every is set, but there is nothing to run: pass evaluate")
        self.model, self.config = model, config
        self._held_by_caller = isinstance(out_dir, RunFolder)
        self._claimed = out_dir if isinstance(out_dir, RunFolder) else None
        self.out_dir = out_dir.path if isinstance(out_dir, RunFolder) else Path(out_dir)
        self.counters = Counters()
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1
        self.device = next(model.parameters()).device
        self._source = batch_source(data, config.accumulation)
        length = self._source(0, 0, self.rank, self.world_size, 1).input_ids.shape[1]
        self._law = LoopLaw.parse(config.loop_law, model.config.max_loops, dims=model.config, length=length)
        self._on_log, self._evaluate, self._show_progress = on_log, evaluate, show_progress
        model.recompute = config.recompute
        self._loss: nn.Module = _Loss(model)
        if self.distributed:
            self._loss = nn.parallel.DistributedDataParallel(
                self._loss
            )  # gives all ranks the weights of rank 0
        self.ema = EMA(model, config.ema)
        self.optimizer = torch.optim.AdamW(
            self.ema.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        # A GPU is kept busy: the figures of a step are read when the next one has been launched.
        self._read_late = self.device.type == "cuda"
        self._stop_requested = False
        self._resumed = False

    def resume(self) -> int:
        """Continue the run in `out_dir` from its checkpoint; returns the number of steps already done.

        Without a checkpoint (the run was stopped before its first) it starts from the beginning.

        Raises:
            ValueError: if the checkpoint is damaged, or belongs to another model or another configuration; or
                the folder holds no run, but files that a run would replace.
            LockedError: another process trains there.
        """
        with self._claim(until_the_end=False):
            return self._resume()

    def _resume(self) -> int:
        path = self.out_dir / STATE_FILE
        if not path.exists() and not _is_config(self.out_dir / CONFIG_FILE) and self.rank == 0:
            refuse_files(self.out_dir, FILES, "a new run")
        if path.exists():
            metadata = read_metadata(path)
            changed = TrainConfig.from_dict(metadata["config"]).differences(self.config)
            if metadata["world_size"] != self.world_size:
                changed["world_size"] = (metadata["world_size"], self.world_size)
            if changed:
                listed = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items())
                raise ValueError(f"{path} belongs to another run: {listed}")
            read_state(path, self.model, self.ema, self.optimizer)
            self.counters = Counters(**metadata["counters"])
        if self.rank == 0:
            keep_until(self.out_dir / METRICS_FILE, self.counters.step)
        self._resumed = True
        return self.counters.step

    @contextlib.contextmanager
    def _claim(self, until_the_end: bool) -> Iterator[None]:
        """Hold the folder of the run; it is released after a failure, or at the end."""
        if self.rank == 0 and self._claimed is None:
            self._claimed = RunFolder(self.out_dir, FILES)
        failed = True
        try:
            yield
            failed = False
        finally:
            if self._claimed is not None and not self._held_by_caller and (failed or until_the_end):
                self._claimed.release()
                self._claimed = None

    def request_stop(self) -> None:
        """Let `train` finish the present step, write a checkpoint and return; safe in a signal handler."""
        self._stop_requested = True

    def train(self) -> Counters:
        """Run until `config.steps` steps are done.

        Raises:
            NonFiniteError: names the step; the last checkpoint is of an earlier one.
            CheckpointError: the disk is full, say; the previous checkpoint is intact.
            ValueError: `out_dir` holds a run, or other files that a run would replace, and `resume` was not
                called.
            LockedError: another process trains there.
        """
        with self._claim(until_the_end=True):
            return self._train()

    def _train(self) -> Counters:
        if not self._resumed and (self.out_dir / STATE_FILE).exists():
            raise ValueError(f"{self.out_dir} holds a run already: resume it, or choose another folder")
        if not self._resumed and self.rank == 0:
            refuse_files(self.out_dir, FILES, "a new run")
        self._batches = Prefetcher(self._source, self.config, self.rank, self.world_size, self.device)
        with contextlib.closing(self._batches):
            return self._train_rank_zero() if self.rank == 0 else self._run(None, None)

    def _train_rank_zero(self) -> Counters:
        write_files({self.out_dir / CONFIG_FILE: json.dumps(self.config.to_dict(), indent=2) + "\n"})
        log = MetricsLog(self.out_dir / METRICS_FILE)
        progress = Progress(self.config.steps, self.counters.step, self._show_progress)
        with contextlib.closing(log), progress:
            return self._run(log, progress)

    def _run(self, log: MetricsLog | None, progress: Progress | None) -> Counters:
        config, counters = self.config, self.counters
        self._log, self._progress = log, progress
        self._start = self._rate_start = self._last_checkpoint = time.perf_counter()
        self._cpu_start, self._before = time.process_time(), (counters.seconds, counters.cpu_seconds)
        self._rate_tokens = counters.tokens
        self._stop_after = config.steps
        if counters.step == 0:
            self._checkpoint()  # tells now, not after hours, whether the disk takes one
        if counters.step >= config.steps:
            self._checkpoint()  # a kill may have come between the state and the exported weights
        self.model.train()
        pending: _Step | None = None
        while counters.step < self._stop_after:
            previous, pending = pending, self._step(counters.step)
            if previous is not None:
                self._finish(previous)
            counters.step += 1
            last = counters.step == self._stop_after
            evaluation_due = self._evaluate is not None and (
                counters.step == config.steps or _every(config.eval_every, counters.step)
            )
            checkpoint_due = last or self._checkpoint_due(counters.step)
            if not self._read_late or evaluation_due or checkpoint_due:
                self._finish(pending)
                pending = None
            if evaluation_due:
                self._run_evaluation()
            if checkpoint_due:
                self._checkpoint()
        return counters

    def _step(self, step: int) -> _Step:
        """One optimizer step; its figures are not waited for."""
        config, dims = self.config, self.model.config
        num_loops = self._law.sample(config.seed, step)
        lr = config.learning_rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        figures = torch.zeros(4, dtype=torch.float64, device=self.device)
        for micro_step in range(config.accumulation):
            batch = self._batches.get(step, micro_step)
            batch_size, length = batch.input_ids.shape
            seed = derive_seed(config.seed, self.rank, step, micro_step)
            last = micro_step == config.accumulation - 1
            with contextlib.ExitStack() as stack:
                if self.distributed and not last:
                    stack.enter_context(self._loss.no_sync())  # type: ignore[operator]
                stack.enter_context(
                    torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16")
                )
                loss, nll_sum, num_tokens = self._loss(batch, num_loops, seed)
                (loss / config.accumulation).backward()
            figures[:3] += torch.stack([v.detach().double() for v in (loss, nll_sum, num_tokens)])
            sequences = self.world_size * batch_size
            self.counters.flops += sequences * flops.training_flops(dims, length, num_loops)
        figures[3] = float(self._stop_requested)
        if self.distributed:
            dist.all_reduce(figures)
        norm = nn.utils.clip_grad_norm_(self.ema.parameters, config.clip or math.inf)
        figures = torch.cat([figures, norm.detach().double()[None]])
        record = {"step": step + 1, "num_loops": num_loops, "lr": lr, "flops": self.counters.flops}
        if not self._read_late:
            self._check_finite(step + 1, *figures[[0, 4]].tolist())
        self.optimizer.step()
        # The fused update does not count as a change of version by itself; caches of the ops are keyed on it.
        torch.autograd.graph.increment_version(self.ema.parameters)
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        figures = figures.to("cpu", non_blocking=True)
        arrived = None
        if self.device.type == "cuda":
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(torch.cuda.current_stream(self.device))
        return _Step(record, figures, arrived)

    def _finish(self, step: _Step) -> None:
        """Read the figures of a step; check, count and log them."""
        if step.arrived is not None:
            step.arrived.synchronize()
        loss_sum, nll_sum, tokens, stop_requests, grad_norm = step.figures.tolist()
        number: int = step.record["step"]
        self._check_finite(number, loss_sum, grad_norm)
        self.counters.tokens += int(tokens)
        if stop_requests:
            # The same step on every rank, also where the next one has been launched already.
            self._stop_after = min(self._stop_after, number + 1)
        if self._log is None or not (_every(self.config.log_every, number) or number == self.config.steps):
            return
        self._update_clocks()
        now = time.perf_counter()
        rate = (self.counters.tokens - self._rate_tokens) / max(now - self._rate_start, 1e-9)
        self._rate_start, self._rate_tokens = now, self.counters.tokens
        self._write(
            {
                "step": number,
                "loss": loss_sum / (self.config.accumulation * self.world_size),
                "nll": nll_sum / tokens,
                **step.record,
                "grad_norm": grad_norm,
                "tokens": self.counters.tokens,
                "tokens_per_second": rate,
                "seconds": self.counters.seconds,
                "cpu_seconds": self.counters.cpu_seconds,
            }
        )

    def _check_finite(self, number: int, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        saved = self.out_dir / STATE_FILE
        raise NonFiniteError(
            f"step {number}: loss {loss}, gradient norm {grad_norm}; stopped. {saved} is from before this "
            "step. Lower the learning rate, lengthen the warm-up, or look for NaN in the initial weights"
        )

    def _checkpoint_due(self, step: int) -> bool:
        age = (time.perf_counter() - self._last_checkpoint) / 60
        return _every(self.config.checkpoint_every, step) or 0 < self.config.checkpoint_minutes < age

    def _checkpoint(self) -> None:
        """Write the state and the averaged weights, after the records that lead to them."""
        if self._log is None:
            return
        self._update_clocks()
        self._log.sync()
        metadata = {
            "config": self.config.to_dict(),
            "counters": asdict(self.counters),
            "world_size": self.world_size,
            "torch": torch.__version__,
        }
        with staged(self.out_dir) as folder:
            write_state(folder / STATE_FILE, self.model, self.ema, self.optimizer, metadata)
            with self.ema.applied():
                self.model.save_pretrained(folder)
        self._last_checkpoint = time.perf_counter()

    def _run_evaluation(self) -> None:
        if self._log is None or self._evaluate is None:
            return
        with evaluating([self.model]), self.ema.applied(), torch.no_grad():
            results = self._evaluate(self.model)
        self._update_clocks()
        counters = self.counters
        self._write(
            {
                "step": counters.step,
                "evaluation": results,
                "flops": counters.flops,
                "seconds": counters.seconds,
                "cpu_seconds": counters.cpu_seconds,
            }
        )
        self._rate_start, self._rate_tokens = time.perf_counter(), counters.tokens

    def _write(self, record: dict[str, Any]) -> None:
        assert self._log is not None and self._progress is not None
        self._log.write(record)
        if "loss" in record:
            self._progress.training(record, time.perf_counter() - self._start)
        else:
            self._progress.note(describe_evaluation(record["step"], record["evaluation"]))
        if self._on_log is not None:
            self._on_log(record)

    def _update_clocks(self) -> None:
        seconds, cpu_seconds = self._before
        self.counters.seconds = seconds + time.perf_counter() - self._start
        self.counters.cpu_seconds = cpu_seconds + time.process_time() - self._cpu_start


def _is_config(path: Path) -> bool:
    """Whether a run has begun in this folder: the first file that it writes."""
    try:
        TrainConfig.from_dict(read_json(path))
    except (OSError, ValueError, TypeError):
        return False
    return True


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
