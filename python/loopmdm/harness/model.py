"""A LoopMDM as the harness asks it: `loopmdm`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from loopmdm.data.batches import Batch
from loopmdm.harness.arguments import device_of, refuse_unknown
from loopmdm.harness.tally import Tally
from loopmdm.model import vocabulary
from loopmdm.model.modes import evaluating
from loopmdm.plan import as_plan
from loopmdm.quality.copies import checked_samples, copies_of, drawn
from loopmdm.quality.estimator import likelihood
from loopmdm.quality.reader import Reader, copies_a_call
from loopmdm.runs.models import load_model, load_tokenizer
from loopmdm.sampling.decoding import Decoding
from loopmdm.sampling.sampler import sample_with
from loopmdm_kernels.values import positive


@register_model("loopmdm")
class LoopMDMHarness(TemplateLM):  # type: ignore[misc]
    """Log-likelihoods by `loopmdm.likelihood` and texts by `loopmdm.sample`, a request at a time.

    A request's copies share network calls, so its figures do not depend on the other requests. A context is
    given, never masked; what is longer than the model reads loses its beginning.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        tokenizer: str | None = None,
        method: str = "stratified",
        order: str | None = None,
        samples: int | None = None,
        num_loops: int | None = None,
        seed: int = 0,
        greedy: bool = True,
        decoding: str = "confidence",
        plan: int | str | None = None,
        steps: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        """Takes what `--model_args` names.

        Args:
            pretrained: a folder of `loopmdm train`, or a hub id.
            tokenizer: as in `loopmdm sample`; None: the one in the folder.
            method, order, samples, num_loops, seed: as in `loopmdm.likelihood`.
            greedy: whether to find out if a continuation is what greedy decoding from left to right writes,
                with a second reading; False: it is said not to be.
            decoding, plan, steps: order, plan (None: `num_loops`) and steps of `loopmdm.sample`.
            max_length: of context and continuation together; None: the model's.
            max_gen_toks: tokens of a text where a task does not say, below `max_length`; None: 256, or half
                of `max_length` where that is less.
            batch_size: copies in a network call; None or "auto": as many as have 16384 tokens.
            max_batch_size: taken for "auto".
        """
        refuse_unknown(unknown, LoopMDMHarness.__init__)
        super().__init__()
        self._device = device_of(device)
        self.model = load_model(pretrained, self._device)
        found = load_tokenizer(self.model, pretrained, tokenizer)
        if found is None:
            raise ValueError(f"pretrained: no tokenizer in {pretrained}; give tokenizer=FOLDER")
        self._tokens = found
        longest = self.model.config.max_length
        self.max_length = longest if max_length is None else min(positive("max_length", max_length), longest)
        usual = min(256, max(1, self.max_length // 2))
        self.max_gen_toks = usual if max_gen_toks is None else positive("max_gen_toks", max_gen_toks)
        chosen = (
            max_batch_size if batch_size is None or str(batch_size).startswith("auto") else int(batch_size)
        )
        self._max_batch = None if chosen is None else positive("batch_size", chosen)
        self._options: dict[str, Any] = {
            "method": method,
            "order": order,
            "samples": checked_samples(method, order, samples),
            "num_loops": self.model.config.max_loops
            if num_loops is None
            else positive("num_loops", num_loops),
            "seed": seed,
        }
        self._greedy = greedy
        self._decoding = Decoding(
            steps=steps,
            order=decoding,
            plan=as_plan(self._options["num_loops"] if plan is None else plan),
            seed=seed,
            eos_token_id=self.eot_token_id,
        )
        self._decoding.check_for(self.model.config)
        self._tally = Tally()

    @property
    def eot_token_id(self) -> int:
        return self._tokens.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text without a context, as in training."""
        return self._tokens.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self._tokens.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        ids: list[int] = self._tokens.encode(string).tolist()
        return ids

    def get_model_info(self) -> dict[str, Any]:
        """What the figures depend on; the harness puts it into its results."""
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "model_dtype": str(self.model.compute_dtype),
            "likelihood": self._options,
            "sampling": {
                "order": self._decoding.order,
                "plan": str(self._decoding.plan),
                "steps": self._decoding.steps,
            },
            "cost": self._tally.to_dict(),
        }

    def _likelihood_facts(self) -> dict[str, Any]:
        """Of `Cost.of`."""
        what = "orders" if self._options["method"] == "chain_rule" else "masks"
        is_drawn = drawn(self._options["method"], self._options["order"])
        return {
            "precision": self.model.compute_dtype,
            "plan": as_plan(self._options["num_loops"]),
            "seeds": {what: self._options["seed"]} if is_drawn else {},
        }

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        results = []
        for texts, context, continuation in tqdm(requests, desc="likelihood", disable=disable_tqdm):
            score = self._log_prob("loglikelihood", context, continuation)
            result = score, self._is_greedy(context, continuation)
            self.cache_hook.add_partial("loglikelihood", texts, result)
            results.append(result)
        self._tally.close("loglikelihood", len(results), **self._likelihood_facts())
        return results

    @torch.no_grad()
    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that score each token once; the last has as much context as fits."""
        results = []
        for request in tqdm(requests, desc="likelihood", disable=disable_tqdm):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length - 1, 1
            )
            kind = "loglikelihood_rolling"
            result = sum(self._log_prob(kind, *make_disjoint_window(window)) for window in windows)
            self.cache_hook.add_partial(kind, request.args, result)
            results.append(result)
        self._tally.close("loglikelihood_rolling", len(results), **self._likelihood_facts())
        return results

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Texts that go on from contexts, up to the first of the words that end them.

        A request that is repeated is drawn anew each time: its number names its random numbers.
        """
        results, seen = [], Counter[str]()
        for request in tqdm(requests, desc="samples", disable=disable_tqdm):
            context, options = request.args
            key = repr(request.args)
            text = self._continued(context, options, seen[key])
            seen[key] += 1
            self.cache_hook.add_partial("generate_until", request.args, text)
            results.append(text)
        decoding = self._decoding
        facts: dict[str, Any] = {"precision": self.model.compute_dtype, "plan": decoding.plan}
        self._tally.close("generate_until", len(results), seeds={"samples": decoding.seed}, **facts)
        return results

    def _batch(self, context: list[int], continuation: list[int]) -> Batch:
        """A context and what is asked about, [1, L]; the end of them where they are too long."""
        tokens = torch.tensor([(context + continuation)[-self.max_length :]], device=self._device)
        given = torch.arange(tokens.shape[1], device=self._device)[None] < tokens.shape[1] - len(continuation)
        return Batch(tokens, prompt_mask=given)

    def _log_prob(self, kind: str, context: list[int], continuation: list[int]) -> float:
        if not continuation:
            return 0.0
        batch = self._batch(context, continuation)
        found = likelihood(
            self.model, batch.input_ids, batch.prompt_mask, max_batch=self._max_batch, **self._options
        )
        self._tally.add(kind, found.ledger, len(continuation), found.ledger.sequence_calls)
        return float(found.log_prob)

    def _is_greedy(self, context: list[int], continuation: list[int]) -> bool:
        """Whether each token is the most probable one, all before it known."""
        if not self._greedy:
            return False
        batch, loops = self._batch(context, continuation), self._options["num_loops"]
        reader = Reader(self.model, loops, copies_a_call(batch.input_ids.shape[1], self._max_batch))
        copies, greedy = copies_of(reader, batch, "chain_rule", None, 1, 0), False
        with evaluating([self.model]):
            for part in reader.calls(torch.arange(len(copies.sequence))):
                masked, scored = (mask.to(self._device) for mask in copies.masks(part))
                sequence = copies.sequence[part].to(self._device)
                hidden, head, dtype, used = reader.read(
                    batch, sequence, masked, copies.t[part].to(self._device)
                )
                rows = scored.flatten().nonzero().squeeze(1)
                reader.count(masked, used, len(rows))
                found: Tensor = vocabulary.most_probable(hidden, head, rows, compute_dtype=dtype).token
                if not torch.equal(found, batch.input_ids[sequence].flatten()[rows]):
                    break
            else:
                greedy = True
        self._tally.add("loglikelihood", reader.ledger, 0, reader.ledger.sequence_calls)
        return greedy

    def _continued(self, context: str, options: dict[str, Any], number: int) -> str:
        if options.get("do_sample"):
            options = {"temperature": 1.0, **options}
        options = normalize_gen_kwargs(options, self.max_gen_toks)
        most = positive("max_gen_toks", options["max_gen_toks"])
        if most >= self.max_length:
            raise ValueError(f"max_gen_toks: got {most}, expected less than max_length = {self.max_length}")
        prompt = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - most) :]
        law = {name: options[name] for name in ("temperature", "top_k", "top_p") if name in options}
        found = sample_with(
            self.model,
            replace(self._decoding, **{"temperature": 0.0, **law}),
            prompt=[prompt],
            length=len(prompt) + most,
            sequence_ids=[number],
            progress=False,
        )
        self._tally.add("generate_until", found.ledger, int(found.lengths[0]) - len(prompt), found.num_steps)
        text = self._tokens.decode(found.tokens[0, len(prompt) : int(found.lengths[0])])
        return str(postprocess_generated_text(text, options["until"] or [], None))
