"""Step accuracy under teacher forcing, and what it would predict for chains if errors were independent.

A step is correct when every token of its result is the model's first choice given the right prefix. High step accuracy
beside low chain accuracy is the compounding that distillation on single tokens does not see.
"""

from collections.abc import Sequence

import numpy as np

from rtd_jax.eval.answers import result_span
from rtd_jax.eval.estimates import Estimate, Values, depth_key, power_mean

Span = tuple[int, int]  # characters [start, end)


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


def steps_correct(chosen_L: np.ndarray, tokens_of_steps: Sequence[np.ndarray]) -> list[bool]:
    """Whether each step's tokens are all the model's first choice; `chosen_L` as in `scoring.TokenScores`."""
    return [bool(np.all(chosen_L[tokens])) for tokens in tokens_of_steps]


def independent_chain_accuracy(
    right: Sequence[Values], depths: Values, open_from: int | None = None, clusters: Values | None = None
) -> dict[str, Estimate]:
    """Chain accuracy by depth bucket if each step failed on its own: the mean over problems of accuracy ** depth.

    The article's example: 92% of steps right gives 0.92 ** 4 = 72% of four-step chains. Measured chain accuracy below
    this means that a wrong step, or the model's own text, makes later steps worse. Standard errors by the delta method
    (`estimates.power_mean`). Chains without steps that can be compared are left out.

    Args:
      right: for each chain, whether each of its steps is right.
      depths: of the chains.
      open_from: first depth of the open bucket, as in `estimates.depth_key`.
      clusters: for each chain its problem, where a problem has several.
    """
    buckets: dict[str, list[int]] = {}
    for i in np.argsort(np.asarray(depths), kind="stable"):
        if len(right[i]):
            buckets.setdefault(depth_key(int(depths[i]), open_from), []).append(int(i))
    groups = np.arange(len(right)) if clusters is None else np.asarray(clusters)
    return {
        key: power_mean([right[i] for i in chains], [depths[i] for i in chains], groups[chains])
        for key, chains in buckets.items()
    }
