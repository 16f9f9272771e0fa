"""Trains a process reward model: a head on the frozen teacher's states, from steps labelled right or wrong."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rtd_jax.base.files import check_writable, write_json
from rtd_jax.base.lock import one_writer
from rtd_jax.base.settings import LAYER, SEED, check_distinct, check_ranges
from rtd_jax.base.sharding import MeshSettings, check_rows, make_mesh, put_batch, to_host
from rtd_jax.base.types import Params
from rtd_jax.data.encoding import encode_traces
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.labelled import LabelledSettings, load_labelled
from rtd_jax.data.packing import fixed_batches
from rtd_jax.data.trace import LabelledChain
from rtd_jax.eval.drift import auroc
from rtd_jax.eval.estimates import estimate
from rtd_jax.models.open import OpenModel, open_model
from rtd_jax.teacher.reward_head import RewardIdentity, init_head, make_step_reader, save_head, step_logits
from rtd_jax.train.recipe import TeacherSettings


@dataclass(frozen=True)
class RewardModelRecipe:
    """How a reward model is trained. The teacher is only read."""

    teacher: TeacherSettings
    train: LabelledSettings
    test: LabelledSettings  # held out; nothing is chosen by it
    text: TextFormat = TextFormat()  # as in the runs that will use the model
    layers: tuple[int, ...] = (-1,)  # of the teacher, whose states at a boundary the head reads
    surprise: bool = True  # the head also reads the teacher's -log p of the step's tokens, mean and largest
    hidden: int = 0  # GELU units of the head; 0 is a linear head
    row_length: int = 1024  # tokens
    max_dropped_fraction: float = 0.0  # of chains longer than a row; more is an error
    batch_size: int = 16  # chains that the teacher reads at one time
    epochs: int = 30  # over the labelled steps
    steps_per_update: int = 512  # labelled steps
    learning_rate: float = 3e-3  # peak; cosine to zero
    weight_decay: float = 1e-2  # on the head
    resamples: int = 200  # for intervals
    seed: int = 0  # of the head and of the order of steps
    mesh: MeshSettings = MeshSettings()

    def __post_init__(self) -> None:
        if not self.layers and not self.surprise:
            raise ValueError("layers is empty and surprise False: the head would read nothing; give layers=(-1,)")
        check_ranges(self, layers=LAYER, hidden="[0, 1e6]", row_length="[2, 1e7]", max_dropped_fraction="[0, 1]")
        check_ranges(self, batch_size="[1, 1e6]", epochs="[1, 1e6]", steps_per_update="[1, 1e7]", seed=SEED)
        check_ranges(self, learning_rate="(0, 10]", weight_decay="[0, 100]", resamples="[20, 1e6]")
        check_distinct(self, "layers")


class LabelledSteps(NamedTuple):
    """The M labelled steps of a split, with the W features that the head reads."""

    features_MW: np.ndarray  # float32
    right_M: np.ndarray  # bool
    chains_M: np.ndarray  # int, the chain of each step
    places_M: np.ndarray  # int, its place in the chain, from 0


@one_writer(lambda recipe, workdir: workdir)
def train_reward_model(recipe: RewardModelRecipe, workdir: Path) -> Path:
    """Writes <workdir>/model (see `teacher.reward_head`) and <workdir>/report.json, whose path it returns.

    Raises:
      ValueError: settings, data or teacher that cannot be used, with the way out.
    """
    if jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes were started, but one trains a reward model")
    check_writable(workdir / "model")
    mesh = make_mesh(recipe.mesh)
    check_rows(recipe.batch_size, mesh)
    teacher = open_model(recipe.teacher, mesh, partial(print, flush=True))
    layers = tuple(teacher.config.layer_index(layer) for layer in recipe.layers)
    chains = {name: load_labelled(getattr(recipe, name)) for name in ("train", "test")}
    train, test = (_read(recipe, teacher, layers, name, chains[name]) for name in ("train", "test"))
    head, losses = fit_head(recipe, train)
    scores = {"train": judge(head, train, recipe), "test": judge(head, test, recipe)}
    identity = RewardIdentity(
        teacher=teacher.fingerprint,
        tokenizer=teacher.tokenizer_fingerprint,
        text=recipe.text.identity,
        layers=layers,
        surprise=recipe.surprise,
        width=train.features_MW.shape[1],
    )
    save_head(workdir / "model", head, identity)
    read = {"settings": dataclasses.asdict(recipe), "teacher_commit": teacher.commit}
    write_json(workdir / "report.json", {**read, "train_loss": losses, **scores})
    for name, score in scores.items():
        area, within = (f"{x['value']} ({x['low']} to {x['high']})" for x in (score["auroc"], score["auroc_within"]))
        accuracy = score["accuracy"]
        teacher.note(
            f"{name}: {score['steps']} steps, {score['wrong']} wrong; AUROC {area}, among steps of the same place "
            f"{within}; accuracy {accuracy['mean']:.3f} ± {accuracy['stderr'] or 0:.3f}, saying 'right' always "
            f"{score['always_right']:.3f}"
        )
    teacher.note(f"reward model: {workdir / 'model'}   report: {workdir / 'report.json'}")
    return workdir / "report.json"


def fit_head(recipe: RewardModelRecipe, steps: LabelledSteps) -> tuple[Params, list[float]]:
    """Logistic regression by AdamW, its cosine over all updates: (params, mean loss of each epoch in nats).

    Raises:
      ValueError: all steps have the same label.
    """
    count, right_count = len(steps.right_M), int(steps.right_M.sum())
    if not 0 < right_count < count:
        raise ValueError(f"{right_count} of {count} training steps are labelled right; a reward model needs both kinds")
    per_update = min(recipe.steps_per_update, count)
    updates = count // per_update
    features, right = jnp.asarray(steps.features_MW), jnp.asarray(steps.right_M, jnp.float32)
    measured = {"mean": jnp.asarray(steps.features_MW.mean(0)), "scale": jnp.asarray(steps.features_MW.std(0) + 1e-6)}
    initial = init_head(jax.random.key(recipe.seed), features.shape[1], recipe.hidden)
    trained = {name: x for name, x in initial.items() if name not in measured}
    schedule = optax.cosine_decay_schedule(recipe.learning_rate, recipe.epochs * updates)
    optimizer = optax.adamw(schedule, weight_decay=recipe.weight_decay)

    @partial(jax.jit, donate_argnums=(0, 1))
    def epoch(trained: Params, opt_state: Any, order: jax.Array) -> tuple[Params, Any, jax.Array]:
        def update(carry: tuple, rows: jax.Array) -> tuple[tuple, jax.Array]:
            trained, opt_state = carry

            def loss_of(trained: Params) -> jax.Array:
                logits = step_logits(measured | trained, features[rows])
                return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, right[rows]))

            loss, gradients = jax.value_and_grad(loss_of)(trained)
            changes, opt_state = optimizer.update(gradients, opt_state, trained)
            return (optax.apply_updates(trained, changes), opt_state), loss

        (trained, opt_state), losses = jax.lax.scan(update, (trained, opt_state), order)
        return trained, opt_state, jnp.mean(losses)

    rng = np.random.default_rng(recipe.seed)
    opt_state, losses = optimizer.init(trained), []
    for _ in range(recipe.epochs):
        order = rng.permutation(count)[: updates * per_update].reshape(updates, per_update)
        trained, opt_state, loss = epoch(trained, opt_state, jnp.asarray(order))
        losses.append(float(loss))
    return measured | trained, losses


def judge(head: Params, steps: LabelledSteps, recipe: RewardModelRecipe) -> dict[str, Any]:
    """AUROC and accuracy of a head on labelled steps; intervals over whole chains."""
    logits = np.asarray(step_logits(head, steps.features_MW))
    options: dict[str, Any] = {"resamples": recipe.resamples, "seed": recipe.seed}

    def area(strata: np.ndarray | None) -> dict[str, Any]:
        row = auroc(logits, steps.right_M, steps.chains_M, strata, **options).interval_row()
        return {name: round(x, 4) if isinstance(x, float) else x for name, x in row.items()}

    return {
        "steps": len(logits),
        "wrong": int(np.sum(~steps.right_M)),
        "auroc": area(None),
        "auroc_within": area(steps.places_M),
        "accuracy": estimate((logits > 0) == steps.right_M, steps.chains_M).error_row(),
        "always_right": float(steps.right_M.mean()),
    }


def _read(
    recipe: RewardModelRecipe,
    teacher: OpenModel,
    layers: tuple[int, ...],
    name: str,
    chains: Sequence[LabelledChain],
) -> LabelledSteps:
    """The labelled steps of the chains that fit into a row, with their features."""
    encoded, report = encode_traces(
        teacher.tokenizer,
        [chain.trace for chain in chains],
        recipe.text,
        row_length=recipe.row_length,
        max_dropped_fraction=recipe.max_dropped_fraction,
    )
    teacher.note(f"{name}: {report}")
    dropped = set(report.dropped)
    kept = [chain for i, chain in enumerate(chains) if i not in dropped]
    labelled = [
        (i, k, label) for i, chain in enumerate(kept) for k, label in enumerate(chain.labels) if label is not None
    ]
    if not labelled:
        raise ValueError(f"{name}: none of the {len(kept)} chains that fit has a labelled step; raise row_length")
    chains_M, places_M, right_M = (np.array(column) for column in zip(*labelled, strict=True))
    slots = max(len(chain.boundaries) for chain in encoded)
    batches = fixed_batches(encoded, recipe.batch_size, recipe.row_length, 1, slots)
    forward = jax.jit(make_step_reader(teacher.model, layers, recipe.surprise, teacher.vocab_size))
    # A chain a row, in order: the labelled steps of batch n are edges[n] to edges[n + 1].
    edges = np.searchsorted(chains_M, np.arange(len(batches) + 1) * recipe.batch_size)
    features = []
    for number, batch in enumerate(batches, start=1):
        features_BKW = to_host(forward(teacher.params, put_batch(batch, teacher.mesh)))[:, 0]
        steps = slice(edges[number - 1], edges[number])
        features.append(features_BKW[chains_M[steps] % recipe.batch_size, places_M[steps] + 1])
        if number % max(1, len(batches) // 10) == 0:
            teacher.note(f"{name}: the teacher has read {number} of {len(batches)} batches")
    return LabelledSteps(np.concatenate(features), right_M, chains_M, places_M)
