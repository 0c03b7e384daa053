"""`loopmdm.hf`: transformers' Auto classes, Trainer and generation take the model as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from loopmdm import LoopMDM, LoopMDMConfig, sample
from tests.tools.watched import new_model

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("loopmdm.hf")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
MASK = 28


def noisy(batch: int = 3, length: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(MASK, (batch, length), generator=generator)
    return tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 0.5, MASK)


def loaded(folder: Path, model: LoopMDM, **options: Any) -> Any:
    model.save_pretrained(folder)
    return transformers.AutoModelForMaskedLM.from_pretrained(folder, **options)


def test_either_class_reads_what_either_writes(tmp_path: Path) -> None:
    model, ids = new_model(), noisy()
    plain = loaded(tmp_path / "ours", model)
    assert type(plain) is hf.LoopMDMForMaskedLM and not plain.training
    assert plain.model.config == model.config and plain.config.num_hidden_layers == 5
    plain.save_pretrained(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == ["config.json", "model.safetensors"]
    plain.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    files = {p.name for p in (tmp_path / "shards").iterdir()}
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 5 and files == shards | {"config.json", "model.safetensors.index.json"}
    for name in ("whole", "shards"):
        fields = json.loads((tmp_path / name / "config.json").read_text())
        assert fields["architectures"] == ["LoopMDMForMaskedLM"] and "auto_map" not in fields
        ours = LoopMDM.from_pretrained(tmp_path / name)
        assert ours.config == model.config
        assert all(torch.equal(ours.state_dict()[key], value) for key, value in model.state_dict().items())
        for auto in (transformers.AutoModelForMaskedLM, transformers.AutoModel):
            theirs = auto.from_pretrained(tmp_path / name)
            assert torch.equal(theirs(ids).logits, plain(ids).logits)


def test_push_to_hub_uploads_what_either_class_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hub's side of it played: config, shards and their index, a card, and no code."""
    from transformers.utils import hub

    def keep(self: Any, working_dir: str, repo_id: str, *_: Any, **__: Any) -> None:
        shutil.copytree(working_dir, tmp_path / repo_id)

    card = SimpleNamespace(save=lambda path: Path(path).write_text("card"))
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: card)
    monkeypatch.setattr(hf.LoopMDMForMaskedLM, "_upload_modified_files", keep)
    if hasattr(hub.PushToHubMixin, "_create_repo"):  # transformers 4
        monkeypatch.setattr(hub.PushToHubMixin, "_create_repo", lambda self, repo_id, *_, **__: repo_id)
    else:
        made = SimpleNamespace(create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
        monkeypatch.setattr(hub, "hf_api", lambda: made)
    model, ids = new_model(), noisy()
    theirs = loaded(tmp_path / "ours", model)
    theirs.push_to_hub("owner-name", max_shard_size="20KB")
    files = {path.name for path in (tmp_path / "owner-name").iterdir()}
    weights = {name for name in files if name.endswith(".safetensors")}
    assert len(weights) > 5
    assert files - weights == {"README.md", "config.json", "model.safetensors.index.json"}
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "owner-name")
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    assert LoopMDM.from_pretrained(tmp_path / "owner-name").config == model.config


def test_options_of_loading(tmp_path: Path) -> None:
    half = loaded(tmp_path, new_model(), dtype=torch.bfloat16, attn_implementation="sdpa", device_map="cpu")
    assert half.dtype == torch.bfloat16 and half(noisy()).logits.dtype == torch.bfloat16
    longer = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path, max_loops=9, output_hidden_states=True
    )
    assert longer.model.config.max_loops == 9 and longer(noisy()).hidden_states is not None


def test_a_new_model_begins_as_a_loopmdm_does() -> None:
    config = hf.LoopMDMPretrainedConfig(**new_model().config.to_dict())
    torch.manual_seed(3)
    model = transformers.AutoModelForMaskedLM.from_config(config).model
    torch.manual_seed(3)
    expected = LoopMDM(config.to_loopmdm()).state_dict()
    assert all(torch.equal(expected[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("changes", [{}, {"time_conditioning": True}, {"positions": "learned"}], ids=str)
def test_logits_are_those_of_the_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    model, ids = new_model(**changes), noisy()
    sigma = torch.tensor([0.1, 0.7, 3.0]) if model.config.time_conditioning else None
    keys = torch.ones_like(ids)
    keys[1, 12:] = 0
    theirs = loaded(tmp_path, model)
    for loops in (None, 1, torch.tensor([3, 1, 2])):
        logits = theirs(ids, keys, sigma, num_loops=loops).logits
        expected = model(ids, sigma, num_loops=loops, attention_mask=keys)
        torch.testing.assert_close(logits[..., :MASK], expected[..., :MASK])
        assert (logits[..., MASK] == -1e30).all()
    theirs.config.suppress_mask_token = False
    torch.testing.assert_close(theirs(ids, keys, sigma).logits, model(ids, sigma, attention_mask=keys))
    assert theirs(ids, keys, sigma, return_dict=False)[0].shape == (3, 16, 29)


def test_loss_and_gradients_are_those_of_the_logits(tmp_path: Path) -> None:
    theirs = loaded(tmp_path, new_model().double(), dtype=torch.float64)
    ids, labels = noisy(), torch.randint(MASK, (3, 16), generator=torch.Generator().manual_seed(4))
    labels = torch.where(ids == MASK, labels, -100)
    parameters = dict(theirs.named_parameters())
    expected = F.cross_entropy(theirs(ids, num_loops=2).logits.flatten(0, 1), labels.flatten())
    wanted = torch.autograd.grad(expected, parameters.values(), allow_unused=True)
    theirs.train()
    out = theirs(ids, num_loops=2, labels=labels)
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected)
    grads = torch.autograd.grad(out.loss, parameters.values(), allow_unused=True)
    for name, got, right in zip(parameters, grads, wanted, strict=True):
        torch.testing.assert_close(got, right, msg=lambda text, name=name: f"{name}: {text}")
        assert got is None or got.abs().sum() > 0, name
    assert theirs.eval()(ids, num_loops=2, labels=labels).logits is not None


@pytest.mark.parametrize("loops", [2, torch.tensor([1, 4, 2])], ids=str)
def test_hidden_states(tmp_path: Path, loops: int | Tensor) -> None:
    theirs, ids = loaded(tmp_path, new_model()), noisy()
    out = theirs(ids, num_loops=loops, output_hidden_states=True)
    assert torch.equal(out.logits, theirs(ids, num_loops=loops).logits)
    assert len(out.hidden_states) == 6
    stages = theirs.model.stages(ids)
    assert torch.equal(out.hidden_states[0], stages.embedded())
    assert torch.equal(out.hidden_states[3], stages.loop(stages.before(), loops))
    for wrong in (0, torch.tensor([1, 0, 2]), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="num_loops"):
            theirs(ids, num_loops=wrong, output_hidden_states=True)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_embeddings_take_the_place_of_tokens(tmp_path: Path, positions: str) -> None:
    theirs, ids = loaded(tmp_path, new_model(positions=positions)), noisy()
    embeds = theirs.get_input_embeddings()(ids).detach().requires_grad_()
    out = theirs(inputs_embeds=embeds, num_loops=2)
    assert torch.equal(out.logits, theirs(ids, num_loops=2).logits)
    out.logits[..., :MASK].sum().backward()
    assert embeds.grad is not None and embeds.grad.abs().sum() > 0
    for given in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of them"):
            theirs(**given)
    for wrong, message in ((embeds[..., :8], "inputs_embeds: got shape"), (embeds[0], "inputs_embeds")):
        with pytest.raises(ValueError, match=message):
            theirs(inputs_embeds=wrong)
    with pytest.raises(TypeError, match=r"inputs_embeds: got torch\.int64"):
        theirs(inputs_embeds=ids)
    with pytest.raises(ValueError, match="exit rules read which tokens are masked"):
        _ = theirs.model.stages(None, inputs_embeds=embeds).masked


def test_what_is_wrong_is_refused(tmp_path: Path) -> None:
    theirs, ids = loaded(tmp_path, new_model()), noisy()
    for labels in (ids, ids.masked_fill(ids == MASK, 29), ids[:, :4], ids.float()):
        with pytest.raises(ValueError, match="labels: got"):
            theirs(ids, labels=labels)
    with pytest.raises(ValueError, match="new_num_tokens: got 31"):
        theirs.resize_token_embeddings(31)
    assert theirs.resize_token_embeddings(29) is theirs.model.vocab_embed
    with pytest.raises(ValueError, match="missing configuration fields"):
        hf.LoopMDMPretrainedConfig()
    with pytest.raises(TypeError, match="suppress_mask_token"):
        hf.LoopMDMPretrainedConfig(**new_model().config.to_dict(), suppress_mask_token=1)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["blocks.1.attn_qkv.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: .*blocks\.1\.attn_qkv"):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    """Half of the tokens masked, as a collator for masked language models gives them."""
    tokens = torch.stack(rows)
    masked = torch.rand(tokens.shape) < 0.5
    return {"input_ids": tokens.masked_fill(masked, MASK), "labels": tokens.masked_fill(~masked, -100)}


def test_trainer(tmp_path: Path) -> None:
    theirs = loaded(tmp_path / "begin", new_model()).train()
    texts = [torch.randint(6, (16,), generator=torch.Generator().manual_seed(n)) for n in range(32)]
    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "save_steps": 10,
        "report_to": [],
        "use_cpu": True,
        "gradient_checkpointing": True,
        "disable_tqdm": True,
        "logging_steps": 5,
    }

    def trainer(steps: int) -> Any:
        given = transformers.TrainingArguments(**arguments, max_steps=steps)
        return transformers.Trainer(model=theirs, args=given, train_dataset=texts, data_collator=collate)

    first = trainer(20)
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] and theirs.model.recompute
    saved = LoopMDM.from_pretrained(tmp_path / "run" / "checkpoint-20")
    again = dict(saved.named_parameters())
    assert all(torch.equal(again[name], value) for name, value in theirs.model.named_parameters())
    with torch.no_grad():
        theirs.model.vocab_embed.embedding.zero_()
    resumed = trainer(21)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 21 and theirs.model.vocab_embed.embedding.abs().sum() > 1


class Drafts:
    """A streamer of the interface of `TextDiffusionStreamer`."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Tensor]] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(("put", value))

    def put_draft(self, value: Tensor) -> None:
        self.seen.append(("draft", value))

    def end(self) -> None:
        self.seen.append(("end", torch.empty(0)))


def test_generate_is_sample_with_drafts(tmp_path: Path) -> None:
    theirs = loaded(tmp_path, new_model())
    prompt, streamer = noisy(1, 5).clamp_max(27), Drafts()
    options: dict[str, Any] = {"temperature": 0.8, "seed": 4}
    out = theirs.generate(
        prompt,
        streamer=streamer,
        max_new_tokens=9,
        max_denoising_steps=4,
        num_loops=2,
        suppress_tokens=[1],
        **options,
    )
    expected = sample(
        theirs.model, prompt=prompt, length=14, steps=4, plan=2, forbidden=[1], progress=False, **options
    )
    assert torch.equal(out.sequences, expected.tokens)
    assert torch.equal(out.network_calls, expected.network_calls) and torch.equal(out.loops, expected.loops)
    torch.testing.assert_close(out.tokens_per_forward, 9 / expected.network_calls)
    kinds = [kind for kind, _ in streamer.seen]
    assert kinds == ["put", *["draft"] * expected.total_network_calls, "put", "end"]
    drafts = [value for kind, value in streamer.seen if kind == "draft"]
    left = [int((draft == MASK).sum()) for draft in drafts]
    assert left == sorted(left, reverse=True) and left[-1] == 0 and left[0] > 0
    assert torch.equal(drafts[-1], out.sequences[:, 5:]) and torch.equal(streamer.seen[0][1], prompt)


def test_transformers_streamer_prints_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not hasattr(transformers, "TextDiffusionStreamer"):
        pytest.skip("a transformers without a streamer of drafts")

    class Letters:
        def decode(self, ids: Any, **_: Any) -> str:
            return "".join("_" if int(i) == MASK else chr(97 + int(i) % 26) for i in ids)

    theirs = loaded(tmp_path, new_model())
    streamer = transformers.TextDiffusionStreamer(Letters())
    out = theirs.generate(noisy(1, 4).clamp_max(27), streamer=streamer, max_new_tokens=6)
    printed = capsys.readouterr().out
    assert "_" in printed and Letters().decode(out.sequences[0, 4:]) in printed


def test_generate_with_padding_ends_and_a_canvas(tmp_path: Path) -> None:
    theirs = loaded(tmp_path, new_model())
    prompts = torch.tensor([[0, 0, 7, 3, 9], [4, 1, 2, 8, 6]])
    kept = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options: dict[str, Any] = {"do_sample": False, "order": "confidence"}
    both = theirs.generate(prompts, kept, max_new_tokens=6, **options).sequences
    alone = theirs.generate(prompts[:1, 2:], max_new_tokens=6, **options).sequences
    assert torch.equal(both[:, :5], prompts) and torch.equal(both[:1, 5:], alone[:, 3:])
    end = int(both[1, 7])
    ended = theirs.generate(
        prompts,
        kept,
        max_new_tokens=6,
        eos_token_id=end,
        pad_token_id=0,
        order="left_to_right",
        do_sample=False,
    )
    for row, rate, calls in zip(ended.sequences, ended.tokens_per_forward, ended.network_calls, strict=True):
        new = row[5:].tolist()
        written = new.index(end) + 1 if end in new else 6
        assert new[written:] == [0] * (6 - written) and float(rate) == written / int(calls)
    canvas = torch.full((2, 6), MASK)
    canvas[:, 3] = 11
    filled = theirs.generate(prompts, decoder_input_ids=canvas, return_dict_in_generate=False)
    assert (filled[:, 8] == 11).all() and (filled != MASK).all()
    config = transformers.GenerationConfig(max_new_tokens=3, do_sample=True, temperature=0.5)
    assert theirs.generate(prompts, generation_config=config).sequences.shape == (2, 8)
    assert theirs.generate(max_length=7).sequences.shape == (1, 7)
    for wrong, message in (
        ({"attention_mask": kept.flip(1)}, "zeros on the left"),
        ({"decoder_input_ids": canvas, "max_new_tokens": 2}, "given with a length"),
        ({"decoder_input_ids": canvas[:1]}, "decoder_input_ids: got shape"),
        ({"max_length": 5}, "leave 0 tokens"),
        ({"num_loops": 2, "plan": 3}, "mean the same"),
    ):
        with pytest.raises(ValueError, match=message):
            theirs.generate(prompts, **wrong)
    with pytest.raises(ValueError, match="input_ids: got"):
        theirs.generate(prompts[0])


def test_what_happens_between_loops_is_kept(tmp_path: Path) -> None:
    """Its weights are of the model, its switches of the configuration, which the call may set."""
    own = new_model().config.to_dict()
    changes = {"inject": "parcae", "loop_embedding": 2, "carry_norm": True}
    torch.manual_seed(0)
    model, ids = LoopMDM(LoopMDMConfig.from_dict(own | changes)).eval(), noisy()
    with torch.no_grad():
        for value in (*model.between.parameters(), *model.output_layer.parameters()):
            value.add_(torch.randn_like(value) * 0.1)
        wrapped = loaded(tmp_path / "ours", model)
        wrapped.save_pretrained(tmp_path / "theirs")
        again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "theirs")
        expected = model.hidden(ids, num_loops=3)
        assert torch.equal(again.model.hidden(ids, num_loops=3), expected)
        states = again(ids, num_loops=3, output_hidden_states=True).hidden_states
        torch.testing.assert_close(states[-1], expected)
        damped = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "theirs", damped=True)
        assert damped.model.config.damped and damped.config.damped
        assert not torch.equal(damped.model.hidden(ids, num_loops=3), expected)
