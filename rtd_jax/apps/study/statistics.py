"""From finished runs to numbers with intervals, over seeds and over problems."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from rtd_jax.base.files import read_json
from rtd_jax.base.types import Array

RESAMPLES = 2_000
CONFIDENCE = 0.95
POWER = 0.8
MOST_SEEDS = 1_000  # beyond, a difference of this size is not to be found by adding seeds
SETTLED = 0.95  # of a curve's best: where it counts as having reached its plateau


@dataclass(frozen=True, eq=False)
class Outcome:
    """One finished run on its test problems; the same problems in the same order for every run of a task."""

    task: str
    method: str
    seed: int
    depths: np.ndarray  # int [problems]
    correct: np.ndarray  # bool [problems]; every intermediate result and the answer right, free-running
    teacher_correct: np.ndarray | None  # bool [problems]
    step_accuracy: float  # teacher-forced, over all depths
    perplexity: float
    updates: int
    seconds: float  # of training, calibration and compilation included; without evaluation and looks
    steps_of_depth: dict[str, float] = field(default_factory=dict)  # teacher-forced step accuracy by depth
    teacher_perplexity: float | None = None
    drift: dict[str, Any] | None = None  # see `rtd_jax.eval.drift.measure`
    curve: tuple[dict[str, Any], ...] = ()  # {"update", "seconds", "chain_accuracy": {depth: mean}}, on validation
    stages: tuple[dict[str, Any], ...] = ()  # see `rtd_jax.train.curriculum.StageRecord`


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and problems with its 95% interval."""

    mean: float
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Difference(Interval):
    """A paired difference of two methods; `p_value` of a two-sided t-test over seeds, None where that is undefined."""

    p_value: float | None
    seeds_needed: int | None  # see `seeds_to_find`; None where there is no p-value


def read_outcome(task: str, method: str, seed: int, workdir: Path) -> Outcome:
    """Reads report.json and generations.jsonl of a finished run.

    Raises:
      ValueError: a file is missing or damaged.
    """
    report = read_json(workdir / "report.json")
    path = workdir / "generations.jsonl"
    records: dict[str, list[dict]] = {"student": [], "teacher": []}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            records[record["model"]].append(record)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not what a run writes ({error!r}); delete {workdir} and run again") from error

    def correct(model: str) -> np.ndarray:
        return np.array([record["correct"] for record in records[model]], bool)

    return Outcome(
        task,
        method,
        seed,
        np.array([record["depth"] for record in records["student"]]),
        correct("student"),
        correct("teacher") if records["teacher"] else None,
        report["student"]["step_accuracy"]["all"]["mean"],
        report["student"]["perplexity"],
        report["updates"],
        report.get("train_seconds", report["wall_seconds"]),
        {depth: found["mean"] for depth, found in report["student"]["step_accuracy"].items()},
        report.get("teacher", {}).get("perplexity"),
        report.get("drift"),
        tuple(report.get("curve", ())),
        tuple(report["stages"]),
    )


def accuracy(outcomes: Sequence[Outcome], chosen: Callable[[Array], Array]) -> Interval:
    """Chain accuracy of one method over its seeds, on the problems whose depth `chosen` keeps."""
    mean, low, high = _interval(_table(outcomes, chosen))
    return Interval(mean, max(low, 0.0), min(high, 1.0), len(outcomes))


def difference(
    outcomes: Sequence[Outcome], baseline: Sequence[Outcome], chosen: Callable[[Array], Array]
) -> Difference | None:
    """Chain accuracy of a method minus the baseline's, paired by seed and problem; None without a common seed."""
    return mean_difference([(outcomes, baseline)], chosen)


def mean_difference(
    pairs: Sequence[tuple[Sequence[Outcome], Sequence[Outcome]]], chosen: Callable[[Array], Array]
) -> Difference | None:
    """Mean over pairs of (method, baseline) of their paired differences, on the seeds that all of them have."""
    seeds = sorted(set.intersection(*({o.seed for o in runs} for pair in pairs for runs in pair)))
    if not seeds:
        return None

    def table(runs: Sequence[Outcome]) -> np.ndarray:
        of_seed = {outcome.seed: outcome for outcome in runs}
        return _table([of_seed[seed] for seed in seeds], chosen)

    table_SP = np.mean([table(method) - table(baseline) for method, baseline in pairs], axis=0)
    per_seed = table_SP.mean(axis=1)
    p_value = needed = None
    if len(per_seed) > 1 and np.ptp(per_seed) > 0:
        p_value, needed = float(stats.ttest_1samp(per_seed, 0.0).pvalue), seeds_to_find(per_seed)
    return Difference(*_interval(table_SP), len(seeds), p_value, needed)


def seeds_to_find(per_seed: Array) -> int:
    """Seeds with which a two-sided t-test finds a difference of the mean and spread seen here with probability POWER.

    The power is that of Student's noncentral t. At most MOST_SEEDS.
    """
    effect = abs(np.mean(per_seed)) / np.std(per_seed, ddof=1)
    for seeds in range(2, MOST_SEEDS):
        critical = stats.t.ppf((1 + CONFIDENCE) / 2, seeds - 1)
        if not stats.nct.sf(critical, seeds - 1, effect * math.sqrt(seeds)) < POWER:  # NaN for enormous effects
            return seeds
    return MOST_SEEDS


def share_of_gain_lost(full: Interval, ablated: Interval, baseline: Interval) -> float | None:
    """(full - ablated) / (full - baseline); None where there is no gain to lose."""
    gain = full.mean - baseline.mean
    return (full.mean - ablated.mean) / gain if gain > 0 else None


def share_interval(
    full: Sequence[Outcome],
    ablated: Sequence[Outcome],
    baseline: Sequence[Outcome],
    chosen: Callable[[Array], Array],
) -> tuple[float, float] | None:
    """95% interval of (full - ablated) / (full - baseline): seeds and problems drawn alike for all three.

    By bootstrap. None without a common seed, or where the gain's own interval does not lie above 0: a share of nothing.
    """
    seeds = sorted({o.seed for o in full} & {o.seed for o in ablated} & {o.seed for o in baseline})
    whole = difference(full, baseline, chosen)
    if not seeds or whole is None or whole.low <= 0:
        return None
    tables = [
        _table([next(o for o in runs if o.seed == s) for s in seeds], chosen) for runs in (full, ablated, baseline)
    ]
    of_full, of_ablated, of_baseline = (_resampled(table) for table in tables)
    gain = of_full - of_baseline
    there = gain > 0  # all but a few draws
    low, high = np.quantile((of_full - of_ablated)[there] / gain[there], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean of one number a seed, with the 95% interval of Student's t; from minus to plus infinity with one seed."""
    x = np.asarray(values, np.float64)
    mean = float(x.mean())
    if len(x) < 2:
        return Interval(mean, -math.inf, math.inf, len(x))
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return Interval(mean, mean - margin, mean + margin, len(x))


def solved_after_stage(outcome: Outcome, number: int) -> float | None:
    """Mean over a stage's depths ("3", "5+", "1-2") at the first look not before its end; None without such a look."""
    end = sum(record["updates"] for record in outcome.stages[: number + 1])
    low, _, high = outcome.stages[number]["depth"].rstrip("+").partition("-")
    last = math.inf if outcome.stages[number]["depth"].endswith("+") else int(high or low)
    seen: dict[str, float] = next((look["chain_accuracy"] for look in outcome.curve if look["update"] >= end), {})
    chosen = [x for key, x in seen.items() if key.isdigit() and int(low) <= int(key) <= last]
    return float(np.mean(chosen)) if chosen else None


def settled_at(outcome: Outcome) -> tuple[int, float]:
    """(update, seconds) of the first look at which a curve has SETTLED of its best."""
    best = max(look["chain_accuracy"]["all"] for look in outcome.curve)
    look = next(look for look in outcome.curve if look["chain_accuracy"]["all"] >= SETTLED * best)
    return look["update"], look["seconds"]


def accuracy_at(outcome: Outcome, seconds: float) -> float:
    """Accuracy at the last look not after `seconds`; 0 before the first."""
    looks = [look["chain_accuracy"]["all"] for look in outcome.curve if look["seconds"] <= seconds]
    return looks[-1] if looks else 0.0


def _table(outcomes: Sequence[Outcome], chosen: Callable[[Array], Array]) -> np.ndarray:
    """float64 [seeds, problems].

    Raises:
      ValueError: the runs were not tested on the same problems.
    """
    first = outcomes[0]
    for outcome in outcomes:
        if not np.array_equal(outcome.depths, first.depths):
            raise ValueError(
                f"{outcome.task} {outcome.method} seed {outcome.seed} was tested on other problems than seed "
                f"{first.seed}; all runs of a task need the same test set"
            )
    keep = np.asarray(chosen(first.depths), bool)
    return np.stack([outcome.correct[keep] for outcome in outcomes]).astype(np.float64)


def _interval(table_SP: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high), seeds and problems both being samples of what could be.

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
    if not variance:
        return mean, mean, mean
    freedom = variance**2 / sum(part**2 / count for part, count in parts)
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance)
    return mean, mean - margin, mean + margin


def _resampled(table_SP: np.ndarray) -> np.ndarray:
    """Means of resampled tables, [RESAMPLES]; tables of one shape are drawn alike."""
    seeds, problems = table_SP.shape
    rng = np.random.default_rng(0)
    weights_RP = rng.multinomial(problems, np.full(problems, 1 / problems), RESAMPLES) / problems
    per_seed_RS = weights_RP @ table_SP.T
    weights_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    return np.sum(per_seed_RS * weights_RS, axis=1)


def verdict(expected_sign: int, found: Interval | None) -> str:
    """Whether a difference has the sign the article reports: "agrees", "disagrees" or "undecided"; so is one seed."""
    if found is None or found.seeds < 2 or not math.isfinite(found.low) or found.low <= 0.0 <= found.high:
        return "undecided"
    return "agrees" if math.copysign(1, found.mean) == expected_sign else "disagrees"
