"""Multiple choice by log-likelihood: which of the given texts does the model hold most likely after the question?

As lm-evaluation-harness scores its `multiple_choice` tasks: `acc` takes the choice with the highest sum of log-
probabilities, `acc_norm` the one with the highest sum per character of its text.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from rtd_jax.base.types import Params
from rtd_jax.eval.estimates import Estimate, error_rows, estimate
from rtd_jax.eval.scoring import PackedModel, ScoringSettings, score_chains

Record = dict[str, Any]


class Question(Protocol):
    """A question with its choices, as `rtd_jax.data.schemas.arc.ChoiceQuestion`."""

    @property
    def question(self) -> str: ...
    @property
    def choices(self) -> tuple[str, ...]: ...
    @property
    def answer(self) -> int: ...  # index of the right choice


@dataclasses.dataclass(frozen=True)
class ChoiceReport:
    """How often the right choice wins; standard errors over questions."""

    accuracy: Estimate  # the harness' acc
    accuracy_norm: Estimate  # the harness' acc_norm
    chance: float  # accuracy of guessing: the mean of 1 / number of choices
    questions: int
    text_format: str

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain numbers and strings, ready for JSON."""
        return error_rows(self)


def score_choices(
    questions: Sequence[Question], log_likelihoods: Sequence[Sequence[float]], text_format: str = ""
) -> tuple[ChoiceReport, list[Record]]:
    """Scores log-likelihoods of every choice of every question; no model is needed.

    Returns:
      The report, and one record a question: prompt, choices, answer (index), log_likelihoods (nats), chosen and
      chosen_norm (indices), text_format.

    Raises:
      ValueError: there are no questions, not one finite number for each choice, or no such answer.
    """
    if not questions:
        raise ValueError("there are no questions to evaluate; check the evaluation split")
    records: list[Record] = []
    for i, (asked, found) in enumerate(zip(questions, log_likelihoods, strict=True)):
        if len(found) != len(asked.choices) or not np.all(np.isfinite(np.asarray(found))):
            raise ValueError(
                f"question {i + 1} has {len(asked.choices)} choices and the log-likelihoods {list(found)}; expected a "
                "finite number for each choice"
            )
        if not 0 <= asked.answer < len(asked.choices):
            raise ValueError(f"question {i + 1} has {len(asked.choices)} choices and the answer {asked.answer}")
        lengths = np.array([len(choice) for choice in asked.choices], np.float64)
        records.append(
            {
                "prompt": asked.question,
                "choices": list(asked.choices),
                "answer": asked.answer,
                "log_likelihoods": [float(x) for x in found],
                "chosen": int(np.argmax(found)),
                "chosen_norm": int(np.argmax(np.asarray(found, np.float64) / lengths)),
                "text_format": text_format,
            }
        )
    report = ChoiceReport(
        accuracy=estimate([record["chosen"] == record["answer"] for record in records]),
        accuracy_norm=estimate([record["chosen_norm"] == record["answer"] for record in records]),
        chance=float(np.mean([1 / len(record["choices"]) for record in records])),
        questions=len(records),
        text_format=text_format,
    )
    return report, records


def choice_log_likelihoods(
    model: PackedModel,
    params: Params,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, Sequence[str]]],
    settings: ScoringSettings = ScoringSettings(),
    *,
    batch_sharding: jax.sharding.NamedSharding | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[float]]:
    """Log-probability (nats) of each continuation after its prompt, summed over the continuation's tokens.

    As the harness does it: white space at the end of the prompt counts as the continuation's; both are tokenised as one
    text, and its tokens beyond as many as the prompt alone has are scored after the tokens of the prompt alone. (That
    differs from the one text where a token would join the prompt's end with what follows.)

    Args:
      pairs: a prompt, with its special tokens as text, and its continuations.
      settings, batch_sharding, progress: see `scoring.score_chains`.

    Raises:
      ValueError: a continuation that adds no token.
    """
    contexts = [prompt.rstrip() for prompt, _ in pairs]
    wholes = [prompt + continuation for prompt, continuations in pairs for continuation in continuations]

    def encode(texts: list[str]) -> list[list[int]]:
        return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])

    starts = encode(contexts)
    ends = iter(encode(wholes))
    chains: list[list[int]] = []
    for start, (prompt, continuations) in zip(starts, pairs, strict=True):
        for continuation in continuations:
            end = next(ends)[len(start) :]
            if not end:
                raise ValueError(f"{continuation!r} adds no token to the prompt {prompt[-60:]!r}; leave it out")
            chains.append(start + end)
    scores = score_chains(
        model,
        params,
        chains,
        settings,
        vocab_size=len(tokenizer),
        batch_sharding=batch_sharding,
        progress=progress,
    )
    of_chain = iter(scores)
    return [
        [float(np.sum(np.asarray(next(of_chain).log_probs, np.float64)[len(start) :])) for _ in continuations]
        for start, (_, continuations) in zip(starts, pairs, strict=True)
    ]
