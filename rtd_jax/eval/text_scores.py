"""Scores of solutions as text, whoever wrote them. No model is needed, so a file of texts can be scored again."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from rtd_jax.eval.answers import Reference, flexible_answer, harness_match, strict_answer
from rtd_jax.eval.chains import ChainScore, comparable, results_right, score_chain, split_solution
from rtd_jax.eval.estimates import Estimate, by_depth, depth_key, difference, estimate
from rtd_jax.eval.steps import independent_chain_accuracy

Record = dict[str, Any]
DEEP = 4  # steps; the article compares step with chain accuracy on problems of four steps and more


@dataclasses.dataclass(frozen=True)
class TextScores:
    """Scores of free-running text by depth bucket ("1", "2", ..., "all"). Samples of one problem are a cluster.

    `first_error` counts, for each bucket, the steps (from 1) at which chains first go wrong; the answer line counts as
    one more step. Step accuracy is {} where steps are prose that cannot be compared.
    """

    chain_accuracy: dict[str, Estimate]
    answer_strict: dict[str, Estimate]
    answer_flexible: dict[str, Estimate]
    exact_match_strict: dict[str, Estimate]  # as lm-evaluation-harness' gsm8k counts; {} where answers are no numbers
    exact_match_flexible: dict[str, Estimate]
    math_verify: dict[str, Estimate]  # the verdicts of that library; {} where answers are no expressions
    step_accuracy_free: dict[str, Estimate]  # results that equal the reference's in their place; stderr by problem
    independent_chain_accuracy_free: dict[str, Estimate]  # what that would give, were errors independent
    gap_free: dict[str, Estimate]  # steps, chains and their difference at four steps and more; {} where one is missing
    groups: dict[str, dict[str, dict[str, Estimate]]]  # MATH's: by subject and by level, accuracies over all depths
    first_error: dict[str, dict[str, int]]
    first_error_position: dict[str, Estimate]  # its mean, over chains that go wrong
    problems: int
    samples: int  # of each problem
    unfinished: int  # texts that were stopped by max_new_tokens


def score_texts(
    traces: Sequence[Reference],
    texts: Sequence[Sequence[str]],
    finished: Sequence[Sequence[bool]] | None = None,
    *,
    open_from: int | None = None,
) -> tuple[TextScores, list[Record]]:
    """Scores texts that somebody wrote for each problem, as many samples of each.

    Args:
      traces: problems with their reference chains.
      texts: for each problem its samples.
      finished: for each text whether it came to its own end; None takes all for finished.
      open_from: first depth of the open bucket "5+"; None gives every depth its own bucket.

    Returns:
      The scores, and one record a text: prompt, completions (steps of the text), final (its answer line), text,
      reference (steps), answer, depth, problem, sample, correct, first_error (index into completions; their number for
      the answer line; -1 none), steps_right (one bool a reference result), finished; and of MATH subject, level and
      math_verify.

    Raises:
      ValueError: there are no problems, or not as many texts for each of them.
    """
    if not traces:
        raise ValueError("there are no problems to evaluate; check the evaluation split and its depths")
    samples = len(texts[0]) if texts else 0
    if len(texts) != len(traces) or samples < 1 or any(len(of_problem) != samples for of_problem in texts):
        raise ValueError(
            f"{len(traces)} problems have {sorted({len(of_problem) for of_problem in texts})} texts each; expected the "
            "same number, at least one, for every problem"
        )
    records: list[Record] = []
    scores: list[ChainScore] = []
    for problem, (trace, of_problem) in enumerate(zip(traces, texts, strict=True)):
        for sample, text in enumerate(of_problem):
            score = score_chain(text, trace)
            scores.append(score)
            done = finished is None or finished[problem][sample]
            records.append({**_record(trace, text, score, done), "problem": problem, "sample": sample})
    problems = np.array([record["problem"] for record in records])
    depths = np.array([record["depth"] for record in records])
    verified = [score.math_verify for score in scores if score.math_verify is not None]
    accuracies: dict[str, Sequence[bool]] = {
        "chain_accuracy": [score.chain_correct for score in scores],
        "answer_strict": [score.answer_strict for score in scores],
        "answer_flexible": [score.answer_flexible for score in scores],
        "math_verify": verified if len(verified) == len(scores) else [],
    }
    exact: dict[str, Sequence[bool]] = {"exact_match_strict": [], "exact_match_flexible": []}
    if all(comparable(trace) and trace.answer for trace in traces):
        for name, read in zip(exact, (strict_answer, flexible_answer), strict=True):
            exact[name] = [harness_match(read(record["text"]), record["answer"]) for record in records]
    tables: dict[str, Any] = {
        name: by_depth(values, depths, open_from=open_from, clusters=problems) if values else {}
        for name, values in (accuracies | exact).items()
    }
    return TextScores(
        **tables,
        **_free_steps(records, depths, problems, open_from),
        **_first_errors(scores, depths, problems, open_from),
        groups={
            name: _by_group(accuracies, [str(record.get(name) or "unknown") for record in records], problems)
            for name in ("subject", "level")
            if any(record.get(name) for record in records)
        },
        problems=len(traces),
        samples=samples,
        unfinished=sum(not record["finished"] for record in records),
    ), records


def _free_steps(
    records: Sequence[Record], depths: np.ndarray, problems: np.ndarray, open_from: int | None
) -> dict[str, Any]:
    """The fields of `TextScores` on single steps of free-running text."""
    right = [record["steps_right"] for record in records]
    steps = [(value, i) for i, of_text in enumerate(right) for value in of_text]
    of_step = np.array([i for _, i in steps], int)
    return {
        "step_accuracy_free": by_depth(
            [value for value, _ in steps], depths[of_step], open_from=open_from, clusters=problems[of_step]
        ),
        "independent_chain_accuracy_free": independent_chain_accuracy(right, depths, open_from, problems),
        "gap_free": gap(records, right, list(range(len(records)))),
    }


def _first_errors(
    scores: Sequence[ChainScore], depths: np.ndarray, problems: np.ndarray, open_from: int | None
) -> dict[str, Any]:
    """The fields of `TextScores` on where chains first go wrong."""
    wrong = [i for i, score in enumerate(scores) if score.first_error >= 0]
    positions = np.array([scores[i].first_error + 1 for i in wrong], int)
    counts: dict[str, Counter[str]] = {}
    for i, position in zip(wrong, positions, strict=True):
        for key in (depth_key(int(depths[i]), open_from), "all"):
            counts.setdefault(key, Counter())[str(position)] += 1
    return {
        "first_error": {
            key: dict(sorted(found.items(), key=lambda x: int(x[0]))) for key, found in sorted(counts.items())
        },
        "first_error_position": by_depth(positions, depths[wrong], open_from=open_from, clusters=problems[wrong]),
    }


def gap(records: Sequence[Record], steps: Sequence[Sequence[bool]], of: Sequence[int]) -> dict[str, Estimate]:
    """Accuracy of steps, of whole chains, and the difference, at `DEEP` steps and more; {} where one is missing.

    Args:
      records: of the chains, as `score_texts` makes them.
      steps: for each chain that has steps to compare, whether each of them is right.
      of: for each entry of `steps`, the index of its record.
    """
    chains = [(record["correct"], record["problem"]) for record in records if record["depth"] >= DEEP]
    right = [
        (step, records[i]["problem"])
        for i, found in zip(of, steps, strict=True)
        if records[i]["depth"] >= DEEP
        for step in found
    ]
    if not chains or not right:
        return {}
    (x, of_x), (y, of_y) = zip(*right, strict=True), zip(*chains, strict=True)
    return {
        "steps": estimate(x, of_x),
        "chains": estimate(y, of_y),
        "difference": difference(x, of_x, y, of_y),
    }


def _by_group(
    accuracies: dict[str, Sequence[bool]], groups: Sequence[str], problems: np.ndarray
) -> dict[str, dict[str, Estimate]]:
    """Estimates of each accuracy for each group of records, by the group's name."""
    places = {group: np.flatnonzero(np.array(groups) == group) for group in sorted(set(groups))}
    return {
        group: {name: estimate(np.array(values)[at], problems[at]) for name, values in accuracies.items() if values}
        for group, at in places.items()
    }


def _record(trace: Reference, solution: str, score: ChainScore, finished: bool) -> Record:
    steps, final = split_solution(solution)
    return {
        "prompt": trace.prompt,
        "completions": steps,
        "final": final,
        "text": solution,
        "reference": list(trace.steps),
        "answer": trace.answer,
        "depth": trace.depth,
        "correct": score.chain_correct,
        "answer_strict": score.answer_strict,
        "answer_flexible": score.answer_flexible,
        "first_error": score.first_error,
        "steps_right": results_right(steps, trace.steps)[1] if comparable(trace) else [],
        "finished": finished,
        **({"subject": trace.subject, "level": trace.level} if trace.subject or trace.level else {}),
        **({} if score.math_verify is None else {"math_verify": score.math_verify}),
    }
