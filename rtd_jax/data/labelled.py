"""Chains whose steps are labelled right or wrong, which a process reward model learns from.

They come from files (see `data/schemas`), or are the word problems with some steps made wrong.
"""

import itertools
import random
from dataclasses import dataclass

from rtd_jax.base.settings import SEED, check_distinct, check_ranges
from rtd_jax.data.generators import word_problems
from rtd_jax.data.generators.corruption import corrupt
from rtd_jax.data.schemas import SCHEMAS
from rtd_jax.data.sources import PLACE, RowSource, read_rows
from rtd_jax.data.trace import LabelledChain

_PARSERS = {name: schema.labelled for name, schema in SCHEMAS.items() if schema.labelled is not None}


@dataclass(frozen=True)
class LabelledSettings(RowSource):
    """Where labelled chains come from: word problems with some steps made wrong, or rows (see `RowSource`)."""

    schema: str  # synthetic, processbench, prm800k or stepwise
    depths: tuple[int, ...] = (1, 2, 3, 4, 5, 6)  # of synthetic
    seed: int = 0  # of synthetic: problems and corruptions
    corruption: float = 0.25  # of synthetic: probability that a step is made wrong

    def __post_init__(self) -> None:
        self.check_source(("synthetic",), _PARSERS)
        check_ranges(self, depths="[1, 1000]", seed=SEED, corruption="(0, 1)")
        check_distinct(self, "depths")

    def unread_settings(self) -> dict[str, str]:
        unread = PLACE if self.schema == "synthetic" else ("depths", "seed", "corruption")
        return dict.fromkeys(unread, f"schema is {self.schema!r}")


def load_labelled(settings: LabelledSettings) -> list[LabelledChain]:
    """All chains of a split, in order.

    Raises:
      ValueError: a row cannot be read (the error names its file and number), or no step of any chain is labelled.
    """
    if settings.schema == "synthetic":
        traces = word_problems.generate(settings.limit, settings.depths, settings.split, settings.seed)
        rng = random.Random(f"{settings.seed}/{settings.split}/corruption")
        return [corrupt(trace, rng, settings.corruption) for trace in traces]
    parse = _PARSERS[settings.schema]
    read = (chain for place, row in read_rows(settings) for chain in parse(row, place))
    chains = list(itertools.islice(read, settings.limit or None))
    if not any(label is not None for chain in chains for label in chain.labels):
        raise ValueError(
            f"{settings.location} ({settings.split}): none of its {len(chains)} chains has a labelled step; a reward "
            "model learns from steps that somebody judged"
        )
    return chains
