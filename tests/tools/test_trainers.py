"""In transformers' Trainer, Lightning and accelerate S is drawn, autocast holds, and weights come back."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import loopmdm_kernels as lk
from loopmdm import LoopMDM, patch
from loopmdm.mdlm import DIT
from tests.mdlm.reference_dit import ReferenceDIT, reference_config

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning.*"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
STEPS = 8


class Texts(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = torch.randint(39, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens.clone()}


@pytest.fixture
def seen(monkeypatch):
    """(S, dtype of the products) of each loss with gradients."""
    calls = []
    loss = LoopMDM.loss

    def recorded(self, *args, **options):
        out = loss(self, *args, **options)
        if torch.is_grad_enabled():
            calls.append((out.num_loops, self.compute_dtype))
        return out

    monkeypatch.setattr(LoopMDM, "loss", recorded)
    return calls


def check(seen, dtype, before, after):
    assert len(seen) == STEPS and {d for _, d in seen} == {dtype}
    assert len({loops for loops, _ in seen}) > 1  # S is drawn anew
    moved = sum(not torch.equal(before[name], value) for name, value in after.items())
    assert moved > 20


@pytest.mark.parametrize("bf16", [False, True])
def test_transformers_trainer(model, tmp_path, seen, bf16):
    transformers = pytest.importorskip("transformers")
    from loopmdm.hf import WriteConfig

    before = copy.deepcopy(model.state_dict())
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=4,
        save_steps=4,
        report_to=[],
        use_cpu=True,
        bf16=bf16,
        gradient_checkpointing=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=Texts(), eval_dataset=Texts(), callbacks=[WriteConfig()]
    )
    trainer.train()
    assert model.recompute
    check(seen, torch.bfloat16 if bf16 else torch.float32, before, model.state_dict())
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
    same_weights(LoopMDM.from_pretrained(tmp_path / "run" / f"checkpoint-{STEPS}"), model)
    trainer.save_model(str(tmp_path / "weights"))
    same_weights(LoopMDM.from_pretrained(tmp_path / "weights", config=model.config), model)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        LoopMDM.from_pretrained(tmp_path / "weights")


def same_weights(loaded, model):
    assert loaded.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_lightning(model, tmp_path, seen, precision):
    """bf16-true makes the parameters and the default dtype bf16: angles, times and losses stay in fp32."""

    def step(batch):
        assert (torch.get_default_dtype() == torch.bfloat16) == (precision == "bf16-true")
        out = model(**batch)
        assert out.loss.dtype == out.t.dtype == torch.float32 and 0 < out.loss < 20
        return out.loss

    before = copy.deepcopy(model.state_dict())
    trainer = fit_in(tmp_path, model.train(), step, precision=precision)
    narrow = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert all(p.dtype == narrow for p in model.parameters()) and torch.get_default_dtype() == torch.float32
    after = {name: value.float() for name, value in model.state_dict().items()}
    check(seen, torch.float32 if precision == "32-true" else torch.bfloat16, before, after)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model.save_pretrained(tmp_path / "model")
    same_weights(LoopMDM.from_pretrained(tmp_path / "model"), model.float())


def fit_in(tmp_path, network, step, **options):
    lightning = pytest.importorskip("lightning")

    class Training(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network

        def training_step(self, batch, index):
            return step(batch)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(Training(), DataLoader(Texts(), batch_size=4))
    return trainer


@pytest.fixture
def loops(monkeypatch):
    """S of each call of the op that runs more than one loop, or may."""
    seen = []
    op = lk.looped_blocks

    def recorded(x, blocks, modulation, num_loops, **options):
        if len(blocks) == 2:
            seen.append(num_loops)
        return op(x, blocks, modulation, num_loops, **options)

    monkeypatch.setattr(lk, "looped_blocks", recorded)
    return seen


def two_blocks_looped(kind):
    torch.manual_seed(0)
    return kind(reference_config(loop_start=1, loop_end=3, num_loops=3, n_blocks=4, dropout=0.0), 40)


@pytest.mark.parametrize("eval_mode", [False, True])
@pytest.mark.parametrize("how", ["labels", "loss", "logits"])
def test_lightning_leaves_a_model_in_its_mode(tmp_path, loops, how, eval_mode):
    """In eval mode, in which `from_pretrained` and `from_mdlm` return it, S is not drawn: said once."""
    model = LoopMDM.from_mdlm(two_blocks_looped(ReferenceDIT)).train(not eval_mode)

    def step(batch):
        ids = batch["input_ids"]
        if how == "logits":
            return model(ids).square().mean()
        return (model(ids, labels=ids) if how == "labels" else model.loss(ids)).loss

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fit_in(tmp_path, model, step)
    assert model.training is not eval_mode and len(loops) == STEPS
    assert set(loops) == {12} if eval_mode else len(set(loops)) > 1
    said = "LoopMDM: gradients in eval mode, where S is max_loops = 12"
    assert sum(str(w.message).startswith(said) for w in warned) == eval_mode


@pytest.mark.parametrize("eval_mode", [False, True])
@pytest.mark.parametrize("how", ["DIT", "patch"])
def test_lightning_with_the_reference_s_interface(tmp_path, loops, how, eval_mode):
    """S is `num_loops` in both modes."""
    network = two_blocks_looped(DIT if how == "DIT" else ReferenceDIT).train(not eval_mode)
    if how == "patch":
        patch(network, num_loops=3)

    def step(batch):
        return network(batch["input_ids"], torch.ones(4)).square().mean()

    fit_in(tmp_path, network, step)
    assert network.training is not eval_mode and loops == [3] * STEPS


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate(model, tmp_path, seen, mixed_precision):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Texts(), batch_size=8))
    for batch in loader:
        accelerator.backward(prepared(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    check(seen, torch.bfloat16 if mixed_precision == "bf16" else torch.float32, before, model.state_dict())
    accelerator.save_model(prepared, str(tmp_path / "weights"))
    same_weights(LoopMDM.from_pretrained(tmp_path / "weights", config=model.config), model)
    AcceleratorState._reset_state(True)


def test_offloaded_weights_are_refused(model, tokens, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    whole = model(tokens)
    model.save_pretrained(tmp_path)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="weights are on the meta device"):
        model(tokens)
    with accelerate.init_empty_weights():
        empty = LoopMDM(model.config)
    with pytest.raises(ValueError, match="weights are on the meta device"):
        empty(tokens)
    weights = str(tmp_path / "model.safetensors")
    loaded = accelerate.load_checkpoint_and_dispatch(empty, weights, device_map={"": "cpu"}).eval()
    assert torch.equal(loaded(tokens), whole)


def test_a_configuration_is_frozen_but_for_notes(model):
    config = model.config
    config.use_cache = False
    assert config == copy.deepcopy(config) and "use_cache" not in config.to_dict()
    assert hash(config) == hash(copy.copy(config))
    for name in ("max_loops", "max_loop"):
        with pytest.raises(AttributeError, match=f"cannot assign to field '{name}'"):
            setattr(config, name, 3)
    with pytest.raises(AttributeError, match="cannot delete"):
        del config.max_loops
