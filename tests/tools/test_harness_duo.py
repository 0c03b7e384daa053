"""The model `dlm` of the harness has the figures of Duo's harness, computed here from its formulas."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loopmdm import LoopMDM
from loopmdm.cli import main
from loopmdm.data.tokenizer import ByteTokenizer
from loopmdm.quality.duo_likelihood import is_greedy
from loopmdm.quality.reader import Reader
from tests.mdlm.files import averaged, write_lightning
from tests.mdlm.reference_dit import Diffusion, ReferenceDIT, randomise, reference_config

pytestmark = [
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed"),
    pytest.mark.filterwarnings("ignore"),  # of the harness and what it imports
]
SAMPLES, BATCH, LENGTH = 12, 4, 24
REQUESTS = [("two and", " two"), ("", "a"), ("so", " it is"), ("two" * 9, " far too long")]


class Oracle:
    """Duo's evaluation of MDLM in plain PyTorch, in the precision of the network."""

    def __init__(self, network: ReferenceDIT, conditioned: bool) -> None:
        self.network, self.conditioned = network, conditioned
        self.mask = ByteTokenizer().mask_token_id

    def log_probs(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Log-probabilities under SUBS [b, L, V]."""
        with torch.no_grad():
            logits = self.network(noisy, sigma if self.conditioned else torch.zeros_like(sigma))
        logits[..., self.mask] = -torch.inf
        found = logits.log_softmax(-1)
        known = torch.full_like(found, -torch.inf).scatter(-1, noisy[..., None], 0.0)
        return torch.where((noisy == self.mask)[..., None], found, known)

    def loss(self, prefix: Tensor, target: Tensor, mode: str) -> float:
        text = torch.cat([prefix, target])
        drawn = torch.rand(SAMPLES)
        t = 0.999 * ((drawn / SAMPLES + torch.arange(SAMPLES) / SAMPLES) % 1) + 1e-3
        losses = []
        for part in t.split(BATCH):
            alpha = 1 - 0.999 * part[:, None]
            noisy = torch.where(torch.rand(BATCH, len(text)) < 1 - alpha, self.mask, text)
            counted = slice(None)
            if mode == "suffix":
                noisy[:, : len(prefix)] = prefix
                alpha = (noisy == text).float().mean(1, keepdim=True)
                counted = slice(len(prefix), None)
            found = self.log_probs(noisy, -alpha.log()[:, 0])
            terms = found.gather(-1, text.expand(BATCH, -1)[..., None])[..., 0] * -0.999 / (1 - alpha)
            terms[(alpha == 1).expand_as(terms)] = 0.0  # where it has 0 / 0
            losses.append(float(terms[:, counted].mean()))
        return sum(losses) / len(losses)

    def predicts(self, prefix: Tensor, target: Tensor) -> bool:
        noisy = torch.cat([prefix, torch.full_like(target[:-1], self.mask), target[-1:]])[None]
        return torch.equal(self.log_probs(noisy, torch.zeros(1))[0, len(prefix) :].argmax(-1), target)


def written(tmp_path: Path, conditioned: bool) -> tuple[Path, Diffusion]:
    """A Lightning file of an MDLM over bytes, whose averaged weights are others, and its tokenizer."""
    module = Diffusion(reference_config(length=LENGTH, dropout=0.0), 258).eval()
    randomise(module)
    stated = {"model": {"length": LENGTH, "n_heads": 2, "dropout": 0.0}, "time_conditioning": conditioned}
    ByteTokenizer().save(tmp_path / "bytes")
    return write_lightning(tmp_path / "mdlm.ckpt", module, averaged(module), stated), module


def options(tmp_path: Path, checkpoint: Path) -> dict[str, Any]:
    return {
        "checkpoint_path": str(checkpoint),
        "num_mc_samples": SAMPLES,
        "batch_size": BATCH,
        "tokenizer": str(tmp_path / "bytes"),
    }


@pytest.mark.parametrize("mode", ["full", "suffix"])
@pytest.mark.parametrize("conditioned", [False, True])
def test_figures_are_duos(
    tmp_path: Path, mode: str, conditioned: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    from lm_eval.api.instance import Instance

    from loopmdm.harness import DuoHarness

    checkpoint, module = written(tmp_path, conditioned)
    harness = DuoHarness(**options(tmp_path, checkpoint), loss_avg_mode=mode, num_proc=8, device="cpu")
    oracle, tokenizer = Oracle(module.backbone, conditioned), ByteTokenizer()
    torch.manual_seed(7)
    requests = [Instance("loglikelihood", {}, words, i) for i, words in enumerate(REQUESTS)]
    found = harness.loglikelihood(requests, disable_tqdm=True)
    assert found[-1] == (0.0, False)
    torch.manual_seed(7)
    for (context, continuation), (got, greedy) in zip(REQUESTS[:-1], found, strict=False):
        prefix = torch.tensor([tokenizer.bos_token_id, *tokenizer.encode(context).tolist()])
        target = torch.tensor([*tokenizer.encode(continuation).tolist(), tokenizer.eos_token_id])
        assert got == pytest.approx(-oracle.loss(prefix, target, mode), rel=2e-5)
        assert greedy is oracle.predicts(prefix, target)
    said = capfd.readouterr().err
    assert "1 requests are longer than 24 tokens" in said
    cost = harness.get_model_info()["cost"]["loglikelihood"]
    calls = 3 * (SAMPLES + 1)
    assert (cost["precision"], cost["plan"], cost["network_calls"]) == ("fp32", "S1", calls)
    assert cost["seeds"] == {"torch": 7} and f"network calls {calls}" in said and "S1: fp32" in said


def test_what_one_call_predicts(tmp_path: Path) -> None:
    checkpoint, module = written(tmp_path, False)
    reader = Reader(LoopMDM.from_mdlm(checkpoint, ema=False), 1, 1)
    prefix, end, mask = torch.tensor([256, 65]), torch.tensor([256]), torch.full((3,), 257)
    noisy = torch.cat([prefix, mask, end])[None]
    best = Oracle(module.backbone, False).log_probs(noisy, torch.zeros(1))[0, 2:5].argmax(-1)
    other = best.clone()
    other[1] = (best[1] + 1) % 256
    assert is_greedy(reader, prefix, torch.cat([best, end]))
    assert not is_greedy(reader, prefix, torch.cat([other, end]))
    assert reader.ledger.rows_projected == 6 and is_greedy(reader, prefix, end)


def test_weights_and_options(tmp_path: Path) -> None:
    from loopmdm.harness import DuoHarness

    checkpoint, module = written(tmp_path, False)
    given = options(tmp_path, checkpoint)
    raw = DuoHarness(**given, device="cpu").model
    assert torch.equal(raw.vocab_embed.embedding, module.backbone.vocab_embed.embedding)
    assert not torch.equal(DuoHarness(**given, ema=True, device="cpu").model.vocab_embed.embedding,
                           raw.vocab_embed.embedding)  # fmt: skip
    with pytest.raises(ValueError, match="num_mc_samples: got 12, expected a multiple of batch_size = 5"):
        DuoHarness(**{**given, "batch_size": 5}, device="cpu")
    with pytest.raises(ValueError, match="loss_avg_mode: got 'sufix'; did you mean"):
        DuoHarness(**given, loss_avg_mode="sufix", device="cpu")
    harness = DuoHarness(**given, device="cpu")
    for ask in (harness.loglikelihood_rolling, harness.generate_until):
        with pytest.raises(NotImplementedError, match="take the model loopmdm"):
            ask([])


def test_a_folder_has_its_own_tokenizer(tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    from loopmdm.harness import DuoHarness

    checkpoint, _ = written(tmp_path, False)
    given = {**options(tmp_path, checkpoint), "device": "cpu"}
    LoopMDM.from_mdlm(checkpoint, ema=False).save_pretrained(tmp_path / "run")
    inside = {**given, "checkpoint_path": str(tmp_path / "run")}
    del inside["tokenizer"]
    ByteTokenizer().save(tmp_path / "run")
    figures = []
    for arguments in (given, inside):
        torch.manual_seed(3)
        asked = [Instance("loglikelihood", {}, REQUESTS[0], 0)]
        figures.append(DuoHarness(**arguments).loglikelihood(asked, disable_tqdm=True))
    assert figures[0] == figures[1]


def test_the_command_has_the_seed_of_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words are Duo's, and --seed decides: two runs agree, and another seed gives another figure."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    checkpoint, _ = written(tmp_path, False)
    rows = [{"question": "two and", "choices": [" two", " a"], "label": 0}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "choice",
        "test_split": "test",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "choice.yaml").write_text(json.dumps(task))

    def figures(name: str, *words: str) -> list[float]:
        given = ",".join(
            f"{key}={value}" for key, value in options(tmp_path, checkpoint).items() if key != "batch_size"
        )
        out = tmp_path / name
        command = ["lm-eval", "run", "--model", "dlm", "--model_args", given, "--tasks", "choice"]
        command += ["--batch_size", str(BATCH), "--include_path", str(tmp_path), "--device", "cpu"]
        assert main([*command, "--output_path", str(out), "--log_samples", *words]) == 0
        (samples,) = out.rglob("samples*.jsonl")
        (results,) = out.rglob("results*.json")
        cost = json.loads(results.read_text())["config"]["cost"]["loglikelihood"]
        assert cost["network_calls"] == 2 * (SAMPLES + 1) and math.isfinite(cost["gflop_per_token"])
        row = json.loads(samples.read_text().splitlines()[0])
        return [float(answer[0]) for answer in row["filtered_resps"]]

    first = figures("first")
    assert figures("again") == first and figures("other", "--seed", "5") != first
