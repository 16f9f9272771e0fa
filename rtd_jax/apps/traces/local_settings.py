"""Settings of a teacher in this process, apart from `local.py`, which is slow to import."""

from dataclasses import dataclass
from typing import Literal

from rtd_jax.base.settings import check_ranges
from rtd_jax.base.sharding import MeshSettings


@dataclass(frozen=True)
class JaxSettings:
    """A teacher in this process, spread over its devices; for backend "jax"."""

    path: str = ""  # Hugging Face folder or hub name
    param_dtype: Literal["float32", "bfloat16", "int8"] = "bfloat16"  # of weights in memory; int8: a scale per channel
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of matrix products and hidden states
    sharding: Literal["fsdp", "tensor"] = "tensor"  # what travels: "fsdp" weights, "tensor" activations
    batch_size: int = 64  # chains decoded together; an interrupted run loses at most so many
    mesh: MeshSettings = MeshSettings()
    revision: str = ""  # of `path` on the hub: commit, tag or branch; "" is the newest. A local folder has none

    def __post_init__(self) -> None:
        check_ranges(self, batch_size="[1, 1e6]")
