"""Texts that were scored: what every metric is measured on."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from rtd_jax.eval.estimates import Estimate, by_depth

Record = dict[str, Any]  # what is known of one text and its problem
Table = dict[str, Estimate]  # by depth bucket: "1", "2", ..., "all"; {} where it cannot be measured


@dataclasses.dataclass(frozen=True)
class ScoredTexts:
    """What every metric is measured on."""

    records: Sequence[Record]  # as `chains.score_texts` makes them
    open_from: int | None = None  # first depth of the open bucket "5+"; None gives every depth its own bucket

    def by_depth(self, values: Callable[[Record], Sequence[float]]) -> Table:
        """Mean of the values that `values` gives for each record; the samples of one problem are a cluster."""
        rows = [(value, record["depth"], record["problem"]) for record in self.records for value in values(record)]
        if not rows:
            return {}
        numbers, depths, problems = zip(*rows, strict=True)
        return by_depth(numbers, depths, open_from=self.open_from, clusters=problems)

    def first_samples(self) -> "ScoredTexts":
        """One text for each problem. What is measured on the reference is the same for all samples of a problem."""
        first = {record["problem"]: record for record in reversed(self.records)}
        return ScoredTexts([first[problem] for problem in sorted(first)], self.open_from)
