"""What a teacher cache holds, and everything that decides it."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rtd_jax.base.settings import LAYER, check_distinct, check_ranges
from rtd_jax.base.types import StepState

SERVED = "served:"  # what `Identity.teacher` begins with where a server's model of this name was asked
AS_SERVED = "as served"  # `Identity.teacher_dtypes` of a teacher whose server does not tell them

Storage = Literal["int8", "bfloat16", "float32", "none"]  # of boundary states


@dataclass(frozen=True)
class CacheSettings:
    """What a teacher cache holds for every token and step, and how precisely. Read when `teacher.cache` is set."""

    top_k: int = 64  # most probable tokens kept; the mass of all others is kept as one number
    predictions: Literal["compact", "float32"] = "compact"  # storage of log-probabilities: 8 bits, or all digits
    states: Storage = "int8"  # storage of boundary states; int8 has a scale per vector; none: only KD can learn from it
    layers: tuple[int, ...] = ()  # states kept beside those of loss.hidden_layer, for recipes that match other layers
    chains_per_shard: int = 512  # the most that a killed run has to write again

    def __post_init__(self) -> None:
        check_ranges(self, top_k="[1, 1e6]", chains_per_shard="[1, 1e7]", layers=LAYER)
        check_distinct(self, "layers")


@dataclass(frozen=True)
class Identity:
    """Everything, except the chains, that decides the content of a cache. Caches of equal identity are interchangeable.

    Layers are counted as `DecoderConfig.layer_index` counts them, from 0 (embeddings) to N (final normed states).
    """

    teacher: str  # fingerprint of the weights; "served:" and a model's name where a server was asked
    teacher_dtypes: str  # of weights and arithmetic
    tokenizer: str  # fingerprint
    vocab_size: int
    width: int  # of the teacher's states
    hidden_layers: tuple[int, ...]  # whose states this reader takes; some of `layers`
    temperature: float  # of the soft loss; the bucket's mass is kept at temperature 1 and at this one
    top_k: int
    predictions: Literal["compact", "float32"]
    states: Storage
    layers: tuple[int, ...] = ()  # whose states are kept, ascending; () means the `hidden_layers`, or none
    step_state: StepState = "end"  # of which tokens the state of a step is made

    def __post_init__(self) -> None:
        kept = () if self.states == "none" else tuple(self.layers) or tuple(sorted(set(self.hidden_layers)))
        object.__setattr__(self, "layers", kept)
        if list(self.layers) != sorted(set(self.layers)) or min(self.layers, default=0) < 0:
            raise ValueError(f"layers is {list(self.layers)}; expected different layers from 0, ascending")
        if min(self.width, self.top_k) < 1 or self.top_k > self.vocab_size:
            raise ValueError(
                f"width is {self.width} and top_k {self.top_k} of vocab_size {self.vocab_size}; expected at least 1, "
                "and no more tokens kept than there are"
            )
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; expected a positive number")

    def stored(self) -> dict[str, Any]:
        """The part that the manifest holds: everything but `hidden_layers`, which each reader chooses.

        What the state of a step is came later: where it is left out, it is the one at the step's end.
        """
        values = asdict(self) | {"layers": list(self.layers)}
        del values["hidden_layers"]
        if self.step_state == "end":
            del values["step_state"]
        return values

    def read(self) -> dict[str, Any]:
        """What this reader gets: the part in the manifest, and the layers that it chose."""
        chosen = list(self.hidden_layers)
        return self.stored() | {"hidden_layer": chosen[0] if len(chosen) == 1 else chosen}
