"""Scores of reference chains under teacher forcing: which steps are right, and their cross-entropy.

A step is correct when every token of its result is the model's first choice given the right prefix. High step accuracy
beside low chain accuracy is the compounding that distillation on single tokens does not see.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from rtd_jax.base.types import Params
from rtd_jax.data.formats import Rendered
from rtd_jax.data.tokenizer_match import vocab_size
from rtd_jax.data.trace import Span, Trace
from rtd_jax.eval.answers import result_span
from rtd_jax.eval.scoring import ScoringSettings, score_chains
from rtd_jax.models.model import DecoderModel


def score_references(
    model: DecoderModel,
    params: Params,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Trace],
    texts: Sequence[Rendered],
    settings: ScoringSettings = ScoringSettings(),
    *,
    batch_sharding: jax.sharding.NamedSharding | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Scores the reference chain of each trace; `settings` and what follows as in `scoring.score_chains`.

    Returns:
      For each trace what its records have besides the scores of their texts: teacher_forced (for each step, whether it
      is right), reference_nats (cross-entropy, summed over the predicted tokens: the completion and its end), and
      reference_tokens (their number).
    """
    prompts = tokenizer([text.prompt for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    encoded = tokenizer(
        [text.text for text in texts], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    token_scores = score_chains(
        model,
        params,
        encoded["input_ids"],
        settings,
        vocab_size=vocab_size(tokenizer),
        batch_sharding=batch_sharding,
        progress=progress,
    )
    scores = []
    for trace, text, prompt, offsets, score in zip(
        traces, texts, prompts, encoded["offset_mapping"], token_scores, strict=True
    ):
        offset = len(text.prompt) + text.completion_offset
        spans = scored_spans(trace.steps, [offset + start for start, _ in trace.spans])
        predicted = np.asarray(score.log_probs, np.float64)[len(prompt) :]
        chosen = np.asarray(score.chosen)
        right = [bool(np.all(chosen[tokens])) for tokens in tokens_in_spans(offsets, spans)]
        nats, count = -float(predicted.sum()), len(predicted)
        scores.append({"teacher_forced": right, "reference_nats": nats, "reference_tokens": count})
    return scores


def scored_spans(steps: Sequence[str], starts: Sequence[int]) -> list[Span]:
    """Characters that decide whether each step is right, within the text in which step i begins at `starts[i]`.

    The characters of the result (see `answers.result_span`); the whole step where it has no number.
    """
    spans = []
    for step, start in zip(steps, starts, strict=True):
        first, last = result_span(step) or (0, len(step))
        spans.append((start + first, start + last))
    return spans


def tokens_in_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[np.ndarray]:
    """For each span of characters the indices of the tokens that cover any of it, given every token's characters.

    Raises:
      ValueError: no token covers a span, so text and tokens do not belong together.
    """
    begins, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    tokens = []
    for start, end in spans:
        covering = np.flatnonzero((begins < end) & (ends > start))
        if not len(covering):
            raise ValueError(
                f"no token covers characters {start} to {end}; the offsets end at {ends.max(initial=0)}: "
                "give the offsets of the text in which the spans were found"
            )
        tokens.append(covering)
    return tokens
