"""How well a segmentation finds the ends of steps, with 95% intervals from a bootstrap over chains."""

import functools
from typing import Any

import numpy as np

from rtd_jax.eval.estimates import Estimate, bootstrap, bootstraps
from rtd_jax.steps.scores import Places, counts, precision_recall_f1


def boundary_scores(found: Places, right: Places, *, resamples: int) -> dict[str, Any]:
    """Precision, recall and F1, exact and within 1 and 2 tokens, each with its interval.

    `all` counts every step's end. `inner` leaves out each chain's last one, which is a boundary by construction and
    needs no finding.
    """
    result: dict[str, Any] = {"chains": len(right), "boundaries": sum(map(len, right)), "all": {}, "inner": {}}
    for kind, stop in (("all", None), ("inner", -1)):
        for name, tolerance in (("exact", 0), ("within_1", 1), ("within_2", 2)):
            counts_C3 = counts([f[:stop] for f in found], [r[:stop] for r in right], tolerance)
            statistic = functools.partial(_precision_recall_f1, counts_C3)
            scores = bootstraps(statistic, np.arange(len(right)), resamples=resamples, seed=0)
            result[kind][name] = dict(zip(("precision", "recall", "f1"), map(_row, scores), strict=True))
    return result


def step_counts(found: Places, right: Places, *, resamples: int) -> dict[str, dict[str, Any]]:
    """Found minus annotated number of steps, by annotated number (8 and more together): mean, mean absolute, exact."""
    depths = np.array([len(r) for r in right])
    errors = np.array([len(f) for f in found]) - depths
    result = {}
    for depth in np.unique(np.minimum(depths, 8)):
        chosen = errors[np.minimum(depths, 8) == depth]
        mean = bootstrap(functools.partial(_mean, chosen), np.arange(len(chosen)), resamples=resamples, seed=0)
        result[str(depth) if depth < 8 else "8+"] = {
            "chains": len(chosen),
            "mean_error": _row(mean),
            "mean_absolute_error": float(np.abs(chosen).mean()),
            "exact": float((chosen == 0).mean()),
        }
    return result


def _precision_recall_f1(counts_C3: np.ndarray, chains: np.ndarray) -> tuple[float, float, float]:
    return precision_recall_f1(counts_C3[chains])


def _mean(values: np.ndarray, chains: np.ndarray) -> float:
    return float(np.mean(values[chains]))


def _row(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}
