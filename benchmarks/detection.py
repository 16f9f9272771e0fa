"""What finding steps costs: compiled FLOPs at the published sizes, and time a batch beside an update's, in turn.

python benchmarks/detection.py  # 3 minutes on two cores; writes docs/segmentation.md
"""

import argparse
import importlib
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import ROOT, machine, markdown_table, random_batch, write_section
from rtd_overhead import LENGTH, ROWS, SIZES, VOCAB, models

from rtd_jax.apps.plan.program import matmul_flops
from rtd_jax.base.settings import build
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.data.formats import TextFormat
from rtd_jax.methods import LossSettings
from rtd_jax.methods.term import Setup
from rtd_jax.models.model import DecoderModel
from rtd_jax.steps.classifier import BoundaryClassifier, find_boundaries
from rtd_jax.steps.detector import detect_batch
from rtd_jax.steps.head import HeadSettings, Scale, boundary_logits, init_head
from rtd_jax.steps.token_states import unit_states
from rtd_jax.train.abstract import abstract_step
from rtd_jax.train.recipe import Recipe
from rtd_jax.train.state import create_state
from rtd_jax.train.update import make_train_step

HEAD = HeadSettings()
LAYERS = 4  # whose states the head reads


def classifier_of(model: DecoderModel) -> BoundaryClassifier:
    """A head that nobody fitted: it costs what a fitted one costs."""
    width = model.config.width
    layers = tuple(round(model.config.layers * (i + 1) / LAYERS) for i in range(LAYERS))
    scale = Scale(np.zeros((LAYERS, width), np.float32), np.ones((LAYERS, width), np.float32))
    return BoundaryClassifier("", "", "", layers, TextFormat(), HEAD, init_head(HEAD, LAYERS, width), scale)


def published_flops(name: str) -> tuple[float, float, float]:
    """FLOPs for a batch of a published recipe: an update, the teacher's reading of it, and the head alone."""
    recipe = build(Recipe, importlib.import_module(f"configs.{name}").get_config().to_dict())
    abstract = abstract_step(recipe, make_mesh(MeshSettings(), jax.devices()[:1]))
    traced = abstract.step.trace(*abstract.arguments)
    config = abstract.teacher.config
    rows = jax.ShapeDtypeStruct(abstract.batch.tokens_BL.shape, jnp.int32)
    states = jax.ShapeDtypeStruct((*rows.shape, LAYERS, config.width), jnp.float16)
    of_scale = jax.ShapeDtypeStruct((LAYERS, config.width), jnp.float32)
    params = jax.eval_shape(partial(init_head, HEAD, LAYERS, config.width))
    head = jax.make_jaxpr(partial(boundary_logits, HEAD))(params, Scale(of_scale, of_scale), states, rows)
    layers = tuple(round(config.layers * (i + 1) / LAYERS) for i in range(LAYERS))
    reading = jax.make_jaxpr(partial(unit_states, abstract.teacher, layers))(abstract.source, rows, rows)
    return tuple(matmul_flops(x.jaxpr) for x in (traced.jaxpr, reading, head))


def batch_times(rounds: int) -> dict[str, list[float]]:
    """Seconds for the same rows: an RTD update, finding steps from their tokens, and from states that are at hand."""
    teacher, student = models()
    batch, key = random_batch(*SIZES), jax.random.PRNGKey(0)
    params, optimizer, classifier = teacher.init(key), optax.adamw(1e-4), classifier_of(teacher)
    objective = LossSettings().objective(Setup(student.config, teacher.config, VOCAB))
    step = make_train_step(student, teacher, optimizer, objective)
    start = {"student": student.init(key), **objective.init_params(key, student.config.width, teacher.config.width)}
    state = create_state(start, optimizer, jax.random.PRNGKey(0))
    parts_BL = np.full((ROWS, LENGTH), 2, np.int32)
    candidates_BL = np.ones((ROWS, LENGTH), bool)
    states_BLND = unit_states(teacher, classifier.layers, params, batch.tokens_BL, parts_BL > 0)
    seconds: dict[str, list[float]] = {"update": [], "tokens": [], "states": []}
    for turn in range(rounds + 2):
        started = time.perf_counter()
        state, metrics = step(state, params, batch, objective.coefficients())
        jax.block_until_ready((state, metrics))
        updated = time.perf_counter()
        detect_batch(classifier, teacher, params, batch.tokens_BL, parts_BL, candidates_BL).block_until_ready()
        detected = time.perf_counter()
        find_boundaries(classifier, states_BLND, candidates_BL, parts_BL).block_until_ready()
        ended = time.perf_counter()
        if turn >= 2:  # compiled, and warm
            times = (updated - started, detected - updated, ended - detected)
            for name, value in zip(seconds, times, strict=True):
                seconds[name].append(value)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-write", action="store_true", help="print the table, leave docs/segmentation.md as it is")
    arguments = parser.parse_args()
    rows = []
    for name in ("rtd_8b", "rtd_1b"):
        update, reading, head = published_flops(name)
        cells = [f"{update:.4g}", f"{reading + head:.4g} ({(reading + head) / update:.3f})"]
        rows.append((f"FLOPs a batch, `{name}`", *cells, f"{head:.4g} ({head / update:.6f})"))
    seconds = batch_times(arguments.rounds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    cells = [f"{medians['update']:.3f}"]
    for name in ("tokens", "states"):
        ratio = statistics.median(b / a for a, b in zip(seconds["update"], seconds[name], strict=True))
        cells.append(f"{medians[name]:.3f} ({ratio:.3f})")
    rows.append((f"s a batch here, {ROWS} x {LENGTH} tokens, 6 x 512 -> 3 x 256, vocabulary {VOCAB:,}", *cells))
    header = ("", "RTD update", "finding its steps from text (/ update)", "from states at hand (/ update)")
    text = markdown_table(header, rows)
    text += f"\n\n{arguments.rounds} of each in turn on {machine()}; the head reads {LAYERS} layers."
    print(text)
    if not arguments.no_write:
        write_section(ROOT / "docs" / "segmentation.md", "overhead", text)


if __name__ == "__main__":
    main()
