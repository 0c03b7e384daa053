"""Generative perplexity and its scorers, against sums written out and another library's loss."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loopmdm.data.tokenizer import BPETokenizer, ByteTokenizer
from loopmdm.quality import CausalScorer, generative_perplexity, load_scorer, quality, unigram_entropy
from loopmdm.quality.causal import CausalConfig, CausalLM
from loopmdm.quality.duo_samples import duo_perplexity, texts_of
from loopmdm.quality.scorer import windows

BYTES = ByteTokenizer()
MASK, EOS = BYTES.mask_token_id, BYTES.eos_token_id
TEXTS = ["def f(x):", "", "return ", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "Ünï"]


def causal(max_length: int = 64) -> CausalLM:
    torch.manual_seed(1)
    model = CausalLM(
        CausalConfig(BYTES.vocab_size, MASK, hidden_size=8, num_heads=2, num_layers=2, max_length=max_length)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def samples(texts: list[str] = TEXTS) -> Tensor:
    rows = [[EOS, *text.encode(), EOS] for text in texts]
    length = max(map(len, rows))
    return torch.tensor([row + [-1] * (length - len(row)) for row in rows])


def test_perplexity_is_the_formula() -> None:
    model, tokens = causal(), samples()
    result = generative_perplexity(CausalScorer(model, BYTES), tokens)
    rows = [row[row >= 0] for row in tokens]
    with torch.no_grad():
        sums = [model.token_nll(row[None]).double().sum().item() for row in rows]
    each = [total / len(row) for total, row in zip(sums, rows, strict=True)]
    assert result.per_sample.tolist() == pytest.approx(each, rel=1e-6)
    assert result.value == pytest.approx(math.exp(sum(each) / len(each)), rel=1e-6)
    num_bytes = [len(text.encode()) for text in TEXTS]
    assert result.num_bytes is not None and result.num_bytes.tolist() == num_bytes
    assert result.bits_per_byte == pytest.approx(sum(sums) / math.log(2) / sum(num_bytes), rel=1e-6)
    assert generative_perplexity(CausalScorer(model), tokens).bits_per_byte is None


def test_many_samples_in_batches_are_each_scored_alone() -> None:
    scorer, generator = CausalScorer(causal(), BYTES), torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (37, 20), generator=generator)
    sums, counted = scorer.nll(tokens)
    alone = torch.cat([scorer.nll(row[None])[0] for row in tokens])
    torch.testing.assert_close(sums, alone, rtol=1e-6, atol=0)
    assert counted.tolist() == [20] * 37


def test_long_samples_are_read_in_windows() -> None:
    assert list(windows(5, 8)) == [(0, 5, 0)]
    assert list(windows(15, 8)) == [(0, 8, 0), (4, 12, 8), (7, 15, 12)]
    model = causal(max_length=8)
    tokens = torch.randint(0, 256, (3, 15), generator=torch.Generator().manual_seed(0))
    tokens[1, 9:] = -1
    sums, counted = CausalScorer(model).nll(tokens)
    assert counted.tolist() == [15, 9, 15]
    with torch.no_grad():
        first, second, third = (model.token_nll(tokens[[0, 2], a:b]) for a, b in ((0, 8), (4, 12), (7, 15)))
        expected = first.sum(1) + second[:, 4:].sum(1) + third[:, 5:].sum(1)
    torch.testing.assert_close(sums[[0, 2]], expected.double(), rtol=1e-6, atol=0)
    # The windows are those of the longest sample: the ninth token is read after four others.
    with torch.no_grad():
        short = model.token_nll(tokens[1:2, :8]).sum() + model.token_nll(tokens[1:2, 4:9])[:, 4:].sum()
    assert float(sums[1]) == pytest.approx(float(short), rel=1e-6)


def test_loading_a_scorer_of_this_package(tmp_path: Path) -> None:
    causal().save_pretrained(tmp_path)
    BYTES.save(tmp_path)
    scorer = load_scorer(tmp_path, ByteTokenizer())
    assert scorer.name == str(tmp_path) and scorer.tokenizer is not None
    tokens = samples()
    assert torch.equal(scorer.nll(tokens)[0], CausalScorer(causal()).nll(tokens)[0])
    other = BPETokenizer.train(["some text to count", "and more of it"], 260)
    with pytest.raises(ValueError, match="trained with another tokenizer than the samples"):
        load_scorer(tmp_path, other)
    with pytest.raises(FileNotFoundError, match="expected the folder of a scorer"):
        load_scorer(tmp_path / "nothing")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "loopmdm"}))
    with pytest.raises(ValueError, match="this is a diffusion model"):
        load_scorer(tmp_path)


def test_bad_samples() -> None:
    scorer = CausalScorer(causal(), BYTES)
    with pytest.raises(ValueError, match="sample 0 holds the mask"):
        generative_perplexity(scorer, torch.tensor([[1, MASK]]))
    with pytest.raises(ValueError, match="samples and scorer need the same tokenizer"):
        generative_perplexity(scorer, torch.tensor([[1, 5000]]))
    with pytest.raises(ValueError, match="sample 1 has no token"):
        generative_perplexity(scorer, torch.tensor([[1], [-1]]))


def test_quality_gathers_the_metrics_with_their_errors() -> None:
    scorer = CausalScorer(causal(), BYTES, "tiny")
    tokens = samples()[[0, 2, 3, 4, 0, 2]]
    figures = quality(tokens, scorer, mask_token_id=MASK, resamples=200, seed=3)
    expected = generative_perplexity(scorer, tokens)
    assert figures["generative_perplexity"]["value"] == pytest.approx(expected.value)
    assert figures["bits_per_byte"]["value"] == pytest.approx(expected.bits_per_byte)
    assert (figures["samples"], figures["scorer"]) == (6, "tiny")
    for name in ("unigram_entropy", "distinct_2", "distinct_3", "self_bleu", "generative_perplexity"):
        figure = figures[name]
        assert figure["low"] < figure["value"] < figure["high"] and figure["stderr"] > 0
    without = quality(tokens, resamples=200, seed=3)
    assert without == {name: figures[name] for name in without}
    with pytest.raises(ValueError, match="got 1 samples, expected at least 2"):
        quality(tokens[:1])


def test_standard_errors_are_those_of_means_and_ratios() -> None:
    scorer = CausalScorer(causal(), BYTES)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 128, (100, 12), generator=generator)
    for row, size in zip(tokens, torch.randint(3, 13, (100,), generator=generator).tolist(), strict=True):
        row[size:] = -1
    figures = quality(tokens, scorer, resamples=4000)
    scored = generative_perplexity(scorer, tokens)
    assert scored.num_bytes is not None and scored.bits_per_byte is not None
    bits = scored.nll_sum / math.log(2)
    residuals = (bits - scored.bits_per_byte * scored.num_bytes) / scored.num_bytes.mean()
    for name, expected in (
        ("unigram_entropy", unigram_entropy(tokens).std()),
        ("generative_perplexity", scored.value * scored.per_sample.std()),
        ("bits_per_byte", residuals.std()),
    ):
        figure = figures[name]
        assert figure["stderr"] == pytest.approx(float(expected) / 10, rel=0.06)
        assert figure["high"] - figure["low"] == pytest.approx(2 * 1.96 * figure["stderr"], rel=0.06)
    assert quality(tokens, scorer, resamples=4000) == figures != quality(tokens, scorer, seed=1)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of a few thousand random parameters with a BPE of its own, as `save_pretrained` leaves it."""
    transformers: Any = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("gpt2")
    BPETokenizer.train(["def f(x): return x", "aaaa bbbb", "Ünïcode"] * 5, 290).save(folder)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    (folder / "loopmdm_tokenizer.json").unlink()
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(fast), n_positions=16, n_embd=8, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_a_model_of_transformers_scores_the_text(gpt2: Path) -> None:
    import transformers

    texts = [TEXTS[0], TEXTS[2], TEXTS[4]]
    scorer = load_scorer(gpt2, BYTES)
    result = generative_perplexity(scorer, samples(texts))
    model = transformers.GPT2LMHeadModel.from_pretrained(gpt2).eval()
    encoder = transformers.AutoTokenizer.from_pretrained(gpt2)
    for index, text in enumerate(texts):
        ids = torch.tensor([[encoder.bos_token_id, *encoder(text, add_special_tokens=False)["input_ids"]]])
        assert ids.shape[1] <= 16
        with torch.no_grad():
            loss = float(model(ids, labels=ids).loss)  # the mean over all tokens but the first
        assert float(result.per_sample[index]) == pytest.approx(loss, rel=1e-5)
        assert float(result.nll_sum[index]) == pytest.approx(loss * (ids.shape[1] - 1), rel=1e-5)
    total = sum(len(text.encode()) for text in texts)
    assert result.bits_per_byte == pytest.approx(float(result.nll_sum.sum()) / math.log(2) / total)
    long = generative_perplexity(scorer, samples(["def f(x): return x" * 4]))
    assert math.isfinite(long.value)


def test_what_a_model_of_transformers_needs(
    gpt2: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="give the tokenizer the samples were made with"):
        load_scorer(gpt2)
    with pytest.raises(ValueError, match="sample 1 has no text that the scorer"):
        generative_perplexity(load_scorer(gpt2, BYTES), samples(["a", ""]))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="transformers cannot read the scorer"):
        load_scorer(tmp_path, BYTES)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"which is not installed: pip install 'loopmdm-kernels\[hf\]'"):
        load_scorer(gpt2, BYTES)


def test_duo_scores_the_texts_of_its_samples(gpt2: Path) -> None:
    """Texts with their marks, padded by the token that ends a text, in pieces of the context."""
    import transformers

    scorer, mark = load_scorer(gpt2, BYTES), "<|endoftext|>"
    texts = ["def f(x):", f"aaaa{mark}bbbb{mark}Ünï", "def f(x): return x def f(x): return x aaaa bbbb def"]
    width = 60
    rows = [[EOS if c == "¬" else c for c in _bytes_and_marks(text, mark)] for text in texts]
    tokens = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    assert texts_of(tokens, BYTES) == texts
    encoder = transformers.AutoTokenizer.from_pretrained(gpt2)
    encoder.pad_token = encoder.eos_token
    model = transformers.GPT2LMHeadModel.from_pretrained(gpt2).eval()
    padded = encoder(texts, return_tensors="pt", padding=True, truncation=True, max_length=width)
    total = count = 0.0
    pieces = zip(padded["input_ids"].split(16, 1), padded["attention_mask"].split(16, 1), strict=True)
    for ids, mask in pieces:
        with torch.no_grad():
            log_probs = model(ids, attention_mask=mask).logits[:, :-1].double().log_softmax(-1)
        nll = -log_probs.gather(-1, ids[:, 1:, None])[..., 0]
        end = ids == encoder.eos_token_id
        counted = (~end | (end.cumsum(1) == 1))[:, 1:]
        # A piece that is padding alone counts its first token nowhere, and no others; ours has no such piece.
        counted &= mask.any(1, keepdim=True)
        total += float(nll[counted].sum())
        count += int(counted.sum())
    # Of the padding behind a text one token is counted, in its last piece only.
    assert duo_perplexity(scorer, tokens, BYTES, width) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_features_are_those_of_mauve_text(gpt2: Path) -> None:
    import transformers

    texts = ["def f(x):", "aaaa bbbb", "Ünï"]
    scorer = load_scorer(gpt2, BYTES)
    found = scorer.features(torch.zeros(3, 1, dtype=torch.int64), texts, 6)
    model, encoder = (
        kind.from_pretrained(gpt2) for kind in (transformers.AutoModel, transformers.AutoTokenizer)
    )
    for text, feature in zip(texts, found, strict=True):
        ids = encoder.encode(text, return_tensors="pt", truncation=True, max_length=6)
        with torch.no_grad():
            hidden = model.eval()(ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(feature, hidden[0, -1])


def _bytes_and_marks(text: str, mark: str) -> list[Any]:
    parts = [list(part.encode()) for part in text.split(mark)]
    return parts[0] + [item for part in parts[1:] for item in ("¬", *part)]
