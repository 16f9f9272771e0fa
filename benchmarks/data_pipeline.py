"""How many tokens a second one host's data path gives, against what the largest plan consumes.

python benchmarks/data_pipeline.py  # a minute; writes docs/benchmarks.md
"""

import argparse
import statistics
import time

import numpy as np
from measure import ROOT, machine, markdown_table, write_section

from rtd_jax.base.sharding import MeshSettings, make_mesh, put_batch
from rtd_jax.data.encoding import encode_traces
from rtd_jax.data.generators.word_problems import generate
from rtd_jax.data.loader import BatchLoader
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT, tiny_tokenizer

ROWS, LENGTH, BATCHES = 64, 1024, 40
# Tokens/s of rtd_8b on 8 x A100 if its arithmetic never waited (docs/scale.md: 5.23 s an update), padding included.
CONSUMED = ROWS * LENGTH / 5.23


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-write", action="store_true", help="print the table, leave docs/benchmarks.md as it is")
    arguments = parser.parse_args()
    traces = generate(6000, (1, 2, 3, 4, 5, 6))
    started = time.perf_counter()
    chains, _ = encode_traces(tiny_tokenizer(), traces, TINY_FORMAT, row_length=LENGTH)
    encoding = sum(len(chain) for chain in chains) / (time.perf_counter() - started)
    rows = [("tokenising and finding boundaries, once at the start", f"{encoding:,.0f}", f"{encoding / CONSUMED:.0f}")]
    mesh = make_mesh(MeshSettings())
    for chains_per_row in (1, 8):
        loader = BatchLoader([(chains, 1.0)], ROWS, LENGTH, chains_per_row, max_boundaries=8, seed=0)
        next(loader)
        speeds = []
        for _ in range(5):
            started, tokens = time.perf_counter(), 0
            for _ in range(BATCHES // 5):
                batch = next(loader)
                tokens += int(np.count_nonzero(batch.chain_ids_BL))
                put_batch(batch, mesh)
            speeds.append(tokens / (time.perf_counter() - started))
        speed = statistics.median(speeds)
        # The plan's tokens are whole rows; a row of few chains is mostly padding, which is not counted here.
        share = tokens / (BATCHES // 5) / (ROWS * LENGTH)
        rows.append(
            (
                f"packing up to {chains_per_row} chains a row, shuffling, onto the device ({share:.0%} of it filled)",
                f"{speed:,.0f}",
                f"{speed / (CONSUMED * share):.0f}",
            )
        )
    text = markdown_table(("", "tokens/s", f"times what an update of {CONSUMED:,.0f} row tokens/s takes"), rows)
    text += f"\n\nMedians on {machine()}."
    print(text)
    if not arguments.no_write:
        write_section(ROOT / "docs" / "benchmarks.md", "data", text)


if __name__ == "__main__":
    main()
