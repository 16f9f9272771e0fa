"""Measures of a segmentation (matched boundaries, precision, recall, F1, calibration), and two rule-based baselines.

Measures with an interval are in `rtd_jax.eval.segmentation`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rtd_jax.steps.prose import Reading

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


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Compares predicted probabilities with how often they come true, in ten bins of equal width weighted by size.

    Expected calibration error = sum_b n_b / n |mean p_b - share_b|; Brier score = mean (p - label)^2.
    """
    bin_of = np.minimum((probabilities * 10).astype(int), 9)
    error, bins = 0.0, []
    for index in np.unique(bin_of):
        is_inside = bin_of == index
        p, share = float(probabilities[is_inside].mean()), float(labels[is_inside].mean())
        error += is_inside.mean() * abs(p - share)
        bins.append({"count": int(is_inside.sum()), "probability": p, "share": share})
    return {
        "tokens": len(labels),
        "expected_calibration_error": float(error),
        "brier": float(np.mean((probabilities - labels) ** 2)),
        "bins": bins,
    }


def sentence_ends(reading: Reading) -> np.ndarray:
    """A baseline without a model: a step ends after . ! or ?, also where closing quotes or brackets follow.

    Returns the indices of tokens among the candidates; the last candidate is always one.
    """
    return _ends_among_candidates(reading, lambda end: reading.text[:end].rstrip("\"')]”’")[-1:] in (".", "!", "?"))


def line_ends(reading: Reading) -> np.ndarray:
    """A baseline without a model: a step ends at a line end. Returns indices of tokens, as `sentence_ends`."""
    return _ends_among_candidates(reading, lambda end: reading.text[end : end + 1] == "\n")


def _ends_among_candidates(reading: Reading, is_end: Callable[[int], bool]) -> np.ndarray:
    candidates = np.flatnonzero(reading.candidates_T)
    return np.array([i for i in candidates if i == candidates[-1] or is_end(reading.ends_T[i])])
