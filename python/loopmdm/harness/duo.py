"""Duo's model of the harness, with its options and its figures: `dlm`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from torch import Tensor
from tqdm import tqdm

from loopmdm.harness.arguments import device_of, refuse_unknown
from loopmdm.harness.tally import Tally
from loopmdm.model import LoopMDM
from loopmdm.plan import as_plan
from loopmdm.quality.duo_likelihood import MODES, is_greedy, mean_nll
from loopmdm.quality.reader import Reader
from loopmdm.runs.models import load_model, load_tokenizer
from loopmdm.terminal import note
from loopmdm_kernels.values import meant, positive


@register_model("dlm")
class DuoHarness(LM):  # type: ignore[misc]
    """Duo's harness: its options by its names, and with the same weights its figures.

    A figure is a mean over tokens and copies, in nats a token: lower bounds of a text's probability are those
    of the model `loopmdm`. A request longer than `max_length` gets (0, False), as there.
    """

    def __init__(
        self,
        checkpoint_path: str,
        *,
        num_mc_samples: int = 1024,
        batch_size: int | str = 64,
        loss_avg_mode: str = "full",
        max_length: int | None = None,
        device: str | None = None,
        num_proc: int | None = None,
        max_batch_size: int | None = None,
        tokenizer: str | None = None,
        num_loops: int = 1,
        ema: bool = False,
        **unknown: Any,
    ) -> None:
        """Takes what `--model_args` names.

        Args:
            checkpoint_path: a Lightning file of MDLM or Duo's MDLM, or what `loopmdm train` wrote.
            num_mc_samples: corrupted copies of each request, a multiple of `batch_size`.
            batch_size: copies in a network call; random numbers are drawn for so many at once.
            loss_avg_mode: "full": the context is masked and counted too; "suffix": it is neither.
            max_length: None: the model's.
            device, num_proc, max_batch_size: as the harness gives them; nothing is done in other processes,
                and the batch is `batch_size`.
            tokenizer: as in `loopmdm sample`; None: the one beside the model, or gpt2. Duo takes the one that
                the checkpoint names.
            num_loops: S; 1 is the network that Duo runs.
            ema: the averaged weights of a Lightning file. Duo's harness takes those of training.
        """
        refuse_unknown(unknown, DuoHarness.__init__)
        super().__init__()
        self._device = device_of(device)
        if Path(checkpoint_path).is_dir():
            self.model = load_model(checkpoint_path, self._device)
        else:
            self.model = LoopMDM.from_mdlm(checkpoint_path, ema=ema).to(self._device)
        found = load_tokenizer(self.model, checkpoint_path, tokenizer)
        if found is None:
            found = load_tokenizer(self.model, checkpoint_path, "gpt2")
            assert found is not None
        self._tokens = found
        longest = self.model.config.max_length
        self.max_length = longest if max_length is None else min(positive("max_length", max_length), longest)
        if loss_avg_mode not in MODES:
            close = meant(loss_avg_mode, MODES)
            raise ValueError(f"loss_avg_mode: got {loss_avg_mode!r}{close}; expected {' or '.join(MODES)}")
        self._mode, self._samples = loss_avg_mode, positive("num_mc_samples", num_mc_samples)
        self._batch, self._loops = positive("batch_size", int(batch_size)), positive("num_loops", num_loops)
        if self._samples % self._batch:
            raise ValueError(
                f"num_mc_samples: got {self._samples}, expected a multiple of batch_size = {self._batch}"
            )
        self._tally = Tally()

    def get_model_info(self) -> dict[str, Any]:
        """What the figures depend on; the harness puts it into its results."""
        return {
            "model_dtype": str(self.model.compute_dtype),
            "likelihood": {
                "num_mc_samples": self._samples,
                "batch_size": self._batch,
                "loss_avg_mode": self._mode,
                "num_loops": self._loops,
            },
            "cost": self._tally.to_dict(),
        }

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Minus the mean over tokens and copies of each request, and whether one call predicts it."""
        seed, results, long = torch.initial_seed(), [], 0
        for request in tqdm(requests, desc="likelihood", disable=disable_tqdm):
            prefix, target = self._encoded(*request.args)
            result = 0.0, False
            if len(prefix) + len(target) > self.max_length:
                long += 1
            else:
                reader = Reader(self.model, self._loops, self._batch)
                loss = mean_nll(reader, prefix, target, self._samples, self._mode)
                result = -loss, is_greedy(reader, prefix, target)
                counted = len(target) + (len(prefix) if self._mode == "full" else 0)
                self._tally.add("loglikelihood", reader.ledger, counted, reader.ledger.sequence_calls)
            self.cache_hook.add_partial("loglikelihood", request.args, result)
            results.append(result)
        if long:
            note(f"{long} requests are longer than {self.max_length} tokens and get (0, False)")
        self._tally.close(
            "loglikelihood",
            len(results) - long,
            precision=self.model.compute_dtype,
            plan=as_plan(self._loops),
            seeds={"torch": seed},
        )
        return results

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("Duo's harness scores continuations only; take the model loopmdm")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("Duo's harness scores continuations only; take the model loopmdm")

    def _encoded(self, context: str, continuation: str) -> tuple[Tensor, Tensor]:
        """BOS and the context [P], the continuation and EOS [N], int64."""
        before = [self._tokens.bos_token_id, *self._tokens.encode(context).tolist()]
        behind = [*self._tokens.encode(continuation).tolist(), self._tokens.eos_token_id]
        return torch.tensor(before, device=self._device), torch.tensor(behind, device=self._device)
