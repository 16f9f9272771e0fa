"""Measures of a segmentation: precision, recall and F1 of boundaries, errors of the number of steps, calibration."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Places = Sequence[np.ndarray]  # for each chain the tokens at which steps end, ascending


def matches(found: np.ndarray, right: np.ndarray, tolerance: int = 0) -> int:
    """How many found and right boundaries can be paired, at most `tolerance` tokens apart and each in one pair only."""
    count, i, j = 0, 0, 0
    while i < len(found) and j < len(right):
        if abs(int(found[i]) - int(right[j])) <= tolerance:
            count, i, j = count + 1, i + 1, j + 1
        elif found[i] < right[j]:
            i += 1
        else:
            j += 1
    return count


def counts(found: Places, right: Places, tolerance: int = 0) -> np.ndarray:
    """Numbers of matched, found and right boundaries of each chain. int [chains, 3]"""
    return np.array([(matches(f, r, tolerance), len(f), len(r)) for f, r in zip(found, right, strict=True)])


def precision_recall_f1(counts_C3: np.ndarray) -> tuple[float, float, float]:
    """Precision, recall and F1 over the boundaries of all chains together; 0 where there are none."""
    matched, found, right = np.asarray(counts_C3).sum(0)
    return matched / max(found, 1), matched / max(right, 1), 2 * matched / max(found + right, 1)


def interval(
    values: np.ndarray, statistic: Callable[[np.ndarray], Any], resamples: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """95% interval (low, high) of a statistic by the percentile bootstrap over chains, the first axis of `values`."""
    rng = np.random.default_rng(seed)
    drawn = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(resamples)]
    low, high = np.percentile(np.asarray(drawn, float), [2.5, 97.5], axis=0)
    return low, high


def boundary_scores(found: Places, right: Places, *, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Precision, recall and F1, exact and within 1 and 2 tokens, each with a 95% interval over chains.

    `all` counts every step's end. `inner` leaves out each chain's last one, which is a boundary by construction and
    needs no finding.
    """
    if not right:
        raise ValueError("there are no chains to score; check the data")
    result: dict[str, Any] = {"chains": len(right), "boundaries": int(sum(map(len, right)))}
    for kind, cut in (("all", None), ("inner", -1)):
        result[kind] = {}
        for tolerance in (0, 1, 2):
            counts_C3 = counts([f[:cut] for f in found], [r[:cut] for r in right], tolerance)
            low, high = interval(counts_C3, precision_recall_f1, resamples, seed)
            names = ("precision", "recall", "f1")
            result[kind]["exact" if not tolerance else f"within_{tolerance}"] = {
                name: {"value": float(value), "low": float(a), "high": float(b)}
                for name, value, a, b in zip(names, precision_recall_f1(counts_C3), low, high, strict=True)
            }
    return result


def step_counts(found: Places, right: Places, *, resamples: int = 1000, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Errors of the number of steps (found minus annotated), by the annotated number; 8 and more are one group."""
    depths = np.array([len(r) for r in right])
    errors = np.array([len(f) for f in found]) - depths
    result = {}
    for depth in sorted({min(int(d), 8) for d in depths}):
        chosen = errors[depths == depth] if depth < 8 else errors[depths >= 8]
        low, high = interval(chosen, np.mean, resamples, seed)
        result[str(depth) if depth < 8 else "8+"] = {
            "chains": len(chosen),
            "mean_error": {"value": float(chosen.mean()), "low": float(low), "high": float(high)},
            "mean_absolute_error": float(np.abs(chosen).mean()),
            "exact": float((chosen == 0).mean()),
        }
    return result


def calibration(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> dict[str, Any]:
    """Compares predicted probabilities with how often they come true, in bins of equal width weighted by their size.

    Expected calibration error = sum_b n_b / n |mean p_b - share_b|; Brier score = mean (p - label)^2.
    """
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    shown = []
    error = 0.0
    for index in range(bins):
        inside = place == index
        if inside.any():
            p, share = float(probabilities[inside].mean()), float(labels[inside].mean())
            error += inside.mean() * abs(p - share)
            shown.append({"count": int(inside.sum()), "probability": p, "share": share})
    return {
        "tokens": len(labels),
        "expected_calibration_error": float(error),
        "brier": float(np.mean((probabilities - labels) ** 2)),
        "bins": shown,
    }


def sentence_ends(text: str, ends: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """A baseline without a model: a step ends behind . ! or ?, also where closing quotes or brackets follow.

    Returns the indices of tokens among the candidates; the last candidate is always one.
    """
    chosen = [i for i in np.flatnonzero(candidates) if text[: ends[i]].rstrip("\"')]”’")[-1:] in (".", "!", "?")]
    return np.unique([*chosen, np.flatnonzero(candidates)[-1]]).astype(int)


def line_ends(text: str, ends: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """A baseline without a model: a step ends at a line end. Returns indices of tokens, as `sentence_ends`."""
    chosen = [i for i in np.flatnonzero(candidates) if text[ends[i] :][:1] == "\n"]
    return np.unique([*chosen, np.flatnonzero(candidates)[-1]]).astype(int)
