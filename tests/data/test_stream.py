"""Training on a corpus that is still being tokenised."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from loopmdm.data.corpus import Corpus, CorpusStream, GrowingCorpus, Settings, StreamData, build_corpus
from loopmdm.data.corpus import build as building
from loopmdm.data.corpus.data import CorpusRows
from loopmdm.data.text import found_files
from loopmdm.data.tokenizer import BPETokenizer, ByteTokenizer

TOKENIZER = ByteTokenizer()
SETTINGS = Settings(validation=0.1, shard_tokens=6000)
LENGTH, WINDOW = 34, 100


@pytest.fixture
def documents():
    rng = np.random.default_rng(0)
    return ["".join(chr(c) for c in rng.integers(32, 300, rng.integers(0, 900))) for _ in range(300)]


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(building, "BATCH_CHARS", 3000)


@pytest.fixture
def finished(documents, tmp_path, small_batches):
    corpus = build_corpus(documents, TOKENIZER, tmp_path / "finished", SETTINGS)
    assert len(corpus.shards("train")) > 10
    return corpus


def slowly(documents):
    for number, document in enumerate(documents):
        if number % 30 == 0:
            time.sleep(0.02)
        yield document


def order(data, steps, **place):
    return np.concatenate([data._rows_at(step * data.batch_size, data.batch_size) for step in range(steps)])


def test_the_order_does_not_depend_on_the_speed_of_the_build(documents, finished, tmp_path, small_batches):
    steps = 3 * len(CorpusRows([finished], "train", LENGTH)) // 32
    done = StreamData(GrowingCorpus(finished.folder), LENGTH, seed=3, window=WINDOW)
    assert done.corpus.finished
    with CorpusStream(slowly(documents), TOKENIZER, tmp_path / "slow", SETTINGS) as stream:
        data = StreamData(stream.corpus, LENGTH, seed=3, window=WINDOW)
        assert not stream.corpus.finished
        waiting = [data.batch(step)[0] for step in range(steps)]
        assert stream.corpus.finished
    for step, batch in enumerate(waiting):
        assert batch.equal(done.batch(step)[0])
    assert Corpus(tmp_path / "slow").digest == finished.digest


def test_every_sequence_comes_once_an_epoch_and_first_in_windows(finished):
    data = StreamData(GrowingCorpus(finished.folder), LENGTH, seed=3, window=WINDOW)
    size = len(data)
    assert size > 5 * WINDOW and size % WINDOW
    rows = order(data, -(-3 * size // 32))
    first, second, third = (rows[epoch * size : (epoch + 1) * size] for epoch in range(3))
    assert [sorted(epoch) for epoch in (first, second, third)] == 3 * [list(range(size))]
    assert (first // WINDOW == np.arange(size) // WINDOW).all()
    assert not (first == np.arange(size)).all()
    assert not (second // WINDOW == np.arange(size) // WINDOW).all()
    assert not (second == third).all()
    other = StreamData(GrowingCorpus(finished.folder), LENGTH, seed=4, window=WINDOW)
    assert not (order(other, 3) == first[:96]).all()
    # The tokens are those of the corpus, in the order of its documents.
    stored = CorpusRows([finished], "train", LENGTH)
    assert data.batch(0)[0].numpy().tolist() == stored[first[:32]].tolist()


def test_ranks_share_the_order_of_one_process(finished):
    data = StreamData(GrowingCorpus(finished.folder), LENGTH, seed=3, window=WINDOW, batch_size=8)
    for step in (0, 7, 200):
        alone = data.batch(step, batch_size=32)[0]
        for ranks in (2, 4):
            parts = [data.batch(step, 0, rank, ranks, 32 // ranks)[0] for rank in range(ranks)]
            assert np.concatenate(parts).tolist() == alone.tolist()


class Records(list):
    """As a streamed data set of the package datasets: records, read from a position on; here, to an error."""

    def __init__(self, records, end, first=0):
        super().__init__(records)
        self.end, self.first = end, first

    def skip(self, number):
        return Records(self, self.end, number)

    def __iter__(self):
        for number in range(self.first, len(self)):
            if number == self.end:
                raise ConnectionError("the network is gone")
            yield self[number]


def test_a_stream_of_records_goes_on_where_it_was(documents, finished, tmp_path, small_batches):
    records = [{"text": document, "id": number} for number, document in enumerate(documents)]
    seen = []
    for end in (60, 150, 151, 240):
        with CorpusStream(Records(records, end), TOKENIZER, tmp_path / "records", SETTINGS) as stream:
            seen.append(StreamData(stream.corpus, LENGTH, seed=3, window=20).batch(0, batch_size=16)[0])
            with pytest.raises(ConnectionError, match="the network is gone"):
                stream.corpus.wait_for(lambda: False)
    with CorpusStream(Records(records, None), TOKENIZER, tmp_path / "records", SETTINGS) as stream:
        stream.corpus.wait_for(lambda: False)
        assert stream.corpus.digest == finished.digest
        seen.append(StreamData(stream.corpus, LENGTH, seed=3, window=20).batch(0, batch_size=16)[0])
    assert all(one.equal(seen[0]) for one in seen)


def test_datasets_are_streamed(documents, finished, tmp_path, small_batches):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    data = datasets.Dataset.from_dict({"text": documents}).to_iterable_dataset()
    with CorpusStream(data, TOKENIZER, tmp_path / "datasets", SETTINGS) as stream:
        stream.corpus.wait_for(lambda: False)
        assert stream.corpus.digest == finished.digest


def write_lines(path, documents):
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return found_files(str(path))


def test_files_are_tokenised_in_a_process_of_their_own(documents, finished, tmp_path):
    found = write_lines(tmp_path / "a.jsonl", documents)
    with CorpusStream(found, TOKENIZER, tmp_path / "files", SETTINGS) as stream:
        assert [child.is_alive() for child in multiprocessing.active_children()] == [True]
        data = StreamData(stream.corpus, LENGTH, seed=3)
        data.batch(0)
        held_out = stream.corpus.beginning("validation", LENGTH)
    assert not multiprocessing.active_children()
    assert Corpus(tmp_path / "files").total("train").tokens == finished.total("train").tokens
    assert held_out.shards("validation")
    # What is finished is opened, whatever became of the file.
    (tmp_path / "a.jsonl").unlink()
    with CorpusStream(found, TOKENIZER, tmp_path / "files", SETTINGS) as stream:
        again = StreamData(stream.corpus, LENGTH, seed=3)
        assert again.batch(5)[0].equal(data.batch(5)[0])
        assert stream.corpus.beginning("validation", LENGTH).digest == held_out.digest


def _stream_for_ever(source, folder):
    def look():
        while True:
            time.sleep(0.05)

    with CorpusStream(found_files(str(source)), TOKENIZER, folder, SETTINGS):
        (folder.parent / "begun").touch()
        look()


def test_the_build_of_a_killed_run_ends_and_is_gone_on_with(documents, tmp_path):
    source = tmp_path / "a.jsonl"
    write_lines(source, documents * 40)
    target = tmp_path / "killed"
    process = multiprocessing.get_context("spawn").Process(target=_stream_for_ever, args=(source, target))
    process.start()
    while not (tmp_path / "begun").exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with CorpusStream(found_files(str(source)), TOKENIZER, target, SETTINGS) as stream:
        stream.corpus.wait_for(lambda: False)
    build_corpus(found_files(str(source)), TOKENIZER, tmp_path / "whole", SETTINGS)
    assert Corpus(target).digest == Corpus(tmp_path / "whole").digest


def test_what_the_build_raises_reaches_who_waits(documents, finished, tmp_path, small_batches):
    bad = [*documents, {"texts": "x"}]
    with CorpusStream(bad, TOKENIZER, tmp_path / "bad", SETTINGS) as stream:
        data = StreamData(stream.corpus, LENGTH, window=WINDOW)
        data.batch(0)
        with pytest.raises(ValueError, match="document 300: no field 'text'"):
            [data.batch(step) for step in range(len(finished.shards("train")) * 6000 // 32)]
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\nnot json\n')
    bad_lines = found_files(str(tmp_path / "bad.jsonl"))
    for name, wrong, message in (
        ("lines", bad_lines, r"bad\.jsonl, line 2: not JSON"),
        ("short", ["short"], "holds no sequence of length 34"),
        ("empty", [""], "no document to train on"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            CorpusStream(wrong, TOKENIZER, tmp_path / name, Settings(validation=0)) as stream,
        ):
            StreamData(stream.corpus, LENGTH)
    other = BPETokenizer.train(documents, 300)
    with pytest.raises(ValueError, match="another tokenizer"):
        CorpusStream(documents, other, finished.folder)
    with pytest.raises(ValueError, match="holds an unfinished build of something else"):
        CorpusStream(documents, other, tmp_path / "bad")
    with pytest.raises(TypeError, match="documents is a str"):
        build_corpus("text", TOKENIZER, tmp_path / "string")
    with pytest.raises(ValueError, match="workers is 2"):
        build_corpus(documents, TOKENIZER, tmp_path / "many", workers=2)
    with pytest.raises(ValueError, match="document 0: field 'text' is a int"):
        build_corpus([{"text": 1}], TOKENIZER, tmp_path / "number")
    with pytest.raises(ValueError, match="document 0: a list"):
        build_corpus([["text"]], TOKENIZER, tmp_path / "list")


def test_nobody_waits_where_nobody_builds(documents, finished, tmp_path, small_batches):
    with pytest.raises(FileNotFoundError, match="no beginning of one"):
        GrowingCorpus(tmp_path / "nothing")
    with pytest.raises(ConnectionError):
        build_corpus(Records(documents, 200), TOKENIZER, tmp_path / "begun", SETTINGS)
    corpus = GrowingCorpus(tmp_path / "begun")
    assert not corpus.finished
    assert corpus.index.shards == finished.index.shards[: len(corpus.index.shards)] != ()
    with pytest.raises(ValueError, match="nobody goes on building"):
        corpus.wait_for(lambda: False)


def test_a_worker_that_was_killed_is_an_error(documents, tmp_path):
    found = write_lines(tmp_path / "a.jsonl", documents * 200)
    with CorpusStream(found, TOKENIZER, tmp_path / "files", SETTINGS) as stream:
        os.kill(stream._builder._worker.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="was ended from outside"):
            stream.corpus.wait_for(lambda: False)
