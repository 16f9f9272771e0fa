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
    """CKA of two sets of states held in memory; row i of both is one example.

    Raises:
      ValueError: the rows do not pair up, or are not finite.
    """
    return _from_grams(*_grams(student_NS, teacher_ND))


def resampled_cka(
    student_NS: np.ndarray, teacher_ND: np.ndarray, resamples: int, rng: np.random.Generator
) -> list[CKA]:
    """CKA of `resamples` random halves of the examples. Their standard deviation is the standard error of CKA over all.

    Halves without replacement (the delete-half jackknife, Shao and Wu 1989), not resamples with replacement: there an
    example meets copies of itself, which are alike to every model, and the debiased estimate comes out far too high
    (0.59 instead of 0 with 40 examples of two unrelated models, 60 wide; `tests/test_eval_drift.py`).
    """
    gram_x, gram_y = _grams(student_NS, teacher_ND)
    halves = []
    for _ in range(resamples):
        chosen = rng.permutation(len(gram_x))[: len(gram_x) // 2]
        block = np.ix_(chosen, chosen)
        halves.append(_from_grams(gram_x[block], gram_y[block]))
    return halves


def _grams(student_NS: np.ndarray, teacher_ND: np.ndarray) -> list[np.ndarray]:
    """Inner products of centred states, float64 [n, n] each: all that CKA depends on."""
    if student_NS.ndim != 2 or teacher_ND.ndim != 2 or len(student_NS) != len(teacher_ND):
        raise ValueError(
            f"states have shapes {student_NS.shape} and {teacher_ND.shape}; expected [examples, width] with as many "
            "examples"
        )
    grams = []
    for name, states in (("student", student_NS), ("teacher", teacher_ND)):
        rows = np.asarray(states, np.float64)
        bad = ~np.isfinite(rows).all(axis=1)
        if bad.any():
            raise ValueError(
                f"the {name}'s state of example {int(np.argmax(bad))} is not finite; use float32, or leave it out"
            )
        rows = rows - rows.mean(0) if len(rows) else rows
        grams.append(rows @ rows.T)
    return grams


def _from_grams(gram_x: np.ndarray, gram_y: np.ndarray) -> CKA:
    if not len(gram_x):
        return CKA(math.nan, math.nan)
    pairs = ((gram_x, gram_y), (gram_x, gram_x), (gram_y, gram_y))
    return CKA(*(_ratio(*(hsic(*pair) for pair in pairs)) for hsic in (_hsic_0, _hsic_1)))


def _hsic_0(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741  # K and L are the names in the source
    """The biased estimate, times (n - 1)^2."""
    return float(np.sum(_centred(k) * _centred(l)))


def _centred(gram: np.ndarray) -> np.ndarray:
    rows = gram.mean(0)
    return gram - rows[None, :] - rows[:, None] + rows.mean()


def _hsic_1(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """n (n - 3) HSIC_1 = tr(K L) + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 / (n - 2) 1'KL1, of K and L with zero diagonals."""
    n = len(k)
    if n < 4:
        return math.nan
    k, l = (gram - np.diag(np.diag(gram)) for gram in (k, l))  # noqa: E741
    k_1, l_1 = k.sum(1), l.sum(1)
    totals = float(k_1.sum()) * float(l_1.sum()) / ((n - 1) * (n - 2))
    return float(np.sum(k * l)) + totals - 2.0 / (n - 2) * float(k_1 @ l_1)


def _ratio(cross: float, own_x: float, own_y: float) -> float:
    if not (own_x > 0 and own_y > 0):
        return math.nan
    return cross / math.sqrt(own_x) / math.sqrt(own_y)
