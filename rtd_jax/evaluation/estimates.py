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
    residuals = np.bincount(groups, weights=x - mean)
    count = len(residuals)
    stderr = None
    if count > 1:
        stderr = math.sqrt(count / (count - 1) * float(np.sum(residuals**2))) / len(x)
    return Estimate(mean=mean, stderr=stderr, n=len(x))


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
