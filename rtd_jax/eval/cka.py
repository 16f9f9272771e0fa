"""Linear CKA: how alike two models arrange the same examples, whatever their widths.

    CKA(X, Y) = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y))

with rows of X [n, S] and Y [n, D] the states of one example in either model. It does not change when either space is
rotated, shifted or scaled as a whole. Source: Kornblith et al. 2019, arXiv:1905.00414.

The plain (biased) estimate rises towards 1 when there are fewer examples than dimensions, whatever the models do. The
debiased one puts the unbiased HSIC of Song et al. 2012 (JMLR 13, eq. 5) in its place (Nguyen et al. 2021,
arXiv:2010.15327, use it so); it may be slightly negative for unrelated models. Both are float64 throughout.
"""

import math
from typing import NamedTuple

import numpy as np


class CKA(NamedTuple):
    """The biased and the debiased estimate.

    Both are NaN where one of the models has no variance; the debiased one also with fewer than four examples.
    """

    biased: float
    debiased: float


def linear_cka(student_NS: np.ndarray, teacher_ND: np.ndarray) -> CKA:
    """CKA of two sets of states held in memory, through their [n, n] Gram matrices; row i of both is one example.

    Raises:
      ValueError: the rows do not pair up, or are not finite.
    """
    return _from_grams(*grams(student_NS, teacher_ND))


def grams(student_NS: np.ndarray, teacher_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inner products of centred states, float64 [n, n] each: all that CKA sees of them.

    Raises:
      ValueError: the rows do not pair up, or are not finite.
    """
    x, y = (np.asarray(rows, np.float64) for rows in (student_NS, teacher_ND))
    _check(x, y)
    x, y = (z - z.mean(0) if len(z) else z for z in (x, y))
    return x @ x.T, y @ y.T


def resampled_cka(
    student_NS: np.ndarray, teacher_ND: np.ndarray, resamples: int, rng: np.random.Generator
) -> list[CKA]:
    """CKA of `resamples` random halves of the examples. Their standard deviation is the standard error of CKA over all.

    Halves without replacement (the delete-half jackknife, Shao and Wu 1989), not resamples with replacement: there an
    example meets copies of itself, which look alike to every model, and the debiased estimate comes out far too high
    (0.59 instead of 0 with 40 examples of two unrelated models, 60 wide; `tests/test_eval_drift.py`).
    """
    gram_x, gram_y = grams(student_NS, teacher_ND)
    found = []
    for _ in range(resamples):
        chosen = rng.permutation(len(gram_x))[: len(gram_x) // 2]
        block = np.ix_(chosen, chosen)
        found.append(_from_grams(gram_x[block], gram_y[block]))
    return found


def _from_grams(gram_x: np.ndarray, gram_y: np.ndarray) -> CKA:
    n = len(gram_x)
    if not n:
        return CKA(math.nan, math.nan)
    centred = [_centred(gram) for gram in (gram_x, gram_y)]
    biased = [float(np.sum(a * b)) for a, b in ((centred[0], centred[1]), *((c, c) for c in centred))]
    cleared = [gram - np.diag(np.diag(gram)) for gram in (gram_x, gram_y)]
    debiased = [_hsic_1(a, b) for a, b in ((cleared[0], cleared[1]), *((c, c) for c in cleared))]
    return CKA(_ratio(*biased), _ratio(*debiased))


def _centred(gram: np.ndarray) -> np.ndarray:
    rows = gram.mean(0)
    return gram - rows[None, :] - rows[:, None] + rows.mean()


def _hsic_1(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741  # K and L are the names in the source
    n = len(k)
    if n < 4:
        return math.nan
    rows_k, rows_l = k.sum(1), l.sum(1)
    return _song(n, float(np.sum(k * l)), float(rows_k.sum()), float(rows_l.sum()), float(rows_k @ rows_l))


def _song(n: int, trace: float, total_k: float, total_l: float, mixed: float) -> float:
    """n (n - 3) HSIC_1 = tr(K L) + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 / (n - 2) 1'KL1."""
    return float(trace + total_k * total_l / ((n - 1) * (n - 2)) - 2.0 / (n - 2) * mixed)


def _ratio(cross: float, own_x: float, own_y: float) -> float:
    if not (own_x > 0 and own_y > 0):
        return math.nan
    return cross / math.sqrt(own_x) / math.sqrt(own_y)


def _check(x: np.ndarray, y: np.ndarray) -> None:
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(
            f"states have shapes {x.shape} and {y.shape}; expected [examples, width] with as many examples"
        )
    for name, rows in (("student", x), ("teacher", y)):
        bad = ~np.isfinite(rows).all(axis=1)
        if bad.any():
            raise ValueError(
                f"the {name}'s state of example {int(np.argmax(bad))} is not finite; use float32, or leave it out"
            )
