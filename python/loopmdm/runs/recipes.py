"""What the presets of `loopmdm train` stand for: model, data and hyper-parameters of each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from loopmdm.data import sudoku
from loopmdm.data.sudoku.clues import Clues
from loopmdm.data.tokenizer import Tokenizer
from loopmdm.model import LoopMDM
from loopmdm.model.config import PRESETS, LoopMDMConfig
from loopmdm.quality.causal import CausalConfig, CausalLM
from loopmdm.train.config import TrainConfig


@dataclass(frozen=True)
class SudokuRecipe:
    """One preset. `clues` as in `as_clues`; `position_scale` as in `grid_positions`.

    embedding_scale: standard deviation of the token embedding at the start; None: the model's own, U(±1/√D).
    A larger one keeps the input visible in the residual stream over many loops.
    """

    spec: sudoku.SudokuSpec
    clues: Clues
    position_scale: float
    training: TrainConfig
    pool_size: int = 100_000
    embedding_scale: float | None = None

    def build(
        self, preset: str, *, threads: int = 1, model: dict[str, Any] | None = None, **training: Any
    ) -> tuple[LoopMDM, sudoku.SudokuData, TrainConfig]:
        """Model, data and configuration of a run, a function of the arguments and of the seed in `training`.

        Args:
            preset: name of the model's preset.
            threads: processor threads that fill the pool of puzzles.
            model: fields of `LoopMDMConfig` to replace.
            training: fields of `TrainConfig` to replace.
        """
        config = dataclasses.replace(self.training, **training)
        torch.manual_seed(config.seed)
        net = LoopMDM(LoopMDMConfig.preset(preset, **(model or {})))
        if net.config.positions == "learned":
            positions = sudoku.grid_positions(
                self.spec, net.config.hidden_size, config.seed, scale=self.position_scale
            )
            with torch.no_grad():
                net.position_embed.embedding.copy_(positions)
        if self.embedding_scale is not None:
            torch.nn.init.normal_(net.vocab_embed.embedding, std=self.embedding_scale)
        data = sudoku.SudokuData(
            self.spec,
            seed=config.seed,
            clues=self.clues,
            pool_size=self.pool_size,
            batch_size=config.batch_size,
            threads=threads,
        )
        return net, data, config


@dataclass(frozen=True)
class TextRecipe:
    """One preset for text: fields of `LoopMDMConfig` (the vocabulary is the tokenizer's), sequence length."""

    model: dict[str, Any]
    length: int
    training: TrainConfig

    def build(
        self, tokenizer: Tokenizer, length: int, *, model: dict[str, Any] | None = None, **training: Any
    ) -> tuple[LoopMDM, TrainConfig]:
        """Model and configuration of a run over sequences of `length`, a function of the arguments.

        model, training: fields of `LoopMDMConfig` and of `TrainConfig` to replace.
        """
        config = dataclasses.replace(self.training, **training)
        vocabulary = {"vocab_size": tokenizer.vocab_size, "mask_token_id": tokenizer.mask_token_id}
        fields = {"max_length": length, **self.model, **(model or {}), **vocabulary}
        torch.manual_seed(config.seed)
        return LoopMDM(LoopMDMConfig.from_dict(fields)), config

    def build_causal(
        self, tokenizer: Tokenizer, length: int, *, model: dict[str, Any] | None = None, **training: Any
    ) -> tuple[CausalLM, TrainConfig]:
        """The autoregressive model of the same sizes, trained as `build`'s; arguments as there."""
        config = dataclasses.replace(self.training, **training)
        vocabulary = {"vocab_size": tokenizer.vocab_size, "mask_token_id": tokenizer.mask_token_id}
        sizes = {
            field.name: self.model[field.name]
            for field in dataclasses.fields(CausalConfig)
            if field.name in self.model
        }
        torch.manual_seed(config.seed)
        return CausalLM(
            CausalConfig.from_dict({"max_length": length, **sizes, **(model or {}), **vocabulary})
        ), config


SUDOKU_RECIPES: dict[str, SudokuRecipe] = {
    "sudoku": SudokuRecipe(
        spec=sudoku.NINE,
        clues=(28, 40),
        position_scale=0.05,
        training=TrainConfig(
            steps=5000,
            batch_size=64,
            learning_rate=1e-3,
            warmup_steps=1000,
            schedule="linear",
            decay_fraction=0.2,
            ema=0.999,
            precision="bf16",
        ),
    ),
    "sudoku6": SudokuRecipe(
        spec=sudoku.SIX,
        clues="minimal",
        position_scale=0.5,
        embedding_scale=0.5,
        training=TrainConfig(
            steps=4500,
            batch_size=64,
            learning_rate=1e-3,
            warmup_steps=200,
            schedule="linear",
            decay_fraction=0.2,
            ema=0.999,
        ),
    ),
}

# MDLM's set-up for OpenWebText, with LoopMDM's loop: for GPUs, steps times batch as in the papers.
_MDLM_TRAINING = TrainConfig(steps=1_000_000, batch_size=32, accumulation=16, precision="bf16")

# "text" is the default: 0.4 M parameters, minutes on a processor. In so short a run many steps of a small
# model get further than few steps of a larger one.
TEXT_RECIPES: dict[str, TextRecipe] = {
    "text": TextRecipe(
        model={
            "hidden_size": 64,
            "num_heads": 4,
            "num_layers": 6,
            "cond_dim": 16,
            "dropout": 0.0,
            "max_loops": 4,
            "gate_init": 1.0,
        },
        length=128,
        training=TrainConfig(
            steps=2500,
            batch_size=16,
            learning_rate=2e-3,
            warmup_steps=100,
            schedule="linear",
            decay_fraction=0.3,
            ema=0.999,
            eval_every=500,
        ),
    ),
    **{
        name: TextRecipe(model=PRESETS[name], length=1024, training=_MDLM_TRAINING)
        for name in ("tiny", "small", "medium")
    },
}
