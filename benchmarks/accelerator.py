"""The real update on a real GPU: agreement with the CPU, seconds, share of the peak rate, memory beside the plan.

python benchmarks/accelerator.py  # one NVIDIA GPU of 80 GB or more, 20 minutes; writes docs/benchmarks.md

Sizes are the published models' own; weights and tokens are random, so nothing is downloaded. Each case is a process.
"""

import argparse
import dataclasses
import gzip
import importlib
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import ROOT, markdown_table, peak_device_memory, random_batch, report, run_worker, write_section

from rtd_jax.apps.plan.plan import GIB, ideal_flops
from rtd_jax.apps.plan.program import memory
from rtd_jax.apps.plan.targets import A100, H100
from rtd_jax.base.files import read_json, write_json
from rtd_jax.base.settings import build
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.base.types import Batch, TeacherOutputs, TopK
from rtd_jax.methods import LossSettings
from rtd_jax.methods.term import Objective, Setup
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel
from rtd_jax.train.abstract import ARCHITECTURES, Abstract, abstract_step
from rtd_jax.train.optimizer import make_optimizer
from rtd_jax.train.recipe import Recipe
from rtd_jax.train.state import TrainState, create_state
from rtd_jax.train.update import make_train_step

PEAKS = {"A100": A100.flops, "H100": H100.flops, "H200": H100.flops}  # an H200 has more memory, and the same rate
STEP_TOKENS = 60  # of a reasoning step
WARM_UP, UPDATES = 1, 6

# What the published recipes change to stand on one GPU. 8 rows of 1,024 at a time, as on each of eight.
ROWS = {"batch_size": 32, "micro_batches": 4}
PAIR = ROWS | {"teacher.path": "meta-llama/Meta-Llama-3-8B-Instruct"}  # 8B -> 1B, whole
# 8 of the 70B's 80 layers and 6 of the 8B's 32: the matrix products of rtd_8b.
CUT = ROWS | {"teacher.path": "cut:meta-llama/Meta-Llama-3-70B-Instruct:8"}
CUT |= {"student.path": "cut:meta-llama/Meta-Llama-3-8B-Instruct:6"}
KD = {"loss.alignment_weight": 0.0, "loss.coherence_weight": 0.0}
XLA = {"teacher.attention": "xla", "student.attention": "xla"}
FAST = {"student.remat": "none", "loss.chunk_length": 128}
LONG = {"data.row_length": 4096, "batch_size": 8}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "8B -> 1B: RTD": ("rtd_1b", PAIR),
    "8B -> 1B: plain KD": ("rtd_1b", PAIR | KD),
    "8B -> 1B: attention in XLA": ("rtd_1b", PAIR | XLA),
    "70B -> 8B, 8 and 6 layers: RTD": ("rtd_8b", CUT),
    "8B -> 1B: from a cache": ("rtd_1b", PAIR | {"teacher.cache": "cache"}),
    "8B -> 1B: remat none": ("rtd_1b", PAIR | {"student.remat": "none"}),
    "8B -> 1B: chunk_length 128": ("rtd_1b", PAIR | {"loss.chunk_length": 128}),
    "8B -> 1B: chunk_length 256": ("rtd_1b", PAIR | {"loss.chunk_length": 256}),
    "8B -> 1B: a mask, chunk_length 128": ("rtd_1b", PAIR | {"loss.chunk_length": 128, "data.chains_per_row": 2}),
    "8B -> 1B: remat none, chunk_length 128": ("rtd_1b", PAIR | FAST),
    "8B -> 1B: remat none, chunk_length 128, 16 rows at a time": ("rtd_1b", PAIR | FAST | {"micro_batches": 2}),
    "8B -> 1B: rows of 4,096": ("rtd_1b", PAIR | LONG),
    "8B -> 1B: rows of 4,096, chunk_length 256": ("rtd_1b", PAIR | LONG | {"loss.chunk_length": 256}),
    "70B -> 8B, 8 and 6 layers: chunk_length 128": ("rtd_8b", CUT | {"loss.chunk_length": 128}),
    "70B -> 8B, 8 and 6 layers: chunk_length 128, 16 rows at a time": (
        "rtd_8b",
        CUT | {"loss.chunk_length": 128, "micro_batches": 2},
    ),
    "8B -> 1B: rows of 4,096, attention in XLA": ("rtd_1b", PAIR | LONG | XLA),
    "8B -> 1B: int8 teacher": ("rtd_1b", PAIR | {"teacher.param_dtype": "int8"}),
}


def recipe_of(config: str, overrides: dict[str, Any], folder: Path) -> Recipe:
    """A published recipe with changes; a path `cut:<model>:<layers>` is the model with fewer layers."""
    settings = importlib.import_module(f"configs.{config}").get_config()
    for key, value in overrides.items():
        if str(value).startswith("cut:"):
            _, name, layers = value.split(":")
            value = str(folder / name / layers)
            Path(value).mkdir(parents=True)
            config_json = read_json(ARCHITECTURES)[name] | {"num_hidden_layers": int(layers)}
            write_json(Path(value) / "config.json", config_json)
        settings.update_from_flattened_dict({key: value})
    return build(Recipe, settings.to_dict())


def filled(shapes: Any, key: jax.Array) -> Any:
    """Arrays of these shapes: norms' scales 1, matrices random and small, int8 ones random over their range."""

    def fill(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        if name.endswith("['scale']"):
            return jnp.ones(shape.shape, shape.dtype)
        if name.endswith(".scale"):  # of an int8 matrix
            return jnp.full(shape.shape, 0.04 / 127, shape.dtype)
        if shape.dtype == jnp.int8:
            return jax.random.randint(own, shape.shape, -127, 128, jnp.int8)
        return 0.02 * jax.random.normal(own, shape.shape, shape.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def from_cache(shapes: TeacherOutputs, vocab_size: int, key: jax.Array) -> TeacherOutputs:
    """Predictions and states as a cache gives them: k tokens apart from each other, a tenth of the mass beyond."""
    assert shapes.top_k is not None
    shape = shapes.top_k.ids_BLM.shape
    ids = (jax.random.randint(key, (*shape[:2], 1), 0, vocab_size) + jnp.arange(shape[2]) * 997) % vocab_size
    log_probs = jax.nn.log_softmax(jax.random.normal(key, shape)) + np.log(0.9)
    tails = jnp.full(shape[:2], 0.1), jnp.full(shape[:2], 0.5)
    states = {layer: jax.random.normal(key, x.shape, x.dtype) for layer, x in shapes.boundary_states.items()}
    return shapes._replace(boundary_states=states, top_k=TopK(ids.astype(jnp.int32), log_probs, *tails))


def arguments_of(recipe: Recipe, abstract: Abstract) -> tuple[TrainState, Any, Batch, dict]:
    """What the step takes, with numbers in it, and where the plan has it."""
    key = jax.random.PRNGKey(0)
    optimizer = make_optimizer(recipe.optimizer, recipe.total_updates)
    sizes = recipe.batch_size, recipe.data.row_length, abstract.vocab_size
    batch = random_batch(
        *sizes,
        STEP_TOKENS,
        boundaries=bool(recipe.loss.coherence_weight),
        chains_per_row=recipe.data.chains_per_row,
    )
    state = jax.jit(lambda params: create_state(params, optimizer, jax.random.PRNGKey(0)))(
        filled(abstract.state.params, key)
    )
    if isinstance(abstract.source, TeacherOutputs):
        slots = batch.boundary_mask_BCK.shape
        states = {
            layer: jax.ShapeDtypeStruct((*slots, x.shape[-1]), x.dtype)
            for layer, x in abstract.source.boundary_states.items()
        }
        shapes = abstract.source._replace(boundary_states=states)
        source = from_cache(shapes, abstract.vocab_size, key)
    else:
        source = filled(abstract.source, key)
    places = jax.tree.map(lambda x: x.sharding, (abstract.state, abstract.batch))
    state, batch = jax.device_put((state, batch), places)
    return state, source, batch, abstract.objective.coefficients()


def run_case(name: str, trace: Path | None = None) -> None:
    """Worker: times updates of a case; one more is traced into a folder, with the program's text beside it."""
    config, overrides = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(config, overrides, Path(folder))
        abstract = abstract_step(recipe, make_mesh(MeshSettings(), jax.devices()[:1]))
    state, *given = arguments_of(recipe, abstract)
    started = time.perf_counter()
    step = abstract.step.lower(state, *given).compile()
    compiled_in = time.perf_counter() - started
    seconds, first = [], None
    for _ in range(WARM_UP + UPDATES):
        started = time.perf_counter()
        state, metrics = step(state, *given)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - started)
        first = first or {key: float(metrics[key].value()) for key in ("loss", "grad_norm")}
    if trace is not None:
        trace.mkdir(parents=True, exist_ok=True)
        (trace / "program.txt.gz").write_bytes(gzip.compress(step.as_text().encode()))
        with jax.profiler.trace(str(trace)):
            jax.block_until_ready(step(state, *given))
    teacher = None if abstract.teacher is None else abstract.teacher_config
    report(
        seconds=seconds[WARM_UP:],
        tokens=recipe.batch_size * recipe.data.row_length,
        flops=ideal_flops(recipe, teacher, abstract.student.config),
        compiled_in=compiled_in,
        planned=memory(step).peak / GIB,
        peak=peak_device_memory() / GIB,
        device=jax.devices()[0].device_kind,
        **(first or {}),
    )


def relative(found: Any, wanted: Any) -> float:
    """|found - wanted| / |wanted| over all arrays, in float64."""
    pairs = [
        (np.asarray(a, np.float64), np.asarray(b, np.float64))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    ]
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs)))


def attention_errors() -> dict[str, float]:
    """Attention of packed rows in bfloat16, and its gradients, by kernel: error to float32 products."""
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    rows, length, heads, kv_heads, head_dim = 2, 1024, 32, 8, 128
    shapes = [(rows, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    *qkv, wanted = (jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, shapes, strict=True))
    chains = jnp.arange(length) // 400  # three chains, the last not whole
    mask = (chains[:, None] == chains[None]) & jnp.tri(length, dtype=bool)

    def pulled(kernel: str, *qkv: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        def attend(*qkv: jax.Array) -> jax.Array:
            return jax.nn.dot_product_attention(*qkv, mask=mask[None, None], implementation=kernel)  # type: ignore[arg-type]

        mixed, backward = jax.vjp(attend, *qkv)
        return mixed, backward(wanted.astype(mixed.dtype))

    rounded = [x.astype(jnp.bfloat16) for x in qkv]
    with jax.default_matmul_precision("highest"):
        reference = jax.jit(pulled, static_argnums=0)("xla", *(x.astype(jnp.float32) for x in rounded))
    errors = {}
    for kernel in ("xla", "cudnn"):
        mixed, gradients = jax.jit(pulled, static_argnums=0)(kernel, *rounded)
        errors[f"{kernel}_value"], errors[f"{kernel}_gradient"] = (
            relative(jax.tree.map(lambda x: x.astype(jnp.float32), found), expected)
            for found, expected in ((mixed, reference[0]), (gradients, reference[1]))
        )
    return errors


def update_errors() -> dict[str, float]:
    """One RTD update of tiny models in float32 here, against the same on the CPU: loss and gradients."""
    config = DecoderConfig(512, 128, 384, layers=4, heads=8, kv_heads=4, head_dim=16)
    teacher, student = DecoderModel(config), DecoderModel(dataclasses.replace(config, layers=2, width=64))
    optimizer = optax.sgd(1.0)  # the update is the gradient
    batch = random_batch(4, 256, 512, STEP_TOKENS)
    objective = LossSettings().objective(Setup(student.config, teacher.config, 512))
    step = make_train_step(student, teacher, optimizer, objective)
    with jax.default_device(jax.devices("cpu")[0]):
        key = jax.random.PRNGKey(0)
        params = jax.device_get({"student": student.init(key), **objective.init_params(key, 64, 128)})
        of_teacher = jax.device_get(teacher.init(key))
    results = []
    for device in (jax.devices("cpu")[0], jax.devices()[0]):
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            state, metrics = step(
                create_state(params, optimizer, jax.random.PRNGKey(0)), of_teacher, batch, coefficients_of(objective)
            )
        moved = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, params)
        results.append((float(metrics["loss"].value()), moved))
    (loss_cpu, moved_cpu), (loss, moved) = results
    return {"loss": abs(loss - loss_cpu) / loss_cpu, "update": relative(moved, moved_cpu)}


def coefficients_of(objective: Objective) -> dict:
    return objective.coefficients()


def matmul_rate() -> float:
    """FLOP/s of 8,192 x 8,192 x 8,192 in bfloat16, random numbers: what a product alone reaches."""
    size, repeats = 8192, 40
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.PRNGKey(0)))
    product = jax.jit(jnp.matmul)
    product(a, b).block_until_ready()
    started = time.perf_counter()
    last = [product(a, b) for _ in range(repeats)][-1]
    last.block_until_ready()
    return 2 * size**3 * repeats / (time.perf_counter() - started)


def run_agreement() -> None:
    """Worker: what can be told without a whole model."""
    report(attention=attention_errors(), update=update_errors(), matmul=matmul_rate(), jax=jax.__version__)


COLUMNS = (
    *("", "s an update (range)", "tokens/s", "% of the data sheet's rate", "time a token / the first line's"),
    *("GiB planned", "GiB at most", "s to compile", "first loss", "first gradient norm"),
)


def row(name: str, case: dict[str, Any], first: dict[str, Any]) -> tuple[str, ...]:
    """A case as a line of the table; `first` is what times are compared with, per token."""
    seconds = statistics.median(case["seconds"])
    peak = next((rate for kind, rate in PEAKS.items() if kind in case["device"]), None)
    per_token, per_token_first = seconds / case["tokens"], statistics.median(first["seconds"]) / first["tokens"]
    return (
        name,
        f"{seconds:.3f} ({min(case['seconds']):.3f} to {max(case['seconds']):.3f})",
        f"{case['tokens'] / seconds:,.0f}",
        f"{100 * case['flops'] / seconds / peak:.1f}" if peak else "-",
        f"{per_token / per_token_first:.3f}",
        *(f"{case[key]:.1f}" for key in ("planned", "peak", "compiled_in")),
        *(f"{case[key]:.5g}" for key in ("loss", "grad_norm")),
    )


def agreement_text(found: dict[str, Any], device: str) -> str:
    attention, update = found["attention"], found["update"]
    peak = next((rate for kind, rate in PEAKS.items() if kind in device), None)
    share = f", {100 * found['matmul'] / peak:.0f}% of the data sheet's" if peak else ""
    return (
        f"On {device}, JAX {found['jax']}, {time.strftime('%Y-%m-%d')}; {UPDATES} updates timed a case. A product "
        f"of 8,192 x 8,192 matrices alone reaches {found['matmul'] / 1e12:.0f} TFLOP/s{share}. Relative errors of "
        "bfloat16 attention over packed rows, and of its gradients, to float32 products: cuDNN "
        f"{attention['cudnn_value']:.1e} and {attention['cudnn_gradient']:.1e}, XLA {attention['xla_value']:.1e} and "
        f"{attention['xla_gradient']:.1e}. A whole RTD update in float32 against the CPU's: loss {update['loss']:.1e}, "
        f"gradients {update['update']:.1e}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this text; writes nothing")
    parser.add_argument("--trace", type=Path, help="folder for a trace of one update of the first case; must be new")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        run_agreement() if arguments.work == "agreement" else run_case(arguments.work, arguments.trace)
        return

    def worked(name: str, *options: str) -> dict[str, Any]:
        return run_worker(name, [sys.executable, __file__, f"--work={name}", *options]).values

    agreement = worked("agreement")
    print(agreement, flush=True)
    first: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = []
    for name in (name for name in CASES if arguments.only in name):
        options = () if first or arguments.trace is None else (f"--trace={arguments.trace}",)
        try:
            found = worked(name, *options)
        except RuntimeError as error:
            if not first:  # the others would fail too
                raise
            print(error, flush=True)
            rows.append((name, "failed", *[""] * (len(COLUMNS) - 2)))
        else:
            first = first or found
            rows.append(row(name, found, first))
        print(*rows[-1], sep=" | ", flush=True)
        text = f"{markdown_table(COLUMNS, rows)}\n\n{agreement_text(agreement, first['device'])}"
        if not arguments.only:  # after each, for the time on such a machine may end
            write_section(ROOT / "docs" / "benchmarks.md", "gpu", text)


if __name__ == "__main__":
    main()
