"""Does the teacher's direction turn where steps end?

    python benchmarks/turns.py    # the bundled teacher on word problems; half a minute
    python benchmarks/turns.py --teacher=<folder> --schema=gsm8k --location=/data/gsm8k --limit=200

Area under the ROC curve, over all completion tokens, of what soft windows could be cut by, against the tokens on which
steps end and those before and behind them: the turn 1 - cos(h_{t-1}, h_t) of the final state, which they are cut by,
and the turn of its movement, 1 - cos(h_{t-1} - h_{t-2}, h_t - h_{t-1}). One half is chance.
"""

import argparse

import numpy as np
from coherence_floor import BUNDLED
from measure import markdown_table
from sklearn.metrics import roc_auc_score

from rtd_jax.data.encoding import EncodedChain, encode_traces
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.sources import SourceSettings, load_traces
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT
from rtd_jax.steps.prose import Reading
from rtd_jax.steps.token_states import token_states
from rtd_jax.train.saved_models import load_model

OFFSETS = (-1, 0, 1)  # tokens from a step's last


def turns(vectors_TD: np.ndarray) -> np.ndarray:
    """1 - cos of each vector with the one before: [T - 1]."""
    unit_TD = vectors_TD / (np.linalg.norm(vectors_TD, axis=-1, keepdims=True) + 1e-12)
    return 1 - np.sum(unit_TD[1:] * unit_TD[:-1], axis=-1)


def reading(chain: EncodedChain) -> Reading:
    """The chain, and the last two tokens of its prompt as if they were its own."""
    nothing_T = np.zeros(len(chain) - chain.prompt_length + 2, bool)
    return Reading(chain.source, chain.tokens, nothing_T.astype(np.int32), nothing_T, nothing_T)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(BUNDLED))
    parser.add_argument("--schema", default="synthetic")
    parser.add_argument("--location", default="")
    parser.add_argument("--limit", type=int, default=600, help="chains")
    args = parser.parse_args()
    split = "train" if args.location else "validation"
    traces = load_traces(SourceSettings(args.schema, args.location, split, limit=args.limit))
    loaded = load_model(args.teacher)
    text = TextFormat() if args.location else TINY_FORMAT
    chains, _ = encode_traces(loaded.tokenizer, traces, text, row_length=512, max_dropped_fraction=1.0)
    states = token_states(loaded.model, loaded.params, loaded.mesh, [reading(chain) for chain in chains], (-1,), 16)
    scores: dict[str, list[np.ndarray]] = {"the state's turn": [], "its movement's turn": []}
    labels: dict[int, list[np.ndarray]] = {offset: [] for offset in OFFSETS}
    for chain, states_TND in zip(chains, states, strict=True):
        states_TD = states_TND[:, 0].astype(np.float32)
        scores["the state's turn"].append(turns(states_TD)[1:])
        scores["its movement's turn"].append(turns(np.diff(states_TD, axis=0)))
        for offset in OFFSETS:
            ends = chain.boundaries[1:] + offset
            labels[offset].append(np.isin(np.arange(chain.prompt_length, len(chain)), ends))
    rows = [
        [name, *(f"{roc_auc_score(np.concatenate(labels[offset]), np.concatenate(of)):.3f}" for offset in OFFSETS)]
        for name, of in scores.items()
    ]
    print(f"{len(chains)} chains")
    print(markdown_table(["", "before the end", "at the end", "behind it"], rows))


if __name__ == "__main__":
    main()
