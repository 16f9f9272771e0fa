"""What a record of the teacher cache weighs on real text at Llama-3's sizes, and how fast records are found and read.

python benchmarks/cache_storage.py --gsm8k=/data/gsm8k  # 5 minutes on two cores; writes docs/teacher-cache.md

No 128k-vocabulary teacher fits here, so its two parts are stood in for, on GSM8K's own chains (SmolLM2's tokens):

- predictions of SmolLM2-135M, real probabilities, with its 49,152 ids thrown over 128,256 by a random one-to-one map;
  or of a random Llama of width 64 and vocabulary 128,256, whose 64 most probable ids lie anywhere;
- states of width 8,192 drawn from a normal distribution, which no code makes smaller than its entropy.
"""

import argparse
import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorstore as ts
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from measure import ROOT, machine, markdown_table, write_section

from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.base.types import TopK
from rtd_jax.data.by_length import round_up
from rtd_jax.data.encoding import EncodedChain, encode_traces
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.packing import fixed_batches
from rtd_jax.data.sources import SourceSettings, load_traces
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.open import ModelSettings, open_model
from rtd_jax.teacher.cache import CacheWriter, TeacherCache
from rtd_jax.teacher.identity import CacheSettings, Identity
from rtd_jax.teacher.predictions import top_k_predictions
from rtd_jax.teacher.records import chain_key, encode_record

VOCAB, WIDTH, K, ROWS = 128_256, 8192, 64, 4
RECORDS = 1000  # in the comparison of formats
UPDATE = 64  # chains of an update of rtd_8b, one a row of 1,024 tokens
CACHE = CacheSettings(K)


def predictions(model: DecoderModel, params: Any, vocab_size: int, chains: Sequence[EncodedChain]) -> list[TopK]:
    """The model's top k at the predicted tokens of each chain."""

    @jax.jit
    def forward(params: Any, batch: Any) -> TopK:
        hidden_BLD = model.hidden(params, batch.tokens_BL, batch.positions_BL, batch.attention_ids_BL)
        return top_k_predictions(hidden_BLD, model.head(params), k=K, temperature=4.0, vocab_size=vocab_size)

    found: list[TopK] = []
    slots = max(len(chain.boundaries) for chain in chains)
    length = round_up(max(map(len, chains)), 64)
    for batch in fixed_batches(chains, ROWS, length, 1, slots):
        top = jax.device_get(forward(params, batch))
        for row in range(min(ROWS, len(chains) - len(found))):
            predicting = np.flatnonzero(np.asarray(batch.loss_weights_BL[row])[1:] > 0)
            found.append(TopK(*(array[row, predicting] for array in top)))
        print(f"{len(found)} of {len(chains)} chains", flush=True)
    return found


def encoded(
    chains: Sequence[EncodedChain], tops: Sequence[TopK], vocab_size: int, seed: int = 0
) -> list[tuple[str, bytes]]:
    """(key, record) of every chain, with normal states, ids thrown over the vocabulary."""
    rng = np.random.default_rng(seed)
    thrown = rng.permutation(VOCAB)[:vocab_size].astype(np.int32)
    records = []
    for chain, top in zip(chains, tops, strict=True):
        states_NKD = rng.normal(size=(1, len(chain.boundaries), WIDTH)).astype(np.float32)
        key = chain_key(chain.tokens, chain.boundaries, chain.loss_weights)
        records.append((key, encode_record(top._replace(ids_BLM=thrown[top.ids_BLM]), states_NKD, CACHE)))
    return records


def sizes(chains: Sequence[EncodedChain], tops: dict[str, tuple[Sequence[TopK], int]]) -> str:
    """Table of bytes a token."""
    tokens = sum(len(chain) for chain in chains)
    predicted = sum(int(np.count_nonzero(chain.loss_weights[1:])) for chain in chains)
    states = sum(len(chain.boundaries) for chain in chains)
    rows = []
    for name, (of_chains, vocab_size) in tops.items():
        size = sum(len(record) for _, record in encoded(chains, of_chains, vocab_size))
        rows.append((name, f"{size / tokens:.0f}", f"{size / predicted:.0f}"))
    return markdown_table(("predictions of", "bytes a token", "bytes a predicted token"), rows) + (
        f"\n\n{len(chains)} GSM8K chains in a chat template, {tokens:,} tokens, {predicted:,} of them predicted, "
        f"{states} boundary states of width {WIDTH:,} in int8; k = {K}, compact storage, vocabulary {VOCAB:,}."
    )


def timed(read: Callable[[int], object], order: np.ndarray, rounds: int = 5) -> tuple[float, float]:
    """Reads a second of wall clock and of processor time (all threads): medians over rounds, files in memory."""
    wall, processor = [], []
    for _ in range(rounds + 1):
        started = time.perf_counter(), time.process_time()
        for i in order:
            read(int(i))
        wall.append(time.perf_counter() - started[0])
        processor.append(time.process_time() - started[1])
    return len(order) / statistics.median(wall[1:]), len(order) / statistics.median(processor[1:])


def formats(records: Sequence[bytes], folder: Path) -> str:
    """Table of random reads from files of the same records."""
    order = np.random.default_rng(0).permutation(len(records))
    readers: dict[str, tuple[Path, Callable[[int], bytes]]] = {}

    path = folder / "array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
    opened = ArrayRecordReader(str(path), "readahead_buffer_size:0")
    readers["ArrayRecord, group of 1 (the cache)"] = path, lambda i: opened.read([i])[0]

    table = pa.table({"record": pa.array(records, pa.binary())})
    for group in (1, 64):
        path = folder / f"parquet{group}"
        pq.write_table(table, path, row_group_size=group, compression="none", use_dictionary=False)

        def read_parquet(i: int, file: pq.ParquetFile = pq.ParquetFile(path), group: int = group) -> bytes:
            return file.read_row_group(i // group)["record"][i % group].as_py()

        readers[f"Parquet, row groups of {group}"] = path, read_parquet

    ends = np.cumsum([len(record) for record in records])
    flat = np.frombuffer(b"".join(records), np.uint8)
    for chunk in (2**16, 2**20):
        path = folder / f"zarr{chunk}"
        store = ts.open(
            {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": str(path)},
                "metadata": {
                    "shape": [len(flat)],
                    "data_type": "uint8",
                    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk]}},
                },
                "create": True,
            }
        ).result()
        store.write(flat).result()

        def read_zarr(i: int, store: Any = store) -> bytes:
            return store[int(ends[i]) - len(records[i]) : int(ends[i])].read().result().tobytes()

        readers[f"Zarr by TensorStore, bytes end to end, chunks of {chunk // 1024} KiB"] = path, read_zarr

    rows = []
    for name, (path, read) in readers.items():
        assert all(read(int(i)) == records[i] for i in order[:20]), name
        wall, processor = timed(read, order)
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files) / sum(map(len, records))
        rows.append((name, f"{processor:,.0f}", f"{wall:,.0f}", f"{size:.3f}", len(files)))
        print(rows[-1], flush=True)
    columns = ("format", "records a processor second", "a second, this machine", "size / records", "files")
    return markdown_table(columns, rows) + (
        f"\n\n{len(records):,} records of {np.mean([len(x) for x in records]) / 1024:.0f} KiB on average, one at a "
        "time, in random order, whole, without compression of the file's own; files in memory."
    )


def reading(chains: Sequence[EncodedChain], records: Sequence[tuple[str, bytes]], folder: Path) -> str:
    """How fast the loader turns records into the arrays of an update."""
    identity = Identity("t", "d", "x", VOCAB, WIDTH, (80,), 4.0, K, CACHE.predictions, CACHE.states)
    CacheWriter(folder, identity).write(records)
    cache = TeacherCache(folder, identity)
    update = [chains[i % len(chains)] for i in range(UPDATE)]
    slots = max(len(chain.boundaries) for chain in chains)
    (batch,) = fixed_batches(update, UPDATE, 1024, 1, slots)
    whole = functools.partial(cache.outputs, batch, dtype="bfloat16")
    states = functools.partial(cache.outputs, batch, states_only=True, dtype="bfloat16")
    tokens = sum(len(chain) for chain in update)
    rows = []
    for name, read in (("everything", whole), ("boundary states alone (validation)", states)):
        wall, processor = timed(lambda _, read=read: read(), np.arange(5))
        numbers = [UPDATE * processor, tokens * processor, UPDATE * wall, 1 / processor]
        rows.append((name, *(f"{number:,.0f}" for number in numbers[:3]), f"{numbers[3]:.2f}"))
        print(rows[-1], flush=True)
    columns = ("read", "chains a processor second", "tokens a processor second", "chains a second, this machine")
    return markdown_table((*columns, "processor seconds an update"), rows) + (
        f"\n\nAn update of `rtd_8b`: {UPDATE} chains of GSM8K, {tokens:,} tokens, in rows of 1,024; checked, "
        "decompressed and laid out, by one thread."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", required=True, help="folder with train.jsonl")
    parser.add_argument("--teacher", type=Path, default=ROOT / ".cache" / "smollm2-135m-instruct")
    parser.add_argument("--chains", type=int, default=24)
    parser.add_argument("--no-write", action="store_true", help="print the tables only")
    arguments = parser.parse_args()
    teacher = open_model(ModelSettings(str(arguments.teacher), "float32", "float32"), make_mesh(MeshSettings()))
    tokenizer = teacher.tokenizer
    traces = load_traces(SourceSettings("gsm8k", arguments.gsm8k, limit=arguments.chains, keep_marks=False))
    chains, _ = encode_traces(tokenizer, traces, TextFormat("chat"), row_length=1024)

    real = predictions(teacher.model, teacher.params, teacher.vocab_size, chains)
    tiny = DecoderModel(dataclasses.replace(DecoderConfig(VOCAB, 64, 128, 2, 4, 4, 16)), "float32")
    random = predictions(tiny, jax.jit(tiny.init)(jax.random.key(0)), VOCAB, chains)
    tops = {"SmolLM2-135M, ids thrown over 128,256": (real, teacher.vocab_size), "a random Llama": (random, VOCAB)}
    texts = {"stored": sizes(chains, tops)}
    records = encoded(chains, real, teacher.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        many = [records[i % len(records)][1] for i in range(RECORDS)]
        texts["formats"] = formats(many, Path(folder)) + f" On {machine()}."
        texts["reading"] = reading(chains, records, Path(folder) / "cache") + f" On {machine()}."
    for name, text in texts.items():
        print(text)
        if not arguments.no_write:
            write_section(ROOT / "docs" / "teacher-cache.md", name, text)


if __name__ == "__main__":
    main()
