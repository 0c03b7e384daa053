"""Prompts and responses: read, packed, batched and learned."""

import json

import numpy as np
import pytest
import torch

from loopmdm.data.pairs import Pair, PairData, read_pairs, split_pairs
from loopmdm.data.tokenizer import ByteTokenizer
from loopmdm.model import LoopMDM
from loopmdm.model.config import LoopMDMConfig
from loopmdm.runs.text_data import fingerprint
from loopmdm.train import TrainConfig, Trainer

TOKENIZER = ByteTokenizer()
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
PAIRS = [Pair("2+2=", "4"), Pair("capital of France?", "Paris"), Pair("", "hello"), Pair("x" * 40, "y")]


def ids(text):
    return list(text.encode())


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_pairs_are_read_out_of_every_kind_of_records(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    records = [{"answer": pair.response, "id": 3, "question": pair.prompt} for pair in PAIRS]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif kind == "json":
        path.write_text(json.dumps(records))
    elif kind == "csv":
        path.write_text("answer,question\n" + "".join(f'"{p.response}","{p.prompt}"\n' for p in PAIRS))
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
        pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    assert list(read_pairs(str(path), ("question", "answer"))) == PAIRS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"prompt": "a"}\n',
            r"line 1: no field 'response'; its fields: 'prompt'; choose two .* --pairs FIELD FIELD$",
        ),
        ('{"prompt": "a", "response": 1}\n', r"line 1: field 'response' is a int"),
        ('{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": ""}\n', r"record 1: .* is empty"),
        ("", "hold no pair"),
        ("not json\n", "line 1: not JSON"),
    ],
)
def test_what_is_no_pair(text, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_pairs(str(tmp_path / "a.jsonl")))


def test_a_table_without_the_columns(tmp_path):
    (tmp_path / "a.csv").write_text("q,a\none,two\n")
    with pytest.raises(
        ValueError, match=r"no column 'prompt'; its columns: 'q', 'a'; .* --pairs FIELD FIELD$"
    ):
        list(read_pairs(str(tmp_path / "a.csv")))


def test_plain_text_holds_no_pairs(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="is plain text"):
        list(read_pairs(str(tmp_path / "a.txt")))


def test_rows_are_prompt_and_response_and_end_in_eos():
    data = PairData(PAIRS, TOKENIZER, 30)
    assert (data.dropped, data.cut, len(data)) == (1, 0, 3)
    batch = data.rows(np.arange(3))
    rows = [[BOS, *ids(p.prompt), *ids(p.response), EOS] for p in PAIRS[:3]]
    longest = max(map(len, rows))
    assert batch.input_ids.tolist() == [row + [EOS] * (longest - len(row)) for row in rows]
    given = [[column <= len(p.prompt) for column in range(longest)] for p in PAIRS[:3]]
    assert batch.prompt_mask.tolist() == given
    assert batch.attention_mask is None


def test_responses_are_cut_and_a_prompt_leaves_room_for_a_token():
    data = PairData([Pair("abc", "defgh"), Pair("abcde", "x"), Pair("abcdef", "x")], TOKENIZER, 8)
    assert (data.dropped, data.cut, len(data)) == (1, 1, 2)
    batch = data.rows(np.arange(2))
    assert batch.input_ids.tolist() == [[BOS, *ids("abcdef"), EOS], [BOS, *ids("abcdex"), EOS]]
    with pytest.raises(ValueError, match="none of 1 pair"):
        PairData([Pair("abcdef", "x")], TOKENIZER, 8)


def test_what_has_no_place_for_prompts_is_refused():
    data = PairData(PAIRS, TOKENIZER, 30)
    for call in (lambda: data.batch(0), lambda: data.examples(0, 1)):
        with pytest.raises(TypeError, match="prompt_mask"):
            call()


def test_another_border_between_prompt_and_response_is_other_data():
    one, other = (PairData([pair], TOKENIZER, 30) for pair in (Pair("ab", "c"), Pair("a", "bc")))
    assert one.tokens.tolist() == other.tokens.tolist()
    assert fingerprint(one) == fingerprint(PairData([Pair("ab", "c")], TOKENIZER, 30)) != fingerprint(other)


def test_batches_do_not_depend_on_the_number_of_ranks():
    pairs = [Pair("p" * (i % 7), "r" * (1 + i % 11)) for i in range(50)]
    data = PairData(pairs, TOKENIZER, 30, seed=5)
    batch = data.source(1)
    lengths = set()
    for step in range(20):
        alone = batch(step, 0, 0, 1, 8)
        parts = [batch(step, 0, rank, 4, 2) for rank in range(4)]
        assert torch.cat([p.input_ids for p in parts]).equal(alone.input_ids)
        assert torch.cat([p.prompt_mask for p in parts]).equal(alone.prompt_mask)
        lengths.add(alone.input_ids.shape[1])
    assert len(lengths) > 1
    with pytest.raises(ValueError, match="accumulation 1"):
        data.source(2)


def test_a_prompt_is_on_one_side():
    pairs = [Pair(f"question {i // 2}", f"answer {i}") for i in range(400)]
    train, held_out = split_pairs(pairs, 0.2)
    assert sorted(train + held_out) == sorted(pairs)
    assert 40 < len(held_out) < 130
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    assert split_pairs(pairs, 0.0) == (pairs, [])
    with pytest.raises(ValueError, match="validation is 1"):
        split_pairs(pairs, 1.0)


def small(hidden_size, length):
    return LoopMDMConfig(
        vocab_size=TOKENIZER.vocab_size,
        mask_token_id=TOKENIZER.mask_token_id,
        hidden_size=hidden_size,
        num_heads=2,
        num_layers=3,
        max_length=length,
        max_loops=2,
        dropout=0.0,
        gate_init=1.0,
    )


def test_the_loss_counts_responses_alone():
    torch.manual_seed(0)
    data = PairData([Pair("abcd", "efgh"), Pair("ab", "cdefghij")], TOKENIZER, 16)
    batch = data.rows(np.arange(2))
    config = small(32, 16)
    loss = LoopMDM(config).loss(batch.input_ids, None, 2, 0, prompt_mask=batch.prompt_mask)
    counted = int((~batch.prompt_mask).sum())
    assert counted == batch.input_ids.numel() - 5 - 3
    assert int(loss.num_tokens) == counted


def test_a_model_learns_the_answers(tmp_path):
    torch.manual_seed(0)
    pairs = [Pair(f"{letter}?", letter.upper() * 3) for letter in "ab"] * 16
    data = PairData(pairs, TOKENIZER, 8, batch_size=32)
    config = small(64, 8)
    model = LoopMDM(config)
    training = TrainConfig(steps=150, batch_size=32, learning_rate=3e-3, warmup_steps=10, ema=0.9)
    Trainer(model, data, training, tmp_path / "run").train()
    swapped = PairData([Pair("a?", "BBB"), Pair("b?", "AAA")], TOKENIZER, 8)

    def nll(answers):
        batch = answers.rows(np.arange(2))
        losses = [
            model.loss(batch.input_ids, None, 2, seed, prompt_mask=batch.prompt_mask).loss
            for seed in range(20)
        ]
        return float(torch.stack(losses).mean())

    model.eval()
    with torch.no_grad():
        assert nll(data) < nll(swapped) - 0.5
