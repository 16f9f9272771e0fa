"""Estimates with their uncertainty, one way for each kind of sample; estimates by reasoning depth.

There is one type, `Estimate`. How its interval is computed depends on what was sampled:

  estimate, ratio, difference, power_mean,  independent items or clusters of items: standard error, normal interval
  harmonic_mean, cohen_kappa
  bootstrap, bootstraps                     any statistic of clusters: percentiles of resampled values
  from_resamples                            a statistic that was recomputed on parts of the data: normal interval
  over_seeds                                one number for each of a few seeds: Student's t
  over_seeds_and_problems                   a table [seeds, problems] of which both axes are samples: Student's t
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Values = Sequence[float] | np.ndarray

CONFIDENCE = 0.95
NORMAL_95 = 1.959964  # standard errors from the mean to either end of a 95% interval of the normal distribution
_TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)


@dataclass(frozen=True)
class Estimate:
    """A value, its 95% interval, and the number of observations.

    Where the observations say too little, `value`, `low` or `high` is NaN. `stderr` is None where there is one
    observation, and where the interval was not made from a standard error.
    """

    value: float
    low: float
    high: float
    n: int
    stderr: float | None = None

    @classmethod
    def with_error(cls, value: float, stderr: float | None, n: int) -> "Estimate":
        """An estimate whose interval is the normal one: value ± 1.96 standard errors."""
        if stderr is None:
            return cls(value, math.nan, math.nan, n)
        return cls(value, value - NORMAL_95 * stderr, value + NORMAL_95 * stderr, n, stderr)

    def error_row(self) -> dict[str, Any]:
        """{"mean", "stderr", "n"}: how evaluation reports write it."""
        return {"mean": self.value, "stderr": self.stderr, "n": self.n}

    def interval_row(self) -> dict[str, Any]:
        """{"value", "low", "high", "n"}, with None in place of NaN: how drift reports write it."""
        row = {"value": self.value, "low": self.low, "high": self.high}
        return {name: x if math.isfinite(x) else None for name, x in row.items()} | {"n": self.n}


def error_rows(value: Any) -> Any:
    """The same with every estimate, also in nested dicts, as its `error_row`."""
    if isinstance(value, Estimate):
        return value.error_row()
    return {key: error_rows(item) for key, item in value.items()} if isinstance(value, dict) else value


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
    return Estimate.with_error(mean, _stderr((x - mean) / len(x), clusters), len(x))


def ratio(numerators: Values, denominators: Values) -> Estimate:
    """Sum of one quantity over the sum of another, both measured on the same independent items; n is their number.

    stderr by the delta method: sqrt(C / (C - 1) * sum_c (y_c - r x_c)^2) / sum_c x_c.
    """
    y, x = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    total = float(x.sum())
    value = float(y.sum()) / total
    return Estimate.with_error(value, _stderr((y - value * x) / total), len(x))


def perplexity_estimate(nats: Values, tokens: Values) -> Estimate:
    """exp of the mean cross-entropy per token, of texts with so many nats over so many predicted tokens each.

    Infinite where that overflows; n is the number of texts. stderr by the delta method, texts being independent:
    perplexity times that of the mean cross-entropy per token.
    """
    mean = ratio(nats, tokens)
    value = math.inf if mean.value >= 700 else math.exp(mean.value)
    return Estimate.with_error(value, None if mean.stderr is None else value * mean.stderr, mean.n)


def difference(values: Values, clusters: Values, others: Values, clusters_of_others: Values) -> Estimate:
    """Mean of one sample less the mean of another, which share clusters; n is the number of clusters.

    What both do in a cluster is subtracted before squares are taken, so their correlation is in the standard error.
    """
    x, y = np.asarray(values, np.float64), np.asarray(others, np.float64)
    groups = np.concatenate([np.asarray(clusters), np.asarray(clusters_of_others)])
    influences = np.concatenate([(x - x.mean()) / len(x), -(y - y.mean()) / len(y)])
    return Estimate.with_error(float(x.mean() - y.mean()), _stderr(influences, groups), len(np.unique(groups)))


def harmonic_mean(values: Values, clusters: Values, others: Values, clusters_of_others: Values) -> Estimate:
    """Harmonic mean of the means of two samples, which may share clusters; 0 where either is. n counts both samples.

    With a and b the means, 2ab / (a + b). stderr by the delta method: it changes by 2b^2 / (a + b)^2 with a, and by
    2a^2 / (a + b)^2 with b. None where either sample has one cluster, which says nothing about its spread.
    """
    x, y = np.asarray(values, np.float64), np.asarray(others, np.float64)
    a, b = float(x.mean()), float(y.mean())
    total = a + b or 1.0  # of two zeros the harmonic mean is zero
    influences = np.concatenate([2 * (b / total) ** 2 * (x - a) / len(x), 2 * (a / total) ** 2 * (y - b) / len(y)])
    groups = np.concatenate([np.asarray(clusters), np.asarray(clusters_of_others)])
    is_known = min(len(np.unique(np.asarray(part))) for part in (clusters, clusters_of_others)) > 1
    return Estimate.with_error(2 * a * b / total, _stderr(influences, groups) if is_known else None, len(x) + len(y))


def cohen_kappa(values: Values, others: Values, clusters: Values | None = None) -> Estimate:
    """Cohen's kappa of two raters who each call the same items true or false: (p - e) / (1 - e).

    p is the share of items on which they agree, and e what it would be if each kept its share of trues and they were
    independent: 1 is full agreement, 0 that of chance. NaN where both say the same of everything. stderr by the delta
    method.
    """
    x, y = np.asarray(values, np.float64), np.asarray(others, np.float64)
    same = (x == y).astype(np.float64)
    a, b, p = float(x.mean()), float(y.mean()), float(same.mean())
    e = a * b + (1 - a) * (1 - b)
    if e == 1:
        return Estimate(math.nan, math.nan, math.nan, len(x))
    slope = -(1 - p) / (1 - e) ** 2  # of kappa, by e
    influences = (same - p) / (1 - e) + slope * ((2 * b - 1) * (x - a) + (2 * a - 1) * (y - b))
    return Estimate.with_error((p - e) / (1 - e), _stderr(influences / len(x), clusters), len(x))


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
    return Estimate.with_error(value, _stderr(influences, clusters), len(d))


def _stderr(influences: np.ndarray, clusters: Values | None = None) -> float | None:
    """Standard error of a statistic from what each observation contributes to it, to first order.

    sqrt(C / (C - 1) * sum_c influence_c^2), with the contributions of each of the C clusters added up; None for one
    cluster, which says nothing about the spread.
    """
    if clusters is not None:
        influences = np.bincount(np.unique(np.asarray(clusters), return_inverse=True)[1], weights=influences)
    count = len(influences)
    return math.sqrt(count / (count - 1) * float(np.sum(influences**2))) if count > 1 else None


def bootstraps(
    statistic: Callable[[np.ndarray], Sequence[float]], clusters: Values, *, resamples: int, seed: int
) -> list[Estimate]:
    """Percentile bootstrap of several numbers at once; clusters are drawn with replacement, whole.

    Resamples whose value is not finite are left out. A number that is not finite on the data itself has no interval.

    Args:
      statistic: takes the indices of observations, those of a cluster as often as it was drawn; returns the numbers.
      clusters: for each observation the group that is drawn as a whole; `np.arange(n)` draws observations.
    """
    rows, groups = np.arange(len(clusters)), np.asarray(clusters)
    values = [float(x) for x in statistic(rows)]
    if not np.isfinite(values).any():
        return [Estimate(math.nan, math.nan, math.nan, len(rows)) for _ in values]
    rng = np.random.default_rng(seed)
    sizes = np.unique(groups, return_counts=True)[1]
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(sizes)[:-1])
    drawn = []
    for _ in range(resamples):
        chosen = rng.integers(0, len(members), len(members))
        drawn.append(statistic(np.concatenate([members[i] for i in chosen])))
    estimates = []
    for value, samples in zip(values, np.asarray(drawn, np.float64).T, strict=True):
        finite = samples[np.isfinite(samples)]
        known = np.isfinite(value) and len(finite) > 1
        low, high = np.percentile(finite, [2.5, 97.5]) if known else (math.nan, math.nan)
        estimates.append(Estimate(value if np.isfinite(value) else math.nan, float(low), float(high), len(rows)))
    return estimates


def bootstrap(statistic: Callable[[np.ndarray], float], clusters: Values, *, resamples: int, seed: int) -> Estimate:
    """`bootstraps` of one number; NaN without observations."""
    if not len(clusters):
        return Estimate(math.nan, math.nan, math.nan, 0)
    return bootstraps(lambda rows: (statistic(rows),), clusters, resamples=resamples, seed=seed)[0]


def from_resamples(value: float, samples: Sequence[float], n: int, most: float = math.inf) -> Estimate:
    """The normal interval of a value whose standard error is the spread of `samples`; its end is `most` at the most."""
    finite = np.asarray([x for x in samples if np.isfinite(x)])
    if not np.isfinite(value) or len(finite) < 2:
        return Estimate(value, math.nan, math.nan, n)
    margin = NORMAL_95 * float(finite.std(ddof=1))
    return Estimate(value, value - margin, min(value + margin, most), n)


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of one number a seed, with the 95% interval of Student's t; from minus to plus infinity with one seed."""
    x = np.asarray(values, np.float64)
    mean = float(x.mean())
    if len(x) < 2:
        return Estimate(mean, -math.inf, math.inf, len(x))
    margin = float(stats.t.ppf(_TAILS[1], len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Estimate(mean, mean - margin, mean + margin, len(x))


def over_seeds_and_problems(table_SP: np.ndarray) -> Estimate:
    """Mean of a table [seeds, problems], seeds and problems both being samples of what could be; n counts the seeds.

    The mean's variance is that of the seeds' means over their number plus that of the problems' means over theirs. That
    counts twice what seeds and problems have in common, so it is rather too large; its degrees of freedom are
    Welch-Satterthwaite's. A bootstrap over five seeds would be too sure of itself. One seed: over problems only.
    """
    parts = [  # (variance of the mean, degrees of freedom)
        (float(means.var(ddof=1)) / len(means), len(means) - 1)
        for means in (table_SP.mean(axis=1), table_SP.mean(axis=0))
        if len(means) > 1
    ]
    mean, variance = float(table_SP.mean()), sum(part for part, _ in parts)
    margin = 0.0
    if variance:
        freedom = variance**2 / sum(part**2 / count for part, count in parts)
        margin = float(stats.t.ppf(_TAILS[1], freedom)) * math.sqrt(variance)
    return Estimate(mean, mean - margin, mean + margin, len(table_SP))


def resampled_means(table_SP: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """Means of a table [seeds, problems] whose seeds and problems were drawn with replacement. float64 [resamples].

    Tables of one shape are drawn alike, so that ratios and differences of their means can be taken.
    """
    seeds, problems = table_SP.shape
    rng = np.random.default_rng(seed)
    weights_RP = rng.multinomial(problems, np.full(problems, 1 / problems), resamples) / problems
    per_seed_RS = weights_RP @ table_SP.T
    weights_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
    return np.sum(per_seed_RS * weights_RS, axis=1)


def percentile_interval(samples: Values) -> tuple[float, float]:
    """(low, high): where 95% of resampled values lie."""
    low, high = np.quantile(np.asarray(samples), _TAILS)
    return float(low), float(high)


def depth_key(depth: int, open_from: int | None) -> str:
    """The bucket of a depth: "1", "2", ..., and "5+" for all depths from `open_from` = 5 on. None: no open bucket."""
    return str(depth) if open_from is None or depth < open_from else f"{open_from}+"


def depth_buckets(depths: Values, open_from: int | None) -> dict[str, list[int]]:
    """The indices of the depths that fall into each bucket (see `depth_key`), shallow ones first."""
    buckets: dict[str, list[int]] = {}
    for i in np.argsort(depths, kind="stable").tolist():
        buckets.setdefault(depth_key(int(depths[i]), open_from), []).append(i)
    return buckets


def by_depth(
    values: Values, depths: Values, *, open_from: int | None = None, clusters: Values | None = None
) -> dict[str, Estimate]:
    """An estimate for each depth bucket that has values, shallow first, and "all" over everything; {} for no values.

    Raises:
      ValueError: values and depths differ in number.
    """
    if len(values) != len(depths):
        raise ValueError(f"{len(values)} values but {len(depths)} depths; give one depth per value")
    if not len(values):
        return {}
    x, c = np.asarray(values, np.float64), np.arange(len(values)) if clusters is None else np.asarray(clusters)
    buckets = depth_buckets(depths, open_from)
    return {key: estimate(x[rows], c[rows]) for key, rows in buckets.items()} | {"all": estimate(x, c)}
