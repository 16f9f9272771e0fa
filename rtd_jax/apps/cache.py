"""Runs the teacher once over a recipe's chains and stores what training reads of it (see rtd_jax/teacher/cache.py).

The teacher's weights are run here, or a server that has them is asked for its predictions.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rtd_jax.base.boundaries import step_states
from rtd_jax.base.files import check_writable
from rtd_jax.base.sharding import check_rows, host_share, make_mesh, put_batch, row_sharding, row_ways
from rtd_jax.base.types import Array, Batch, Params, TopK
from rtd_jax.data.encoding import EncodedChain
from rtd_jax.data.packing import fixed_batches
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.open import open_model
from rtd_jax.teacher.cache import CacheWriter
from rtd_jax.teacher.identity import Identity
from rtd_jax.teacher.predictions import top_k_predictions
from rtd_jax.teacher.records import encode_record, key_of, packed_chains
from rtd_jax.teacher.served.asking import Progress
from rtd_jax.teacher.served.predictions import ask_for_predictions, check_served
from rtd_jax.train.cache_identity import cache_identity
from rtd_jax.train.curriculum import stages
from rtd_jax.train.recipe import Recipe
from rtd_jax.train.splits import load_splits, make_detector, make_windows, prefixed_chains, row_length_of


def cache_teacher(recipe: Recipe, _: Path) -> Path:
    """Writes the teacher's outputs on every training and validation chain, and on the prefixed ones of the calibration.

    What the folder already has is kept. So a run that was killed goes on, and other data are added. Each of several
    processes writes shards of the rows that it feeds, into a folder that all of them see or into one of its own.

    With `teacher.served_model` it is the server that is asked, by one process.

    Raises:
      ValueError: no folder is given, it holds a cache of something else, or processes do not find the same in it; or
        the server cannot be used.
    """
    if not recipe.teacher.cache:
        raise ValueError("teacher.cache is empty; say where to write with --config.teacher.cache=<folder>")
    if bool(recipe.teacher.server) != recipe.is_served:
        raise ValueError(
            f"teacher.server is {recipe.teacher.server!r} and teacher.served_model {recipe.teacher.served_model!r}; "
            "give both the address of a server and the name under which it has the teacher, or neither"
        )
    if recipe.is_served and jax.process_count() > 1:
        raise ValueError(f"a server is asked by one process, and there are {jax.process_count()}; start one")
    folder = Path(recipe.teacher.cache).expanduser()
    check_writable(folder, "--config.teacher.cache")
    mesh = make_mesh(recipe.mesh)
    check_rows(recipe.batch_size, mesh)
    tell = functools.partial(print, flush=True)
    teacher = open_model(recipe.teacher, mesh, tell, has_weights=not recipe.is_served)
    identity = cache_identity(recipe, teacher)
    writer = CacheWriter(folder, identity)
    train, validation = load_splits(
        recipe.data, teacher.tokenizer, make_detector(recipe, teacher), make_windows(recipe, teacher)
    )
    prefixed: list[EncodedChain] = []
    for stage in stages(recipe.curriculum) if recipe.calibrates else ():
        held_out = validation.of_stage(stage, recipe.curriculum.validation_chains)
        prefixed += prefixed_chains(recipe, teacher.tokenizer, train.traces, held_out)
    missing = _missing((*train.encoded, *validation.encoded), writer), _missing(prefixed, writer)
    total = sum(map(len, missing))
    _check_same_everywhere(folder, missing)
    note = tell if jax.process_index() == 0 else lambda _: None
    note(f"{len(writer.keys)} chains are in {folder}, {total} are to be added")
    if not total:
        return folder
    if recipe.is_served:
        _ask_server(recipe, identity, missing[0], writer)
        return folder
    run = functools.partial(_forward, teacher.model, identity, recipe.loss.chunk_length)
    forward = jax.jit(run, out_shardings=row_sharding(mesh))
    share, is_writer, done = host_share(mesh), _is_writer(mesh), len(writer.keys)
    shapes = (recipe.data.row_length, recipe.data.chains_per_row), (row_length_of(prefixed or missing[0]), 1)
    for chains, (row_length, chains_per_row) in zip(missing, shapes, strict=True):
        slots = max((len(chain.boundaries) for chain in chains), default=0)
        for start in range(0, len(chains), recipe.cache.chains_per_shard):
            shard = chains[start : start + recipe.cache.chains_per_shard]
            batches = fixed_batches(shard, recipe.batch_size, row_length, chains_per_row, slots, share=share)
            outputs = ((batch, forward(teacher.params, put_batch(batch, mesh))) for batch in batches)
            records = list(_records(outputs, identity, shard))
            if is_writer and records:
                writer.write(records)
            done += len(shard)
            note(f"{done} chains are in {folder}")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the cache is written")  # whoever returns may start to read
    return folder


def _ask_server(recipe: Recipe, identity: Identity, chains: Sequence[EncodedChain], writer: CacheWriter) -> None:
    """Writes the predictions of the recipe's server on these chains, a shard at a time.

    Raises:
      ValueError: the server cannot be used; the shards that were written before stay.
    """
    asked = recipe.teacher.server, recipe.teacher.served_model, recipe.teacher.serving
    check_served(*asked)
    progress = Progress(len(chains), "chains")
    for start in range(0, len(chains), recipe.cache.chains_per_shard):
        shard = {key_of(chain): chain for chain in chains[start : start + recipe.cache.chains_per_shard]}
        tops = ask_for_predictions(*asked, shard, identity.top_k, identity.vocab_size, progress.add)
        states_NKD = {key: np.zeros((0, len(chain.boundaries), 0)) for key, chain in shard.items()}
        writer.write([(key, encode_record(tops[key], states_NKD[key], identity)) for key in shard])


def _check_same_everywhere(folder: Path, missing: tuple[list[EncodedChain], ...]) -> None:
    """Raises ValueError where processes do not miss the same chains. None of them writes before all have looked."""
    if jax.process_count() == 1:
        return
    keys = "".join(key_of(chain) for chains in missing for chain in chains)
    digest = np.frombuffer(hashlib.sha256(keys.encode()).digest(), np.uint8)
    if np.any(multihost_utils.process_allgather(digest) != digest):
        raise ValueError(
            f"the {jax.process_count()} processes do not find the same chains in {folder}; give a folder that all "
            "hosts see, or put the shards of all hosts together before going on"
        )


def _is_writer(mesh: Mesh) -> bool:
    """Whether this process writes the rows that it feeds: of several that feed the same rows, the first does."""
    first, count = host_share(mesh)
    devices = mesh.devices.reshape(row_ways(mesh), -1)[first * (row_ways(mesh) // count)]
    return jax.process_index() == min(device.process_index for device in devices)


def _missing(chains: Iterable[EncodedChain], writer: CacheWriter) -> list[EncodedChain]:
    """Chains that are missing from the cache, without duplicates."""
    keyed = {key_of(chain): chain for chain in chains}
    return [chain for key, chain in keyed.items() if key not in writer.keys]


def _forward(
    model: DecoderModel, identity: Identity, chunk_length: int, params: Params, batch: Batch
) -> tuple[TopK, Array]:
    """The predictions at every token, and the states of N layers for every step, [B, N, C, K, D]."""
    rows = batch.tokens_BL, batch.positions_BL, batch.attention_ids_BL
    if identity.layers:
        hidden_BLD, layers_BLD = model.hidden(params, *rows, layers=identity.layers)
        states = [step_states(x_BLD, batch, identity.step_state) for x_BLD in layers_BLD]
        states_BNCKD = jnp.stack(states, axis=1)
    else:
        hidden_BLD = model.hidden(params, *rows)
        states_BNCKD = jnp.zeros((len(batch.tokens_BL), 0, *batch.boundary_positions_BCK.shape[1:], 0))
    top_k = top_k_predictions(
        hidden_BLD,
        model.head(params),
        k=identity.top_k,
        temperature=identity.temperature,
        vocab_size=identity.vocab_size,
        chunk_length=chunk_length,
    )
    return top_k, states_BNCKD


def _records(
    batches: Iterable[tuple[Batch, tuple[TopK, Array]]], identity: Identity, chains: Sequence[EncodedChain]
) -> Iterator[tuple[str, bytes]]:
    """(key, record) of every one of the chains that is in this process's rows of the batches.

    Raises:
      ValueError: the teacher's outputs on a chain are not finite; the chain's source is named.
    """
    for batch, outputs in batches:
        top_k, states_BNCKD = jax.tree.map(_own_rows, outputs)
        for key, row, slot, mask_K, predicting_P in packed_chains(batch):
            top = TopK(*(array[row, predicting_P] for array in top_k))
            try:
                record = encode_record(top, states_BNCKD[row, :, slot][:, mask_K], identity)
            except ValueError as error:
                source = next(chain.source for chain in chains if key_of(chain) == key)
                raise ValueError(
                    f"{source}: on this chain {error}, and a cache of them would teach nothing; check the teacher's "
                    "weights, and teacher.compute_dtype"
                ) from error
            yield key, record


def _own_rows(x: jax.Array) -> np.ndarray:
    """The rows that this process's devices hold, in order."""
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
