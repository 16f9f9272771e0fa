"""The teacher's outputs on disk: one record per chain, looked up by the chain's content, in any order.

    <folder>/manifest.json   the cache's identity: teacher, tokenizer, layers, k, storage (`teacher/identity.py`)
    <folder>/shard-*         records (`teacher/records.py`), and which cache they belong to (`teacher/shards.py`)

Several processes may write into one folder, each its own shards. Caches of one identity that were written into separate
folders are joined by moving their shards into one folder: a reader sees the union. A shard of another cache is refused.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rtd_jax.base.files import json_digest, read_record, reading, write_record
from rtd_jax.base.records import shaped
from rtd_jax.base.types import Batch, TeacherOutputs, TopK
from rtd_jax.models.fingerprint import Fingerprint
from rtd_jax.teacher.identity import SERVED, Identity
from rtd_jax.teacher.records import decode_record, packed_chains
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
                    f"{list(identity.layers)}; set loss.hidden_layer, loss.layers and cache.layers alike, or write "
                    "another cache"
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
        now, before = (json.dumps(x.read(), sort_keys=True).encode() for x in (self.identity, earlier))
        return Fingerprint(hashlib.sha256(now).hexdigest(), hashlib.sha256(before).hexdigest())

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def read(self, key: str) -> tuple[TopK, np.ndarray]:
        """The predictions of P tokens ([P, M] and [P]) and the states [N, K, D] of the chain with this key.

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
        shape = (*batch.boundary_mask_BCK.shape, width)
        states = {layer: np.zeros(shape, jnp.dtype(dtype)) for layer in self.identity.hidden_layers if has_states}
        for key, row, slot, mask_K, predicting_P in packed_chains(batch):
            predictions, states_NKD = self.read(key)
            found, wanted = (len(predictions.tail_BL), states_NKD.shape[1]), (len(predicting_P), int(mask_K.sum()))
            if found != wanted:
                place = self._places[key]
                raise ValueError(
                    f"{self._folder / place.shard}.array_record: record {place.row} has {found[0]} predicted tokens "
                    f"and {found[1]} boundaries, its chain {wanted[0]} and {wanted[1]}; {rewriting(place.shard)}"
                )
            for states_BCKD, states_KD in zip(states.values(), states_NKD, strict=True):
                states_BCKD[row, slot, mask_K] = states_KD
            for array, values in zip(top, predictions, strict=True):
                array[row, predicting_P] = values
        return TeacherOutputs(None, None, {**states}, {}, None if states_only else top)


def read_identity(folder: Path, hidden_layers: tuple[int, ...]) -> Identity:
    """The identity that the cache in a folder states, for a reader of some of its layers.

    Raises:
      ValueError: the folder holds no cache, or one that this version cannot read.
    """
    return replace(_manifest(folder)[0], hidden_layers=hidden_layers)


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
    return shaped(Identity, {**identity, "hidden_layers": (layers or [0])[:1]}, path, way_out), manifest["format"]


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
    of_old = {"step_state": "end"}  # what is left out
    before, now = of_old | _manifest(folder)[0].stored(), of_old | identity.stored()
    changed = [name for name in now if name != "layers" and before.get(name) != now[name]]
    if changed:
        name = changed[0]
        more = f" (and {', '.join(changed[1:])})" if len(changed) > 1 else ""
        raise ValueError(
            f"the teacher cache {folder} was written with another {name}: {before.get(name)!r}, this run has "
            f"{now[name]!r}{more}; use the settings it was written with, or write another with launch/cache_teacher.py"
        )
    layers = before.get("layers")
    missing = [layer for layer in identity.hidden_layers if not isinstance(layers, list) or layer not in layers]
    if not isinstance(layers, list) or (identity.layers and missing):
        raise ValueError(
            f"the teacher cache {folder} has the states of layers {layers}, this run matches hidden_layer "
            f"{missing[0]}; choose one of them, or write another cache with launch/cache_teacher.py"
        )
    return replace(identity, layers=tuple(layers))
