"""What a model wrote in an evaluation, as chains that models can read again."""

from collections.abc import Mapping, Sequence
from typing import Any

from rtd_jax.data.trace import Trace

OwnChain = tuple[int, Trace, list[bool | None]]  # index of the record, chain, whether each step is right


def own_chains(records: Sequence[Mapping[str, Any]]) -> list[OwnChain]:
    """The written solutions as chains with their steps' verdicts (None: says nothing), where they have steps.

    Args:
      records: of an evaluation (`rtd_jax.eval.chains.score_chain`).
    """
    own: list[OwnChain] = []
    for i, record in enumerate(records):
        steps = [" ".join(step.split()) for step in record["completions"]]
        if steps:
            labels = (list(record["verdicts"]) or [None] * len(steps))[: len(steps)]
            trace = Trace.of_steps(record["prompt"], steps, "", record["final"], f"generation {i + 1}")
            own.append((i, trace, labels))
    return own
