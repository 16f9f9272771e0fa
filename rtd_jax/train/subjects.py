"""Opens any saved model by one string: a Hugging Face folder, a hub name, or a stage checkpoint of a run."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from rtd_jax.base.boundaries import gather_boundaries
from rtd_jax.base.settings import build
from rtd_jax.base.sharding import MeshSettings, make_mesh, param_shardings, put_same, row_sharding, row_ways, to_host
from rtd_jax.base.types import Array, Params
from rtd_jax.data.encoding import EncodedChain
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.tokenizer_match import tokenizer_fingerprint
from rtd_jax.methods.maps import state_map, transition_map
from rtd_jax.methods.term import Setup
from rtd_jax.models.from_hf import weights_fingerprint
from rtd_jax.models.model import LlamaModel
from rtd_jax.models.open import FloatDtype, ModelSettings, WeightDtype, open_model
from rtd_jax.models.quantized import INT8, quantize_params
from rtd_jax.models.weights import logical_axes
from rtd_jax.teacher.cache import TeacherCache, chain_key, read_identity
from rtd_jax.train.checkpoints import read_meta, restore_params
from rtd_jax.train.recipe import Recipe
from rtd_jax.train.student import student_config

LENGTH_BUCKET = 64  # tokens; rows are as long as their longest chain, rounded up to this


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that is ready to run, and what a stage checkpoint holds besides its weights.

    Attributes:
      name: for reports.
      params: empty where they were not asked for.
      directory: the Hugging Face folder or the stage checkpoint.
      text: the form of text that a run trained it on. It and what follows are unset for a Hugging Face folder.
      f, g: the run's maps from its width to the teacher's, for states and for transitions. [S, D]
      layers: the (student, teacher) layers that the maps join.
      teacher_fingerprint: of the run's teacher.
    """

    name: str
    model: LlamaModel
    params: Params
    tokenizer: PreTrainedTokenizerBase
    mesh: Mesh
    directory: Path
    text: TextFormat | None = None
    f: np.ndarray | None = None
    g: np.ndarray | None = None
    layers: tuple[int, int] | None = None
    teacher_fingerprint: str = ""

    def fingerprint(self) -> str:
        """The fingerprint of the weights' files; "" for a stage checkpoint."""
        return "" if self.text is not None else weights_fingerprint(self.directory)


def load_model(
    path: str, dtype: WeightDtype = "float32", compute_dtype: FloatDtype = "float32", *, weights: bool = True
) -> LoadedModel:
    """Loads a model over all devices of this process.

    Args:
      path: a Hugging Face folder, a hub name, a stage checkpoint (runs/rtd_tiny/checkpoints/stages/5), or a run's
        folder, for its newest stage.
      dtype: of the weights in memory; "int8" quantises them with one scale per output channel.
      compute_dtype: of matrix products and hidden states.
      weights: False leaves `params` empty, for a teacher whose states are read from a cache.

    Raises:
      ValueError: there is no model of that name, it is not a Llama, or it is a checkpoint whose teacher is gone; or a
        stage checkpoint is asked for without weights: a cache belongs to a Hugging Face folder.
    """
    mesh = make_mesh(MeshSettings())
    stage = stage_checkpoint(path)
    if stage is not None and not weights:
        raise ValueError(f"{path} is a run's checkpoint, of which there is no teacher cache; give the teacher's folder")
    if stage is not None:
        return _from_stage(stage, dtype, compute_dtype, mesh)
    opened = open_model(ModelSettings(path, dtype, compute_dtype), mesh, lambda _: None)
    name = _labelled(opened.directory.name, dtype)
    params = opened.params if weights else {}
    return LoadedModel(name, opened.model, params, opened.tokenizer, mesh, opened.directory)


def stage_checkpoint(path: str) -> Path | None:
    """The stage checkpoint that a path names: itself, or a run's newest; None for anything else."""
    folder = Path(path).expanduser()
    if (folder / "meta").is_dir() and (folder / "state").is_dir():
        return folder.absolute()
    stages = [x for x in (folder / "checkpoints" / "stages").glob("*") if x.name.isdigit()]
    return max(stages, key=lambda x: int(x.name)).absolute() if stages else None


def _from_stage(path: Path, dtype: WeightDtype, compute_dtype: FloatDtype, mesh: Mesh) -> LoadedModel:
    meta = read_meta(path)
    recipe = build(Recipe, meta["settings"], "settings")
    try:
        teacher = open_model(recipe.teacher, mesh)
        config = student_config(recipe.student, teacher.config)
    except ValueError as error:
        raise ValueError(
            f"{path} was trained with models that are not where they were ({error}). A finished run has its student as "
            f"a Hugging Face folder too: give {path.parents[2] / 'student'}"
        ) from error
    model = LlamaModel(config, compute_dtype, activation_sharding=row_sharding(mesh))
    objective = recipe.objective(config, teacher.config, config.vocab_size)
    maps = jax.eval_shape(lambda: objective.init_params(jax.random.key(0), config.width, teacher.config.width))
    abstract: Params = {"student": model.abstract_params(), **maps}
    axes = {"student": logical_axes(abstract["student"]), **objective.param_axes()}
    restored = restore_params(path, abstract, param_shardings(abstract, axes, mesh))
    params, f, g = restored["student"], state_map(restored), transition_map(restored)
    if dtype == INT8:
        params = jax.jit(quantize_params)(params)
    elif dtype != "float32":
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    return LoadedModel(
        name=_labelled(f"{path.parents[2].name}, stage {path.name}", dtype),
        model=model,
        params=params,
        tokenizer=teacher.tokenizer,
        mesh=mesh,
        directory=path,
        text=recipe.data.text,
        f=np.eye(config.width) if f is None else np.asarray(f),
        g=np.eye(config.width) if g is None else np.asarray(g),
        layers=recipe.loss.matched_layers(Setup(config, teacher.config, config.vocab_size)),
        teacher_fingerprint=meta["fingerprints"]["teacher"],
    )


def _labelled(name: str, dtype: str) -> str:
    return name if dtype == "float32" else f"{name} ({dtype})"


def boundary_states(
    loaded: LoadedModel, chains: Sequence[EncodedChain], layer: int = -1, batch_size: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """States of one layer at every boundary of every chain, teacher forced: float32 [C, K, D], and bool [C, K].

    Chains are read one a row, neighbours in length together; only the boundaries' states leave the device.

    Args:
      layer: as `LlamaModel.hidden` counts them; -1 is the final normed state.
      batch_size: rows at one time, rounded up to the devices.

    Raises:
      ValueError: there are no chains, or the layer does not exist.
    """
    if not chains:
        raise ValueError("there are no chains to read; check the data and its row length")
    layer = loaded.model.layer_index(layer)
    sharding, ways = row_sharding(loaded.mesh), row_ways(loaded.mesh)
    batch_size = -(-min(batch_size, len(chains)) // ways) * ways
    slots = max(len(chain.boundaries) for chain in chains)
    states_CKD = np.zeros((len(chains), slots, loaded.model.config.width), np.float32)
    mask_CK = np.zeros((len(chains), slots), bool)
    by_length = sorted(range(len(chains)), key=lambda i: len(chains[i]))
    for start in range(0, len(chains), batch_size):
        rows = by_length[start : start + batch_size]
        length = -(-len(chains[rows[-1]]) // LENGTH_BUCKET) * LENGTH_BUCKET
        tokens_BL, ids_BL = np.zeros((2, batch_size, length), np.int32)
        boundaries_BK = np.zeros((batch_size, slots), np.int32)
        for row, i in enumerate(rows):
            tokens_BL[row, : len(chains[i])] = chains[i].tokens
            ids_BL[row, : len(chains[i])] = 1
            boundaries_BK[row, : len(chains[i].boundaries)] = chains[i].boundaries
        placed = put_same((tokens_BL, ids_BL, boundaries_BK), sharding)
        found_BKD = to_host(_states(loaded.model, loaded.params, *placed, layer=layer))
        for row, i in enumerate(rows):
            count = len(chains[i].boundaries)
            states_CKD[i, :count] = found_BKD[row, :count]
            mask_CK[i, :count] = True
    return states_CKD, mask_CK


def open_cache(folder: str, teacher: LoadedModel, layer: int = -1) -> TeacherCache:
    """Opens the cache that launch/cache_teacher.py wrote for this teacher, to read its states at boundaries.

    Raises:
      ValueError: there is no cache, or one of another teacher, tokenizer or layer; with what it is.
    """
    path = Path(folder).expanduser()
    wanted = teacher.model.config.layer_index(layer)
    stored = read_identity(path, wanted)
    if stored.teacher != (fingerprint := teacher.fingerprint()):
        raise ValueError(
            f"the teacher cache {path} was written by another teacher than {teacher.directory} (fingerprint of weights "
            f"{stored.teacher[:12]}, not {fingerprint[:12]}); give --teacher the one that wrote it"
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
    return TeacherCache(path, stored)


def cached_key(chain: EncodedChain) -> str:
    """The key under which a teacher cache keeps a chain."""
    return chain_key(chain.tokens, chain.boundaries, chain.loss_weights)


def cached_states(cache: TeacherCache, chains: Sequence[EncodedChain]) -> tuple[np.ndarray, np.ndarray]:
    """As `boundary_states`, from a cache that has all of these chains: exact up to its storage."""
    found = [cache.read(cached_key(chain))[1] for chain in chains]
    slots = max(len(states_KD) for states_KD in found)
    states_CKD = np.zeros((len(chains), slots, found[0].shape[1]), np.float32)
    mask_CK = np.zeros((len(chains), slots), bool)
    for i, states_KD in enumerate(found):
        states_CKD[i, : len(states_KD)], mask_CK[i, : len(states_KD)] = states_KD, True
    return states_CKD, mask_CK


@functools.partial(jax.jit, static_argnames=("model", "layer"))
def _states(
    model: LlamaModel, params: Params, tokens_BL: Array, ids_BL: Array, boundaries_BK: Array, *, layer: int
) -> Array:
    positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
    _, (states_BLD,) = model.hidden(params, tokens_BL, positions_BL, ids_BL, layers=(layer,))
    return gather_boundaries(states_BLD, boundaries_BK[:, None])[:, 0].astype(jnp.float32)
