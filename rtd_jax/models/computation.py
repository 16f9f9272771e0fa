"""How a model is computed: its description, number formats, kernels, and what is recomputed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from rtd_jax.models.adapters import AdapterSettings
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.schemes import Scheme

# What the forward pass stores of a layer for the backward pass: with "none" everything, so that nothing is recomputed;
# with "full" the layer's input alone; with "dots" its input and the projections, but not the attention scores.
Remat = Literal["none", "dots", "full"]
REMAT_POLICIES: dict[Remat, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
AttentionKernel = Literal["auto", "xla", "cudnn"]


@dataclass(frozen=True)
class Computation:
    """The description of a model and how it is computed. Only the description changes the result by more than rounding.

    Raises:
      ValueError: an attribute has a value that does not exist.
    """

    config: DecoderConfig
    compute_dtype: str = "float32"  # of matrix products and hidden states: "float32" or "bfloat16"
    remat: Remat = "none"  # what the backward pass recomputes
    activation_sharding: NamedSharding | None = None  # of the [B, L, D] states between layers
    attention: AttentionKernel = "auto"  # implementation of jax.nn.dot_product_attention; see `attention_kernel`
    streamed: bool = False  # layers stay in host memory, and each is copied to the device when it runs
    quantization: Scheme | None = None  # compute with float weights as this would round them; gradients go through
    adapter: AdapterSettings | None = None  # beside frozen weights; the params then have two parts (see `adapters`)

    def __post_init__(self) -> None:
        if self.adapter is not None and (self.adapter.rank < 1 or self.quantization is not None):
            raise ValueError(
                f"adapter has rank {self.adapter.rank} and quantization is {self.quantization}; expected a rank from 1 "
                "and no quantization: the weights under an adapter are not trained"
            )
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat {self.remat!r} is not a policy; use one of {', '.join(REMAT_POLICIES)}")
        if self.attention not in get_args(AttentionKernel):
            raise ValueError(f"attention {self.attention!r} is not an implementation; use 'auto', 'xla' or 'cudnn'")
        if not jnp.issubdtype(jnp.dtype(self.compute_dtype), jnp.floating):
            raise ValueError(f"compute_dtype {self.compute_dtype!r} is not a float type; use 'float32' or 'bfloat16'")
