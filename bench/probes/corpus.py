"""What a corpus costs: tokenising beside the tokenizer's own rate, reading beside a training step, memory.

python -m bench.probes.corpus [result]: documents are the Python files of the installed packages, twice the
same with one of 10 times their number for the memory. `result` is a JSON file to write.
"""

from __future__ import annotations

import json
import re
import statistics
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import loopmdm_kernels as lk
from bench.model import token_ids, trained_config, training_step
from bench.roofline import limits, native_dtype
from bench.script import arguments
from loopmdm.data.corpus import Corpus, CorpusData, Settings, build_corpus
from loopmdm.data.text import documents_in, found_files
from loopmdm.data.tokenizer import BPETokenizer
from loopmdm.model import LoopMDM
from loopmdm_kernels.files import write_file

TEXT_BYTES = 80 * 2**20
VOCAB, SAMPLED = 8192, 2**21  # of the tokenizer, and characters it is trained on
TIMES, COPIES = 2, 10
BATCH, LENGTH, LOOPS, BATCHES = 4, 512, 6, 3000
LIBRARY_BATCH = 200  # documents that the library encodes together: of two million characters, as ours


def documents() -> list[str]:
    found = found_files(sysconfig.get_paths()["purelib"], ".py")
    texts: list[str] = []
    left = TEXT_BYTES
    for text in documents_in(found, errors="replace"):
        if left <= 0:
            break
        texts.append(text)
        left -= len(text.encode())
    return texts


def anonymous_mebibytes() -> float:
    """Memory of this process that is no mapped file."""
    text = Path("/proc/self/status").read_text()
    match = re.search(r"RssAnon:\s*(\d+) kB", text)
    assert match is not None
    return int(match[1]) / 1024


def library_seconds(tokenizer: BPETokenizer, texts: list[str]) -> tuple[float, int]:
    """Of the package tokenizers alone, on all processors; and the tokens it makes."""
    backend = tokenizer._backend
    start, tokens = time.perf_counter(), 0
    for first in range(0, len(texts), LIBRARY_BATCH):
        encoded = backend.encode_batch_fast(texts[first : first + LIBRARY_BATCH], add_special_tokens=False)
        tokens += sum(map(len, encoded))
    return time.perf_counter() - start, tokens


def copied(corpus: Corpus, folder: Path) -> Corpus:
    """A corpus of COPIES times the shards, under names of their own."""
    index = json.loads((corpus.folder / "corpus.json").read_text())
    shards = []
    folder.mkdir()
    for path in corpus.folder.glob("*token*"):
        write_file(folder / path.name, path.read_bytes())
    for copy in range(COPIES):
        for shard in index["shards"]:
            name = f"{shard['name']}-{copy}"
            for suffix in ("bin", "crc"):
                data = (corpus.folder / f"{shard['name']}.{suffix}").read_bytes()
                write_file(folder / f"{name}.{suffix}", data)
            shards.append({**shard, "name": name})
    write_file(folder / "corpus.json", json.dumps({**index, "shards": shards}))
    return Corpus(folder)


def read(corpus: Corpus) -> dict[str, float]:
    """Milliseconds of a batch, and memory that reading BATCHES of them has taken."""
    data = CorpusData([corpus], LENGTH, batch_size=BATCH)
    data.batch(0)
    before, seconds = anonymous_mebibytes(), []
    for step in range(1, BATCHES):
        start = time.perf_counter()
        data.batch(step)
        seconds.append(time.perf_counter() - start)
    return {
        "tokens": corpus.total("train").tokens,
        "milliseconds_a_batch": round(1e3 * statistics.median(seconds), 3),
        "mean_milliseconds_a_batch": round(1e3 * statistics.fmean(seconds), 3),
        "grown_mebibytes": round(anonymous_mebibytes() - before, 2),
    }


def step_milliseconds() -> float:
    torch.manual_seed(0)
    model = LoopMDM(trained_config(LENGTH, LOOPS))
    ids = token_ids(BATCH, LENGTH, model.config)
    step = training_step(
        model, lambda m: m.loss(ids, num_loops=LOOPS, seed=0).loss, native_dtype() == torch.bfloat16
    )
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[2:])


def measure() -> dict[str, Any]:
    texts = documents()
    text_bytes = sum(len(text.encode()) for text in texts)
    tokenizer = BPETokenizer.train(("".join(texts)[:SAMPLED],), VOCAB)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in range(4):  # files of which two processes take their share
            lines = (json.dumps({"text": text}) + "\n" for text in texts[part::4])
            write_file(folder / f"{part}.jsonl", "".join(lines))
        found = found_files(str(folder / "*.jsonl"))
        library, ours = [], []
        for repeat in range(TIMES):
            seconds, tokens = library_seconds(tokenizer, texts)
            library.append(seconds)
            start = time.perf_counter()
            corpus = build_corpus(found, tokenizer, folder / f"corpus{repeat}", Settings(validation=0))
            ours.append(time.perf_counter() - start)
            assert corpus.total("train").tokens == tokens + len(texts)
        once, tenfold = read(corpus), read(copied(corpus, folder / "tenfold"))
        step = step_milliseconds()
    machine = limits()
    return {
        "command": "python -m bench.probes.corpus",
        "machine": {name: machine[name] for name in ("isa", "threads")},
        "versions": {"loopmdm_kernels": lk.__version__, "torch": torch.__version__},
        "figures": {
            "text": {"bytes": text_bytes, "documents": len(texts), "tokens": tokens},
            "tokenising": {
                "library_tokens_a_second": round(tokens / statistics.median(library)),
                "corpus_tokens_a_second": round(tokens / statistics.median(ours)),
                "share_of_library": round(
                    statistics.median(a / b for a, b in zip(library, ours, strict=True)), 3
                ),
            },
            "reading": once,
            "reading, 10 times the corpus": tenfold,
            "training step": {
                "milliseconds": round(step, 1),
                "share_of_reading": round(tenfold["mean_milliseconds_a_batch"] / step, 5),
            },
        },
    }


def main(target: str | None = None) -> None:
    result = measure()
    if target is not None:
        write_file(Path(target), json.dumps(result, indent=1) + "\n")
    for name, figures in result["figures"].items():
        print(f"{name}: {', '.join(f'{key} {value:,}' for key, value in figures.items())}")


if __name__ == "__main__":
    main(*arguments(__doc__, "[result]"))
