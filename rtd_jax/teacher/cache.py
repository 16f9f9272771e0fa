"""The teacher's outputs on disk: one record per chain, looked up by the chain's content, in any order.

    <folder>/manifest.json   what the cache is: teacher, tokenizer, layers, k, temperature, storage
    <folder>/shard-*         records, and which cache they belong to (see `teacher/shards.py`)

A record's key is the SHA-256 of the chain's token ids, boundaries and loss weights. Batch size, packing and mesh
therefore do not matter, and a chain from another text, template, tokenizer or segmentation is not found. A record
holds the predictions of the tokens whose loss counts, and the states of each stored layer at all boundaries. A cache
whose `states` are "none" has predictions alone; one that a server filled (`served.predictions`) is such a cache.

The compact storage sorts the ids of a token's predictions and keeps their differences in byte planes, which zstd's
entropy coding compresses to about 12 bits each. It keeps log-probabilities in 8 bits, with more precision near 0; the
two masses of the bucket as float16 log-odds; and states in int8 with one scale per vector.

Several processes may write into one folder, each its own shards. Caches of one identity that were written into separate
folders are joined by moving their shards into one folder: a reader sees the union. A shard of another cache is refused.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load, save

from rtd_jax.base.files import json_digest, read_record, reading, write_record
from rtd_jax.base.records import shaped
from rtd_jax.base.settings import LAYER, check_distinct, check_ranges
from rtd_jax.base.types import Array, Batch, TeacherOutputs, TopK
from rtd_jax.models.fingerprint import Fingerprint
from rtd_jax.teacher.shards import (
    FORMAT,
    UNBOUND,
    Place,
    ShardReaders,
    index_shards,
    rewriting,
    shard_names,
    write_shard,
)

_SQRT_STEP = np.float32(np.sqrt(32.0) / 255)  # nats^(1/2) between two codes of a log-probability; the lowest is -32
_CODEC = pa.Codec("zstd", 9)


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

    Layers are counted as `LlamaConfig.layer_index` counts them, from 0 (embeddings) to N (final normed states).
    """

    teacher: str  # fingerprint of the weights; "served:" and a model's name where a server was asked
    teacher_dtypes: str  # of weights and arithmetic
    tokenizer: str  # fingerprint
    vocab_size: int
    width: int  # of the teacher's states
    hidden_layer: int  # whose states this reader takes; one of `layers`
    temperature: float  # of the soft loss; the bucket's mass is kept at temperature 1 and at this one
    top_k: int
    predictions: Literal["compact", "float32"]
    states: Storage
    layers: tuple[int, ...] = ()  # whose states are kept, ascending; () means `hidden_layer` alone, or none

    def __post_init__(self) -> None:
        kept = () if self.states == "none" else tuple(self.layers) or (self.hidden_layer,)
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
        """The part that the manifest holds: everything but `hidden_layer`, which each reader chooses."""
        values = asdict(self) | {"layers": list(self.layers)}
        del values["hidden_layer"]
        return values


def chain_key(tokens_L: Array, boundaries_K: Array, loss_weights_L: Array) -> str:
    """SHA-256 of a chain as the model sees it. The first token's weight is left out, because nothing predicts it."""
    digest = hashlib.sha256()
    weights = np.asarray(loss_weights_L, np.float32).copy()
    weights[:1] = 0.0
    for array in (np.asarray(tokens_L, np.int32), np.asarray(boundaries_K, np.int32), weights):
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
        key = chain_key(batch.tokens_BL[row, columns], boundaries_K, weights_L)
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
    """The predictions, by ascending id, and the states of `hidden_layer`, float32 [K, D]; as precise as the storage.

    A cache without states gives [K, 0].

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
    layer = identity.layers.index(identity.hidden_layer) if identity.layers else None
    if layer is None:
        states_KD = np.zeros((boundaries, 0), np.float32)
    elif identity.states == "int8":
        states_KD = plane(f"states{layer}", np.int8, shape) * plane(f"scales{layer}", np.float32, (boundaries, 1))
    else:
        states_KD = plane(f"states{layer}", jnp.dtype(identity.states), shape).astype(np.float32)
    if not all(np.all(np.isfinite(array)) for array in (log_probs_PM, tails_P2, states_KD)):
        raise ValueError("it has numbers that are not finite")
    if ids_PM.size and not 0 <= ids_PM.min() <= ids_PM.max() < identity.vocab_size:
        raise ValueError(
            f"it has token ids from {ids_PM.min()} to {ids_PM.max()} of a vocabulary of {identity.vocab_size}"
        )
    return TopK(ids_PM, log_probs_PM, tails_P2[:, 0], tails_P2[:, 1]), states_KD


class CacheWriter:
    """Adds records to a folder, a shard at a time. A shard is part of the cache once its list of keys is written.

    A folder without shards becomes a cache with the first one: a run that fails before leaves nothing that would bind
    the next one to its settings.

    Attributes:
      keys: of all chains in the folder.

    Raises:
      ValueError: the folder holds a cache of another identity; the message says what differs.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        self._folder, self._identity, self._cache = folder, identity, json_digest(identity.stored())
        if _has_manifest(folder):
            kept = check_identity(folder, identity).layers
            if kept != identity.layers:
                raise ValueError(
                    f"the teacher cache {folder} has the states of layers {list(kept)}, this run would add those of "
                    f"{list(identity.layers)}; set loss.hidden_layer and cache.layers alike, or write another cache"
                )
            places = _places(folder)
            self._cache = json_digest(_manifest(folder)[0].stored())
        else:  # shards without it are taken only if each says that it belongs to this cache
            places = index_shards(folder, self._cache, unbound=False) if folder.is_dir() else {}
            if places:
                self._sign()
        self.keys = set(places)

    def write(self, records: Sequence[tuple[str, bytes]]) -> None:
        """Writes one shard of (key, record) pairs, named by its keys, so that writing it again replaces it."""
        if not _has_manifest(self._folder):
            self._sign()
        keys = [key for key, _ in records]
        name = "shard-" + hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
        write_shard(self._folder, name, self._cache, records)
        self.keys.update(keys)

    def _sign(self) -> None:
        write_record(self._folder / "manifest.json", FORMAT, {"identity": self._identity.stored()})


class TeacherCache:
    """A cache opened for reading.

    Attributes:
      identity: what the cache holds, and the layer whose states are read.

    Raises:
      ValueError: the folder holds no cache or one of another teacher, tokenizer or setting, or a file is damaged.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.identity = check_identity(folder, identity)
        self._folder = folder
        self._places = _places(folder)
        self._readers = ShardReaders(folder)
        if not self._places:
            raise ValueError(f"{folder} is a teacher cache without records; run launch/cache_teacher.py again")

    @property
    def fingerprint(self) -> Fingerprint:
        """The identity as a hash: caches of equal fingerprints give equal outputs for equal chains."""
        teacher = self.identity.teacher
        earlier = replace(self.identity, teacher=getattr(teacher, "earlier", teacher))  # as older checkpoints have it
        now, before = (json.dumps(asdict(x), sort_keys=True).encode() for x in (self.identity, earlier))
        return Fingerprint(hashlib.sha256(now).hexdigest(), hashlib.sha256(before).hexdigest())

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def read(self, key: str) -> tuple[TopK, np.ndarray]:
        """The predictions of P tokens ([P, M] and [P]) and the states [K, D] of the chain with this key.

        Raises:
          ValueError: there is no such chain, or its record is damaged.
        """
        if key not in self._places:
            raise ValueError(
                f"{self._folder} has no chain {key[:12]}: text, template, segmentation or curriculum settings are not "
                "those it was written for; run launch/cache_teacher.py with this recipe to add what is missing"
            )
        place = self._places[key]
        record = self._readers.read(place)
        try:
            return decode_record(record, self.identity)
        except ValueError as error:
            raise ValueError(
                f"{self._folder / place.shard}.array_record: record {place.row} is damaged ({error}); "
                f"{rewriting(place.shard)}"
            ) from error

    def outputs(self, batch: Batch, *, states_only: bool = False, dtype: str = "float32") -> TeacherOutputs:
        """The teacher's outputs on a batch, in the places of its chains; zeros where nothing is predicted.

        Args:
          states_only: whether the predictions are left out.
          dtype: of the states.

        Raises:
          ValueError: a chain has no record or a damaged one, or states alone are asked of a cache that has none.
        """
        has_states = bool(self.identity.layers)
        if states_only and not has_states:
            raise ValueError(f"the teacher cache {self._folder} has no hidden states, only predictions")
        shape = (*batch.tokens_BL.shape, self.identity.top_k)
        top = TopK(np.zeros(shape, np.int32), np.zeros(shape, np.float32), *np.zeros((2, *shape[:2]), np.float32))
        width = self.identity.width if has_states else 0
        states_BCKD = np.zeros((*batch.boundary_mask_BCK.shape, width), jnp.dtype(dtype))
        for key, row, slot, mask_K, predicting_P in packed_chains(batch):
            predictions, states_KD = self.read(key)
            found, wanted = (len(predictions.tail_BL), len(states_KD)), (len(predicting_P), int(mask_K.sum()))
            if found != wanted:
                place = self._places[key]
                raise ValueError(
                    f"{self._folder / place.shard}.array_record: record {place.row} has {found[0]} predicted tokens "
                    f"and {found[1]} boundaries, its chain {wanted[0]} and {wanted[1]}; {rewriting(place.shard)}"
                )
            if has_states:
                states_BCKD[row, slot, mask_K] = states_KD
            for array, values in zip(top, predictions, strict=True):
                array[row, predicting_P] = values
        states: dict[int, Array] = {self.identity.hidden_layer: states_BCKD} if has_states else {}
        return TeacherOutputs(None, None, states, {}, None if states_only else top)


def read_identity(folder: Path, hidden_layer: int) -> Identity:
    """The identity that the cache in a folder states, for a reader of one of its layers.

    Raises:
      ValueError: the folder holds no cache, or one that this version cannot read.
    """
    return replace(_manifest(folder)[0], hidden_layer=hidden_layer)


def served_model(folder: Path) -> str:
    """The name of the model whose server filled the cache in a folder; "" where no server did, or there is no cache.

    Raises:
      ValueError: the folder holds a cache that this version cannot read.
    """
    teacher = _manifest(folder)[0].teacher if _has_manifest(folder) else ""
    return teacher.removeprefix(SERVED) if teacher.startswith(SERVED) else ""


def _has_manifest(folder: Path) -> bool:
    with reading(folder / "manifest.json"):
        return (folder / "manifest.json").is_file()


def _manifest(folder: Path) -> tuple[Identity, int]:
    """The identity in a folder's manifest, for a reader of the first of its layers, and the manifest's format."""
    way_out = "restore it from a copy, or write the cache again into another folder with launch/cache_teacher.py"
    if not _has_manifest(folder):
        shards = folder.is_dir() and shard_names(folder)
        raise ValueError(
            f"{folder} is not a teacher cache (no manifest.json); "
            + ("the shards in it have lost theirs: run" if shards else "write one with")
            + " `python launch/cache_teacher.py --config=<this recipe> --config.teacher.cache=<folder>`"
        )
    path = folder / "manifest.json"
    manifest = read_record(path, FORMAT, way_out, undigested=(UNBOUND,))
    identity = manifest.get("identity")
    layers = identity.get("layers") if isinstance(identity, dict) else None
    has_none = isinstance(identity, dict) and identity.get("states") == "none"
    if not isinstance(identity, dict) or not isinstance(layers, list) or bool(layers) == has_none:
        raise ValueError(f"{path} has no identity with its layers; {way_out}")
    return shaped(Identity, {**identity, "hidden_layer": (layers or [0])[0]}, path, way_out), manifest["format"]


def _places(folder: Path) -> dict[str, Place]:
    """Where the record of each key is. Raises ValueError for a shard that is damaged or not of this cache."""
    identity, format = _manifest(folder)
    return index_shards(folder, json_digest(identity.stored()), unbound=format == UNBOUND)


def check_identity(folder: Path, identity: Identity) -> Identity:
    """Compares an identity with that of the folder's cache, and returns it with all the layers that the cache has.

    Raises:
      ValueError: the folder holds no cache, or one of another identity or without this layer; the message says what
        differs.
    """
    before, now = _manifest(folder)[0].stored(), identity.stored()
    changed = [name for name in now if name != "layers" and before.get(name) != now[name]]
    if changed:
        name = changed[0]
        more = f" (and {', '.join(changed[1:])})" if len(changed) > 1 else ""
        raise ValueError(
            f"the teacher cache {folder} was written with another {name}: {before.get(name)!r}, this run has "
            f"{now[name]!r}{more}; use the settings it was written with, or write another with launch/cache_teacher.py"
        )
    layers = before.get("layers")
    if not isinstance(layers, list) or (identity.layers and identity.hidden_layer not in layers):
        raise ValueError(
            f"the teacher cache {folder} has the states of layers {layers}, this run matches hidden_layer "
            f"{identity.hidden_layer}; choose one of them, or write another cache with launch/cache_teacher.py"
        )
    return replace(identity, layers=tuple(layers))
