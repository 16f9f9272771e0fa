"""Trains a process reward model: a head on what the frozen teacher makes of steps labelled right or wrong."""

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
        for name in ("row_length", "batch_size", "epochs", "steps_per_update"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden < 0 or self.learning_rate <= 0:
            raise ValueError(f"hidden is {self.hidden} and learning_rate {self.learning_rate}; give >= 0 and > 0")


class LabelledSteps(NamedTuple):
    """Labelled steps of a split, as the head sees them."""

    features_MW: np.ndarray  # float32
    right_M: np.ndarray  # bool
    chains_M: np.ndarray  # int, which chain each belongs to
    places_M: np.ndarray  # int, which step of it, from 0


def train_reward_model(recipe: RewardModelRecipe, workdir: Path) -> Path:
    """Writes <workdir>/model (see `teacher.reward_head`) and report.json. Returns the latter's path.

    Raises:
      ValueError: settings, data or teacher that cannot be used, with the way out.
    """
    check_writable(workdir)
    if jax.process_count() > 1:
        raise ValueError(f"{jax.process_count()} processes were started, but one trains a reward model")
    note = partial(print, flush=True)
    mesh = make_mesh(recipe.mesh)
    check_rows(recipe.batch_size, mesh)
    teacher = open_model(recipe.teacher, mesh, note)
    layers = tuple(teacher.config.layer_index(layer) for layer in recipe.layers)
    chains = {name: load_labelled(getattr(recipe, name)) for name in ("train", "test")}
    train, test = (_read(recipe, teacher, layers, name, chains[name]) for name in ("train", "test"))
    head, losses = fit_head(recipe, train)
    identity = RewardIdentity(
        teacher.fingerprint,
        teacher.tokenizer_fingerprint,
        recipe.text.identity,
        layers,
        recipe.surprise,
        train.features_MW.shape[1],
    )
    report: dict[str, Any] = {
        "settings": dataclasses.asdict(recipe),
        "train_loss": losses,
        "train": judge(head, train, recipe),
        "test": judge(head, test, recipe),
    }
    save_head(workdir / "model", head, identity)
    write_json(workdir / "report.json", report)
    for name in ("train", "test"):
        found = report[name]
        area, within = (f"{x['value']} ({x['low']} to {x['high']})" for x in (found["auroc"], found["auroc_within"]))
        note(
            f"{name}: {found['steps']} steps, {found['wrong']} wrong; AUROC {area}, among steps of the same place "
            f"{within}; accuracy {found['accuracy']['mean']:.3f} ± {found['accuracy']['stderr'] or 0:.3f}, saying "
            f"'right' always {found['always_right']:.3f}"
        )
    note(f"reward model: {workdir / 'model'}   report: {workdir / 'report.json'}")
    return workdir / "report.json"


def fit_head(recipe: RewardModelRecipe, steps: LabelledSteps) -> tuple[Params, list[float]]:
    """Logistic regression by AdamW, its cosine over all updates: (params, mean loss in nats of each epoch).

    Raises:
      ValueError: all steps have the same label.
    """
    count = len(steps.right_M)
    if not 0 < int(steps.right_M.sum()) < count:
        raise ValueError(
            f"{int(steps.right_M.sum())} of {count} training steps are labelled right; a reward model needs both kinds"
        )
    per_update = min(recipe.steps_per_update, count)
    updates = count // per_update
    params = init_head(jax.random.key(recipe.seed), steps.features_MW.shape[1], recipe.hidden)
    params |= {"mean": jnp.asarray(steps.features_MW.mean(0)), "scale": jnp.asarray(steps.features_MW.std(0) + 1e-6)}
    trained = {name: x for name, x in params.items() if name not in ("mean", "scale")}
    measured = {name: params[name] for name in ("mean", "scale")}
    schedule = optax.cosine_decay_schedule(recipe.learning_rate, recipe.epochs * updates)
    optimizer = optax.adamw(schedule, weight_decay=recipe.weight_decay)
    features, right = jnp.asarray(steps.features_MW), jnp.asarray(steps.right_M, jnp.float32)

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
    chains = steps.chains_M

    def area(strata: np.ndarray | None) -> dict[str, Any]:
        found = auroc(logits, steps.right_M, chains, strata, **options).interval_row()
        return {name: round(x, 4) if isinstance(x, float) else x for name, x in found.items()}

    return {
        "steps": len(logits),
        "wrong": int(np.sum(~steps.right_M)),
        "auroc": area(None),
        "auroc_within": area(steps.places_M),
        "accuracy": estimate((logits > 0) == steps.right_M, chains).error_row(),
        "always_right": float(steps.right_M.mean()),
    }


def _read(
    recipe: RewardModelRecipe,
    teacher: OpenModel,
    layers: tuple[int, ...],
    name: str,
    chains: Sequence[LabelledChain],
) -> LabelledSteps:
    """The features of every labelled step of the chains."""
    encoded, report = encode_traces(
        teacher.tokenizer,
        [chain.trace for chain in chains],
        recipe.text,
        row_length=recipe.row_length,
        max_dropped_fraction=recipe.max_dropped_fraction,
    )
    dropped = set(report.dropped)
    kept = [chain for i, chain in enumerate(chains) if i not in dropped]
    teacher.note(f"{name}: {report}")
    slots = max(len(chain.boundaries) for chain in encoded)
    batches = fixed_batches(encoded, recipe.batch_size, recipe.row_length, 1, slots)
    forward = jax.jit(make_step_reader(teacher.model, layers, recipe.surprise, len(teacher.tokenizer)))
    features, right, of_chain, places = [], [], [], []
    for number, batch in enumerate(batches):
        found_BKW = to_host(forward(teacher.params, put_batch(batch, teacher.mesh)))[:, 0]
        for row, chain in enumerate(kept[number * recipe.batch_size :][: recipe.batch_size]):
            for place, label in enumerate(chain.labels):
                if label is not None:
                    features.append(found_BKW[row, place + 1])
                    right.append(label)
                    of_chain.append(number * recipe.batch_size + row)
                    places.append(place)
        if (number + 1) % max(1, len(batches) // 10) == 0:
            teacher.note(f"{name}: the teacher has read {number + 1} of {len(batches)} batches")
    if not right:
        raise ValueError(f"{name}: none of the {len(kept)} chains that fit has a labelled step; raise row_length")
    return LabelledSteps(np.stack(features), np.array(right, bool), np.array(of_chain), np.array(places))
