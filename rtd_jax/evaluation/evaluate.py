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

from rtd_jax.common.types import Params
from rtd_jax.evaluation.answers import Reference, flexible_answer, harness_match, strict_answer
from rtd_jax.evaluation.chains import ChainScore, comparable, results_right, score_chain, split_solution
from rtd_jax.evaluation.estimates import Estimate, by_depth, depth_key
from rtd_jax.evaluation.perplexity import Perplexity
from rtd_jax.evaluation.scoring import PackedModel, score_chains
from rtd_jax.evaluation.steps import independent_chain_accuracy, scored_spans, steps_correct, tokens_in_spans
from rtd_jax.generation.decode import CachedModel, Sampling, generate

Record = dict[str, Any]


class Model(CachedModel, PackedModel, Protocol):
    """A model that can both decode and score, as `rtd_jax.models.LlamaModel`."""


class RenderedText(Protocol):
    """The pieces of a problem's text, as `rtd_jax.data.formats.render` gives them."""

    @property
    def prompt(self) -> str: ...
    @property
    def text(self) -> str: ...  # prompt, completion and what closes the turn
    @property
    def completion_offset(self) -> int: ...  # characters between the prompt and the first step


@dataclasses.dataclass(frozen=True)
class TextScores:
    """What free-running text shows, by depth bucket ("1", "2", ..., "all"). Samples of one problem are a cluster.

    `first_error` counts, for each bucket, the steps (from 1) at which chains first go wrong; the answer line counts as
    one more step. Step accuracy is None where steps are prose that cannot be compared.
    """

    chain_accuracy: dict[str, Estimate]
    answer_strict: dict[str, Estimate]
    answer_flexible: dict[str, Estimate]
    exact_match_strict: dict[str, Estimate]  # as lm-evaluation-harness' gsm8k counts; {} where answers are no numbers
    exact_match_flexible: dict[str, Estimate]
    step_accuracy_free: dict[str, Estimate]  # results that equal the reference's in their place; stderr by problem
    independent_chain_accuracy_free: dict[str, float]  # what that would give, were errors independent
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
    independent_chain_accuracy: dict[str, float]  # what step accuracy would give, were errors independent
    perplexity: float
    perplexity_by_depth: dict[str, float]
    predicted_tokens: int
    max_new_tokens: int
    text_format: str  # "plain", "chat", ...: the same model may score very differently under another
    decoding: str  # "greedy", or the temperature, top-p and seed of the samples

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain numbers and strings, ready for JSON."""
        return dataclasses.asdict(self)


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
      the answer line; -1 none), steps_right (one bool a reference result), finished.

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
        return by_depth(values, depths, open_from=open_from, clusters=problems)

    numeric = all(comparable(trace) and trace.answer for trace in traces)
    read = [(strict_answer(record["text"]), flexible_answer(record["text"])) for record in records]
    exact = [
        tuple(harness_match(found, record["answer"]) for found in pair)
        for record, pair in zip(records, read, strict=True)
    ]
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
        chain_accuracy=table([score.chain_correct for score in scores]),
        answer_strict=table([score.answer_strict for score in scores]),
        answer_flexible=table([score.answer_flexible for score in scores]),
        exact_match_strict=table([pair[0] for pair in exact]) if numeric else {},
        exact_match_flexible=table([pair[1] for pair in exact]) if numeric else {},
        step_accuracy_free=step_accuracy_free,
        independent_chain_accuracy_free=independent_chain_accuracy(step_accuracy_free, depths.tolist(), open_from),
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
      progress: called with (problems generated, problems in all).

    Returns:
      The report, and one record per generation as in `score_texts`, with teacher_forced (one bool a reference step).

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
    forced, correct_steps = _teacher_forced(
        model,
        params,
        tokenizer,
        traces,
        texts,
        [len(prompt) for prompt in prompts],
        open_from,
        row_length=row_length,
        batch_size=scoring_batch_size,
        chunk_tokens=chunk_tokens,
        batch_sharding=batch_sharding,
    )
    for record in records:
        record["teacher_forced"] = correct_steps[record["problem"]]
    report = EvaluationReport(
        **{field.name: getattr(scores, field.name) for field in dataclasses.fields(scores)},
        **forced,
        max_new_tokens=max_new_tokens,
        text_format=text_format,
        decoding="greedy" if sampling is None else str(sampling),
    )
    return report, records


def _teacher_forced(
    model: Model,
    params: Params,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Reference],
    texts: Sequence[RenderedText],
    prompt_lengths: Sequence[int],
    open_from: int | None,
    **options: Any,
) -> tuple[dict[str, Any], list[list[bool]]]:
    """Fields of the report that come from the reference text, and for each problem which of its steps are right."""
    encoded = tokenizer(
        [text.text for text in texts], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    token_scores = score_chains(model, params, encoded["input_ids"], vocab_size=len(tokenizer), **options)
    correct_steps: list[list[bool]] = []
    sums: dict[str, Perplexity] = {}
    for trace, text, prompt_length, offsets, score in zip(
        traces, texts, prompt_lengths, encoded["offset_mapping"], token_scores, strict=True
    ):
        starts: list[int] = []
        end = len(text.prompt) + text.completion_offset
        for step in trace.steps:  # between them may be more than one line end, where a classifier cut them
            starts.append(text.text.index(step, end))
            end = starts[-1] + len(step)
        spans = scored_spans(trace.steps, starts)
        correct_steps.append(steps_correct(np.asarray(score.chosen), tokens_in_spans(offsets, spans)))
        predicted = np.asarray(score.log_probs, np.float64)[prompt_length:]
        for key in (depth_key(trace.depth, open_from), "all"):
            before = sums.get(key, Perplexity(0.0, 0))
            sums[key] = Perplexity(before.nats - float(predicted.sum()), before.tokens + len(predicted))
    depths = [trace.depth for trace in traces]
    problem_of_step = [problem for problem, steps in enumerate(correct_steps) for _ in steps]
    step_accuracy = by_depth(
        [step for steps in correct_steps for step in steps],
        [depths[problem] for problem in problem_of_step],
        open_from=open_from,
        clusters=problem_of_step,
    )
    fields = {
        "step_accuracy": step_accuracy,
        "independent_chain_accuracy": independent_chain_accuracy(step_accuracy, depths, open_from),
        "perplexity": sums["all"].value,
        "perplexity_by_depth": {key: sums[key].value for key in step_accuracy},
        "predicted_tokens": int(sums["all"].tokens),
    }
    return fields, correct_steps


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
    }
