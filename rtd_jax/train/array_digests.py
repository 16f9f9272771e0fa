"""A digest of each array of a state, computed on the devices that hold it, and equal on every mesh.

    digest = sum over words i of mix(word_i xor mix(i, seed)), modulo 2^32, for two seeds

`mix` is a bijection of 32-bit words (MurmurHash3's finalizer), so one changed word always changes both sums; words that
change places, or several that change, go unnoticed with probability 2^-64. That is a guard against damage and mixed-up
files, not against somebody who makes a collision on purpose. Sums do not depend on their order, hence not on the
sharding; nothing is copied to the host, and an array costs one pass over its bytes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from rtd_jax.base.types import Array

_SEEDS = (0x9E3779B1, 0x7FEB352D)


def array_digests(tree: Any) -> dict[str, str]:
    """Dtype, shape and digest of every array, by its path: {"params/student/embedding": "float32[445, 64] 0f3c..."}.

    All processes must call it.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    # Each is fetched before the next is started: several programs under way at one time may run in another order on
    # each of several processes, which then wait for one another for ever.
    sums = [np.asarray(_sums_where_it_lies(leaf)) for _, leaf in leaves]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)} {high:08x}{low:08x}"
        for (path, leaf), (high, low) in zip(leaves, sums, strict=True)
    }


def _sums_where_it_lies(x: Array) -> Array:
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return _program(None)(x)
    if sharding.memory_kind == "pinned_host":  # moments that an update fetches; one array at a time has room
        x = jax.device_put(x, sharding.with_memory_kind("device"))
    return _program(NamedSharding(sharding.mesh, PartitionSpec()))(x)


@functools.cache
def _program(whole: Sharding | None) -> Any:
    return jax.jit(_sums, out_shardings=whole)


def _sums(x: Array) -> jax.Array:
    """The two sums of an array, uint32 [2]."""
    words = _words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = (_mix(words ^ _mix(place ^ np.uint32(seed))) for seed in _SEEDS)
    return jnp.stack([jnp.sum(each, dtype=jnp.uint32) for each in mixed])


def _words(x: Array) -> jax.Array:
    """The bits of an array, as uint32; a word may hold fewer of them."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_ or jax.dtypes.itemsize_bits(x.dtype) < 8:
        return x.astype(jnp.int8).astype(jnp.uint32)
    unsigned = {8: jnp.uint8, 16: jnp.uint16}.get(jax.dtypes.itemsize_bits(x.dtype), jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
