"""What a teacher cache saves: updates with and without the teacher, in turn in one process.

python benchmarks/teacher_cache.py --gsm8k=/data/gsm8k  # what is lost: SmolLM2-135M, 40 GSM8K problems, 3 minutes
python benchmarks/teacher_cache.py  # 2 minutes on two cores; writes docs/teacher-cache.md
"""

import argparse
import dataclasses
import functools
import importlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import ROOT, machine, markdown_table, random_batch, write_section

from rtd_jax.apps.cache import cache_teacher
from rtd_jax.apps.distill.prepare import Experiment, prepare
from rtd_jax.apps.plan.program import matmul_flops, memory
from rtd_jax.base.boundaries import shifted_labels
from rtd_jax.base.settings import build
from rtd_jax.base.types import Batch, TeacherOutputs, TopK
from rtd_jax.data.encoding import EncodedChain
from rtd_jax.data.loader import BatchLoader
from rtd_jax.losses import kd_sums, top_k_kd_sums
from rtd_jax.methods import LossSettings
from rtd_jax.methods.term import Setup
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.open import open_model
from rtd_jax.teacher.cache import TeacherCache
from rtd_jax.teacher.online import teacher_outputs
from rtd_jax.teacher.predictions import top_k_predictions
from rtd_jax.teacher.records import chain_key
from rtd_jax.train.cache_identity import cache_identity
from rtd_jax.train.recipe import Recipe
from rtd_jax.train.state import create_state
from rtd_jax.train.update import make_train_step

KEPT = (64,)  # k of the caches that are compared with whole distributions
SIZES = ROWS, LENGTH, VOCAB, STEP_TOKENS = 4, 256, 8192, 40
K = 64
# 70B : 8B is 8.8 : 1 in weights and 6.9 : 1 in FLOPs of a forward pass with the head; here it is printed.
TEACHER = DecoderConfig(VOCAB, 1024, 3584, layers=8, heads=16, kv_heads=4, head_dim=64)
STUDENT = DecoderConfig(VOCAB, 512, 1792, layers=4, heads=8, kv_heads=2, head_dim=64)


def updates(rounds: int) -> str:
    """Table of the three updates: seconds in turn, and what the compiled program holds."""
    teacher, student, optimizer = DecoderModel(TEACHER), DecoderModel(STUDENT), optax.adamw(1e-4)
    batch = random_batch(*SIZES)
    key = jax.random.PRNGKey(0)
    params = jax.jit(teacher.init)(key)
    given = jax.tree.map(jnp.asarray, batch)
    online = jax.jit(lambda params: teacher_outputs(teacher, params, given, (TEACHER.layers,)))(params)
    top_k = top_k_predictions(online.hidden_BLD, teacher.head(params), k=K, temperature=4.0, vocab_size=VOCAB)
    cached = jax.device_get(TeacherOutputs(None, None, online.boundary_states, {}, top_k))
    setup = Setup(STUDENT, TEACHER, VOCAB)
    kd = LossSettings(alignment_weight=0.0, coherence_weight=0.0).objective(setup)
    rtd = LossSettings().objective(setup)
    steps: dict[str, tuple[Any, Any, dict]] = {
        "plain online KD": (make_train_step(student, teacher, optimizer, kd), params, kd.coefficients()),
        "online RTD": (make_train_step(student, teacher, optimizer, rtd), params, rtd.coefficients()),
        "cached RTD": (make_train_step(student, None, optimizer, rtd), cached, rtd.coefficients()),
    }
    states, sizes = {}, {}
    for name, (step, source, weights) in steps.items():
        start = {"student": student.init(key), **rtd.init_params(key, STUDENT.width, TEACHER.width)}
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
        f"forward pass costs {ratio:.1f} x the student's. Plain KD is RTD with both weights 0."
    )


def _forward(model: DecoderModel, batch: Batch) -> float:
    rows = batch.tokens_BL, batch.positions_BL, batch.attention_ids_BL
    return matmul_flops(
        jax.make_jaxpr(lambda p: model.logits(p, model.hidden(p, *rows)))(model.abstract_params()).jaxpr
    )


def what_is_lost(name: str, overrides: dict[str, Any], batches: int) -> str:
    """A cache of a recipe's own teacher, as it lies on disk, against whole distributions, at the student's start."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.update_from_flattened_dict(overrides)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        recipe = build(Recipe, config.to_dict())
        online, state = prepare(recipe, lambda _: None)
        loader = BatchLoader(
            [(online.train.encoded, 1.0)],
            recipe.batch_size,
            recipe.data.row_length,
            recipe.data.chains_per_row,
            online.max_boundaries,
            seed=0,
        )
        sample = [next(loader) for _ in range(batches)]
        gradient = jax.jit(functools.partial(_kd_gradient, online))
        exact = [jax.device_get(gradient(state.params["student"], online.teacher_params, batch)) for batch in sample]
        for k in KEPT:
            place = Path(folder) / str(k)
            settings = dataclasses.replace(recipe.teacher, cache=str(place))
            of_k = dataclasses.replace(recipe, teacher=settings, cache=dataclasses.replace(recipe.cache, top_k=k))
            cache_teacher(of_k, place)
            cache = TeacherCache(place, cache_identity(of_k, open_model(of_k.teacher, online.mesh)))
            found, cosines, tails, read = [], [], [], []
            for batch, (sums, wanted) in zip(sample, exact, strict=True):
                started = time.perf_counter()
                outputs = cache.outputs(batch)
                read.append(np.count_nonzero(batch.chain_ids_BL) / (time.perf_counter() - started))
                top = outputs.top_k
                assert top is not None
                got_sums, got = jax.device_get(gradient(state.params["student"], top, batch))
                pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True))
                dot, a, b = (sum(np.vdot(x[i], x[j]) for x in pairs) for i, j in ((0, 1), (0, 0), (1, 1)))
                cosines.append(dot / np.sqrt(a * b))
                found.append([float(s.kl_T1 / s.weight) for s in (sums, got_sums)])
                found[-1] += [float(s.soft / s.weight) for s in (sums, got_sums)]
                counted = np.pad(batch.loss_weights_BL[:, 1:], ((0, 0), (0, 1))) > 0
                tails.append([top.tail_BL[counted].mean(), top.soft_tail_BL[counted].mean()])
            kl, kl_cached, soft, soft_cached = np.mean(found, axis=0)
            keys = {_key(chain): len(chain) for chain in (*online.train.encoded, *online.validation.encoded)}
            size = sum(path.stat().st_size for path in place.glob("shard-*.array_record"))
            tail, soft_tail = np.mean(tails, axis=0)
            rows.append(
                (
                    k,
                    f"{kl_cached:.4f} of {kl:.4f}",
                    f"{soft_cached:.3f} of {soft:.3f}",
                    f"{np.mean(cosines):.4f}",
                    f"{tail:.5f}, {soft_tail:.3f}",
                    f"{size / sum(keys.values()):.0f}",
                    f"{statistics.median(read):,.0f}",
                )
            )
    columns = ("k", "KL at T = 1", "T^2 KL at T = 4", "gradient's cosine", "mass of the bucket at T = 1, 4")
    table = markdown_table((*columns, "bytes a token on disk", "tokens/s read"), rows)
    assert online.teacher is not None
    width, vocab = online.teacher.config.width, online.vocab_size
    return table + (
        f"\n\n`{name}`, teacher width {width}, vocabulary {vocab:,}; {batches} batches of {recipe.batch_size} rows, at "
        "the student's start, compact storage. The gradient is that of the KD loss by all params of the student."
    )


def _key(chain: EncodedChain) -> str:
    return chain_key(chain.tokens, chain.boundaries, chain.loss_weights)


def _kd_gradient(experiment: Experiment, params: Any, source: Any, batch: Batch) -> tuple[Any, Any]:
    """(KDSums, gradient by the student's params) of the mean KD loss, from the teacher's params or its top k."""
    rows, targets = (batch.tokens_BL, batch.positions_BL, batch.attention_ids_BL), shifted_labels(batch)
    options: Any = {"temperature": 4.0, "alpha": 0.7, "vocab_size": experiment.vocab_size}

    def loss(params: Any) -> Any:
        student = experiment.student.hidden(params, *rows), experiment.student.head(params)
        if isinstance(source, TopK):
            sums = top_k_kd_sums(*student, source, *targets, **options)
        else:
            teacher = experiment.teacher
            assert teacher is not None
            sums = kd_sums(*student, teacher.hidden(source, *rows), teacher.head(source), *targets, **options)
        return sums.loss / sums.weight, sums

    gradient, sums = jax.grad(loss, has_aux=True)(params)
    return sums, gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--no-write", action="store_true", help="print the tables, leave docs/teacher-cache.md as it is"
    )
    arguments = parser.parse_args()
    texts = {}
    if arguments.gsm8k:
        places = {f"data.{split}.location": arguments.gsm8k for split in ("train", "test")}
        few = {"data.train.limit": 40, "data.validation_fraction": 0.3, "curriculum.enabled": False, "batch_size": 2}
        few["curriculum.validation_chains"] = 2
        texts["lost"] = what_is_lost("rtd_smollm2", few | places, batches=2)
    else:
        texts["measured"] = updates(arguments.rounds) + f" On {machine()}."
    for name, text in texts.items():
        print(text)
        if not arguments.no_write:
            write_section(ROOT / "docs" / "teacher-cache.md", name, text)


if __name__ == "__main__":
    main()
