"""The training loop: AdamW, warm-up, clipping, EMA, a drawn loop count, exact resumption."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from loopmdm.formats.folders import CONFIG_FILE as MODEL_CONFIG_FILE
from loopmdm.formats.folders import WEIGHTS_FILE, read_json
from loopmdm.model.between import check_compile, check_loop_loss
from loopmdm.model.checkpoint import Trainable
from loopmdm.model.loop_law import LoopLaw
from loopmdm.model.modes import evaluating
from loopmdm.train import usage
from loopmdm.train.batches import Prefetcher, batch_source
from loopmdm.train.checkpoints import (
    CHECKPOINTS,
    KEPT,
    Checkpoints,
    Found,
    Header,
    best_nll,
    has_checkpoint,
    load,
    newest,
)
from loopmdm.train.config import TrainConfig
from loopmdm.train.ema import EMA
from loopmdm.train.evaluation import SharedEvaluation
from loopmdm.train.folder import RunFolder
from loopmdm.train.metrics import METRICS_FILE, MetricsLog, keep_until, results
from loopmdm.train.optimizers import Optimizer
from loopmdm.train.parallel import Form, Layout, Ranks
from loopmdm.train.progress import Progress, describe_evaluation
from loopmdm.train.state import STATE_FILE, counted, read_state, staged, tensors_of, write_state
from loopmdm.train.step import MicroBatch, Step, Stepper, leaves_out
from loopmdm.train.usage import peak_memory
from loopmdm.train.watch import Watch
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


class Trainer:
    """Trains a model and writes everything a run leaves behind into one folder.

    The loss of a step is the mean over ranks and micro-batches of their losses per token, as in the
    reference. One loop count S is drawn per step and shared by all ranks and micro-batches; times, masks and
    dropout are drawn per micro-batch. Everything random is a function of (seed, step, number of the
    micro-batch), so a run resumed from a checkpoint computes what the uninterrupted one would have (on a CPU
    and as many ranks, bit for bit), and N ranks with one micro-batch each compute what one process computes
    with N.

    The folder holds config.json and model.safetensors (the averaged weights, for `from_pretrained`),
    train_config.json and metrics.jsonl, and what a run is resumed from: training_state.safetensors of a
    single process, checkpoints in shards of several (see `loopmdm.train.checkpoints`).
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
        parallel: Form | None = None,
        shard_size: int | None = None,
        keep: int | None = None,
        peak_flops: float | None = None,
        timeout: timedelta | None = None,
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
                `plot_loss` draws the `NLLResult.to_dict()`s it finds there in a list under "held_out". Of a
                `SharedEvaluation` every rank does its part.
            show_progress: report on stderr.
            parallel: how the ranks of an initialised `torch.distributed` share the model, see
                `loopmdm.train.parallel.Ranks`; None: ddp. The sharded forms split it in place.
            shard_size: ranks that share one copy of it, see there.
            keep: checkpoints in shards that stay, the newest and the one with the best held-out NLL; None: 3,
                and of a single process one file of the newest, unless the run has shards already.
            peak_flops: of the device of one rank, FLOP/s, for the share of it that is used (mfu); None: that
                of the GPU's data sheet, if it is known.
            timeout: of the collectives of a step, from the second step of this process on, since the first
                one may compile for long; None: that which `torch.distributed` was begun with.
        """
        if config.eval_every and evaluate is None:
            raise ValueError("eval_every is set, but there is nothing to run: pass evaluate")
        self.model, self.config = model, config
        self._held_by_caller = isinstance(out_dir, RunFolder)
        self._claimed = out_dir if isinstance(out_dir, RunFolder) else None
        self.out_dir = out_dir.path if isinstance(out_dir, RunFolder) else Path(out_dir)
        if keep is not None and keep < 1:
            raise ValueError(f"keep: got {keep}, expected at least 1")
        self.counters = Counters()
        self.device = next(model.parameters()).device
        if config.compile:
            check_compile(model.config.to_dict())
        check_loop_loss(config.loop_loss, damped=getattr(model.config, "damped", False))
        model.recompute, model.backprop_loops = config.recompute, config.backprop_loops
        model.loop_loss = config.loop_loss
        self.ranks = Ranks(
            model,
            parallel,
            bf16=config.precision == "bf16",
            shard_size=shard_size,
            unused_parameters=leaves_out(config, model.config),
            compiled=config.compile,
        )
        self.rank, self.world_size = self.ranks.rank, self.ranks.world_size
        self.layout = Layout(config.accumulation, self.world_size, self.rank, self.world_size)
        self._source = batch_source(data, config.accumulation)
        length = self._source(0, *self.layout.place(0), 1).input_ids.shape[1]
        self._law = LoopLaw.parse(config.loop_law, model.config.max_loops, dims=model.config, length=length)
        self._timeout = timeout
        self._on_log, self._evaluate, self._show_progress = on_log, evaluate, show_progress
        self.ema = EMA(model, config.ema)
        self.optimizer = Optimizer(self.ema.names, self.ema.parameters, config, self.device)
        self._watch = Watch(self.out_dir, self.rank, config.spike)
        self._checkpoints: Checkpoints | None = None
        if keep is not None or self.ranks.distributed or (self.out_dir / CHECKPOINTS).is_dir():
            self._checkpoints = Checkpoints(self.out_dir, keep or KEPT, self.ranks)
        peak = peak_flops or usage.peak_flops(self.device)
        self._peak = None if peak is None else peak * self.world_size
        # A GPU is kept busy: the figures of a step are read when the next one has been launched.
        self._read_late = self.device.type == "cuda"
        self._stop_requested = False
        self._resumed = False
        self._has_shards = False  # of the step that it was resumed at
        self._best_nll: float | None = None  # of checkpoints in shards

    def resume(self) -> int:
        """Continue the run in `out_dir` from its checkpoint; returns the number of steps already done.

        Without a checkpoint (the run was stopped before its first) it starts from the beginning.

        Raises:
            ValueError: if the checkpoint is damaged, or belongs to another model or another configuration; if
                the ranks cannot share the micro-batches of a step evenly; or the folder holds no run, but
                files that a run would replace.
            LockedError: another process trains there.
        """
        with self._claim(until_the_end=False):
            return self._resume()

    def _resume(self) -> int:
        # The other ranks look when rank 0 has the folder.
        there = (newest(self.out_dir), best_nll(self.out_dir)) if self.rank == 0 else None
        found, self._best_nll = self.ranks.agreed(there)
        if found is None and not _is_config(self.out_dir / CONFIG_FILE) and self.rank == 0:
            refuse_files(self.out_dir, FILES, "a new run")
        if found is not None:
            config = TrainConfig.from_dict(found.metadata["config"])
            self._check_config(found, config)
            self.layout = Layout(
                config.accumulation, found.metadata["world_size"], self.rank, self.world_size
            )
            self._load(found)
            self.counters = Counters(**found.metadata["counters"])
            self._has_shards = found.sharded
        if self.rank == 0:
            keep_until(self.out_dir / METRICS_FILE, self.counters.step)
        self._resumed = True
        return self.counters.step

    def _check_config(self, found: Found, config: TrainConfig) -> None:
        changed = config.differences(self.config)
        if changed:
            listed = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items())
            raise ValueError(f"{found.path} belongs to another run: {listed}")

    def _load(self, found: Found) -> None:
        if not found.sharded:
            read_state(found.path, self.model, self.ema, self.optimizer)
            return
        self.optimizer.begin(found.metadata["adam_steps"])
        load(found, tensors_of(self.model, self.ema, self.optimizer), self.ranks)
        self.ema.updates = found.metadata["ema_updates"]

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
        """Let `train` finish the present step, write a checkpoint and return; safe in a signal handler.

        Of several ranks one that is asked is enough, and all end after the same step, within the next two.
        """
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
        if not self._resumed and has_checkpoint(self.out_dir):
            raise ValueError(f"{self.out_dir} holds a run already: resume it, or choose another folder")
        if not self._resumed and self.rank == 0:
            refuse_files(self.out_dir, FILES, "a new run")
        with contextlib.ExitStack() as stack:
            batches = Prefetcher(self._source, self.config, self.layout, self.device)
            stack.enter_context(contextlib.closing(batches))
            if self._checkpoints is not None:
                stack.enter_context(contextlib.closing(self._checkpoints))
            self._stepper = Stepper(
                self.ranks,
                self.layout,
                batches,
                self._law,
                self.config,
                self.model.config,
                self.optimizer,
                self.ema,
                self.device,
            )
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
        self._start = self._last_checkpoint = time.perf_counter()
        self._cpu_start, self._before = time.process_time(), (counters.seconds, counters.cpu_seconds)
        self._begin_rates(self._start, counters.flops)
        self._stop_after, self._save_after = config.steps, 0
        if counters.step == 0 and not self._has_shards:
            self._checkpoint()  # tells now, not after hours, whether the disk takes one
        if counters.step >= config.steps and self._checkpoints is None:
            self._checkpoint()  # a kill may have come between the state and the exported weights
        self.model.train()
        pending: Step | None = None
        while counters.step < self._stop_after:
            previous, pending = pending, self._step(counters.step)
            if previous is not None:
                self._finish(previous)
            counters.step += 1
            if self._stop_requested and not self.ranks.distributed:
                self._stop_after = counters.step
            evaluation_due = self._evaluate is not None and (
                counters.step == config.steps or _every(config.eval_every, counters.step)
            )
            checkpoint_due = self._checkpoint_due(counters.step)
            if not self._read_late or evaluation_due or checkpoint_due:
                self._finish(pending)
                pending = None
            nll = self._run_evaluation() if evaluation_due else None
            if checkpoint_due or self._is_best(nll):
                self._checkpoint(nll)
        self._export()
        return counters

    def _step(self, step: int) -> Step:
        """One optimizer step; its figures are not waited for."""
        requests = self._stop_requested, self._log is not None and self._checkpoint_is_old()
        taken = self._stepper.take(step, requests, None if self._read_late else self._check_finite)
        if self._timeout is not None:
            self.ranks.wait_at_most(self._timeout)
            self._timeout = None
        self.counters.flops += taken.record.pop("work")
        taken.record["flops"] = self.counters.flops
        return taken

    def _finish(self, step: Step) -> None:
        """Read the figures of a step; check, count and log them."""
        figures, number = step.figures(), step.number
        self._check_finite(number, figures.loss_sum, figures.grad_norm, step.micro_batches)
        loss = figures.loss_sum / self.layout.total
        warning = self._watch.look(number, loss, step.micro_batches)
        if warning is not None and self._progress is not None:
            self._progress.note(f"warning: {warning}")
        if self._checkpoints is not None:
            self._checkpoints.check()
        self.counters.tokens += int(figures.tokens)
        stop, save = figures.requests
        if stop:
            # The same step on every rank, also where the next one has been launched already.
            self._stop_after = min(self._stop_after, number + 1)
        if save:
            self._save_after = number + 1
        if self._log is None or not (_every(self.config.log_every, number) or number == self.config.steps):
            return
        self._update_clocks()
        now = time.perf_counter()
        rate = (self.counters.tokens - self._rate_tokens) / max(now - self._rate_start, 1e-9)
        flops_rate = (step.record["flops"] - self._rate_flops) / max(now - self._rate_start, 1e-9)
        self._begin_rates(now, step.record["flops"])
        self._write(
            {
                "step": number,
                "loss": loss,
                "nll": figures.nll_sum / figures.tokens,
                **step.record,
                "grad_norm": figures.grad_norm,
                "tokens": self.counters.tokens,
                "tokens_per_second": rate,
                "flops_per_second": flops_rate,
                **({} if self._peak is None else {"mfu": flops_rate / self._peak}),
                "peak_memory": peak_memory(self.device),
                "seconds": self.counters.seconds,
                "cpu_seconds": self.counters.cpu_seconds,
            }
        )

    def _begin_rates(self, now: float, flops: float) -> None:
        """Speeds of the next record are of the time from now on."""
        self._rate_start, self._rate_flops, self._rate_tokens = now, flops, self.counters.tokens

    def _check_finite(
        self, number: int, loss: float, grad_norm: float, micro_batches: Sequence[MicroBatch]
    ) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        saved = self.out_dir / (STATE_FILE if self._checkpoints is None else CHECKPOINTS)
        raise NonFiniteError(
            f"step {number}: loss {loss}, gradient norm {grad_norm}; stopped. {saved} is from before this"
            f" step, and {self._watch.save(number, loss, micro_batches)}. Lower the learning rate, lengthen"
            " the warm-up, or look for NaN in the initial weights"
        )

    def _checkpoint_due(self, step: int) -> bool:
        # By the clock of rank 0, whose word takes a step to reach the others.
        by_clock = step == self._save_after if self.ranks.distributed else self._checkpoint_is_old()
        return step == self._stop_after or by_clock or _every(self.config.checkpoint_every, step)

    def _checkpoint_is_old(self) -> bool:
        age = (time.perf_counter() - self._last_checkpoint) / 60
        return 0 < self.config.checkpoint_minutes < age

    def _checkpoint(self, nll: float | None = None) -> None:
        """Write the state, after the records that lead to it; nll: held out, if it was measured at it."""
        if self._log is not None:
            self._update_clocks()
            self._log.sync()
        metadata = {
            "config": self.config.to_dict(),
            "counters": asdict(self.counters),
            "world_size": self.layout.began_with,
            "torch": torch.__version__,
        }
        if self._checkpoints is not None:
            tensors = tensors_of(self.model, self.ema, self.optimizer)
            model = {"model_type": self.model.model_type, **self.model.config.to_dict()}
            self._checkpoints.save(tensors, Header(counted(metadata, self.ema, self.optimizer), model, nll))
            if self._is_best(nll):
                self._best_nll = nll
        else:
            with staged(self.out_dir) as folder:
                write_state(folder / STATE_FILE, self.model, self.ema, self.optimizer, metadata)
                with self.ema.applied():
                    self.model.save_pretrained(folder)
        self._last_checkpoint = time.perf_counter()
        self._save_after = 0  # what was asked for meanwhile is done

    def _export(self) -> None:
        """Write the averaged weights in the one-file form, which checkpoints in shards are not."""
        if self._checkpoints is None:
            return
        self._checkpoints.wait()
        with self._averaged() as model:
            if model is not None:
                with staged(self.out_dir) as folder:
                    model.save_pretrained(folder)

    @contextlib.contextmanager
    def _averaged(self, everywhere: bool = False) -> Iterator[Trainable | None]:
        """A whole model with the averaged weights on rank 0, or everywhere; every rank has to enter."""
        if self.ranks.sharded:
            averages = dict(zip(self.ema.names, self.ema.shadow, strict=True))
            yield self.ranks.whole_model(averages, everywhere)
        elif self.rank and not everywhere:
            yield None
        else:
            with self.ema.applied():
                yield self.model

    def _is_best(self, nll: float | None) -> bool:
        """Whether a checkpoint of now would be kept for its NLL."""
        if self._checkpoints is None or nll is None:
            return False
        return self._best_nll is None or nll < self._best_nll

    def _run_evaluation(self) -> float | None:
        """The held-out NLL of the averaged weights, the best over loop counts, if it is measured."""
        evaluate = self._evaluate
        assert evaluate is not None
        found = None
        if self.ranks.distributed and isinstance(evaluate, SharedEvaluation):
            with self._averaged(everywhere=True) as model:
                assert model is not None
                with evaluating([model]), torch.no_grad():
                    part = evaluate.part(model, self.rank, self.world_size)
            parts = self.ranks.gathered(part)
            if parts is not None:
                found = evaluate.whole(parts)
        else:
            with self._averaged() as model:
                if model is not None:
                    with evaluating([model]), torch.no_grad():
                        found = evaluate(model)
        nll = None if found is None else self._log_evaluation(found)
        return self.ranks.agreed(nll, patiently=True) if self.ranks.distributed else nll

    def _log_evaluation(self, evaluation: dict[str, Any]) -> float | None:
        self._update_clocks()
        counters = self.counters
        self._write(
            {
                "step": counters.step,
                "evaluation": evaluation,
                "flops": counters.flops,
                "seconds": counters.seconds,
                "cpu_seconds": counters.cpu_seconds,
            }
        )
        self._begin_rates(time.perf_counter(), counters.flops)
        return min((one["nll"] for one in results({"evaluation": evaluation}, "held_out")), default=None)

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
