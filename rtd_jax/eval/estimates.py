"""Means with standard errors, and their grouping by reasoning depth."""

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

Values = Sequence[float] | np.ndarray


class Estimate(TypedDict):
    """A mean, its standard error (None where one observation cannot give it), and the number of observations."""

    mean: float
    stderr: float | None
    n: int


def estimate(values: Values, clusters: Values | None = None) -> Estimate:
    """Mean and standard error of a sample.

    Without clusters, stderr = sample sd / sqrt(n), as lm-evaluation-harness has it. Steps of one chain rise and fall
    together, and treating them as independent understates the error: with a cluster per chain,
    stderr = sqrt(C / (C - 1) * sum_c (sum_{i in c} (x_i - mean))^2) / n, which is the former when every cluster has one
    member.

    Args:
      values: at least one number.
      clusters: for each value, the group in which values are not independent.

    Raises:
      ValueError: there are no values.
    """
    if not len(values):
        raise ValueError("an estimate needs at least one value, got none")
    x = np.asarray(values, np.float64)
    mean = float(x.mean())
    groups = np.arange(len(x)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    return Estimate(mean=mean, stderr=_stderr(np.bincount(groups, weights=x - mean) / len(x)), n=len(x))


def ratio(numerators: Values, denominators: Values) -> Estimate:
    """Sum of one quantity over the sum of another, both measured on the same independent items; n is their number.

    stderr by the delta method: sqrt(C / (C - 1) * sum_c (y_c - r x_c)^2) / sum_c x_c.
    """
    y, x = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    total = float(x.sum())
    mean = float(y.sum()) / total
    return Estimate(mean=mean, stderr=_stderr((y - mean * x) / total), n=len(x))


def perplexity_estimate(nats: Values, tokens: Values) -> Estimate:
    """exp of the mean cross-entropy per token, of texts with so many nats over so many predicted tokens each.

    Infinite where that overflows; n is the number of texts. stderr by the delta method, texts being independent:
    perplexity times that of the mean cross-entropy per token.
    """
    mean = ratio(nats, tokens)
    value = math.exp(mean["mean"]) if mean["mean"] < 700 else math.inf
    return Estimate(mean=value, stderr=None if mean["stderr"] is None else value * mean["stderr"], n=mean["n"])


def difference(values: Values, clusters: Values, others: Values, clusters_of_others: Values) -> Estimate:
    """Mean of one sample less the mean of another, which share clusters; n is the number of clusters.

    What both do in a cluster is subtracted before squares are taken, so their correlation is in the standard error.
    """
    x, y = np.asarray(values, np.float64), np.asarray(others, np.float64)
    groups = np.unique(np.concatenate([np.asarray(clusters), np.asarray(clusters_of_others)]), return_inverse=True)[1]
    influences = np.concatenate([(x - x.mean()) / len(x), -(y - y.mean()) / len(y)])
    sums = np.bincount(groups, weights=influences)
    return Estimate(mean=float(x.mean() - y.mean()), stderr=_stderr(sums), n=len(sums))


def _stderr(influences_C: np.ndarray) -> float | None:
    """Standard error of a statistic from what each independent cluster contributes to it, to first order.

    sqrt(C / (C - 1) * sum_c influence_c^2); None for one cluster, which says nothing about the spread.
    """
    count = len(influences_C)
    return math.sqrt(count / (count - 1) * float(np.sum(influences_C**2))) if count > 1 else None


def power_mean(right: Sequence[Values], powers: Values, clusters: Values | None = None) -> Estimate:
    """Mean over chains of a ** power, with a the mean of all steps of all chains; n is the number of chains.

    stderr by the delta method, clustered: a chain moves a by its steps and the mean by its own power.

    Args:
      right: for each chain its steps' values.
      powers: for each chain its exponent.
      clusters: for each chain, the group in which chains are not independent.
    """
    steps = np.array([np.size(x) for x in right])
    sums = np.array([np.sum(x) for x in right], np.float64)
    d = np.asarray(powers, np.float64)
    a = float(sums.sum() / steps.sum())
    value = float(np.mean(a**d))
    slope = float(np.mean(d * a ** (d - 1)))
    influences = (a**d - value) / len(d) + slope * (sums - a * steps) / steps.sum()
    groups = np.arange(len(d)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    return Estimate(mean=value, stderr=_stderr(np.bincount(groups, weights=influences)), n=len(d))


def depth_key(depth: int, open_from: int | None) -> str:
    """The bucket of a depth: "1", "2", ..., and "5+" for all depths from `open_from` = 5 on. None: no open bucket."""
    return str(depth) if open_from is None or depth < open_from else f"{open_from}+"


def by_depth(
    values: Values,
    depths: Values,
    *,
    open_from: int | None = None,
    clusters: Values | None = None,
) -> dict[str, Estimate]:
    """An estimate for each depth bucket that has values, shallow first, and "all" over everything; {} for no values."""
    if len(values) != len(depths):
        raise ValueError(f"{len(values)} values but {len(depths)} depths; give one depth per value")
    if not len(values):
        return {}
    x, d = np.asarray(values, np.float64), np.asarray(depths)
    c = np.arange(len(x)) if clusters is None else np.asarray(clusters)
    buckets = np.minimum(d, open_from) if open_from is not None else d
    table = {
        depth_key(int(bucket), open_from): estimate(x[buckets == bucket], c[buckets == bucket])
        for bucket in np.unique(buckets)
    }
    return table | {"all": estimate(x, c)}
