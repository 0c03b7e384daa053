import json
import multiprocessing
import os
import resource
import signal
import time

import numpy as np
import pytest

from loopmdm.data.corpus import Corpus, CorpusData, Settings, build_corpus
from loopmdm.data.corpus import build as building
from loopmdm.data.corpus.order import CYCLE, Mixture, shuffled
from loopmdm.data.corpus.store import BLOCK, INDEX_FILE, DamagedCorpusError
from loopmdm.data.text import content_hash, found_files
from loopmdm.data.tokenizer import ByteTokenizer
from loopmdm_kernels.files import WriteError
from loopmdm_kernels.locks import LockedError

TOKENIZER = ByteTokenizer()
EOS = TOKENIZER.eos_token_id


@pytest.fixture
def sources(tmp_path):
    """Files of several kinds, an empty document among them; and their documents in order."""
    folder = tmp_path / "sources"
    folder.mkdir()
    rng = np.random.default_rng(0)
    documents = ["".join(chr(c) for c in rng.integers(32, 300, rng.integers(1, 900))) for _ in range(300)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in [*documents[:200], ""]))
    for number, document in enumerate(documents[200:]):
        (folder / f"b{number:03d}.txt").write_text(document, newline="")
    return folder, documents


def built(sources, folder, *, settings=None, workers=1, **options):
    settings = settings or Settings(validation=0.1, shard_tokens=20_000)
    return build_corpus(found_files(str(sources)), TOKENIZER, folder, settings, workers=workers, **options)


def tokens_of(corpus, part):
    shards = corpus.shards(part)
    return np.concatenate([corpus.read(s, 0, s.tokens) for s in shards]) if shards else np.empty(0, int)


def stream(documents):
    return np.concatenate([[*document.encode(), EOS] for document in documents])


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(building, "UNIT_BYTES", 30_000)
    monkeypatch.setattr(building, "BATCH_CHARS", 3000)


def test_shards_hold_every_document_in_order_on_the_side_its_hash_says(sources, tmp_path, small_units):
    folder, documents = sources
    corpus = built(folder, tmp_path / "corpus")
    held_out = [content_hash(d.encode()) < 0.1 * 2**64 for d in documents]
    assert 5 < sum(held_out) < 100
    for part, wanted in (("train", False), ("validation", True)):
        expected = [d for d, out in zip(documents, held_out, strict=True) if out == wanted]
        assert np.array_equal(tokens_of(corpus, part), stream(expected))
        total = corpus.total(part)
        assert total.documents == len(expected)
        assert total.tokens == len(stream(expected))
        assert total.text_bytes == sum(len(d.encode()) for d in expected)
    assert len(corpus.shards("train")) > 3
    left = {p.name for p in (tmp_path / "corpus").iterdir()} - {INDEX_FILE, "loopmdm_tokenizer.json"}
    assert left == {f"{s.name}.{suffix}" for s in corpus.shards("all") for suffix in ("bin", "crc")}
    corpus.check()


def test_the_number_of_workers_does_not_matter(sources, tmp_path):
    # Workers are processes of their own: the sizes of units are those of the package.
    folder, _ = sources
    one, two = (built(folder, tmp_path / str(n), workers=n) for n in (1, 2))
    assert one.index.shards == two.index.shards
    assert one.digest == two.digest


def test_a_build_that_stops_anywhere_goes_on_to_the_same_corpus(sources, tmp_path, small_units):
    folder, _ = sources
    settings = Settings(validation=0.1, shard_tokens=6000)
    whole = built(folder, tmp_path / "whole", settings=settings)

    class Stop(Exception):
        pass

    def stopping_after(batches):
        seen = iter(range(batches + 1))  # and the call at the start

        def progress(_):
            if next(seen, None) is None:
                raise Stop

        return progress

    for stops in range(100):
        try:
            progress = stopping_after(3 + stops % 3)
            parts = built(folder, tmp_path / "parts", settings=settings, on_progress=progress)
            break
        except Stop:
            with pytest.raises(FileNotFoundError, match="holds no corpus"):
                Corpus(tmp_path / "parts")
    assert 5 < stops < 99
    assert parts.index == whole.index
    assert np.array_equal(tokens_of(parts, "all"), tokens_of(whole, "all"))


def _build_for_ever(sources, folder):
    building.UNIT_BYTES, building.BATCH_CHARS = 30_000, 3000
    built(sources, folder, on_progress=lambda _: time.sleep(0.02))


def test_a_killed_build_goes_on(sources, tmp_path, small_units):
    folder, _ = sources
    target = tmp_path / "killed"
    process = multiprocessing.get_context("spawn").Process(target=_build_for_ever, args=(folder, target))
    process.start()
    while not list(target.glob("unit-*.json")):
        assert process.is_alive()
        time.sleep(0.01)
    with pytest.raises(LockedError):
        built(folder, target)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert built(folder, target).index.shards == built(folder, tmp_path / "whole").index.shards


def test_what_cannot_be_built(sources, tmp_path):
    folder, _ = sources
    with pytest.raises(ValueError, match="validation is 1"):
        Settings(validation=1.0)
    with pytest.raises(ValueError, match="errors is 'ignore'"):
        Settings(errors="ignore")
    with pytest.raises(ValueError, match="shard_tokens"):
        Settings(shard_tokens=0)
    with pytest.raises(ValueError, match="workers"):
        built(folder, tmp_path / "none", workers=0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"1 other file\(s\), thesis.txt among them"):
        built(folder, tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.txt"]
    built(folder, tmp_path / "corpus")
    with pytest.raises(ValueError, match="holds a finished corpus"):
        built(folder, tmp_path / "corpus")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="no document"):
        built(tmp_path / "empty.jsonl", tmp_path / "of nothing")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"bad.jsonl, line 2: not JSON"):
            built(tmp_path / "bad.jsonl", tmp_path / f"bad {workers}", workers=workers)


def test_a_begun_build_is_not_continued_as_another(sources, tmp_path, small_units):
    folder, _ = sources

    def stop(counts):
        if any((tmp_path / "corpus").glob("*.bin")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built(folder, tmp_path / "corpus", on_progress=stop)
    with pytest.raises(ValueError, match="unfinished build of something else: its settings changed"):
        built(folder, tmp_path / "corpus", settings=Settings(validation=0.2))
    (folder / "b000.txt").write_text("other words")
    with pytest.raises(ValueError, match="its files changed"):
        built(folder, tmp_path / "corpus")


def test_a_build_that_failed_before_its_first_shard_is_put_right(sources, tmp_path):
    folder, _ = sources
    (tmp_path / "bad.jsonl").write_text("not json\n")
    (tmp_path / "empty.txt").touch()
    for wrong, message in ((tmp_path / "bad.jsonl", "not JSON"), (tmp_path / "empty.txt", "no document")):
        with pytest.raises(ValueError, match=message):
            built(wrong, tmp_path / "corpus")
    expected = built(folder, tmp_path / "expected")
    found = built(folder, tmp_path / "corpus")
    assert found.digest == expected.digest
    names = [sorted(path.name for path in one.folder.iterdir()) for one in (found, expected)]
    assert names[0] == names[1]


def test_a_disk_that_is_full_at_the_start_is_emptied_and_the_build_begun_again(sources, tmp_path):
    folder, _ = sources
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256, before[1]))  # takes the tokenizer, not the plan
    try:
        with pytest.raises(WriteError, match=r"build\.json: File too large; no partial file is left"):
            built(folder, tmp_path / "corpus")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "corpus").iterdir())
    built(folder, tmp_path / "corpus")


@pytest.mark.parametrize("suffix", ["bin", "crc"])
def test_damage_is_one_clear_error(sources, tmp_path, suffix):
    folder, _ = sources
    corpus = built(folder, tmp_path / "corpus", settings=Settings(shard_tokens=10**6))
    path = tmp_path / "corpus" / f"{corpus.shards('train')[0].name}.{suffix}"
    data = path.read_bytes()
    assert len(data) > BLOCK or suffix == "crc"
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedCorpusError, match=path.name):
        Corpus(tmp_path / "corpus").check()
    path.write_bytes(data[:-1])
    with pytest.raises(DamagedCorpusError, match=f"{path.name} has {len(data) - 1} bytes, {len(data)} were"):
        Corpus(tmp_path / "corpus")
    path.unlink()
    with pytest.raises(DamagedCorpusError, match=f"{path.name} is missing"):
        Corpus(tmp_path / "corpus")


def test_only_blocks_that_are_read_are_compared(sources, tmp_path):
    folder, _ = sources
    corpus = built(folder, tmp_path / "corpus", settings=Settings(shard_tokens=10**6))
    shard = corpus.shards("train")[0]
    path = tmp_path / "corpus" / f"{shard.name}.bin"
    data = bytearray(path.read_bytes())
    data[BLOCK + 1] ^= 1
    path.write_bytes(data)
    damaged = Corpus(tmp_path / "corpus")
    assert len(damaged.read(shard, 0, BLOCK // 2)) == BLOCK // 2
    with pytest.raises(DamagedCorpusError, match=f"bytes from {BLOCK} on"):
        damaged.read(shard, BLOCK // 2 - 1, BLOCK // 2 + 1)


@pytest.mark.parametrize("change", [{"format": 2}, {"shards": [{"name": "x"}]}, {"vocab_size": None}])
def test_a_damaged_index_is_one_clear_error(sources, tmp_path, change):
    folder, _ = sources
    built(folder, tmp_path / "corpus")
    path = tmp_path / "corpus" / INDEX_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DamagedCorpusError, match=f"{INDEX_FILE} is damaged"):
        Corpus(tmp_path / "corpus")


def test_a_sequence_is_bos_tokens_eos_and_an_epoch_holds_each_once(sources, tmp_path, small_units):
    folder, _ = sources
    corpus = built(folder, tmp_path / "corpus")
    data = CorpusData([corpus], 50, seed=3, batch_size=7)
    bodies = []
    for shard in corpus.shards("train"):
        body = corpus.read(shard, 0, shard.tokens // 48 * 48)
        bodies += [tuple(row) for row in body.reshape(-1, 48)]
    assert len(data) == len(bodies)
    seen = []
    for step in range(-(-2 * len(data) // 7)):
        ids, mask = data.batch(step)
        assert mask is None
        assert (ids[:, 0] == TOKENIZER.bos_token_id).all()
        assert (ids[:, -1] == EOS).all()
        seen += [tuple(row) for row in ids[:, 1:-1].tolist()]
    first, second = seen[: len(data)], seen[len(data) : 2 * len(data)]
    assert sorted(first) == sorted(second) == sorted(bodies)
    assert first != second != bodies
    again = CorpusData([corpus], 50, seed=4, batch_size=7).batch(0)[0]
    assert not np.array_equal(again, data.batch(0)[0])


def test_other_ranks_and_micro_batches_see_the_same_global_batch(sources, tmp_path):
    folder, _ = sources
    corpus = built(folder, tmp_path / "corpus")

    def global_batch(step, accumulation, world_size, size):
        data = CorpusData([corpus], 20, accumulation=accumulation)
        places = [(micro, rank) for micro in range(accumulation) for rank in range(world_size)]
        return np.concatenate([data.batch(step, *place, world_size, size)[0] for place in places])

    for step in (0, 9):
        wanted = global_batch(step, 1, 1, 12)
        for shape in ((1, 2, 6), (3, 1, 4), (2, 3, 2)):
            assert np.array_equal(global_batch(step, *shape), wanted)


@pytest.mark.parametrize("size", [1, 2, 3, 17, 256, 1000, 4097])
def test_shuffled_is_a_permutation_that_depends_on_everything(size):
    places = np.arange(size)
    orders = {}
    for case in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**64 - 1, -1, 2**40)):
        seed, source, epoch = case
        order = shuffled(places, size, seed, source, np.full(size, epoch))
        assert np.array_equal(np.sort(order), places)
        orders[case] = tuple(order.tolist())
        assert orders[case][::-1] == tuple(
            shuffled(places[::-1], size, seed, source, np.full(size, epoch)).tolist()
        )
    if size > 16:
        assert len(set(orders.values())) == len(orders)


def test_shuffled_sends_every_place_everywhere():
    size, seeds = 10, 4000
    counts = np.zeros((size, size))
    for seed in range(seeds):
        counts[np.arange(size), shuffled(np.arange(size), size, seed, 0, np.zeros(size, int))] += 1
    expected = seeds / size
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < 140  # chi-square, 81 degrees of freedom: exceeded with probability 5e-5


def test_a_mixture_keeps_its_shares_and_numbers_each_corpus_in_order():
    mixture = Mixture([5, 3, 0.5], seed=1)
    sources, numbers = mixture.at(np.arange(3 * CYCLE + 100))
    for source, share in enumerate((5, 3, 0.5)):
        assert np.array_equal(np.sort(numbers[sources == source]), np.arange((sources == source).sum()))
        assert abs((sources[:CYCLE] == source).sum() - share / 8.5 * CYCLE) <= 1
        assert mixture.counts(len(sources))[source] == (sources == source).sum()
    assert not np.array_equal(sources[:CYCLE], sources[CYCLE : 2 * CYCLE])
    some = np.array([5000, 3, 5001, 9000])
    assert np.array_equal(mixture.at(some), (sources[some], numbers[some]))


def test_a_mixture_of_corpora_repeats_the_small_one(sources, tmp_path):
    folder, documents = sources
    (tmp_path / "small.txt").write_text(documents[0] * 3)
    large = built(folder, tmp_path / "large")
    small = built(tmp_path / "small.txt", tmp_path / "small", settings=Settings(validation=0))
    data = CorpusData([large, small], 30, weights=[1, 1], batch_size=64)
    repeats = data.repeats(64 * 50)
    assert repeats[1] > 10 * repeats[0]
    of_small = {
        tuple(row)
        for row in CorpusData([small], 30, batch_size=len(CorpusData([small], 30))).batch(0)[0].tolist()
    }
    seen = [tuple(row) in of_small for step in range(50) for row in data.batch(step)[0].tolist()]
    assert np.mean(seen) == pytest.approx(0.5, abs=0.01)
    # Without weights, by the numbers of sequences.
    even = CorpusData([large, small], 30)
    assert even.repeats(len(even)) == pytest.approx([1, 1], abs=0.2)


def test_bad_mixtures_are_refused(sources, tmp_path):
    folder, _ = sources
    corpus = built(folder, tmp_path / "corpus")
    for weights, message in (
        ([1], "1 values for 2"),
        ([1, 0], "above 0"),
        ([1, float("nan")], "above 0"),
        ([1, 1e-9], "at least 1/4096"),
    ):
        with pytest.raises(ValueError, match=message):
            CorpusData([corpus, corpus], 20, weights=weights)
    with pytest.raises(ValueError, match="corpora is empty"):
        CorpusData([], 20)
    with pytest.raises(ValueError, match="holds no sequence of length 1000000"):
        CorpusData([corpus], 10**6)
    with pytest.raises(ValueError, match="length"):
        CorpusData([corpus], 2)
