"""How low the coherence loss goes for a student that knows nothing of a chain but its depth and the place in it.

python benchmarks/coherence_floor.py  # the bundled teacher on word problems; half a minute
python benchmarks/coherence_floor.py --teacher=<study>/prepared/lift_teacher/model --schema=lift
python benchmarks/coherence_floor.py --teacher=<folder> --schema=gsm8k --location=/data/gsm8k --limit=200 --layers=15,30

Each transition is answered by the mean direction of other chains' transitions at its place. A student whose states say
no more than that reaches this loss through g, so what lies below is all that the loss can teach about reasoning.
Writes two sections of docs/coherence.md: the ends of steps in each layer, and in the last layer every `loss.step_state`
with every `loss.distance`.
"""

import argparse
from typing import get_args

import numpy as np
from measure import ROOT, markdown_table, write_section

from rtd_jax.base.types import StepState
from rtd_jax.data.encoding import encode_traces
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.sources import SourceSettings, load_traces
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT
from rtd_jax.eval.states import boundary_states
from rtd_jax.losses import coherence
from rtd_jax.losses.trajectory import Distance
from rtd_jax.train.saved_models import load_model

BUNDLED = ROOT / "rtd_jax" / "bundled" / "tiny_teacher"
DEPTHS = range(1, 7)


def floor(states_CKD: np.ndarray, distance: Distance = "cosine") -> float:
    """Coherence loss of states that make the same transition at each place in every chain.

    The transition is made of the even chains' for the odd ones, and the other way round: the mean of their directions,
    or, for the squared distance, the one of least relative error, their mean under weights 1 / |delta|^2.

    Args:
      states_CKD: the prompt's and every step's, of chains of one depth.
    """
    steps_CJD = np.diff(states_CKD, axis=1)
    weights_CJ1 = 1 / (np.linalg.norm(steps_CJD, axis=-1, keepdims=True) + 1e-12) ** (1 if distance == "cosine" else 2)
    losses = []
    for half in (0, 1):
        held_CKD = states_CKD[half::2]
        others, weights = steps_CJD[1 - half :: 2], weights_CJ1[1 - half :: 2]
        moves_JD = (others * weights).sum(0) / weights.sum(0)
        blind_CKD = np.broadcast_to(np.pad(moves_JD.cumsum(0), ((1, 0), (0, 0))), held_CKD.shape)
        losses.append(coherence(blind_CKD, held_CKD, np.ones(held_CKD.shape[:2], bool), distance=distance))
    return float(np.mean(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(BUNDLED))
    parser.add_argument("--schema", default="synthetic")
    parser.add_argument("--location", default="")
    parser.add_argument("--limit", type=int, default=3000, help="chains")
    parser.add_argument("--layers", default="", help="of the teacher, separated by commas; all")
    args = parser.parse_args()
    source = SourceSettings(
        args.schema, args.location, "validation" if not args.location else "train", limit=args.limit
    )
    traces = load_traces(source)
    loaded = load_model(args.teacher)
    text = TextFormat() if args.location else TINY_FORMAT
    chains, report = encode_traces(loaded.tokenizer, traces, text, row_length=512, max_dropped_fraction=1.0)
    kept = [trace for i, trace in enumerate(traces) if i not in set(report.dropped)]
    depth_C = np.array([trace.depth for trace in kept])
    depths = [depth for depth in DEPTHS if (depth_C == depth).sum() >= 20]
    count = loaded.model.config.layers
    rows = []
    for layer in map(int, args.layers.split(",")) if args.layers else range(1, count + 1):
        states_CKD, _ = boundary_states(loaded, chains, -1 if layer == count else layer)
        cells = [f"{floor(states_CKD[depth_C == depth, : depth + 1]):.2f}" for depth in depths]
        rows.append([f"{layer}, normed" if layer == count else layer, *cells])
        print(*rows[-1], flush=True)
    steps = [f"{depth} step{'s' * (depth > 1)}" for depth in depths]
    document = ROOT / "docs" / "coherence.md"
    write_section(document, args.schema, f"{len(kept)} chains.\n\n{markdown_table(['layer', *steps], rows)}")
    rows = []
    for step_state in get_args(StepState):
        states_CKD, _ = boundary_states(loaded, chains, step_state=step_state)
        for distance in get_args(Distance):
            cells = (f"{floor(states_CKD[depth_C == depth, : depth + 1], distance):.2f}" for depth in depths)
            rows.append([f"{step_state}, {distance}", *cells])
            print(*rows[-1], flush=True)
    table = markdown_table(["step_state, distance", *steps], rows)
    write_section(document, f"{args.schema}_states", f"The last layer:\n\n{table}")


if __name__ == "__main__":
    main()
