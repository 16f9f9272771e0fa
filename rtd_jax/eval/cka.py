"""Linear CKA: how alike two models arrange the same examples, whatever their widths.

    CKA(X, Y) = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y))

with rows of X [n, S] and Y [n, D] the states of one example in either model. It does not change when either space is
rotated, shifted or scaled as a whole. Source: Kornblith et al. 2019, arXiv:1905.00414.

The plain (biased) estimate rises towards 1 when there are fewer examples than dimensions, whatever the models do. The
debiased one puts the unbiased HSIC of Song et al. 2012 (JMLR 13, eq. 5) in its place (Nguyen et al. 2021,
arXiv:2010.15327, use it so); it may be slightly negative for unrelated models. Both are float64 throughout.
"""

import math
from typing import Any, NamedTuple

import numpy as np


class CKA(NamedTuple):
    """Both estimates; NaN where one of the models has no variance, or, debiased, with fewer than four examples."""

    biased: float
    debiased: float


class StreamingCKA:
    """CKA over batches of examples that are never held together: sums of first to fourth order are enough.

    Memory is that of [S, D], [S, S] and [D, D] float64 matrices, whatever the number of examples.
    """

    def __init__(self, student_width: int, teacher_width: int):
        self.n = 0
        self._widths = (student_width, teacher_width)
        self._shifts: tuple[np.ndarray, np.ndarray] | None = None
        self._sums: dict[str, Any] = {}

    def add(self, student_NS: np.ndarray, teacher_ND: np.ndarray) -> None:
        """Takes one more batch; row i of both is the same example.

        Raises:
          ValueError: the rows do not pair up, have another width, or are not finite.
        """
        x, y = (np.asarray(rows, np.float64) for rows in (student_NS, teacher_ND))
        _check(x, y)
        if (x.shape[1], y.shape[1]) != self._widths:
            raise ValueError(f"states are {x.shape[1]} and {y.shape[1]} wide, the sums are for {self._widths}")
        if not len(x):
            return
        if self._shifts is None:
            # CKA does not see a shift, but sums of squares of states far from zero would lose digits.
            self._shifts = (x.mean(0), y.mean(0))
        x, y = x - self._shifts[0], y - self._shifts[1]
        xx, yy = (np.einsum("nd,nd->n", z, z) for z in (x, y))
        new = {
            "x": x.sum(0),
            "y": y.sum(0),
            "xy": x.T @ y,
            "xx": x.T @ x,
            "yy": y.T @ y,
            "x|x|": xx @ x,
            "x|y|": yy @ x,
            "y|x|": xx @ y,
            "y|y|": yy @ y,
            "|x||x|": xx @ xx,
            "|x||y|": xx @ yy,
            "|y||y|": yy @ yy,
        }
        self.n += len(x)
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in new.items()}

    def value(self) -> CKA:
        """CKA of everything added so far."""
        pairs = (("x", "y", "xy"), ("x", "x", "xx"), ("y", "y", "yy"))
        return CKA(_ratio(*(self._biased(*pair) for pair in pairs)), _ratio(*(self._unbiased(*pair) for pair in pairs)))

    def _biased(self, a: str, b: str, ab: str) -> float:
        """(n - 1)^2 HSIC_0 = || A^T H B ||^2."""
        if not self.n:
            return math.nan
        centred = self._sums[ab] - np.outer(self._sums[a], self._sums[b]) / self.n
        return float(np.sum(centred**2))

    def _unbiased(self, a: str, b: str, ab: str) -> float:
        """n (n - 3) HSIC_1 of the kernels K = A A^T and L = B B^T with their diagonals cleared."""
        if self.n < 4:
            return math.nan
        s = self._sums
        diagonals = s[f"|{a}||{b}|"]
        trace = np.sum(s[ab] ** 2) - diagonals
        total_k = s[a] @ s[a] - np.trace(s[a + a])
        total_l = s[b] @ s[b] - np.trace(s[b + b])
        # 1^T K L 1 = sum_i (a_i . sum a - |a_i|^2)(b_i . sum b - |b_i|^2)
        mixed = s[a] @ s[ab] @ s[b] - s[a] @ s[f"{a}|{b}|"] - s[f"{b}|{a}|"] @ s[b] + diagonals
        return _song(self.n, trace, total_k, total_l, mixed)


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
