"""Coherence drift: do student and teacher diverge along a chain of steps, and is that associated with failure?

Everything here is float64 NumPy on states at step boundaries, [C, K, D]: C chains, slot 0 the end of the prompt, slot
i >= 1 the end of step i. Transition i (index i - 1 below) leads into step i: delta_i = h_i - h_{i-1}.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from sklearn.linear_model import RidgeCV
from sklearn.metrics import roc_auc_score, roc_curve

from rtd_jax.eval.cka import linear_cka, resampled_cka
from rtd_jax.eval.estimates import Estimate, bootstrap, estimate, from_resamples

# Ridge strengths tried, as multiples of the mean square of a coordinate times the number of rows.
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
MIN_CHAINS = 8  # a slot that fewer chains have gets no CKA, and no verdict on where drift starts

Map = np.ndarray | None  # [S, D], or the identity


class BoundaryStates(NamedTuple):
    """States of two models that read the same chains."""

    student_CKS: np.ndarray
    teacher_CKD: np.ndarray
    mask_CK: np.ndarray  # bool; the slots that exist


def finite_states(states: BoundaryStates) -> tuple[BoundaryStates, int]:
    """The states with those masked that are not finite in either model, and how many these are.

    A model whose numbers overflow has no state there: nothing can be compared with it, but the rest can.
    """
    student_CKS, teacher_CKD, mask_CK = states
    finite_CK = np.isfinite(student_CKS).all(-1) & np.isfinite(teacher_CKD).all(-1)
    known_CK = mask_CK & finite_CK
    if (known_CK == mask_CK).all():
        return states, 0
    student, teacher = (np.where(known_CK[:, :, None], x, 0.0) for x in (student_CKS, teacher_CKD))
    return BoundaryStates(student, teacher, known_CK), int(np.sum(mask_CK & ~finite_CK))


def transitions(states: BoundaryStates) -> BoundaryStates:
    """The transitions between neighbouring slots, in the place of states: float64 [C, K-1, D], one slot fewer."""
    student, teacher = (np.diff(np.asarray(x, np.float64), axis=1) for x in states[:2])
    return BoundaryStates(student, teacher, states.mask_CK[:, 1:] & states.mask_CK[:, :-1])


def cka_by_step(
    states: BoundaryStates, *, resamples: int, seed: int, chains: np.ndarray | None = None
) -> dict[int, tuple[Estimate, Estimate]]:
    """{slot: (biased, debiased) CKA over the chains that have it}, for slots that `MIN_CHAINS` chains have.

    Intervals are normal, from the standard deviation over random halves of the chains (see `cka.resampled_cka`).

    Args:
      chains: bool [C], the chains to take; all by default. The deeper a slot, the fewer and the more particular the
        chains that have it: pass the deep ones alone to follow the same chains through all slots.
    """
    chosen = np.ones(len(states.mask_CK), bool) if chains is None else chains
    ckas: dict[int, tuple[Estimate, Estimate]] = {}
    for slot, has_slot in enumerate(states.mask_CK.T):
        keep = has_slot & chosen
        count = int(keep.sum())
        if count >= MIN_CHAINS:
            pair = states.student_CKS[keep, slot], states.teacher_CKD[keep, slot]
            value, samples = linear_cka(*pair), resampled_cka(*pair, resamples, np.random.default_rng((seed, slot)))
            ckas[slot] = (
                from_resamples(value.biased, [sample.biased for sample in samples], count, most=1.0),
                from_resamples(value.debiased, [sample.debiased for sample in samples], count, most=1.0),
            )
    return ckas


def cosines(states: BoundaryStates, maps: Sequence[Map]) -> np.ndarray:
    """cos(f(h_S_i), h_T_i) at every slot; NaN where masked or a state is zero. float64 [C, K].

    Args:
      states: of boundaries, or what `transitions` makes of them.
      maps: f (or g) for each chain, as `cross_fitted` gives it; one for all chains is `[f] * C`.

    Raises:
      ValueError: there is not one map for each chain, or the identity is to join two widths.
    """
    student_CKS, teacher_CKD, mask_CK = states
    if len(maps) != len(mask_CK):
        raise ValueError(f"{len(maps)} maps for {len(mask_CK)} chains; give one for each chain")
    cosines_CK = np.full(mask_CK.shape, np.nan)
    for chain, mapping in enumerate(maps):
        keep = mask_CK[chain]
        x, y = np.asarray(student_CKS[chain, keep], np.float64), np.asarray(teacher_CKD[chain, keep], np.float64)
        if mapping is None and x.shape[-1] != y.shape[-1]:
            raise ValueError(
                f"student width {x.shape[-1]}, teacher width {y.shape[-1]}: cosines need a map between them"
            )
        x = x if mapping is None else x @ np.asarray(mapping, np.float64)
        norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
        dots = np.sum(x * y, axis=-1)
        cosines_CK[chain, keep] = np.divide(dots, norms, out=np.full(len(x), np.nan), where=norms > 0)
    return cosines_CK


def cross_fitted(states: BoundaryStates, seed: int) -> list[Map]:
    """For each chain a linear map student -> teacher that has not seen it: fitted on one half, used on the other.

    Ridge regression, its strength by leave-one-out error (scikit-learn's RidgeCV). Where the widths agree it shrinks to
    the identity, else to zero: with fewer boundaries than dimensions plain least squares could not even map a model to
    itself.

    Args:
      states: of boundaries, for f; or what `transitions` makes of them, for g.

    Raises:
      ValueError: fewer than two chains.
    """
    student_CKS, teacher_CKD, mask_CK = finite_states(states)[0]
    count = len(mask_CK)
    if count < 2:
        raise ValueError(f"a map fitted on one half and measured on the other needs two chains, got {count}")
    half_C = np.random.default_rng(seed).permutation(count) < count // 2
    fitted = {}
    for side in (False, True):
        rows = mask_CK & (half_C == side)[:, None]
        fitted[side] = _fit(student_CKS[rows], teacher_CKD[rows])
    return [fitted[not side] for side in half_C.tolist()]


def mean_by_step(values_CK: np.ndarray) -> dict[int, Estimate]:
    """{column: mean over the chains that have a value there}; NaN is no value."""
    columns = enumerate(values_CK.T)
    return {column: estimate(x[np.isfinite(x)]) for column, x in columns if np.isfinite(x).any()}


def decline(values_CK: np.ndarray) -> Estimate:
    """Mean change of a value per step, over chains with at least two values: the slope of each chain's own line.

    Negative: student and teacher diverge along the chain. Chains of different depth are not compared with each other.
    """
    slopes = []
    for row in values_CK:
        columns = np.flatnonzero(np.isfinite(row))
        if len(columns) > 1:
            slopes.append(float(np.polyfit(columns, row[columns], 1)[0]))
    return estimate(slopes) if slopes else Estimate(np.nan, np.nan, np.nan, 0)


def drift_starts(values_CK: np.ndarray) -> int | None:
    """The first column whose drop against column 0, chain by chain, is beyond its 95% interval, there and ever after.

    None where there is no such column.
    """
    start = None
    for column in range(1, values_CK.shape[1]):
        drops = values_CK[:, column] - values_CK[:, 0]
        drops = drops[np.isfinite(drops)]
        if len(drops) < MIN_CHAINS:
            break
        is_below = estimate(drops).high < 0
        start = (start or column) if is_below else None
    return start


def auroc(
    scores: np.ndarray,
    correct: np.ndarray,
    chains: np.ndarray,
    strata: np.ndarray | None = None,
    *,
    resamples: int,
    seed: int,
) -> Estimate:
    """Area under the ROC curve: how often something right scores higher than something wrong. 0.5 is chance.

    The interval is the percentile bootstrap over whole chains: steps of one chain are not independent.

    Args:
      scores: float [M], higher for what should be right.
      correct: bool [M].
      chains: [M], which chain each belongs to.
      strata: [M]; compares only within a stratum, each weighted by its pairs. Deep chains fail more often and drift
        further for other reasons too: without strata by depth, depth itself would be found to predict failure.
    """
    groups = np.zeros(len(scores), int) if strata is None else np.unique(strata, return_inverse=True)[1]

    def statistic(rows: np.ndarray) -> float:
        total = pairs = 0.0
        for group in np.unique(groups[rows]):
            inside = rows[groups[rows] == group]
            right = int(correct[inside].sum())
            weight = right * (len(inside) - right)
            if weight:
                total += weight * float(roc_auc_score(correct[inside], scores[inside]))
                pairs += weight
        return total / pairs if pairs else np.nan

    return bootstrap(statistic, chains, resamples=resamples, seed=seed)


def roc_points(scores: np.ndarray, correct: np.ndarray) -> list[tuple[float, float]]:
    """(false positive rate, true positive rate) along the ROC curve; [] where all are right or all wrong."""
    if not 0 < int(np.sum(correct)) < len(correct):
        return []
    false_positive, true_positive, _ = roc_curve(correct, scores)
    return [(float(x), float(y)) for x, y in zip(false_positive, true_positive, strict=True)]


def rank_correlation(
    drift: np.ndarray, failed: np.ndarray, depths: np.ndarray | None = None, *, resamples: int, seed: int
) -> Estimate:
    """Spearman's correlation of drift with failure, over chains; with `depths`, of the ranks within each depth.

    The interval is the percentile bootstrap over chains.
    """

    def statistic(rows: np.ndarray) -> float:
        x, y = drift[rows], failed[rows].astype(float)
        if depths is not None:
            x, y = (_ranks_within(z, depths[rows]) for z in (x, y))
        if len(rows) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
            return np.nan
        return float(stats.pearsonr(x, y)[0] if depths is not None else stats.spearmanr(x, y)[0])

    return bootstrap(statistic, np.arange(len(drift)), resamples=resamples, seed=seed)


def measure(
    states: BoundaryStates,
    maps: tuple[Sequence[Map], Sequence[Map]],
    steps_right: Sequence[Sequence[bool | None]],
    failed: np.ndarray,
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Drift by step, and its relation to failure, as plain numbers.

    Args:
      states: of both models at slots 0 (the prompt's end) to K; those that are not finite are left out and counted.
      maps: (f, g) for each chain.
      steps_right: for each chain, whether each of its steps is right; None where that cannot be said.
      failed: bool [C], whether the student's free-running chain is wrong.
    """
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    states, not_finite = finite_states(states)
    slots = states.mask_CK.shape[1]
    depths = np.where(states.mask_CK.any(1), slots - 1 - np.argmax(states.mask_CK[:, ::-1], axis=1), 0)
    # Column 0 of both belongs to the first step: the prompt's end has no transition, and no part in what follows.
    boundary_CK, transition_CK = cosines(states, maps[0]), cosines(transitions(states), maps[1])
    by_step = {"boundary_cosine": boundary_CK[:, 1:], "transition_cosine": transition_CK}
    everyone = cka_by_step(states, **options)
    deepest = max((slot for slot in everyone if slot <= 4), default=0)
    same = cka_by_step(states, **options, chains=depths >= deepest)
    boundary, transition = mean_by_step(boundary_CK), mean_by_step(transition_CK)
    none = (None, None)
    steps = [
        {
            "step": slot,
            "chains": int(states.mask_CK[:, slot].sum()),
            "cka": _row(everyone.get(slot, none)[0]),
            "cka_debiased": _row(everyone.get(slot, none)[1]),
            "cka_same_chains": _row(same.get(slot, none)[1]) if slot <= deepest else None,
            "boundary_cosine": _row(boundary.get(slot)),
            "transition_cosine": _row(transition.get(slot - 1)),
        }
        for slot in range(states.mask_CK.shape[1])
    ]
    relation, roc = _relation(transition_CK, depths, steps_right, failed, options)
    starts = {name: drift_starts(values_CK) for name, values_CK in by_step.items()}
    return {
        "chains": len(depths),
        **({"not_finite": not_finite} if not_finite else {}),  # boundaries left out
        "steps": steps,
        "same_chains": {"steps": deepest, "chains": int(np.sum(depths >= deepest))},
        "decline": {name: decline(values_CK).interval_row() for name, values_CK in by_step.items()},
        "drift_starts": {name: None if column is None else column + 1 for name, column in starts.items()},
        "relation": relation,
        "roc": roc,
    }


def _relation(
    transition_CK: np.ndarray,
    depths: np.ndarray,
    steps_right: Sequence[Sequence[bool | None]],
    failed: np.ndarray,
    options: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Association of transition cosines with right steps and right chains: (AUROCs and correlations, ROC curves)."""
    relation: dict[str, Any] = {}
    roc: dict[str, Any] = {}

    def relate(name: str, scores: np.ndarray, correct: np.ndarray, chains: np.ndarray, strata: np.ndarray) -> None:
        relation[name] = {
            "auroc": auroc(scores, correct, chains, **options).interval_row(),
            "auroc_within": auroc(scores, correct, chains, strata, **options).interval_row(),
            "wrong": int(np.sum(~correct)),
        }
        roc[name] = roc_points(scores, correct)

    # One row for each transition whose own step (offset 0) or next step (offset 1) has a known outcome.
    for name, offset in (("next_step", 1), ("same_step", 0)):
        rows = [
            (transition_CK[chain, i], right[i + offset], chain, depths[chain] * 1000 + i)
            for chain, right in enumerate(steps_right)
            for i in range(min(len(right) - offset, transition_CK.shape[1]))
            if right[i + offset] is not None and np.isfinite(transition_CK[chain, i])
        ]
        scores, correct, chains, strata = np.array(rows).reshape(-1, 4).T
        # The same place in chains of the same depth: neither depth nor place may stand in for the cosine.
        relate(name, scores, correct.astype(bool), chains, strata)
    known = np.isfinite(transition_CK).any(axis=1)
    means, right, depths = np.nanmean(transition_CK[known], axis=1), ~failed[known], depths[known]
    relate("chain", means, right, np.arange(len(means)), depths)
    relation["correlation"] = {
        "spearman": rank_correlation(1 - means, ~right, **options).interval_row(),
        "within_depth": rank_correlation(1 - means, ~right, depths, **options).interval_row(),
    }
    return relation, roc


def _ranks_within(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Ranks within each group, in (-1/2, 1/2): what is left is not explained by the group."""
    ranks = np.zeros(len(values))
    for group in np.unique(groups):
        inside = groups == group
        ranks[inside] = (stats.rankdata(values[inside]) - 0.5) / inside.sum() - 0.5
    return ranks


def _fit(student_RS: np.ndarray, teacher_RD: np.ndarray) -> np.ndarray:
    x, y = np.asarray(student_RS, np.float64), np.asarray(teacher_RD, np.float64)
    prior = np.eye(x.shape[1]) if x.shape[1] == y.shape[1] else np.zeros((x.shape[1], y.shape[1]))
    if len(x) < 2:
        return prior
    strengths = np.asarray(RIDGES) * max(float(np.mean(x**2)) * len(x), 1e-30)
    ridge = RidgeCV(alphas=strengths, fit_intercept=False).fit(x, y - x @ prior)
    return prior + np.reshape(ridge.coef_, (y.shape[1], x.shape[1])).T


def _row(value: Estimate | None) -> dict[str, Any] | None:
    return None if value is None else value.interval_row()
