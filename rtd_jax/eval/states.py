"""A model's hidden states of the steps of given chains: read by the model, or from a teacher cache."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from rtd_jax.base.boundaries import step_states
from rtd_jax.base.sharding import put_same, row_sharding, row_ways, to_host
from rtd_jax.base.types import Array, Batch, Params, StepState
from rtd_jax.data.by_length import batches_by_length, rows_at_once
from rtd_jax.data.encoding import EncodedChain
from rtd_jax.data.packing import feature_names, token_features
from rtd_jax.data.tokenizer_match import tokenizer_fingerprint
from rtd_jax.models.model import DecoderModel
from rtd_jax.teacher.cache import TeacherCache, read_identity
from rtd_jax.teacher.records import key_of

ROWS = 8  # at one time, rounded up to the devices
LENGTH_MULTIPLE = 64  # tokens; rows are as long as their longest chain, rounded up to this


class ReadyModel(Protocol):
    """A model with its weights, its tokenizer and where they came from."""

    @property
    def model(self) -> DecoderModel: ...
    @property
    def params(self) -> Params: ...
    @property
    def mesh(self) -> Mesh: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def directory(self) -> Path: ...

    def fingerprint(self) -> str: ...  # identity of the weights' files


def boundary_states(
    opened: ReadyModel, chains: Sequence[EncodedChain], layer: int = -1, step_state: StepState = "end"
) -> tuple[np.ndarray, np.ndarray]:
    """States of one layer for the prompt and every step of every chain, teacher forced: float32 [C, K, D], bool [C, K].

    Chains are read one a row, neighbours in length together; only the steps' states leave the device.

    Args:
      layer: as `DecoderModel.hidden` counts them; -1 is the final normed state.
      step_state: of which tokens the state of a step is made (`base.boundaries.step_states`).

    Raises:
      ValueError: there are no chains, they are not of one kind, or the layer does not exist.
    """
    if not chains:
        raise ValueError("there are no chains to read; check the data and its row length")
    layer, names = opened.model.config.layer_index(layer), feature_names(chains)
    slots = max(len(chain.boundaries) for chain in chains)
    states: list[np.ndarray] = [np.empty(0)] * len(chains)
    rows = rows_at_once(ROWS, len(chains), row_ways(opened.mesh))
    for batch in batches_by_length([chain.tokens for chain in chains], rows, LENGTH_MULTIPLE):
        ids_BL = batch.mask_BL.astype(np.int32)
        positions_BL = np.broadcast_to(np.arange(ids_BL.shape[1], dtype=np.int32), ids_BL.shape)
        places_BK, mask_BK = np.zeros((rows, slots), np.int32), np.zeros((rows, slots), bool)
        conclusions_BL = np.zeros_like(ids_BL)
        soft_BL = np.zeros(ids_BL.shape, np.float32) if "places" in names else None
        for row, i in enumerate(batch.indices):
            count, features = len(chains[i].boundaries), token_features(chains[i])
            places_BK[row, :count], mask_BK[row, :count] = chains[i].boundaries, True
            conclusions_BL[row, : len(chains[i])] = features["conclusions"]
            if soft_BL is not None:
                soft_BL[row, : len(chains[i])] = features["places"]
        weights_BL = np.zeros(ids_BL.shape, np.float32)  # nothing is learned
        slots_BCK = places_BK[:, None], mask_BK[:, None]
        arrays = Batch(batch.tokens_BL, positions_BL, ids_BL, weights_BL, *slots_BCK, conclusions_BL, soft_BL)
        placed = put_same(arrays, row_sharding(opened.mesh))
        states_BKD = to_host(_states(opened.model, opened.params, placed, layer=layer, step_state=step_state))
        for row, i in enumerate(batch.indices):
            states[i] = states_BKD[row, : len(chains[i].boundaries)]
    return _padded(states)


def open_cache(folder: str, teacher: ReadyModel, layer: int = -1, step_state: StepState = "end") -> TeacherCache:
    """The cache that launch/cache_teacher.py wrote for this teacher, for its states of steps.

    Raises:
      ValueError: there is no cache, or it is another teacher's, tokenizer's, layer's or form of state's; with what it
        is.
    """
    path = Path(folder).expanduser()
    wanted = teacher.model.config.layer_index(layer)
    stored = read_identity(path, (wanted,))
    if not stored.layers:
        raise ValueError(
            f"the teacher cache {path} has no hidden states, only predictions; leave out --cache, or give one that "
            "launch/cache_teacher.py wrote with the teacher's weights and cache.states"
        )
    if stored.teacher != teacher.fingerprint():
        raise ValueError(
            f"the teacher cache {path} was written by another teacher than {teacher.directory} (fingerprint of weights "
            f"{stored.teacher[:12]}, not {teacher.fingerprint()[:12]}); give --teacher the one that wrote it"
        )
    if stored.tokenizer != tokenizer_fingerprint(teacher.tokenizer):
        raise ValueError(
            f"the teacher cache {path} was written with another tokenizer than that in {teacher.directory}; put back "
            "the tokenizer it was written with, or write another cache with launch/cache_teacher.py"
        )
    if wanted not in stored.layers:
        layers = ", ".join(map(str, stored.layers))
        raise ValueError(
            f"the teacher cache {path} holds states of layer {layers}, but layer {wanted} is asked for; "
            f"use --teacher_layer={stored.layers[-1]}, or write another with --config.loss.hidden_layer={wanted}"
        )
    if stored.step_state != step_state:
        raise ValueError(
            f"the teacher cache {path} holds states of steps made by step_state {stored.step_state!r}, but "
            f"{step_state!r} is asked for; use --step_state={stored.step_state}, or write another with "
            f"--config.loss.step_state={step_state}"
        )
    return TeacherCache(path, stored)


def cached_key(chain: EncodedChain) -> str:
    """Where a teacher cache keeps what belongs to a chain."""
    return key_of(chain)


def cached_states(cache: TeacherCache, chains: Sequence[EncodedChain]) -> tuple[np.ndarray, np.ndarray]:
    """The result of `boundary_states`, from a cache that has all of these chains; as precise as the stored states."""
    return _padded([cache.read(cached_key(chain))[1][0] for chain in chains])


def _padded(states: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The [K, D] states of each chain as one float32 [C, K, D], zero where a chain has no boundary, and bool [C, K]."""
    slots = max(len(states_KD) for states_KD in states)
    states_CKD = np.zeros((len(states), slots, states[0].shape[1]), np.float32)
    mask_CK = np.zeros((len(states), slots), bool)
    for i, states_KD in enumerate(states):
        states_CKD[i, : len(states_KD)], mask_CK[i, : len(states_KD)] = states_KD, True
    return states_CKD, mask_CK


@functools.partial(jax.jit, static_argnames=("model", "layer", "step_state"))
def _states(model: DecoderModel, params: Params, batch: Batch, *, layer: int, step_state: StepState) -> Array:
    rows = batch.tokens_BL, batch.positions_BL, batch.chain_ids_BL
    _, (states_BLD,) = model.hidden(params, *rows, layers=(layer,))
    return step_states(states_BLD, batch, step_state)[:, 0].astype(jnp.float32)
