"""Fits a boundary head to texts whose steps are known: the network, its calibration, its threshold."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from rtd_jax.base.settings import SEED, check_distinct, check_filled, check_ranges
from rtd_jax.base.types import Array, Params
from rtd_jax.steps.classifier import BoundaryClassifier, in_rows, row_ids, text_boundaries, text_probabilities
from rtd_jax.steps.head import HeadSettings, Scale, boundary_logits, boundary_loss, init_head, measure_scale
from rtd_jax.steps.prose import Reading
from rtd_jax.steps.scores import counts, precision_recall_f1


@dataclass(frozen=True)
class FitSettings:
    """How the head is fitted. The epoch with the best average precision on the validation texts is kept."""

    epochs: int = 4  # over the training texts
    rows: int = 8  # of 512 tokens, per update
    learning_rate: float = 1e-3  # peak; linear warm-up over a twentieth of the updates, then a cosine to 0
    weight_decay: float = 0.01  # of AdamW, per unit of the learning rate
    positive_weight: float = 3.0  # of a boundary in the loss; other candidates have 1
    thresholds: tuple[float, ...] = tuple(i / 20 for i in range(1, 20))  # tried on the validation texts
    min_tokens: tuple[int, ...] = (1, 3, 5, 7)  # tried likewise
    seed: int = 0  # of the head and the order of the data

    def __post_init__(self) -> None:
        check_ranges(
            self, epochs="[1, 1e6]", rows="[1, 1e5]", learning_rate="(0, 10]", weight_decay="[0, 100]", seed=SEED
        )
        check_ranges(self, positive_weight="(0, 1e6]", thresholds="[0, 1]", min_tokens="[1, 1e4]")
        check_filled(self, "thresholds", "min_tokens")
        check_distinct(self, "thresholds", "min_tokens")


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts whose steps are known, as the teacher read them, and the states [T, N, D] of each."""

    readings: Sequence[Reading]
    states: Sequence[np.ndarray]

    @property
    def labels(self) -> list[np.ndarray]:
        """Whether a step ends at each token. bool [T] of each text."""
        return [reading.labels_T for reading in self.readings]

    @property
    def candidates(self) -> list[np.ndarray]:
        """Whether a step may end at each token. bool [T] of each text."""
        return [reading.candidates_T for reading in self.readings]

    @property
    def counted(self) -> list[np.ndarray]:
        """The candidates that count in the loss: all but the last of each text, which is a boundary by construction."""
        return [x & (np.cumsum(x[::-1])[::-1] > 1) for x in self.candidates]

    @property
    def right(self) -> list[np.ndarray]:
        """The tokens of each text at which steps end."""
        return [np.flatnonzero(x) for x in self.labels]


def fit_classifier(
    make_classifier: Callable[[HeadSettings, Params, Scale], BoundaryClassifier],
    head: HeadSettings,
    settings: FitSettings,
    train: Examples,
    validation: Examples,
    note: Callable[[str], None],
) -> BoundaryClassifier:
    """Fits to `train`. Epoch, calibration, threshold and minimum length of a step are chosen on `validation`.

    Args:
      make_classifier: (head, params, scale) -> a classifier of the teacher whose states the examples have.

    Raises:
      ValueError: there are no texts, or no boundary inside any of them.
    """
    for name, examples in (("training", train), ("validation", validation)):
        if not any((x & y).any() for x, y in zip(examples.labels, examples.counted, strict=True)):
            raise ValueError(
                f"none of the {len(examples.states)} {name} texts has two steps; boundaries cannot be learned from them"
            )
    scale = measure_scale(train.states)
    lengths = [len(x) for x in train.states]
    columns = (in_rows(column, settings.rows) for column in (train.states, train.labels, train.counted))
    arrays = row_ids(lengths, settings.rows), *columns
    _, layers, width = train.states[0].shape
    params = init_head(head, layers, width, settings.seed)
    unfitted = make_classifier(head, params, scale)
    per_epoch = len(arrays[0]) // settings.rows
    total = per_epoch * settings.epochs
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, max(total // 20, 1), max(total, 2))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=settings.weight_decay)
    )
    update = functools.partial(_update, head, optimizer, settings.positive_weight)
    state = optimizer.init(params)
    rng, best, best_precision = np.random.default_rng(settings.seed), unfitted, -1.0
    chosen, labels = np.concatenate(validation.counted), np.concatenate(validation.labels)
    for epoch in range(1, settings.epochs + 1):
        losses = []
        order = rng.permutation(per_epoch * settings.rows).reshape(per_epoch, settings.rows)
        for number, rows in enumerate(order):
            key = jax.random.key((epoch * per_epoch + number) * 1000 + settings.seed)
            params, state, loss = update(params, state, scale, key, tuple(array[rows] for array in arrays))
            losses.append(loss)
            if (done := (epoch - 1) * per_epoch + number + 1) % 100 == 0:
                note(f"update {done} of {total}: loss {float(loss):.4f}")
        fitted = dataclasses.replace(unfitted, params=jax.tree.map(jnp.copy, params))  # params are donated
        probabilities = np.concatenate(text_probabilities(fitted, validation.states))
        precision = float(average_precision_score(labels[chosen], probabilities[chosen]))
        note(
            f"epoch {epoch} of {settings.epochs}: loss {float(np.mean(jax.device_get(losses))):.4f}, average precision "
            f"{precision:.4f} on validation"
        )
        if precision > best_precision:
            best, best_precision = fitted, precision
    return calibrated(best, settings, validation)


def calibrated(classifier: BoundaryClassifier, settings: FitSettings, validation: Examples) -> BoundaryClassifier:
    """The classifier with the slope, intercept, threshold and minimum length of a step that fit the validation texts.

    Slope and intercept are fitted by maximum likelihood (Platt scaling). Then threshold and minimum length are chosen
    by the F1 of exact boundaries. Where the head is sure, F1 hardly depends on the threshold; so of all thresholds
    within a thousandth of the best one, the nearest to one half is taken.
    """
    chosen = np.concatenate(validation.counted)
    raw = text_probabilities(dataclasses.replace(classifier, slope=1.0, intercept=0.0), validation.states)
    p = np.clip(np.concatenate(raw)[chosen].astype(np.float64), 1e-12, 1 - 1e-7)
    logits = np.log(p) - np.log1p(-p)
    fit = LogisticRegression(C=1e6).fit(logits[:, None], np.concatenate(validation.labels)[chosen])
    classifier = dataclasses.replace(classifier, slope=float(fit.coef_[0, 0]), intercept=float(fit.intercept_[0]))
    probabilities = text_probabilities(classifier, validation.states)

    def f1_of(min_tokens: int, threshold: float) -> float:
        ends = text_boundaries(probabilities, validation.candidates, threshold, min_tokens)
        return precision_recall_f1(counts([np.flatnonzero(x) for x in ends], validation.right))[2]

    scored = {pair: f1_of(*pair) for pair in itertools.product(settings.min_tokens, settings.thresholds)}
    good = {pair: f1 for pair, f1 in scored.items() if f1 >= max(scored.values()) - 1e-3}
    min_tokens, threshold = min(good, key=lambda pair: (abs(pair[1] - 0.5), -good[pair], pair[0]))
    return dataclasses.replace(classifier, threshold=threshold, min_tokens=min_tokens)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def _update(
    head: HeadSettings,
    optimizer: optax.GradientTransformation,
    positive_weight: float,
    params: Params,
    state: Any,
    scale: Scale,
    key: jax.Array,
    batch: tuple[Array, ...],
) -> tuple[Params, Any, jax.Array]:
    ids_BL, states_BLND, labels_BL, counted_BL = batch

    def loss_of(params: Params) -> jax.Array:
        logits_BL = boundary_logits(head, params, scale, states_BLND, ids_BL, key)
        return boundary_loss(logits_BL, labels_BL, counted_BL, positive_weight)

    loss, gradient = jax.value_and_grad(loss_of)(params)
    changes, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, changes), state, loss
