"""One chain's record in a teacher cache: its key, and the teacher's predictions and states as bytes.

A record's key is the SHA-256 of the chain's token ids, boundaries and loss weights, and of the places of its tokens
in soft windows where it has such. Batch size, packing and mesh
therefore do not matter, and a chain from another text, template, tokenizer or segmentation is not found. A record
holds the predictions of the tokens whose loss counts, and each stored layer's states of all steps. A cache
whose `states` are "none" has predictions alone.

The compact storage sorts the ids of a token's predictions and keeps their differences in byte planes, which zstd's
entropy coding compresses to about 12 bits each. It keeps log-probabilities in 8 bits, with more precision near 0; the
two masses of the bucket as float16 log-odds; and states in int8 with one scale per vector.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load, save

from rtd_jax.base.types import Array, Batch, TopK
from rtd_jax.data.encoding import EncodedChain
from rtd_jax.teacher.identity import CacheSettings, Identity

_SQRT_STEP = np.float32(np.sqrt(32.0) / 255)  # nats^(1/2) between two codes of a log-probability; the lowest is -32
_CODEC = pa.Codec("zstd", 9)


def key_of(chain: EncodedChain) -> str:
    """The key of an encoded chain's record."""
    return chain_key(chain.tokens, chain.boundaries, chain.loss_weights, chain.places)


def chain_key(tokens_L: Array, boundaries_K: Array, loss_weights_L: Array, places_L: Array | None = None) -> str:
    """SHA-256 of a chain as the model sees it. The first token's weight is left out, because nothing predicts it."""
    digest = hashlib.sha256()
    weights = np.asarray(loss_weights_L, np.float32).copy()
    weights[:1] = 0.0
    arrays = [np.asarray(tokens_L, np.int32), np.asarray(boundaries_K, np.int32), weights]
    if places_L is not None:
        arrays.append(np.asarray(places_L, np.float32))
    for array in arrays:
        digest.update(len(array).to_bytes(8, "little") + array.tobytes())
    return digest.hexdigest()


class PackedChain(NamedTuple):
    """A chain of a batch: its key, where it lies in the batch, and which positions predict a token whose loss counts.

    A token is predicted at the position before it.
    """

    key: str
    row: int
    slot: int  # index of the chain in its row
    mask_K: Array  # bool; the boundaries that it has
    predicting_P: np.ndarray  # positions in the row


def packed_chains(batch: Batch) -> Iterator[PackedChain]:
    """The chains of a batch (of NumPy arrays), row by row."""
    for row, slot in zip(*np.nonzero(np.any(batch.boundary_mask_BCK, axis=-1)), strict=True):
        columns = np.flatnonzero(batch.chain_ids_BL[row] == slot + 1)
        mask_K, weights_L = batch.boundary_mask_BCK[row, slot], batch.loss_weights_BL[row, columns]
        boundaries_K = batch.boundary_positions_BCK[row, slot, mask_K] - columns[0]
        places_L = None if batch.places_BL is None else batch.places_BL[row, columns]
        key = chain_key(batch.tokens_BL[row, columns], boundaries_K, weights_L, places_L)
        yield PackedChain(key, row, slot, mask_K, columns[:-1][weights_L[1:] > 0])


def encode_record(top: TopK, states_NKD: np.ndarray, settings: CacheSettings | Identity) -> bytes:
    """One chain as bytes: the predictions of its P predicted tokens, and the states of N layers at its K boundaries.

    N may be 0: [0, K, D] of any width.

    Raises:
      ValueError: a number is not finite. No run can learn from it, and integers would hide it.
    """
    for name, array in (("predictions", top.log_probs_BLM), ("masses", top[2:]), ("states", states_NKD)):
        if not np.all(np.isfinite(np.asarray(array, np.float32))):
            raise ValueError(f"the teacher's {name} are not finite numbers")
    order = np.argsort(top.ids_BLM, axis=-1)
    ids_PM = np.take_along_axis(np.asarray(top.ids_BLM, np.int32), order, axis=-1)
    log_probs_PM = np.take_along_axis(np.asarray(top.log_probs_BLM, np.float32), order, axis=-1)
    gaps_PM = np.diff(ids_PM, axis=-1, prepend=0)
    arrays: dict[str, np.ndarray] = {f"gaps{i}": (gaps_PM >> 8 * i).astype(np.uint8) for i in range(4)}
    tails_P2 = np.stack([top.tail_BL, top.soft_tail_BL], axis=-1).astype(np.float32)
    if settings.predictions == "float32":
        arrays |= {"log_probs": log_probs_PM, "tails": tails_P2}
    else:
        codes = np.rint(np.sqrt(np.maximum(-log_probs_PM, 0.0)) / _SQRT_STEP)
        with np.errstate(divide="ignore"):
            odds = np.log(tails_P2) - np.log1p(-np.minimum(tails_P2, 1 - 2**-20))
        arrays |= {"log_probs": np.minimum(codes, 255).astype(np.uint8), "tails": odds.astype(np.float16)}
    for layer, states_KD in enumerate(np.asarray(states_NKD, np.float32)):
        if settings.states == "int8":
            scales_K1 = np.maximum(np.max(np.abs(states_KD), axis=-1, keepdims=True), 1e-30) / 127
            arrays[f"states{layer}"] = np.rint(states_KD / scales_K1).astype(np.int8)
            arrays[f"scales{layer}"] = scales_K1.astype(np.float32)
        else:
            arrays[f"states{layer}"] = states_KD.astype(jnp.dtype(settings.states))
    planes = {
        name: np.frombuffer(_CODEC.compress(x.tobytes(), asbytes=True), np.uint8)
        for name, x in arrays.items()
        if x.size and (not name.startswith("gaps") or x.any())
    }
    # All metadata in one entry: safetensors writes several in an order that differs from call to call, and two equal
    # records must be equal bytes.
    return save(planes, {"sizes": f"{len(ids_PM)} {np.shape(states_NKD)[1]}"})


def decode_record(record: bytes, identity: Identity) -> tuple[TopK, np.ndarray]:
    """The predictions, by ascending id, and the states of `hidden_layers`, float32 [N, K, D]; as precise as stored.

    A cache without states gives [0, K, 0].

    Raises:
      ValueError: these are not the bytes of a record of this identity.
    """
    try:
        header = json.loads(record[8 : 8 + int.from_bytes(record[:8], "little")])["__metadata__"]
        predicted, boundaries = map(int, header["sizes"].split())
        planes = load(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"its header cannot be read ({type(error).__name__}: {error})") from error
    if min(predicted, boundaries) < 0:
        raise ValueError(f"it says that it has {predicted} predicted tokens and {boundaries} boundaries")

    def plane(name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
        if name not in planes:
            if size and not name.startswith("gaps"):  # those are left out where they are zero
                raise ValueError(f"it has no {name}")
            return np.zeros(shape, dtype)
        try:
            content = _CODEC.decompress(planes[name].tobytes(), size, asbytes=True)
        except (ValueError, OSError, OverflowError, MemoryError) as error:
            raise ValueError(f"its {name} are not the {size} bytes that they should be ({error})") from error
        return np.frombuffer(content, dtype).reshape(shape)

    entries = (predicted, identity.top_k)
    # The planes that are never left out come first, so that sizes which are not true end here.
    if identity.predictions == "float32":
        log_probs_PM, tails_P2 = plane("log_probs", np.float32, entries), plane("tails", np.float32, (predicted, 2))
    else:
        log_probs_PM = -np.square(plane("log_probs", np.uint8, entries) * _SQRT_STEP)
        odds = plane("tails", np.float16, (predicted, 2)).astype(np.float32)
        tails_P2 = 1 / (1 + np.exp(-odds))
    gaps_PM = sum(plane(f"gaps{i}", np.uint8, entries).astype(np.int32) << 8 * i for i in range(4))
    ids_PM = np.cumsum(gaps_PM, axis=-1, dtype=np.int32)
    shape = boundaries, identity.width
    wanted = [identity.layers.index(layer) for layer in identity.hidden_layers] if identity.layers else []
    states = []
    for layer in wanted:
        if identity.states == "int8":
            states.append(
                plane(f"states{layer}", np.int8, shape) * plane(f"scales{layer}", np.float32, (boundaries, 1))
            )
        else:
            states.append(plane(f"states{layer}", jnp.dtype(identity.states), shape).astype(np.float32))
    states_NKD = np.stack(states) if states else np.zeros((0, boundaries, 0), np.float32)
    if not all(np.all(np.isfinite(array)) for array in (log_probs_PM, tails_P2, states_NKD)):
        raise ValueError("it has numbers that are not finite")
    if ids_PM.size and not 0 <= ids_PM.min() <= ids_PM.max() < identity.vocab_size:
        raise ValueError(
            f"it has token ids from {ids_PM.min()} to {ids_PM.max()} of a vocabulary of {identity.vocab_size}"
        )
    return TopK(ids_PM, log_probs_PM, tails_P2[:, 0], tails_P2[:, 1]), states_NKD
