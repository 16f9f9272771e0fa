"""Chains whose steps are labelled right or wrong, which a process reward model learns from.

They come from files (see `data/schemas`), or are the generator's problems with some steps made wrong.
"""

import random
from dataclasses import dataclass

from rtd_jax.data.generators import word_problems
from rtd_jax.data.generators.corruption import corrupt
from rtd_jax.data.schemas import SCHEMAS
from rtd_jax.data.sources import read_rows
from rtd_jax.data.trace import LabelledChain

_PARSERS = {name: schema.labelled for name, schema in SCHEMAS.items() if schema.labelled is not None}


@dataclass(frozen=True)
class LabelledSettings:
    """Where labelled chains come from. `location`, `split`, `subset` and `revision` are as in `SourceSettings`."""

    schema: str  # synthetic, processbench, prm800k or stepwise
    location: str = ""  # folder, file or hub name; unused by synthetic
    split: str = "train"  # of the data set; those of synthetic are disjoint
    subset: str = ""  # the hub's configuration name
    revision: str = ""  # the hub's commit or tag; "" is the newest
    limit: int = 0  # chains; 0 takes all (synthetic needs a number)
    depths: tuple[int, ...] = (1, 2, 3, 4, 5, 6)  # of synthetic
    seed: int = 0  # of synthetic: problems and corruptions
    corruption: float = 0.25  # of synthetic: probability that a step is made wrong

    def __post_init__(self) -> None:
        if self.schema not in ("synthetic", *_PARSERS):
            raise ValueError(f"schema {self.schema!r} is unknown; use one of synthetic, {', '.join(_PARSERS)}")
        if not 0.0 < self.corruption < 1.0:
            raise ValueError(f"corruption is {self.corruption}; give a share of the steps in (0, 1), e.g. 0.25")
        if self.limit < 0:
            raise ValueError(f"limit is {self.limit}; expected 0 (all) or more chains")
        if self.schema == "synthetic" and not self.limit:
            raise ValueError("limit is 0; the synthetic source is endless and needs the number of chains to make")
        if self.schema != "synthetic" and not self.location:
            raise ValueError(f"schema {self.schema!r} needs a location: a local folder or file, or a hub name")

    def unread_settings(self) -> dict[str, str]:
        of_files, of_generator = ("location", "subset", "revision"), ("depths", "seed", "corruption")
        return dict.fromkeys(of_files if self.schema == "synthetic" else of_generator, f"schema is {self.schema!r}")


def load_labelled(settings: LabelledSettings) -> list[LabelledChain]:
    """All chains of a split, in order.

    Raises:
      ValueError: a row cannot be read (the error names its file and number), or no step of any chain is labelled.
    """
    if settings.schema == "synthetic":
        traces = word_problems.generate(settings.limit, settings.depths, settings.split, settings.seed)
        rng = random.Random(f"{settings.seed}/{settings.split}/corruption")
        return [corrupt(trace, rng, settings.corruption) for trace in traces]
    chains: list[LabelledChain] = []
    for place, row in read_rows(settings):
        chains += _PARSERS[settings.schema](row, place)
        if settings.limit and len(chains) >= settings.limit:
            chains = chains[: settings.limit]
            break
    if not any(label is not None for chain in chains for label in chain.labels):
        raise ValueError(
            f"{settings.location} ({settings.split}): none of its {len(chains)} chains has a labelled step; a reward "
            "model learns from steps that somebody judged"
        )
    return chains
