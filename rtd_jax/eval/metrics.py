"""What a report says about scored texts: one entry per metric, most of them a table by reasoning depth.

A new metric is a function of `ScoredTexts`, in a file of its own, and one line in one of the lists below.
report.json, the printed tables and report.html show what these lists hold.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rtd_jax.data.trace import answer_line
from rtd_jax.eval.answers import flexible_answer, harness_match, parse_number, strict_answer
from rtd_jax.eval.estimates import (
    depth_buckets,
    depth_key,
    difference,
    error_rows,
    estimate,
    perplexity_estimate,
    power_mean,
)
from rtd_jax.eval.scored import Record, ScoredTexts, Table

DEEP = 4  # steps; the article compares step accuracy with chain accuracy on problems of four steps and more
# What a record has besides the scores of its text, where a model was run on the problem.
MODEL_KEYS = ("teacher_forced", "reference_nats", "reference_tokens", "max_new_tokens", "text_format", "decoding")
# And where a served model judged it; see `judged_texts.verdict_fields`.
JUDGE_KEYS = ("judged_by", "judged_text", "judged_first_error")


@dataclasses.dataclass(frozen=True)
class Metric:
    """One entry of a report.

    Attributes:
      name: its key in report.json.
      measure: makes the entry from the scored texts: a `Table`, or anything else that JSON can hold.
      label: the name of a `Table` in printed tables and on the page; "" leaves it out there.
      is_share: whether it is shown in percent.
      is_column: whether it is shown for every depth; otherwise only its "all" is shown, in a line of its own.
    """

    name: str
    measure: Callable[[ScoredTexts], Any]
    label: str = ""
    is_share: bool = True
    is_column: bool = True


def make_report(records: Sequence[Record], open_from: int | None = None) -> dict[str, Any]:
    """Everything that can be measured on these records, ready for JSON: estimates are {"mean", "stderr", "n"}.

    `MODEL_METRICS` are part of it where every record has the `MODEL_KEYS`, and `JUDGE_METRICS` where it has the
    `JUDGE_KEYS`.
    """
    groups = ((TEXT_METRICS, ()), (JUDGE_METRICS, JUDGE_KEYS), (MODEL_METRICS, MODEL_KEYS))
    scored = ScoredTexts(records, open_from)
    metrics = [
        metric for group, keys in groups if all(key in record for record in records for key in keys) for metric in group
    ]
    return {metric.name: error_rows(metric.measure(scored)) for metric in metrics}


def accuracy(scored: ScoredTexts, key: str) -> Table:
    """Share of texts whose record has a true `key`; {} where some record lacks it."""
    has_key = all(key in record for record in scored.records)
    return scored.by_depth(lambda record: [record[key]]) if has_key else {}


def chain_exact(scored: ScoredTexts) -> Table:
    """Share of chains that follow the reference to the letter; {} where there are no steps that can be compared."""
    return scored.by_depth(lambda record: [] if record["chain_exact"] is None else [record["chain_exact"]])


def exact_match(scored: ScoredTexts, read: Callable[[str], str | None]) -> Table:
    """As lm-evaluation-harness counts on GSM8K; {} where an answer is no number on a `####` line that it can read."""
    answers = {record["answer"] for record in scored.records}
    unread = any(parse_number(x) is None or not harness_match(read(answer_line(x)), x) for x in answers)
    if unread or any("math_verify" in record for record in scored.records):
        return {}
    return scored.by_depth(lambda record: [harness_match(read(record["text"]), record["answer"])])


def accuracy_by_group(scored: ScoredTexts) -> dict[str, dict[str, Table]]:
    """MATH's accuracies over all depths: {"subject" or "level": {group: {name: estimate}}}."""
    records = scored.records
    keys = {name: key for name, key in ACCURACIES.items() if all(key in record for record in records)}
    groups: dict[str, dict[str, Table]] = {}
    for kind in ("subject", "level"):
        if any(record.get(kind) for record in records):
            group_of = [str(record.get(kind) or "unknown") for record in records]
            for group in sorted(set(group_of)):
                chosen = [record for record, other in zip(records, group_of, strict=True) if other == group]
                problems = [record["problem"] for record in chosen]
                groups.setdefault(kind, {})[group] = {
                    name: estimate([record[key] for record in chosen], problems) for name, key in keys.items()
                }
    return groups


def step_accuracy(scored: ScoredTexts, key: str) -> Table:
    """Share of all steps that are right, as `key` of a record says of each of its steps."""
    return scored.by_depth(lambda record: record[key])


def independent_chain_accuracy(scored: ScoredTexts, key: str) -> Table:
    """Chain accuracy by depth bucket if each step failed on its own: the mean over problems of accuracy ** depth.

    The article's example: 92% of steps right gives 0.92 ** 4 = 72% of four-step chains. Measured chain accuracy below
    this means that a wrong step, or the model's own text, makes later steps worse. Standard errors by the delta method
    (`estimates.power_mean`). Chains without steps that can be compared are left out.

    Args:
      key: the key under which a record says of each step whether it is right.
    """
    chains = [record for record in scored.records if record[key]]
    buckets = depth_buckets([record["depth"] for record in chains], scored.open_from)
    return {
        bucket: power_mean(*([chains[i][name] for i in rows] for name in (key, "depth", "problem")))
        for bucket, rows in buckets.items()
    }


def gap(records: Sequence[Record], judged: Sequence[Record], key: str) -> Table:
    """Accuracy of steps, accuracy of whole chains, and their difference, on problems of `DEEP` steps and more.

    {} where there are no such chains, or no steps that can be compared.

    Args:
      records: of the chains.
      judged: records whose `key` says of each step whether it is right.
    """
    chains = [(record["correct"], record["problem"]) for record in records if record["depth"] >= DEEP]
    steps = [(right, record["problem"]) for record in judged if record["depth"] >= DEEP for right in record[key]]
    if not chains or not steps:
        return {}
    (x, x_problems), (y, y_problems) = zip(*steps, strict=True), zip(*chains, strict=True)
    return {
        "steps": estimate(x, x_problems),
        "chains": estimate(y, y_problems),
        "difference": difference(x, x_problems, y, y_problems),
    }


def first_errors(scored: ScoredTexts) -> dict[str, dict[str, int]]:
    """For each depth bucket, how many chains first go wrong at each step (from 1). The answer line is one more step."""
    counts: dict[str, Counter[int]] = {}
    for record in scored.records:
        if record["first_error"] >= 0:
            for key in (depth_key(record["depth"], scored.open_from), "all"):
                counts.setdefault(key, Counter())[record["first_error"] + 1] += 1
    return {
        key: {str(step): count for step, count in sorted(counter.items())} for key, counter in sorted(counts.items())
    }


def first_error_position(scored: ScoredTexts) -> Table:
    """Mean of the step (from 1) at which a chain first goes wrong, over chains that do."""
    return scored.by_depth(lambda record: [record["first_error"] + 1] if record["first_error"] >= 0 else [])


def perplexity(scored: ScoredTexts) -> Table:
    """Perplexity of the reference texts, per predicted token; n is the number of problems."""
    records = scored.first_samples().records
    buckets = depth_buckets([record["depth"] for record in records], scored.open_from)
    return {
        key: perplexity_estimate(
            [records[i]["reference_nats"] for i in rows], [records[i]["reference_tokens"] for i in rows]
        )
        for key, rows in (buckets | {"all": list(range(len(records)))}).items()
    }


ACCURACIES = {  # metric: key of a record
    "chain_accuracy": "correct",
    "judged_chain_accuracy": "judged",
    "answer": "answer_right",
    "answer_strict": "answer_strict",
    "answer_flexible": "answer_flexible",
    "math_verify": "math_verify",
}
TEXT_METRICS = (  # of any text; the order is that of report.json
    Metric("chain_accuracy", lambda scored: accuracy(scored, "correct"), "chain"),
    Metric("chain_exact", chain_exact, "chain, to the letter", is_column=False),
    Metric("answer", lambda scored: accuracy(scored, "answer_right"), "answer"),
    Metric("answer_strict", lambda scored: accuracy(scored, "answer_strict"), "answer, strict"),
    Metric("answer_flexible", lambda scored: accuracy(scored, "answer_flexible"), "answer, flexible"),
    Metric("exact_match_strict", lambda scored: exact_match(scored, strict_answer), "strict-match", is_column=False),
    Metric(
        "exact_match_flexible", lambda scored: exact_match(scored, flexible_answer), "flexible-extract", is_column=False
    ),
    Metric("math_verify", lambda scored: accuracy(scored, "math_verify"), "math-verify", is_column=False),
    Metric("step_accuracy_free", lambda scored: step_accuracy(scored, "steps_right"), "step, free"),
    Metric("independent_chain_accuracy_free", lambda scored: independent_chain_accuracy(scored, "steps_right")),
    Metric("gap_free", lambda scored: gap(scored.records, scored.records, "steps_right")),
    Metric("groups", accuracy_by_group),
    Metric("first_error", first_errors),
    Metric("first_error_position", first_error_position, "first wrong step", is_share=False, is_column=False),
    Metric("problems", lambda scored: len(scored.first_samples().records)),
    Metric("samples", lambda scored: len(scored.records) // len(scored.first_samples().records)),
    Metric("unfinished", lambda scored: sum(not record["finished"] for record in scored.records)),
)
JUDGE_METRICS = (  # of records with the `JUDGE_KEYS`
    Metric("judged_chain_accuracy", lambda scored: accuracy(scored, "judged"), "chain, judged"),
    Metric("judged_steps", lambda scored: accuracy(scored, "judged_steps"), "no wrong step, judged", is_column=False),
    Metric("judged_by", lambda scored: " and ".join(sorted({record["judged_by"] for record in scored.records}))),
    Metric("judged_without_verdict", lambda scored: sum(x["judged_first_error"] is None for x in scored.records)),
)
MODEL_METRICS = (  # of records with the `MODEL_KEYS`
    Metric("step_accuracy", lambda scored: step_accuracy(scored.first_samples(), "teacher_forced"), "step, forced"),
    Metric(
        "independent_chain_accuracy",
        lambda scored: independent_chain_accuracy(scored.first_samples(), "teacher_forced"),
        "step ^ depth",
    ),
    Metric("gap", lambda scored: gap(scored.records, scored.first_samples().records, "teacher_forced")),
    Metric("perplexity", lambda scored: perplexity(scored)["all"].value),
    Metric("perplexity_by_depth", perplexity, "perplexity", is_share=False),
    Metric("predicted_tokens", lambda scored: sum(x["reference_tokens"] for x in scored.first_samples().records)),
    Metric("max_new_tokens", lambda scored: scored.records[0]["max_new_tokens"]),
    Metric("text_format", lambda scored: scored.records[0]["text_format"]),
    Metric("decoding", lambda scored: scored.records[0]["decoding"]),
)
