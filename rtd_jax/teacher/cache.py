"""The teacher's outputs on disk: one record per chain, looked up by the chain's content, in any order.

    <folder>/manifest.json               what the cache is: teacher, tokenizer, layers, k, temperature, storage
    <folder>/shard-<hash>.array_record   records, in ArrayRecord's format
    <folder>/shard-<hash>.json           their keys and checksums

A record's key is the SHA-256 of the chain's token ids, boundaries and loss weights. Batch size, packing and mesh
therefore do not matter, and a chain from another text, template, tokenizer or segmentation is not found. A record
holds the predictions of the tokens whose loss counts, and the states of each stored layer at all boundaries.

The compact storage sorts the ids of a token's predictions and keeps their differences in byte planes, which zstd's
entropy coding compresses to about 12 bits each. It keeps log-probabilities in 8 bits, with more precision near 0; the
two masses of the bucket as float16 log-odds; and states in int8 with one scale per vector.

Several processes may write into one folder, each its own shards. Caches of one identity that were written into separate
folders are joined by moving their shards into one folder: a reader sees the union.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from safetensors.numpy import load, save

from rtd_jax.base.files import read_json, replacing, write_json
from rtd_jax.base.settings import LAYER, check_distinct, check_ranges
from rtd_jax.base.types import Array, Batch, TeacherOutputs, TopK

FORMAT = 2
_SQRT_STEP = np.float32(np.sqrt(32.0) / 255)  # nats^(1/2) between two codes of a log-probability; the lowest is -32
_CODEC = pa.Codec("zstd", 9)


@dataclass(frozen=True)
class CacheSettings:
    """What a teacher cache holds for every token and step, and how precisely. Read when `teacher.cache` is set."""

    top_k: int = 64  # most probable tokens kept; the mass of all others is kept as one number
    predictions: Literal["compact", "float32"] = "compact"  # storage of log-probabilities: 8 bits, or all digits
    states: Literal["int8", "bfloat16", "float32"] = "int8"  # storage of boundary states; int8 has a scale per vector
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

    teacher: str  # fingerprint of the weights
    teacher_dtypes: str  # of weights and arithmetic
    tokenizer: str  # fingerprint
    vocab_size: int
    width: int  # of the teacher's states
    hidden_layer: int  # whose states this reader takes; one of `layers`
    temperature: float  # of the soft loss; the bucket's mass is kept at temperature 1 and at this one
    top_k: int
    predictions: str
    states: str
    layers: tuple[int, ...] = ()  # whose states are kept, ascending; () means `hidden_layer` alone

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers) or (self.hidden_layer,))

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
    """One chain as bytes: the predictions of its P predicted tokens, and the states of N layers at its K boundaries."""
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
    """The predictions, by ascending id, and the states of `hidden_layer`, float32 [K, D]; as precise as the storage."""
    header = json.loads(record[8 : 8 + int.from_bytes(record[:8], "little")])["__metadata__"]
    predicted, boundaries = map(int, header["sizes"].split())
    planes = load(record)

    def plane(name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        if name not in planes:
            return np.zeros(shape, dtype)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(_CODEC.decompress(planes[name].tobytes(), size, asbytes=True), dtype).reshape(shape)

    entries = (predicted, identity.top_k)
    gaps_PM = sum(plane(f"gaps{i}", np.uint8, entries).astype(np.int32) << 8 * i for i in range(4))
    if identity.predictions == "float32":
        log_probs_PM, tails_P2 = plane("log_probs", np.float32, entries), plane("tails", np.float32, (predicted, 2))
    else:
        log_probs_PM = -np.square(plane("log_probs", np.uint8, entries) * _SQRT_STEP)
        odds = plane("tails", np.float16, (predicted, 2)).astype(np.float32)
        tails_P2 = 1 / (1 + np.exp(-odds))
    shape, layer = (boundaries, identity.width), identity.layers.index(identity.hidden_layer)
    if identity.states == "int8":
        states_KD = plane(f"states{layer}", np.int8, shape) * plane(f"scales{layer}", np.float32, (boundaries, 1))
    else:
        states_KD = plane(f"states{layer}", jnp.dtype(identity.states), shape).astype(np.float32)
    return TopK(np.cumsum(gaps_PM, axis=-1, dtype=np.int32), log_probs_PM, tails_P2[:, 0], tails_P2[:, 1]), states_KD


class CacheWriter:
    """Adds records to a folder, a shard at a time. A shard is part of the cache once its list of keys is written.

    Attributes:
      keys: of all chains in the folder.

    Raises:
      ValueError: the folder holds a cache of another identity; the message says what differs.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        self._folder, self._identity = folder, identity
        if (folder / "manifest.json").exists():
            kept = check_identity(folder, identity).layers
            if kept != identity.layers:
                raise ValueError(
                    f"the teacher cache {folder} has the states of layers {list(kept)}, this run would add those of "
                    f"{list(identity.layers)}; set loss.hidden_layer and cache.layers alike, or write another cache"
                )
        else:
            write_json(folder / "manifest.json", {"format": FORMAT, "identity": identity.stored()})
        self.keys = set(_index(folder))

    def write(self, records: Sequence[tuple[str, bytes]]) -> None:
        """Writes one shard of (key, record) pairs, named by its keys, so that writing it again replaces it."""
        name = "shard-" + hashlib.sha256("".join(key for key, _ in records).encode()).hexdigest()[:16]
        with replacing(self._folder / f"{name}.array_record") as temporary:
            writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
            for _, record in records:
                writer.write(record)
            writer.close()
        size = (self._folder / f"{name}.array_record").stat().st_size
        keys, checksums = [key for key, _ in records], [zlib.crc32(record) for _, record in records]
        write_json(self._folder / f"{name}.json", {"bytes": size, "keys": keys, "crc32": checksums})
        self.keys.update(keys)


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
        self._places = _index(folder)
        self._readers: dict[str, ArrayRecordReader] = {}
        if not self._places:
            raise ValueError(f"{folder} is a teacher cache without records; run launch/cache_teacher.py again")

    @property
    def fingerprint(self) -> str:
        """The identity as a hash: caches of equal fingerprints give equal outputs for equal chains."""
        return hashlib.sha256(json.dumps(asdict(self.identity), sort_keys=True).encode()).hexdigest()

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
        name, row, checksum = self._places[key]
        path = self._folder / f"{name}.array_record"
        try:
            if name not in self._readers:
                self._readers[name] = ArrayRecordReader(str(path), "readahead_buffer_size:0")
            (record,) = self._readers[name].read([row])
            if zlib.crc32(record) != checksum:
                raise RuntimeError("checksum differs")
        except Exception as error:  # the reader raises many kinds, and each of them means a damaged file
            raise ValueError(
                f"{path}: record {row} is damaged ({str(error).splitlines()[0][:200]}); delete {name}.* and run "
                "launch/cache_teacher.py again, which writes what is missing"
            ) from error
        return decode_record(record, self.identity)

    def outputs(self, batch: Batch, *, states_only: bool = False, dtype: str = "float32") -> TeacherOutputs:
        """The teacher's outputs on a batch, in the places of its chains; zeros where nothing is predicted.

        Args:
          states_only: whether the predictions are left out.
          dtype: of the states.
        """
        shape = (*batch.tokens_BL.shape, self.identity.top_k)
        top = TopK(np.zeros(shape, np.int32), np.zeros(shape, np.float32), *np.zeros((2, *shape[:2]), np.float32))
        states_BCKD = np.zeros((*batch.boundary_mask_BCK.shape, self.identity.width), jnp.dtype(dtype))
        for key, row, slot, mask_K, predicting_P in packed_chains(batch):
            predictions, states_KD = self.read(key)
            states_BCKD[row, slot, mask_K] = states_KD
            for array, values in zip(top, predictions, strict=True):
                array[row, predicting_P] = values
        states: dict[int, Array] = {self.identity.hidden_layer: states_BCKD}
        return TeacherOutputs(None, None, states, {}, None if states_only else top)


def read_identity(folder: Path, hidden_layer: int) -> Identity:
    """The identity that the cache in a folder states, for a reader of one of its layers.

    Raises:
      ValueError: the folder holds no cache, or one that this version cannot read.
    """
    try:
        return Identity(**_stored(folder), hidden_layer=hidden_layer)
    except TypeError as error:
        raise ValueError(
            f"{folder}/manifest.json: its identity cannot be read ({error}); write the cache again"
        ) from error


def _stored(folder: Path) -> dict[str, Any]:
    if not (folder / "manifest.json").is_file():
        raise ValueError(
            f"{folder} is not a teacher cache (no manifest.json); write one with "
            "`python launch/cache_teacher.py --config=<this recipe> --config.teacher.cache=<folder>`"
        )
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{folder}/manifest.json is not of format {FORMAT}, which this version reads")
    return manifest.get("identity", {})


def check_identity(folder: Path, identity: Identity) -> Identity:
    """Compares an identity with that of the folder's cache, and returns it with all the layers that the cache has.

    Raises:
      ValueError: the folder holds no cache, or one of another identity or without this layer; the message says what
        differs.
    """
    before, now = _stored(folder), identity.stored()
    changed = [name for name in now if name != "layers" and before.get(name) != now[name]]
    if changed:
        name = changed[0]
        more = f" (and {', '.join(changed[1:])})" if len(changed) > 1 else ""
        raise ValueError(
            f"the teacher cache {folder} was written with another {name}: {before.get(name)!r}, this run has "
            f"{now[name]!r}{more}; use the settings it was written with, or write another with launch/cache_teacher.py"
        )
    layers = before.get("layers")
    if not isinstance(layers, list) or identity.hidden_layer not in layers:
        raise ValueError(
            f"the teacher cache {folder} has the states of layers {layers}, this run matches hidden_layer "
            f"{identity.hidden_layer}; choose one of them, or write another cache with launch/cache_teacher.py"
        )
    return replace(identity, layers=tuple(layers))


def _index(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Key -> (shard, row, checksum). Raises ValueError for a shard that is missing or has the wrong size."""
    places: dict[str, tuple[str, int, int]] = {}
    for path in sorted(folder.glob("shard-*.json")):
        listed, shard = read_json(path), path.with_suffix(".array_record")
        size = shard.stat().st_size if shard.is_file() else -1
        if size != listed["bytes"]:
            state = f"has {size} bytes" if size >= 0 else "is missing"
            raise ValueError(
                f"{shard} {state}, {path.name} says {listed['bytes']}; delete {path.stem}.* and run "
                "launch/cache_teacher.py again, which writes what is missing"
            )
        for row, (key, checksum) in enumerate(zip(listed["keys"], listed["crc32"], strict=True)):
            places.setdefault(key, (path.stem, row, checksum))
    return places
