"""What RTD costs on top of plain KD: compiled FLOPs at the published sizes, and step time here, in turn; one process.

python benchmarks/rtd_overhead.py  # 5 minutes on two cores; writes docs/benchmarks.md
"""

import argparse
import importlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from measure import ROOT, machine, markdown_table, random_batch, write_section

from rtd_jax.apps.plan.program import matmul_flops
from rtd_jax.base.boundaries import shifted_labels
from rtd_jax.base.means import Mean
from rtd_jax.base.settings import build
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.base.types import Batch
from rtd_jax.losses import kd
from rtd_jax.methods import LossSettings
from rtd_jax.methods.term import Setup
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel
from rtd_jax.train.abstract import abstract_step
from rtd_jax.train.recipe import Recipe
from rtd_jax.train.state import create_state
from rtd_jax.train.update import apply_update, make_train_step

SIZES = ROWS, LENGTH, VOCAB, STEP_TOKENS = 8, 256, 8192, 40


def published_flops(name: str) -> tuple[float, float]:
    """FLOPs of an update of a published recipe: whole, and without what the boundaries add."""
    recipe = build(Recipe, importlib.import_module(f"configs.{name}").get_config().to_dict())
    abstract = abstract_step(recipe, make_mesh(MeshSettings(), jax.devices()[:1]))

    def flops(slots: int) -> float:
        rows, chains, _ = abstract.batch.boundary_mask_BCK.shape
        places = jax.ShapeDtypeStruct((rows, chains, slots), jnp.int32)
        mask = jax.ShapeDtypeStruct((rows, chains, slots), jnp.bool_)
        batch = abstract.batch._replace(boundary_positions_BCK=places, boundary_mask_BCK=mask)
        traced = abstract.step.trace(abstract.state, abstract.source, batch, abstract.objective.coefficients())
        return matmul_flops(traced.jaxpr.jaxpr)

    slots = abstract.batch.boundary_mask_BCK.shape[-1]
    per_slot = (flops(slots) - flops(slots - 8)) / 8  # every product of the two terms is linear in the slots
    return flops(slots), flops(slots) - slots * per_slot


def models() -> tuple[DecoderModel, DecoderModel]:
    """Teacher and student."""
    return (
        DecoderModel(DecoderConfig(VOCAB, 512, 2048, layers=6, heads=8, kv_heads=4, head_dim=64)),
        DecoderModel(DecoderConfig(VOCAB, 256, 1024, layers=3, heads=8, kv_heads=4, head_dim=32)),
    )


def step_times(rounds: int) -> dict[str, list[float]]:
    """Seconds per update of plain KD (written without any boundary) and of RTD, in turn."""
    teacher, student = models()
    batch = random_batch(*SIZES)
    key = jax.random.PRNGKey(0)
    teacher_params, optimizer = teacher.init(key), optax.adamw(1e-4)

    def plain_loss(params: Any, teacher_params: Any, batch: Batch) -> Any:
        rows = batch.tokens_BL, batch.positions_BL, batch.attention_ids_BL
        states_S, states_T = student.hidden(params["student"], *rows), teacher.hidden(teacher_params, *rows)
        heads = student.head(params["student"]), teacher.head(teacher_params)
        loss = kd(states_S, heads[0], states_T, heads[1], *shifted_labels(batch), vocab_size=VOCAB)
        return loss, {"loss": Mean(loss, jnp.ones(()))}

    def plain(state: Any, teacher_params: Any, batch: Batch) -> Any:
        gradients, metrics = jax.grad(plain_loss, has_aux=True)(state.params, teacher_params, batch)
        return apply_update(optimizer, state, gradients, metrics)

    objective = LossSettings().objective(Setup(student.config, teacher.config, VOCAB))
    rtd = make_train_step(student, teacher, optimizer, objective)
    steps = {
        "plain KD": (jax.jit(plain, donate_argnums=0), {"student": student.init(key)}, ()),
        "RTD": (
            rtd,
            {"student": student.init(key), **objective.init_params(key, 256, 512)},
            (objective.coefficients(),),
        ),
    }
    # A key of its own for each: states are donated.
    states = {name: create_state(params, optimizer, jax.random.PRNGKey(0)) for name, (_, params, _) in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, (step, _, more) in steps.items():
            started = time.perf_counter()
            states[name], metrics = step(states[name], teacher_params, batch, *more)
            jax.block_until_ready((states[name], metrics))
            if turn >= 2:  # compiled, and warm
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-write", action="store_true", help="print the table, leave docs/benchmarks.md as it is")
    arguments = parser.parse_args()
    rows = []
    for name in ("rtd_8b", "rtd_1b"):
        whole, without = published_flops(name)
        rows.append((f"FLOPs of an update, `{name}`", f"{without:.4g}", f"{whole:.4g}", f"{whole / without:.5f}"))
    seconds = step_times(arguments.rounds)
    ratios = sorted(b / a for a, b in zip(seconds["plain KD"], seconds["RTD"], strict=True))
    kd_s, rtd_s = (statistics.median(seconds[name]) for name in ("plain KD", "RTD"))
    quartiles = f"{ratios[len(ratios) // 4]:.3f} to {ratios[3 * len(ratios) // 4]:.3f}"
    shape = f"s an update here, {ROWS} x {LENGTH} tokens, 6 x 512 -> 3 x 256, vocabulary {VOCAB:,}"
    rows.append((shape, f"{kd_s:.3f}", f"{rtd_s:.3f}", f"{statistics.median(ratios):.3f} (quartiles {quartiles})"))
    text = markdown_table(("", "plain KD", "RTD", "ratio"), rows)
    text += f"\n\n{arguments.rounds} updates of each in turn on {machine()}."
    print(text)
    if not arguments.no_write:
        write_section(ROOT / "docs" / "benchmarks.md", "overhead", text)


if __name__ == "__main__":
    main()
