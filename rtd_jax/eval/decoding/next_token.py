"""The choice of the next token from the states that the head reads."""

import jax
import jax.numpy as jnp

from rtd_jax.base.types import Array, Params
from rtd_jax.eval.decoding.settings import GenerateSettings
from rtd_jax.losses.divergences import mask_padding
from rtd_jax.models.model import DecoderModel


def next_tokens(
    model: DecoderModel, params: Params, hidden_BD: Array, streams_B: Array, counts_B: Array, settings: GenerateSettings
) -> tuple[jax.Array, jax.Array]:
    """The next token of each row, int32 [B], and whether it is one of `eos_ids`, bool [B].

    Args:
      hidden_BD: normed states of the rows' newest tokens.
      streams_B: int32, the row's stream of draws.
      counts_B: int32, how many new tokens the row has: a draw is a function of (seed, stream, count).
    """
    head_DV = model.head(params).astype(hidden_BD.dtype)
    raw_BV = jnp.einsum("bd,dv->bv", hidden_BD, head_DV, preferred_element_type=jnp.float32)
    if settings.vocab_size > raw_BV.shape[-1]:
        raise ValueError(
            f"vocab_size is {settings.vocab_size}, but the model has logits for {raw_BV.shape[-1]} ids; "
            "use the tokenizer's highest id + 1"
        )
    logits_BV = mask_padding(raw_BV, settings.vocab_size)
    sampling = settings.sampling
    if sampling is None:
        chosen_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    else:
        base = jax.random.key(sampling.seed)
        keys_B = jax.vmap(lambda row, count: jax.random.fold_in(jax.random.fold_in(base, row), count))(
            streams_B, counts_B
        )
        kept_BV = nucleus(logits_BV / sampling.temperature, sampling.top_p)
        chosen_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV).astype(jnp.int32)
    eos_ids = jnp.asarray(settings.eos_ids, jnp.int32)
    return chosen_B, jnp.any(chosen_B[:, None] == eos_ids[None, :], axis=-1)


def nucleus(logits_BV: Array, top_p: float) -> Array:
    """Logits of the fewest ids whose probabilities reach `top_p`, -inf elsewhere (arXiv:1904.09751)."""
    if top_p >= 1.0:
        return logits_BV
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # An id is kept while those before it have not reached top_p; the first always is.
    kept_B = jnp.sum(jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV < top_p, axis=-1)
    lowest_B1 = jnp.take_along_axis(sorted_BV, kept_B[:, None] - 1, axis=-1)
    return jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)
