"""Does the teacher's direction turn where steps end?

    python benchmarks/turns.py    # the bundled teacher on word problems; half a minute
    python benchmarks/turns.py --teacher=<folder> --schema=gsm8k --location=/data/gsm8k --limit=200

Soft windows are cut by the turn 1 - cos(h_{t-1}, h_t) of the final states (`steps/soft.py`). For it, for that of other
layers, and for the turn of the movement, 1 - cos(h_{t-1} - h_{t-2}, h_t - h_{t-1}): the area under the ROC curve over
all completion tokens, for the tokens on which steps end and for those before and behind them (one half is chance); the
standard deviation over the mean; and how many ends of windows of 12 tokens lie within one token of a step's end. Writes
a section of docs/coherence.md.
"""

import argparse

import numpy as np
from coherence_floor import BUNDLED
from measure import ROOT, markdown_table, write_section
from sklearn.metrics import roc_auc_score

from rtd_jax.data.encoding import EncodedChain, encode_traces
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.sources import SourceSettings, load_traces
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT
from rtd_jax.steps.prose import Reading
from rtd_jax.steps.soft import in_soft_windows
from rtd_jax.steps.token_states import token_states
from rtd_jax.train.saved_models import load_model

TOKENS = 12  # of a window
OFFSETS = (-1, 0, 1)  # tokens from a step's last


def turns(vectors_TD: np.ndarray) -> np.ndarray:
    """1 - cos of each vector with the one before: [T - 1]."""
    unit_TD = vectors_TD / (np.linalg.norm(vectors_TD, axis=-1, keepdims=True) + 1e-12)
    return 1 - np.sum(unit_TD[1:] * unit_TD[:-1], axis=-1)


def reading(chain: EncodedChain) -> Reading:
    """The chain, and the last two tokens of its prompt as if they were its own."""
    nothing_T = np.zeros(len(chain) - chain.prompt_length + 2, bool)
    return Reading(chain.source, chain.tokens, nothing_T.astype(np.int32), nothing_T, nothing_T)


def measured(chains: list[EncodedChain], turns_of: list[np.ndarray]) -> list[str]:
    """The cells of a row, for the turn at each token of each chain's completion."""
    areas = []
    for offset in OFFSETS:
        labels = [
            np.isin(np.arange(chain.prompt_length, len(chain)), chain.boundaries[1:] + offset) for chain in chains
        ]
        areas.append(roc_auc_score(np.concatenate(labels), np.concatenate(turns_of)))
    spread = np.mean([np.std(turns_T) / max(np.mean(turns_T), 1e-12) for turns_T in turns_of])
    near = []
    for chain, turns_T in zip(chains, turns_of, strict=True):
        inner = in_soft_windows(chain, turns_T, TOKENS).boundaries[1:-1]  # the last one is the chain's end
        near += list(np.min(np.abs(inner[:, None] - chain.boundaries[1:]), axis=1) <= 1)
    return [*(f"{area:.2f}" for area in areas), f"{spread:.2f}", f"{100 * np.mean(near):.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(BUNDLED))
    parser.add_argument("--schema", default="synthetic")
    parser.add_argument("--location", default="")
    parser.add_argument("--limit", type=int, default=300, help="chains")
    args = parser.parse_args()
    split = "train" if args.location else "validation"
    traces = load_traces(SourceSettings(args.schema, args.location, split, limit=args.limit))
    loaded = load_model(args.teacher)
    text = TextFormat() if args.location else TINY_FORMAT
    chains, _ = encode_traces(loaded.tokenizer, traces, text, row_length=512, max_dropped_fraction=1.0)
    layers = tuple(range(1, loaded.model.config.layers + 1))
    states = token_states(loaded.model, loaded.params, loaded.mesh, [reading(chain) for chain in chains], layers, 16)
    rows = [["as many tokens in each", *measured(chains, [np.ones(len(x) - 2) for x in states])]]
    for i, layer in enumerate(layers):
        name = f"layer {layer}" + (", normed (of soft windows)" if layer == layers[-1] else "")
        of_layer = [states_TND[:, i].astype(np.float32) for states_TND in states]
        rows.append([name, *measured(chains, [turns(states_TD)[1:] for states_TD in of_layer])])
        moves = [turns(np.diff(states_TD, axis=0)) for states_TD in of_layer]
        rows.append([f"layer {layer}, movement", *measured(chains, moves)])
    columns = ["turn", "before a step's end", "at it", "behind it", "spread", "ends near steps' (%)"]
    table = markdown_table(columns, rows)
    print(table)
    write_section(ROOT / "docs" / "coherence.md", f"{args.schema}_turns", f"{len(chains)} chains.\n\n{table}")


if __name__ == "__main__":
    main()
