"""One model on one set of problems: free-running chains, teacher-forced steps, perplexity, in one report.

What is measured on text alone (`score_texts`) needs no model, so that generations can be scored again, or come from
elsewhere. How a problem becomes text is the caller's: `render` gives the pieces, so that training and evaluation cannot
differ.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from rtd_jax.base.types import Params
from rtd_jax.eval.answers import Reference, flexible_answer, harness_match, strict_answer
from rtd_jax.eval.chains import ChainScore, comparable, results_right, score_chain, split_solution
from rtd_jax.eval.decoding import CachedModel, Sampling, generate
from rtd_jax.eval.estimates import Estimate, by_depth, depth_key, difference, error_rows, estimate
from rtd_jax.eval.reference import ReferenceScore, RenderedText, reference_fields, score_references
from rtd_jax.eval.scoring import PackedModel
from rtd_jax.eval.steps import independent_chain_accuracy

Record = dict[str, Any]
DEEP = 4  # steps; the article compares step with chain accuracy on problems of four steps and more


class Model(CachedModel, PackedModel, Protocol):
    """A model that can both decode and score, as `rtd_jax.models.LlamaModel`."""


@dataclasses.dataclass(frozen=True)
class TextScores:
    """What free-running text shows, by depth bucket ("1", "2", ..., "all"). Samples of one problem are a cluster.

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
    groups: dict[
        str, dict[str, dict[str, Estimate]]
    ]  # of MATH: by subject and by level, the accuracies over all depths
    first_error: dict[str, dict[str, int]]
    first_error_position: dict[str, Estimate]  # its mean, over chains that go wrong
    problems: int
    samples: int  # of each problem
    unfinished: int  # texts that were stopped by max_new_tokens


@dataclasses.dataclass(frozen=True)
class EvaluationReport(TextScores):
    """What a model can do, by depth bucket ("1", "2", ..., "all") where it depends on depth.

    Chain and answer accuracy are measured on text that the model wrote freely; step accuracy and perplexity on the
    reference text, each token given the right prefix. Perplexity is per predicted token of the completion, its end
    included.
    """

    step_accuracy: dict[str, Estimate]  # stderr clustered by problem
    independent_chain_accuracy: dict[str, Estimate]  # what step accuracy would give, were errors independent
    gap: dict[str, Estimate]  # as gap_free, with the steps of the reference texts
    perplexity: float
    perplexity_by_depth: dict[str, Estimate]  # n is the number of problems
    predicted_tokens: int
    max_new_tokens: int
    text_format: str  # "plain", "chat", ...: the same model may score very differently under another
    decoding: str  # "greedy", or the temperature, top-p and seed of the samples

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain numbers and strings, ready for JSON."""
        return error_rows(self)


def score_texts(
    traces: Sequence[Reference],
    texts: Sequence[Sequence[str]],
    finished: Sequence[Sequence[bool]] | None = None,
    *,
    open_from: int | None = None,
) -> tuple[TextScores, list[Record]]:
    """Scores text that somebody wrote for each problem, as many samples of each; no model is needed.

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

    def table(values: Sequence[bool]) -> dict[str, Estimate]:
        return by_depth(values, depths, open_from=open_from, clusters=problems) if values else {}

    numeric = all(comparable(trace) and trace.answer for trace in traces)
    verified = [score.math_verify for score in scores if score.math_verify is not None]
    exact = {
        read: [harness_match(read(record["text"]), record["answer"]) for record in records] if numeric else []
        for read in (strict_answer, flexible_answer)
    }
    accuracies: dict[str, Sequence[bool]] = {
        "chain_accuracy": [score.chain_correct for score in scores],
        "answer_strict": [score.answer_strict for score in scores],
        "answer_flexible": [score.answer_flexible for score in scores],
        "math_verify": verified if len(verified) == len(scores) else [],
    }
    steps = [(right, i) for i, record in enumerate(records) for right in record["steps_right"]]
    of_step = np.array([i for _, i in steps], int)
    step_accuracy_free = by_depth(
        [right for right, _ in steps], depths[of_step], open_from=open_from, clusters=problems[of_step]
    )
    wrong = [i for i, score in enumerate(scores) if score.first_error >= 0]
    positions = np.array([scores[i].first_error + 1 for i in wrong], int)
    counts: dict[str, Counter[str]] = {}
    for i, position in zip(wrong, positions, strict=True):
        for key in (depth_key(int(depths[i]), open_from), "all"):
            counts.setdefault(key, Counter())[str(position)] += 1
    return TextScores(
        **{name: table(values) for name, values in accuracies.items()},
        exact_match_strict=table(exact[strict_answer]),
        exact_match_flexible=table(exact[flexible_answer]),
        step_accuracy_free=step_accuracy_free,
        independent_chain_accuracy_free=independent_chain_accuracy(
            [record["steps_right"] for record in records], depths, open_from, problems
        ),
        gap_free=_gap(records, [record["steps_right"] for record in records], list(range(len(records)))),
        groups={
            name: _by_group(accuracies, [str(record.get(name) or "unknown") for record in records], problems)
            for name in ("subject", "level")
            if any(record.get(name) for record in records)
        },
        first_error={
            key: dict(sorted(found.items(), key=lambda x: int(x[0]))) for key, found in sorted(counts.items())
        },
        first_error_position=by_depth(positions, depths[wrong], open_from=open_from, clusters=problems[wrong]),
        problems=len(traces),
        samples=samples,
        unfinished=sum(not record["finished"] for record in records),
    ), records


def evaluate_model(
    model: Model,
    params: Params,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Reference],
    *,
    render: Callable[[Any], RenderedText],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    text_format: str,
    stop_texts: Sequence[str] = (),
    sampling: Sampling | None = None,
    samples: int = 1,
    open_from: int | None = None,
    batch_size: int = 128,
    scoring_batch_size: int = 8,
    row_length: int = 512,
    chunk_tokens: int = 512,
    batch_sharding: jax.sharding.NamedSharding | None = None,
    progress: Callable[[int, int], None] | None = None,
    scoring_progress: Callable[[int, int], None] | None = None,
) -> tuple[EvaluationReport, list[Record]]:
    """Evaluates a model; neither changes nor donates its params.

    Args:
      model: static under jit.
      params: its parameters, on whatever devices and shardings they live.
      tokenizer: a fast one; ids from `len(tokenizer)` on are padding of the vocabulary.
      traces: problems with their reference chains; a completion is the steps and the final line, one a line.
      render: a trace's prompt and whole text, as in training.
      stop_ids: token ids that end a generation.
      max_new_tokens: most tokens generated for a problem.
      text_format: recorded in the report.
      stop_texts: strings that end a generation, themselves not part of it.
      sampling: how to draw; None takes the most probable token.
      samples: generations of each problem.
      open_from: first depth of the open bucket "5+"; None gives every depth its own bucket.
      batch_size: problems decoded together.
      scoring_batch_size, row_length, chunk_tokens: shape of the teacher-forced pass, see `scoring.score_chains`.
      batch_sharding: where to put [batch] and [batch, length] arrays; None leaves it to the compiler.
      progress: called with (texts generated, texts in all).
      scoring_progress: called with (reference chains scored, chains in all).

    Returns:
      The report, and one record per generation as in `score_texts`, with teacher_forced (one bool a reference step),
      reference_nats and reference_tokens (cross-entropy of the reference text), max_new_tokens, text_format, decoding.

    Raises:
      ValueError: there are no problems, or a text does not fit its tokenizer.
    """
    if not traces:
        raise ValueError("there are no problems to evaluate; check the evaluation split and its depths")
    vocab_size = len(tokenizer)
    texts = [render(trace) for trace in traces]
    prompts = tokenizer([text.prompt for text in texts], add_special_tokens=False, verbose=False)["input_ids"]

    def decoded(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    generated = generate(
        model,
        params,
        [prompt for prompt in prompts for _ in range(samples)],
        max_new_tokens=max_new_tokens,
        eos_ids=stop_ids,
        vocab_size=vocab_size,
        batch_size=batch_size,
        pad_id=tokenizer.pad_token_id or 0,
        sampling=sampling,
        stopped=(lambda ids: any(stop in decoded(ids) for stop in stop_texts)) if stop_texts else None,
        batch_sharding=batch_sharding,
        progress=progress,
    )
    full = [decoded(ids) for ids in generated]
    cut = [_before(text, stop_texts) for text in full]
    finished = [len(ids) < max_new_tokens or a != b for ids, a, b in zip(generated, full, cut, strict=True)]
    scores, records = score_texts(traces, _grouped(cut, samples), _grouped(finished, samples), open_from=open_from)
    references = score_references(
        model,
        params,
        tokenizer,
        traces,
        texts,
        row_length=row_length,
        batch_size=scoring_batch_size,
        chunk_tokens=chunk_tokens,
        batch_sharding=batch_sharding,
        progress=scoring_progress,
    )
    how = {
        "max_new_tokens": max_new_tokens,
        "text_format": text_format,
        "decoding": "greedy" if sampling is None else str(sampling),
    }
    for record in records:
        of = references[record["problem"]]
        record |= {"teacher_forced": of.steps, "reference_nats": of.nats, "reference_tokens": of.tokens, **how}
    return full_report(scores, records, open_from), records


def full_report(scores: TextScores, records: Sequence[Record], open_from: int | None = None) -> EvaluationReport:
    """The report of a model from its records, as `evaluate_model` makes them; so it can be made again from a file."""
    first = {record["problem"]: i for i, record in reversed(list(enumerate(records)))}
    of_problem = [records[first[problem]] for problem in sorted(first)]
    references = [ReferenceScore(r["teacher_forced"], r["reference_nats"], r["reference_tokens"]) for r in of_problem]
    return EvaluationReport(
        **{field.name: getattr(scores, field.name) for field in dataclasses.fields(scores)},
        **reference_fields(references, [record["depth"] for record in of_problem], open_from),
        gap=_gap(records, [reference.steps for reference in references], [first[problem] for problem in sorted(first)]),
        **{name: records[0][name] for name in ("max_new_tokens", "text_format", "decoding")},
    )


def _gap(records: Sequence[Record], steps: Sequence[Sequence[bool]], of: Sequence[int]) -> dict[str, Estimate]:
    """Accuracy of steps, of whole chains, and the difference, at `DEEP` steps and more; {} where one is missing.

    `of[i]` is the record of steps[i].
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
    """For each group of records, by name, an estimate of each accuracy."""
    places = {group: np.flatnonzero(np.array(groups) == group) for group in sorted(set(groups))}
    return {
        group: {name: estimate(np.array(values)[at], problems[at]) for name, values in accuracies.items() if values}
        for group, at in places.items()
    }


def _before(text: str, stop_texts: Sequence[str]) -> str:
    """`text` up to the first of the stop texts."""
    return text[: min((text.index(stop) for stop in stop_texts if stop in text), default=len(text))]


def _grouped(values: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


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
