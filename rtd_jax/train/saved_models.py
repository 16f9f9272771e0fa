"""Loads any saved model by one string: a Hugging Face folder, a hub name, or a stage checkpoint of a run."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from rtd_jax.base.hub import model_name
from rtd_jax.base.settings import build
from rtd_jax.base.sharding import MeshSettings, make_mesh, param_shardings, row_sharding
from rtd_jax.base.types import Params, StepState
from rtd_jax.data.formats import TextFormat
from rtd_jax.methods.maps import last_map, state_map, transition_map
from rtd_jax.methods.term import Setup
from rtd_jax.models.fingerprint import weights_fingerprint
from rtd_jax.models.from_hf import resolve
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.open import FloatDtype, ModelSettings, OpenModel, WeightDtype, open_model
from rtd_jax.models.quantized import INT8, quantize_params
from rtd_jax.models.text_record import read_text_format
from rtd_jax.models.weight_files import weight_files
from rtd_jax.models.weights import ADAPTER, BASE, logical_axes
from rtd_jax.train.checkpoints import numbered, read_meta, restore_params
from rtd_jax.train.recipe import Recipe
from rtd_jax.train.state import without_base
from rtd_jax.train.student import FOLDER, frozen_fingerprint, read_weights, student_config


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that is ready to run, and what a stage checkpoint holds besides its weights.

    Attributes:
      name: for reports.
      params: empty where they were not asked for.
      directory: the Hugging Face folder or the stage checkpoint.
      text: the form of text that it was trained on; None where its folder does not say.
      f, g: the run's maps for states and for transitions, [S, D]; the identity where it has none. Unset for a Hugging
        Face folder, as are the attributes below.
      layers: the (student, teacher) layers that the maps join; the last pair, where a run has several.
      step_state: of which tokens the states are made that the maps join.
      teacher_fingerprint: of the run's teacher.
    """

    name: str
    model: DecoderModel
    params: Params
    tokenizer: PreTrainedTokenizerBase
    mesh: Mesh
    directory: Path
    text: TextFormat | None = None
    f: np.ndarray | None = None
    g: np.ndarray | None = None
    layers: tuple[int, int] | None = None
    step_state: StepState = "end"
    teacher_fingerprint: str = ""

    def fingerprint(self) -> str:
        """The fingerprint of the weights' files; "" for a stage checkpoint."""
        return "" if self.layers is not None else self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return weights_fingerprint(self.directory)


def load_model(
    path: str, dtype: WeightDtype = "float32", compute_dtype: FloatDtype = "float32", *, weights: bool = True
) -> LoadedModel:
    """Loads a model over all devices of this process.

    Args:
      path: a Hugging Face folder, a hub name (or NAME@REVISION), a stage checkpoint
        (runs/rtd_tiny/checkpoints/stages/5), or a run's folder, for its newest stage.
      dtype: of the weights in memory; "int8" quantises them with one scale per output channel.
      compute_dtype: of matrix products and hidden states.
      weights: False leaves `params` empty, for a teacher whose states are read from a cache.

    Raises:
      ValueError: there is no model of that name, its family is not supported, or it is a checkpoint whose teacher is
        gone; or a stage checkpoint is asked for without weights: a cache belongs to a Hugging Face folder.
    """
    mesh, stage = make_mesh(MeshSettings()), stage_checkpoint(path)
    if stage is not None and not weights:
        raise ValueError(f"{path} is a run's checkpoint, of which there is no teacher cache; give the teacher's folder")
    if stage is not None:
        loaded = _load_stage(stage, dtype, compute_dtype, mesh)
    else:
        opened = open_model(ModelSettings(path, dtype, compute_dtype), mesh, lambda _: None)
        tokenizer, directory = opened.tokenizer, opened.directory  # before the weights, which take longer
        text, params = read_text_format(directory), opened.params if weights else {}
        loaded = LoadedModel(model_name(directory), opened.model, params, tokenizer, mesh, directory, text)
    return loaded if dtype == "float32" else replace(loaded, name=f"{loaded.name} ({dtype})")


def check_model(path: str) -> None:
    """Tries what can be tried of a model without its weights: whether its files are there, its config, its tokenizer.

    Raises:
      ValueError: as `load_model`, which reads the weights too.
    """
    if stage_checkpoint(path) is None:
        opened = open_model(ModelSettings(path), make_mesh(MeshSettings()), lambda _: None)
        weight_files(opened.directory)
        _ = opened.tokenizer


def trained_text(path: str) -> TextFormat | None:
    """The form of text that the model at `path` (as in `load_model`) was trained on; None where nothing says it.

    Raises:
      ValueError: there is no model of that name, or what says it is damaged.
    """
    stage = stage_checkpoint(path)
    if stage is None:
        return read_text_format(resolve(path))
    return trained_recipe(stage).data.text


def trained_recipe(stage: Path) -> Recipe:
    """The recipe of the run that a stage checkpoint is of. Raises ValueError where it is not a distillation's."""
    try:
        return build(Recipe, read_meta(stage)["settings"], "settings")
    except ValueError as error:
        raise ValueError(f"{stage} is no checkpoint of a distillation that this version reads: {error}") from error


def stage_checkpoint(path: str) -> Path | None:
    """The stage checkpoint that a path names: itself, or a run's newest; None for anything else."""
    folder = Path(path).expanduser()
    if (folder / "meta").is_dir() and (folder / "state").is_dir():
        return folder.absolute()
    stages = numbered(folder / "checkpoints" / "stages")
    return stages[-1].absolute() if stages else None


def _load_stage(path: Path, dtype: WeightDtype, compute_dtype: FloatDtype, mesh: Mesh) -> LoadedModel:
    meta, recipe = read_meta(path), trained_recipe(path)
    try:
        teacher = open_model(recipe.teacher, mesh)
        config = student_config(recipe.student, teacher.config)
    except ValueError as error:
        raise ValueError(
            f"{path} was trained with models that are not where they were ({error}). A finished run has its student as "
            f"a Hugging Face folder too: give {path.parents[2] / 'student'}"
        ) from error
    adapter = recipe.student.adapter if recipe.student.adapter.rank else None
    model = DecoderModel(config, compute_dtype, activation_sharding=row_sharding(mesh), adapter=adapter)
    objective = recipe.objective(config, teacher.config, config.vocab_size)
    learned = jax.eval_shape(lambda: objective.init_params(jax.random.key(0), config.width, teacher.config.width))
    abstract: Params = {"student": model.abstract_params(), **learned}
    axes = {"student": logical_axes(abstract["student"]), **objective.param_axes()}
    shardings = param_shardings(abstract, axes, mesh)
    restored = restore_params(path, without_base(abstract), without_base(shardings))
    if adapter is not None:
        restored["student"] |= {BASE: _frozen_base(path, meta, recipe, teacher, shardings["student"][BASE])}
    model, params = replace(model, quantization=recipe.student.scheme).deployed(restored["student"])
    if dtype == INT8:
        params = jax.jit(quantize_params)(params)
    elif dtype != "float32":
        params = jax.tree.map(lambda x: x.astype(dtype), params)
    maps = last_map(state_map(restored)), last_map(transition_map(restored))
    f, g = (np.eye(config.width) if x is None else np.asarray(x) for x in maps)
    return LoadedModel(
        name=f"{path.parents[2].name}, stage {path.name}",
        model=model,
        params=params,
        tokenizer=teacher.tokenizer,
        mesh=mesh,
        directory=path,
        text=recipe.data.text,
        f=f,
        g=g,
        layers=recipe.loss.matched_layers(Setup(config, teacher.config, config.vocab_size))[-1],
        step_state=recipe.loss.step_state,
        teacher_fingerprint=meta["fingerprints"].get("teacher", ""),
    )


def _frozen_base(path: Path, meta: dict[str, Any], recipe: Recipe, teacher: OpenModel, shardings: Params) -> Params:
    """The weights under the adapter of a checkpoint. Raises ValueError where they are not those that it was made on."""
    way_out = f"give the run's student as a Hugging Face folder, {path.parents[2] / FOLDER}"
    try:
        base = read_weights(recipe.student, teacher, shardings)
    except ValueError as error:
        raise ValueError(f"{path} holds an adapter without the weights under it: {error}; {way_out}") from error
    before, now = str(meta["fingerprints"].get("frozen_base", "")), frozen_fingerprint({BASE: base, ADAPTER: {}})
    if before != now:
        raise ValueError(
            f"{path} was made with another frozen base (fingerprint {before[:12]}, now {now[:12]}); restore it, or "
            f"{way_out}"
        )
    return base
