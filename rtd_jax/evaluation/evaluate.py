"""One model on one set of problems: free-running chains, teacher-forced steps, perplexity, in one report.

How a problem becomes text is the caller's: `render` gives the pieces, so that training and evaluation cannot differ.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from rtd_jax.common.types import Params
from rtd_jax.evaluation.answers import Reference
from rtd_jax.evaluation.chains import ChainScore, score_chain, split_solution
from rtd_jax.evaluation.estimates import Estimate, by_depth
from rtd_jax.evaluation.perplexity import Perplexity
from rtd_jax.evaluation.scoring import PackedModel, score_chains
from rtd_jax.evaluation.steps import independent_chain_accuracy, scored_spans, steps_correct, tokens_in_spans
from rtd_jax.generation.decode import CachedModel, generate

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
class EvaluationReport:
    """What a model can do, by depth bucket ("1", "2", ..., "all") where it depends on depth.

    Chain and answer accuracy are measured on text that the model wrote freely by greedy decoding; step accuracy and
    perplexity on the reference text, each token given the right prefix. Perplexity is per predicted token of the
    completion, its end included.
    """

    chain_accuracy: dict[str, Estimate]
    answer_strict: dict[str, Estimate]
    answer_flexible: dict[str, Estimate]
    step_accuracy: dict[str, Estimate]  # stderr clustered by problem
    independent_chain_accuracy: dict[str, float]  # what step accuracy would give, were errors independent
    perplexity: float
    predicted_tokens: int
    problems: int
    max_new_tokens: int
    unfinished: int  # generations that were stopped by max_new_tokens
    text_format: str  # "plain", "chat", ...: the same model may score very differently under another

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain numbers and strings, ready for JSON."""
        return dataclasses.asdict(self)


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
      open_from: first depth of the open bucket "5+"; None gives every depth its own bucket.
      batch_size: problems decoded together.
      scoring_batch_size, row_length, chunk_tokens: shape of the teacher-forced pass, see `scoring.score_chains`.
      batch_sharding: where to put [batch] and [batch, length] arrays; None leaves it to the compiler.
      progress: called with (problems generated, problems in all).

    Returns:
      The report, and one record per problem: prompt, completions (generated steps), final (generated answer line),
      reference (steps), answer, depth, correct, first_error (index into completions; their number for the answer line;
      -1 none), finished.

    Raises:
      ValueError: there are no problems, or a text does not fit its tokenizer.
    """
    if not traces:
        raise ValueError("there are no problems to evaluate; check the evaluation split and its depths")
    vocab_size = len(tokenizer)
    texts = [render(trace) for trace in traces]
    prompts = tokenizer([text.prompt for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    generated = generate(
        model,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        eos_ids=stop_ids,
        vocab_size=vocab_size,
        batch_size=batch_size,
        pad_id=tokenizer.pad_token_id or 0,
        batch_sharding=batch_sharding,
        progress=progress,
    )
    solutions = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in generated]
    scores = [score_chain(solution, trace) for solution, trace in zip(solutions, traces, strict=True)]

    encoded = tokenizer(
        [text.text for text in texts], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    token_scores = score_chains(
        model,
        params,
        encoded["input_ids"],
        vocab_size=vocab_size,
        row_length=row_length,
        batch_size=scoring_batch_size,
        chunk_tokens=chunk_tokens,
        batch_sharding=batch_sharding,
    )
    correct_steps: list[list[bool]] = []
    nats, tokens = 0.0, 0
    for trace, text, prompt, offsets, score in zip(
        traces, texts, prompts, encoded["offset_mapping"], token_scores, strict=True
    ):
        first = len(text.prompt) + text.completion_offset
        starts = itertools.accumulate((len(step) + 1 for step in trace.steps[:-1]), initial=first)
        spans = scored_spans(trace.steps, list(starts))
        correct_steps.append(steps_correct(np.asarray(score.chosen), tokens_in_spans(offsets, spans)))
        predicted = np.asarray(score.log_probs, np.float64)[len(prompt) :]
        nats, tokens = nats - float(predicted.sum()), tokens + len(predicted)

    finished = [len(ids) < max_new_tokens for ids in generated]
    records = [
        _record(trace, solution, score, done)
        for trace, solution, score, done in zip(traces, solutions, scores, finished, strict=True)
    ]
    depths = [trace.depth for trace in traces]

    def per_problem(values: Sequence[bool]) -> dict[str, Estimate]:
        return by_depth(values, depths, open_from=open_from)

    problem_of_step = [problem for problem, steps in enumerate(correct_steps) for _ in steps]
    step_accuracy = by_depth(
        [step for steps in correct_steps for step in steps],
        [depths[problem] for problem in problem_of_step],
        open_from=open_from,
        clusters=problem_of_step,
    )
    report = EvaluationReport(
        chain_accuracy=per_problem([score.chain_correct for score in scores]),
        answer_strict=per_problem([score.answer_strict for score in scores]),
        answer_flexible=per_problem([score.answer_flexible for score in scores]),
        step_accuracy=step_accuracy,
        independent_chain_accuracy=independent_chain_accuracy(step_accuracy, depths, open_from),
        perplexity=Perplexity(nats, tokens).value,
        predicted_tokens=tokens,
        problems=len(traces),
        max_new_tokens=max_new_tokens,
        unfinished=finished.count(False),
        text_format=text_format,
    )
    return report, records


def _record(trace: Reference, solution: str, score: ChainScore, finished: bool) -> Record:
    steps, final = split_solution(solution)
    return {
        "prompt": trace.prompt,
        "completions": steps,
        "final": final,
        "reference": list(trace.steps),
        "answer": trace.answer,
        "depth": trace.depth,
        "correct": score.chain_correct,
        "first_error": score.first_error,
        "finished": finished,
    }
