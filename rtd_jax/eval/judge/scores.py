"""How well a judge finds the first wrong step, as ProcessBench (arXiv:2412.06559) counts, and how two judges agree."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from rtd_jax.eval.estimates import Estimate, cohen_kappa, estimate, harmonic_mean

Verdicts = Sequence[int | None]  # index of the first wrong step; -1: all are right; None: the judge gave no verdict


def score_verdicts(labels: Sequence[int], verdicts: Verdicts, problems: Sequence[Hashable]) -> dict[str, Any]:
    """A judge against people, in percent, each share with its standard error under `<name>_stderr`.

      accuracy_right   of the solutions that people call right (label -1), those that the judge calls right
      accuracy_wrong   of the others, those whose first wrong step the judge finds exactly
      f1               harmonic mean of the two
      n_right, n_wrong how many solutions they are
      no_verdict       how many of them got no verdict, which counts as a wrong one

    Solutions of one problem are a cluster. What has no solutions to be measured on is None.
    """
    found = np.array([label == verdict for label, verdict in zip(labels, verdicts, strict=True)], np.float64)
    is_right, clusters = np.array(labels, np.int64) == -1, _numbered(problems)
    parts = [(found[rows], clusters[rows]) for rows in (is_right, ~is_right)]
    right, wrong = (estimate(*part) if len(part[0]) else None for part in parts)
    f1 = harmonic_mean(*parts[0], *parts[1]) if right and wrong else None
    return {
        **_percent("accuracy_right", right),
        **_percent("accuracy_wrong", wrong),
        **_percent("f1", f1),
        "n_right": int(is_right.sum()),
        "n_wrong": int((~is_right).sum()),
        "no_verdict": sum(verdict is None for verdict in verdicts),
    }


def agreement(verdicts: Verdicts, others: Verdicts, problems: Sequence[Hashable]) -> dict[str, Any]:
    """Two judges on the same solutions, over those on which both gave a verdict.

    same_verdict  share with the same first wrong step, or none in both, in percent
    same_right    share that both call right or both wrong, in percent
    kappa         Cohen's kappa of calling a solution right; None where both say the same of all
    n, no_verdict how many solutions have two verdicts, and how many do not
    """
    pairs = list(zip(verdicts, others, _numbered(problems), strict=True))
    rows = [(a, b, problem) for a, b, problem in pairs if a is not None and b is not None]
    left_out = {"n": len(rows), "no_verdict": len(pairs) - len(rows)}
    if not rows:
        return {**_percent("same_verdict", None), **_percent("same_right", None), **_plain("kappa", None), **left_out}
    first, second, clusters = (np.array(column) for column in zip(*rows, strict=True))
    return {
        **_percent("same_verdict", estimate((first == second).astype(np.float64), clusters)),
        **_percent("same_right", estimate(((first == -1) == (second == -1)).astype(np.float64), clusters)),
        **_plain("kappa", cohen_kappa(first == -1, second == -1, clusters)),
        **left_out,
    }


def _numbered(problems: Sequence[Hashable]) -> np.ndarray:
    numbers = {problem: number for number, problem in enumerate(dict.fromkeys(problems))}
    return np.array([numbers[problem] for problem in problems])


def _percent(name: str, found: Estimate | None) -> dict[str, float | None]:
    return _plain(name, found, 100)


def _plain(name: str, found: Estimate | None, scale: int = 1) -> dict[str, float | None]:
    if found is None or not math.isfinite(found.value):
        return {name: None, f"{name}_stderr": None}
    return {name: scale * found.value, f"{name}_stderr": None if found.stderr is None else scale * found.stderr}
