"""Hidden states of several layers at every token of many texts, read once and kept on disk.

A boundary classifier is fitted to them again and again, and the teacher runs once. Each state is divided by its root
mean square, as the norm of the next layer does it, up to that norm's learned scale. So layers become comparable, the
very large activations of first tokens do no harm, and float16 can hold the states.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rtd_jax.base import files
from rtd_jax.base.sharding import put_same, row_sharding, row_ways, to_host
from rtd_jax.base.types import Array, Params
from rtd_jax.data.by_length import LengthBatch, batches_by_length, rows_at_once
from rtd_jax.models.model import DecoderModel
from rtd_jax.steps.prose import Reading

SHARD = 256  # texts of a file: as many as are read again at most, if a run is killed
LENGTH_MULTIPLE = 32  # tokens; rows are as long as their longest text, rounded up to this


def token_states(
    model: DecoderModel, params: Params, mesh: Mesh, readings: Sequence[Reading], layers: Sequence[int], batch_size: int
) -> list[np.ndarray]:
    """States of the texts' own tokens (not of the prompts'), of unit root mean square. float16 [T, N, D] each.

    Args:
      layers: N of them, as `DecoderModel.hidden` counts.
      batch_size: see `run_on_readings`.
    """

    def states_of(batch: LengthBatch) -> Array:
        placed = put_same((batch.tokens_BL, batch.mask_BL.astype(np.int32)), row_sharding(mesh))
        return unit_states(model, tuple(layers), params, *placed)

    return run_on_readings(states_of, readings, mesh, batch_size)


def run_on_readings(
    run: Callable[[LengthBatch], Array], readings: Sequence[Reading], mesh: Mesh, batch_size: int
) -> list[np.ndarray]:
    """The results for the texts' own tokens of a program that reads batches: [T, ...] each.

    Args:
      run: batch -> [B, L, ...]
      batch_size: rows at one time, rounded up to the devices; neighbours in length go together.
    """
    rows = rows_at_once(batch_size, len(readings), row_ways(mesh))
    results: list[np.ndarray] = [np.zeros(0)] * len(readings)
    for batch in batches_by_length([reading.tokens_L for reading in readings], rows, LENGTH_MULTIPLE):
        results_BL = to_host(run(batch))
        for row, i in enumerate(batch.indices):
            results[i] = results_BL[row, readings[i].prompt_length : len(readings[i].tokens_L)].copy()
    return results


def kept_states(
    folder: Path,
    teacher: str,
    readings: Sequence[Reading],
    layers: Sequence[int],
    run: Callable[[Sequence[Reading]], list[np.ndarray]],
    note: Callable[[str], None],
    name: str = "hidden states",
) -> list[np.ndarray]:
    """What `run` gives for the readings, in shards; a shard that `folder` holds already is read instead.

    Args:
      folder: has one safetensors file a shard, named by what determines its content.
      teacher: its fingerprint.
      run: readings -> states, as `token_states` gives them.
      name: of what is read, in notes.

    Raises:
      ValueError: a file is damaged; the error names it.
    """
    states: list[np.ndarray] = []
    for start in range(0, len(readings), SHARD):
        shard = readings[start : start + SHARD]
        digest = hashlib.sha256(f"{teacher}:{tuple(layers)}".encode())
        for reading in shard:
            digest.update(f"{reading.prompt_length}:{len(reading.tokens_L)}:".encode() + reading.tokens_L.tobytes())
        path = folder / f"{digest.hexdigest()[:32]}.safetensors"
        tokens = sum(len(reading.ends_T) for reading in shard)
        if path.exists():
            states_TND = _read_states(path, tokens, len(layers))
        else:
            states_TND = np.concatenate(run(shard))
            if not np.all(np.isfinite(states_TND)):
                sources = f"the {len(shard)} texts from {shard[0].text[:40]!r} on"
                raise ValueError(
                    f"the teacher's hidden states of {sources} are not finite; check its weights and dtypes"
                )
            with files.replacing(path) as temporary:
                save_file({"states": states_TND}, temporary, {"sha256": _digest(states_TND)})
            note(f"{name} of {start + len(shard)} of {len(readings)} texts are in {folder}")
        states += np.split(states_TND, np.cumsum([len(reading.ends_T) for reading in shard])[:-1])
    return states


def _read_states(path: Path, tokens: int, layers: int) -> np.ndarray:
    """The states in a file, [T, N, D]. Raises ValueError where it is damaged; an earlier version wrote no digest."""
    way_out = "delete it, and it is written again"
    try:
        with files.reading(path, way_out), safe_open(path, "numpy") as file:
            digest, states_TND = (file.metadata() or {}).get("sha256"), file.get_tensor("states")
    except (SafetensorError, KeyError, TypeError, MemoryError) as error:
        raise ValueError(f"{path} is damaged ({error}); {way_out}") from error
    if states_TND.ndim != 3 or states_TND.shape[:2] != (tokens, layers) or states_TND.dtype != np.float16:
        raise ValueError(
            f"{path} is damaged: it has {states_TND.dtype}{list(states_TND.shape)}, where float16 states of {tokens} "
            f"tokens and {layers} layers are expected; {way_out}"
        )
    if digest not in (None, _digest(states_TND)) or not np.all(np.isfinite(states_TND)):
        raise ValueError(f"{path} was changed or damaged after it was written; {way_out}")
    return states_TND


def _digest(states_TND: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(states_TND).tobytes()).hexdigest()


@functools.partial(jax.jit, static_argnums=(0, 1))
def unit_states(
    model: DecoderModel, layers: tuple[int, ...], params: Params, tokens_BL: Array, mask_BL: Array
) -> Array:
    """States of N layers at every token of rows that hold one text each, of unit root mean square.

    `mask_BL` says which places hold a token. float16 [B, L, N, D].
    """
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    ids_BL = jnp.asarray(mask_BL, jnp.int32)
    _, states = model.hidden(params, tokens_BL, positions_BL, ids_BL, layers=layers)
    states_BLND = jnp.stack(states, axis=2).astype(jnp.float32)
    square_BLN1 = jnp.mean(jnp.square(states_BLND), axis=-1, keepdims=True)
    return (states_BLND * jax.lax.rsqrt(square_BLN1 + 1e-6)).astype(jnp.float16)
