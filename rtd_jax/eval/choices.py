"""Multiple choice by log-likelihood: which of the given texts is the most likely after the question?

As lm-evaluation-harness scores its `multiple_choice` tasks: `acc` takes the choice with the highest sum of log-
probabilities, `acc_norm` the one with the highest sum per character of its text.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from rtd_jax.base.types import Params
from rtd_jax.data.schemas.arc import ChoiceQuestion
from rtd_jax.data.tokenizer_match import vocab_size
from rtd_jax.eval.estimates import estimate
from rtd_jax.eval.scored import Record
from rtd_jax.eval.scoring import ScoringSettings, score_chains
from rtd_jax.models.model import DecoderModel


def score_choices(
    questions: Sequence[ChoiceQuestion], log_likelihoods: Sequence[Sequence[float]], text_format: str = ""
) -> tuple[dict[str, Any], list[Record]]:
    """Scores log-likelihoods of every choice of every question; no model is needed.

    Returns:
      The report, ready for JSON: accuracy and accuracy_norm (the harness' acc and acc_norm, with standard errors over
      questions), chance (accuracy of guessing: the mean of 1 / number of choices), questions, text_format. And one
      record a question: prompt, choices, answer (index), log_likelihoods (nats), chosen and chosen_norm (indices),
      text_format.

    Raises:
      ValueError: there are no questions, not one finite number for each choice, or no such answer.
    """
    if not questions:
        raise ValueError("there are no questions to evaluate; check the evaluation split")
    records: list[Record] = []
    for i, (question, nats) in enumerate(zip(questions, log_likelihoods, strict=True), start=1):
        choices, answer = question.choices, question.answer
        if len(nats) != len(choices) or not np.all(np.isfinite(nats)):
            raise ValueError(
                f"question {i} has {len(choices)} choices and the log-likelihoods {list(nats)}; expected a finite "
                "number for each choice"
            )
        if not 0 <= answer < len(choices):
            raise ValueError(f"question {i} has {len(choices)} choices and the answer {answer}")
        records.append(
            {
                "prompt": question.question,
                "choices": list(choices),
                "answer": answer,
                "log_likelihoods": [float(x) for x in nats],
                "chosen": int(np.argmax(nats)),
                "chosen_norm": int(np.argmax(np.asarray(nats, np.float64) / [len(choice) for choice in choices])),
                "text_format": text_format,
            }
        )
    report = {
        "accuracy": estimate([record["chosen"] == record["answer"] for record in records]).error_row(),
        "accuracy_norm": estimate([record["chosen_norm"] == record["answer"] for record in records]).error_row(),
        "chance": float(np.mean([1 / len(record["choices"]) for record in records])),
        "questions": len(records),
        "text_format": text_format,
    }
    return report, records


def choice_log_likelihoods(
    model: DecoderModel,
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

    def encode(texts: list[str]) -> list[list[int]]:
        return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])

    starts = encode([prompt.rstrip() for prompt, _ in pairs])
    ends = iter(encode([prompt + continuation for prompt, continuations in pairs for continuation in continuations]))
    chains: list[list[int]] = []
    lengths: list[int] = []
    for start, (prompt, continuations) in zip(starts, pairs, strict=True):
        for continuation in continuations:
            end = next(ends)[len(start) :]
            if not end:
                raise ValueError(f"{continuation!r} adds no token to the prompt {prompt[-60:]!r}; leave it out")
            chains.append(start + end)
            lengths.append(len(start))
    scores = score_chains(
        model,
        params,
        chains,
        settings,
        vocab_size=vocab_size(tokenizer),
        batch_sharding=batch_sharding,
        progress=progress,
    )
    sums = iter(
        float(np.sum(np.asarray(score.log_probs, np.float64)[length:]))
        for score, length in zip(scores, lengths, strict=True)
    )
    return [[next(sums) for _ in continuations] for _, continuations in pairs]
