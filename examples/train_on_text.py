"""Train a looped model on your own text and sample from it at several loop counts.

python examples/train_on_text.py my_text/ run

The same from the command line: loopmdm train --data my_text/ --out run; loopmdm sample run
"""

from __future__ import annotations

import sys

from loopmdm import LoopMDM, LoopMDMConfig, sample
from loopmdm.data.packing import TextData
from loopmdm.data.text import read_documents, split_documents
from loopmdm.data.tokenizer import ByteTokenizer
from loopmdm.quality.likelihood import evaluate_nll
from loopmdm.train import TrainConfig, Trainer

LENGTH = 128


def main(source: str, folder: str, steps: int = 2500) -> None:
    """Train on the documents of `source`, write the run into `folder`, print likelihoods and samples."""
    training, held_out = split_documents(read_documents(source))
    tokenizer = ByteTokenizer()
    data = TextData.from_documents(training, tokenizer, LENGTH)
    validation = TextData.from_documents(held_out, tokenizer, LENGTH)

    # Six blocks are stored; blocks 1 and 2 are applied S times, S drawn from 1..4 at every step.
    config = LoopMDMConfig(
        vocab_size=tokenizer.vocab_size,
        mask_token_id=tokenizer.mask_token_id,
        hidden_size=64,
        num_heads=4,
        num_layers=6,
        cond_dim=16,
        max_length=LENGTH,
        dropout=0.0,
        max_loops=4,
        gate_init=1.0,
    )
    training_config = TrainConfig(steps, batch_size=16, learning_rate=2e-3, warmup_steps=100, ema=0.999)
    Trainer(LoopMDM(config), data, training_config, folder).train()
    tokenizer.save(folder)

    model = LoopMDM.from_pretrained(folder)  # the averaged weights
    windows, _ = validation.examples(0, min(32, len(validation)))
    for result in evaluate_nll(model, [windows], num_loops=[1, 2, 4], num_t=4):
        print(f"S = {result.num_loops}: {result.nll:.3f} ± {result.stderr:.3f} nats per byte")
    for loops in (1, 4):
        tokens = sample(model, num_samples=1, length=LENGTH, plan=loops, seed=0).tokens[0]
        print(f"\nA sample at S = {loops}:\n{tokenizer.decode(tokens)}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
