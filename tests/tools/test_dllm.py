"""What dllm's masked diffusion trainer, sampler and evaluation ask of a model, asked of ours.

The package is on no registry, so its calls are made here, as its public interface states them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tools.watched import new_model

transformers = pytest.importorskip("transformers")
pytest.importorskip("loopmdm.hf")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
MASK = 28


@pytest.fixture
def model(tmp_path: Path) -> Any:
    new_model().save_pretrained(tmp_path / "model")
    return transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "model", dtype=torch.float32)


class MaskedDiffusionTrainer(transformers.Trainer):
    """Masks are drawn outside of the model, which is called for logits."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        tokens, labels = inputs["input_ids"], inputs["labels"]
        t = 1e-3 + (1 - 1e-3) * torch.rand(len(tokens))
        masked = (torch.rand(tokens.shape) < t[:, None]) & (labels != -100)
        noised = torch.where(masked, MASK, tokens)
        out = model(input_ids=noised, attention_mask=inputs.get("attention_mask"))
        nll = F.cross_entropy(out.logits[masked].float(), tokens[masked], reduction="none")
        loss = (nll / t[:, None].expand(masked.shape)[masked]).sum() / (labels != -100).sum()
        return (loss, out) if return_outputs else loss


def test_trainer(model: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows = [
        {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}
        for row in (torch.arange(16) + torch.arange(32)[:, None]) % 5
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=40,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = MaskedDiffusionTrainer(model=model.train(), args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "saved")
    ids = torch.full((1, 16), MASK)
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


def low_confidence(
    model: Any, canvas: Tensor, steps: int, cfg_scale: float = 0.0, suppress: tuple[int, ...] = ()
) -> Tensor:
    """Greedy decoding of the surest positions first, by full logits."""
    prompt = canvas != MASK
    left = int((canvas == MASK).sum(dim=1)[0])
    keys = torch.ones_like(canvas)
    for step in range(steps):
        count = left // steps + (step < left % steps)
        if cfg_scale > 0:
            without = torch.where(prompt, MASK, canvas)
            pair = torch.cat((canvas, without))
            given, unconditional = model(pair, attention_mask=keys.repeat(2, 1)).logits.chunk(2)
            logits = unconditional + (cfg_scale + 1) * (given - unconditional)
        else:
            logits = model(canvas, attention_mask=keys).logits
        for token in suppress:
            logits[:, :, token] = -torch.inf
        best = logits.argmax(dim=-1)
        sure = torch.softmax(logits.double(), dim=-1).gather(-1, best[..., None])[..., 0]
        sure = sure.masked_fill(canvas != MASK, -torch.inf)
        for row, places in enumerate(sure.topk(count).indices):
            canvas[row, places] = best[row, places]
    return canvas


@torch.no_grad()
def test_sampler_writes_what_generate_writes(model: Any) -> None:
    assert model.device.type == "cpu"
    prompt = torch.tensor([[3, 9, 1], [4, 4, 20]])
    canvas = torch.cat((prompt, torch.full((2, 13), MASK)), dim=1)
    for suppress in ((), (5, 7)):
        ours = model.generate(
            prompt,
            max_denoising_steps=5,
            order="confidence",
            counts="llada",
            do_sample=False,
            suppress_tokens=suppress,
        ).sequences
        assert torch.equal(low_confidence(model, canvas.clone(), 5, suppress=suppress), ours)


@torch.no_grad()
def test_sampler_with_guidance(model: Any) -> None:
    prompt = torch.tensor([[3, 9, 1], [4, 4, 20]])
    canvas = torch.cat((prompt, torch.full((2, 13), MASK)), dim=1)
    options: dict[str, Any] = {"max_denoising_steps": 5, "order": "confidence", "counts": "llada"}
    ours = model.generate(prompt, do_sample=False, cfg_scale=1.5, **options)
    assert torch.equal(low_confidence(model, canvas.clone(), 5, cfg_scale=1.5), ours.sequences)
    assert ours.network_calls.tolist() == [10, 10]
    assert not torch.equal(ours.sequences, model.generate(prompt, do_sample=False, **options).sequences)


@torch.no_grad()
def test_evaluation_estimates_the_bound(model: Any) -> None:
    """Monte Carlo over numbers of masks, L / n times the masked cross-entropy, is the NELBO of the model."""
    draws = 1000
    text = torch.tensor([[3, 9, 1, 4, 12, 20]]).expand(draws, -1)
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 7, (draws, 1), generator=generator)
    masked = torch.rand(text.shape, generator=generator).argsort(dim=1).argsort(dim=1) < counts
    logits = model(torch.where(masked, MASK, text)).logits
    nll = F.cross_entropy(logits.flatten(0, 1), text.flatten(), reduction="none").view(text.shape)
    drawn = (nll * masked * 6 / counts).sum(dim=1)
    ours = torch.stack([model.model.loss(text, seed=seed).nll_sum / draws for seed in range(8)])
    error = (drawn.var() / draws + ours.var() / len(ours)).sqrt()
    assert (drawn.mean() - ours.mean()).abs() < 4 * error and error < 0.1 * ours.mean()
