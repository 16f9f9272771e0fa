"""Runs the teacher once over a recipe's chains and keeps what training reads of it (rtd_jax/teacher/cache.py)."""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rtd_jax.common.files import check_writable
from rtd_jax.common.sharding import check_rows, make_mesh, put_batch
from rtd_jax.common.types import Batch, Params, TeacherOutputs, TopK
from rtd_jax.data.packing import fixed_batches
from rtd_jax.data.tokens import EncodedChain
from rtd_jax.models.checkpoint import load_config, resolve
from rtd_jax.models.functional import LlamaModel
from rtd_jax.teacher.cache import CacheWriter, Identity, chain_key, encode_record, predicting_positions
from rtd_jax.teacher.online import teacher_outputs
from rtd_jax.teacher.predictions import top_k_predictions
from rtd_jax.training.curriculum import stages
from rtd_jax.training.prepare import (
    LoadedTeacher,
    cache_identity,
    load_tokenizer,
    make_detector,
    weights_fingerprint,
)
from rtd_jax.training.recipe import Recipe
from rtd_jax.training.splits import load_splits, prefixed_chains, row_length_of

SHARD = 512  # chains of a shard; what a kill can cost at most


def cache_teacher(recipe: Recipe, _: Path) -> Path:
    """Writes the teacher's outputs on every training and validation chain, and on those of the calibration.

    What the folder has already is kept, so that a run that was killed goes on, and other data are added.

    Raises:
      ValueError: no folder is given, it holds a cache of something else, or several processes were started.
    """
    if not recipe.teacher.cache:
        raise ValueError("teacher.cache is empty; say where to write with --config.teacher.cache=<folder>")
    if jax.process_count() > 1:
        raise ValueError(
            f"{jax.process_count()} processes were started, but one writes a cache; use one host's devices"
        )
    folder = Path(recipe.teacher.cache).expanduser()
    check_writable(folder)
    mesh = make_mesh(recipe.mesh)
    check_rows(recipe.batch_size, mesh)
    directory = resolve(recipe.teacher.path)
    config, tokenizer = load_config(directory), load_tokenizer(directory)
    fingerprint = weights_fingerprint(directory)
    writer = CacheWriter(folder, identity := cache_identity(recipe, config, fingerprint, tokenizer))
    teacher = LoadedTeacher(recipe.teacher, config, directory, mesh, functools.partial(print, flush=True))
    detector = make_detector(recipe, teacher, fingerprint, tokenizer)
    train, validation = load_splits(recipe.data, tokenizer, detector)
    calibration: list[EncodedChain] = []
    for stage in stages(recipe.curriculum):
        chosen = validation.of_stage(stage)[: recipe.curriculum.validation_chains]
        traces = [validation.traces[i] for i in chosen]
        calibration += prefixed_chains(recipe, tokenizer, train.traces, traces)
    wanted = _missing((*train.encoded, *validation.encoded), writer), _missing(calibration, writer)
    total = sum(map(len, wanted))
    print(f"{len(writer.keys)} chains are in {folder}, {total} are to be added", flush=True)
    if not total:
        return folder
    forward = jax.jit(functools.partial(_forward, teacher.model, identity, recipe.loss.chunk_length))
    shapes = (recipe.data.row_length, recipe.data.chains_per_row), (row_length_of(calibration or wanted[0]), 1)
    for chains, (row_length, chains_per_row) in zip(wanted, shapes, strict=True):
        slots = max((len(chain.boundaries) for chain in chains), default=0)
        for start in range(0, len(chains), SHARD):
            shard = chains[start : start + SHARD]
            batches = fixed_batches(shard, recipe.batch_size, row_length, chains_per_row, slots)
            outputs = ((batch, forward(teacher.params, put_batch(batch, mesh))) for batch in batches)
            writer.write(list(_records(outputs, identity)))
            print(f"{len(writer.keys)} chains are in {folder}", flush=True)
    return folder


def _missing(chains: Iterable[EncodedChain], writer: CacheWriter) -> list[EncodedChain]:
    """Those that are not there, each once."""
    keyed = {chain_key(chain.tokens, chain.boundaries, chain.loss_weights): chain for chain in chains}
    return [chain for key, chain in keyed.items() if key not in writer.keys]


def _forward(model: LlamaModel, identity: Identity, chunk_length: int, params: Params, batch: Batch) -> TeacherOutputs:
    outputs = teacher_outputs(model, params, batch, identity.hidden_layer)
    assert outputs.hidden_BLD is not None
    sizes: dict[str, Any] = {"k": identity.top_k, "vocab_size": identity.vocab_size, "chunk_length": chunk_length}
    top_k = top_k_predictions(outputs.hidden_BLD, model.head(params), temperature=identity.temperature, **sizes)
    return outputs._replace(hidden_BLD=None, top_k=top_k)


def _records(batches: Iterable[tuple[Batch, TeacherOutputs]], identity: Identity) -> Iterator[tuple[str, bytes]]:
    """(key, record) of every chain of the batches."""
    for batch, outputs in batches:
        outputs = jax.device_get(outputs)
        assert outputs.top_k is not None
        for row, slot in zip(*np.nonzero(np.any(batch.boundary_mask_BCK, axis=-1)), strict=True):
            columns = np.flatnonzero(batch.chain_ids_BL[row] == slot + 1)
            mask, weights = batch.boundary_mask_BCK[row, slot], batch.loss_weights_BL[row, columns]
            boundaries = batch.boundary_positions_BCK[row, slot][mask] - columns[0]
            predicting = columns[predicting_positions(weights)]
            top = TopK(*(array[row, predicting] for array in outputs.top_k))
            record = encode_record(top, outputs.boundary_states_BCKD[row, slot][mask], identity)
            yield chain_key(batch.tokens_BL[row, columns], boundaries, weights), record
