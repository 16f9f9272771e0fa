"""Scores of reference chains under teacher forcing: which steps are right, and perplexity."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from rtd_jax.base.types import Params
from rtd_jax.eval.answers import Reference
from rtd_jax.eval.estimates import Estimate, by_depth, depth_key, perplexity_estimate
from rtd_jax.eval.scoring import PackedModel, ScoringSettings, score_chains
from rtd_jax.eval.steps import independent_chain_accuracy, scored_spans, steps_correct, tokens_in_spans


class RenderedText(Protocol):
    """The pieces of a problem's text, as `rtd_jax.data.formats.render` gives them."""

    @property
    def prompt(self) -> str: ...
    @property
    def text(self) -> str: ...  # prompt, completion and what closes the turn
    @property
    def completion_offset(self) -> int: ...  # characters between the prompt and the first step


class ReferenceScore(NamedTuple):
    """One reference chain under teacher forcing."""

    steps: list[bool]  # every token of the step's result is the model's first choice
    nats: float  # cross-entropy, summed over the predicted tokens: the completion and its end
    tokens: int


def score_references(
    model: PackedModel,
    params: Params,
    tokenizer: PreTrainedTokenizerBase,
    traces: Sequence[Reference],
    texts: Sequence[RenderedText],
    settings: ScoringSettings = ScoringSettings(),
    *,
    batch_sharding: jax.sharding.NamedSharding | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[ReferenceScore]:
    """Scores the reference chain of each trace; arguments as in `scoring.score_chains`."""
    prompts = tokenizer([text.prompt for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    encoded = tokenizer(
        [text.text for text in texts], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    token_scores = score_chains(
        model,
        params,
        encoded["input_ids"],
        settings,
        vocab_size=len(tokenizer),
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
        right = steps_correct(np.asarray(score.chosen), tokens_in_spans(offsets, spans))
        scores.append(ReferenceScore(right, -float(predicted.sum()), len(predicted)))
    return scores


def reference_fields(
    scores: Sequence[ReferenceScore], depths: Sequence[int], open_from: int | None = None
) -> dict[str, Any]:
    """The fields of `evaluate.EvaluationReport` that come from reference chains, given their scores and depths."""
    steps = [(right, i) for i, score in enumerate(scores) for right in score.steps]
    buckets: dict[str, list[int]] = {}
    for i in np.argsort(np.asarray(depths), kind="stable"):
        buckets.setdefault(depth_key(int(depths[i]), open_from), []).append(int(i))
    perplexities: dict[str, Estimate] = {
        key: perplexity_estimate([scores[i].nats for i in chains], [scores[i].tokens for i in chains])
        for key, chains in (buckets | {"all": list(range(len(scores)))}).items()
    }
    return {
        "step_accuracy": by_depth(
            [right for right, _ in steps],
            [depths[i] for _, i in steps],
            open_from=open_from,
            clusters=[i for _, i in steps],
        ),
        "independent_chain_accuracy": independent_chain_accuracy([s.steps for s in scores], depths, open_from),
        "perplexity": perplexities["all"].value,
        "perplexity_by_depth": perplexities,
        "predicted_tokens": sum(score.tokens for score in scores),
    }
