"""What a teacher cache saves: updates with and without the teacher, in turn in one process.

python benchmarks/teacher_cache.py  # 2 minutes on two cores; writes docs/teacher-cache.md
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import ROOT, machine, markdown_table, write_section

from rtd_jax.common.types import Batch, TeacherOutputs
from rtd_jax.losses import LossWeights
from rtd_jax.models import LlamaConfig, LlamaModel
from rtd_jax.planning.program import matmul_flops, memory
from rtd_jax.teacher.online import teacher_outputs
from rtd_jax.teacher.predictions import top_k_predictions
from rtd_jax.training.state import create_state, init_projections
from rtd_jax.training.step import StepSettings, make_train_step

ROWS, LENGTH, STEP_TOKENS, VOCAB, K = 4, 256, 40, 8192, 64
# 70B : 8B is 8.8 : 1 in weights and 6.9 : 1 in FLOPs of a forward pass with the head; here it is printed.
TEACHER = LlamaConfig(VOCAB, 1024, 3584, layers=8, heads=16, kv_heads=4, head_dim=64)
STUDENT = LlamaConfig(VOCAB, 512, 1792, layers=4, heads=8, kv_heads=2, head_dim=64)


def random_batch() -> Batch:
    tokens_BL = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    ends = np.arange(STEP_TOKENS - 1, LENGTH, STEP_TOKENS, dtype=np.int32)
    places_BCK = np.broadcast_to(ends, (ROWS, 1, len(ends)))
    return Batch(
        tokens_BL,
        np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens_BL.shape),
        np.ones_like(tokens_BL),
        np.broadcast_to(np.arange(LENGTH) > 0, tokens_BL.shape).astype(np.float32),
        places_BCK,
        np.ones(places_BCK.shape, bool),
    )


def updates(rounds: int) -> str:
    """Table of the three updates: seconds in turn, and what the compiled program holds."""
    teacher, student, optimizer, batch = LlamaModel(TEACHER), LlamaModel(STUDENT), optax.adamw(1e-4), random_batch()
    key = jax.random.PRNGKey(0)
    params = jax.jit(teacher.init)(key)
    given = jax.tree.map(jnp.asarray, batch)
    online = jax.jit(lambda params: teacher_outputs(teacher, params, given))(params)
    top_k = top_k_predictions(online.hidden_BLD, teacher.head(params), k=K, temperature=4.0, vocab_size=VOCAB)
    cached = jax.device_get(TeacherOutputs(None, online.boundary_states_BCKD, top_k=top_k))
    none = LossWeights(alignment=0.0, coherence=0.0)
    steps: dict[str, tuple[Any, Any, LossWeights]] = {
        "plain online KD": (make_train_step(student, teacher, optimizer, StepSettings(), VOCAB), params, none),
        "online RTD": (make_train_step(student, teacher, optimizer, StepSettings(), VOCAB), params, LossWeights()),
        "cached RTD": (make_train_step(student, None, optimizer, StepSettings(), VOCAB), cached, LossWeights()),
    }
    states, sizes = {}, {}
    for name, (step, source, weights) in steps.items():
        start = {"student": student.init(key), **init_projections(key, STUDENT.width, TEACHER.width)}
        states[name] = create_state(start, optimizer, jax.random.PRNGKey(0))
        traced = step.trace(states[name], source, batch, weights)
        sizes[name] = memory(traced.lower().compile()), matmul_flops(traced.jaxpr.jaxpr)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, (step, source, weights) in steps.items():
            started = time.perf_counter()
            states[name], metrics = step(states[name], source, batch, weights)
            jax.block_until_ready((states[name], metrics))
            if turn >= 2:  # compiled, and warm
                seconds[name].append(time.perf_counter() - started)
    first = seconds["plain online KD"]
    rows = []
    for name in steps:
        ratios = sorted(b / a for a, b in zip(first, seconds[name], strict=True))
        quartiles = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
        size, flops = sizes[name]
        rows.append(
            (
                name,
                f"{statistics.median(seconds[name]):.3f}",
                f"{statistics.median(ratios):.3f} ({quartiles[0]:.3f} to {quartiles[1]:.3f})",
                f"{size.peak / 2**20:,.0f}",
                f"{flops / sizes['plain online KD'][1]:.3f}",
            )
        )
    columns = (
        "update",
        "s, median",
        "/ plain online KD (quartiles)",
        "peak MiB, as compiled",
        "FLOPs / plain online KD",
    )
    ratio = _forward(teacher, batch) / _forward(student, batch)
    return markdown_table(columns, rows) + (
        f"\n\n{rounds} updates of each in turn, {ROWS} x {LENGTH} tokens, vocabulary {VOCAB:,}, float32; the teacher's "
        f"forward pass costs {ratio:.1f} x the student's. Plain KD is RTD with both weights 0, its boundary terms still computed."
    )


def _forward(model: LlamaModel, batch: Batch) -> float:
    rows = batch.tokens_BL, batch.positions_BL, batch.chain_ids_BL
    return matmul_flops(
        jax.make_jaxpr(lambda p: model.logits(p, model.hidden(p, *rows)))(model.abstract_params()).jaxpr
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--no-write", action="store_true", help="print the tables, leave docs/teacher-cache.md as it is"
    )
    arguments = parser.parse_args()
    text = updates(arguments.rounds) + f" On {machine()}."
    print(text)
    if not arguments.no_write:
        write_section(ROOT / "docs" / "teacher-cache.md", "measured", text)


if __name__ == "__main__":
    main()
