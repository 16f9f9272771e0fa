"""The student: its sizes, the model, and the weights it starts from."""

from dataclasses import replace
from pathlib import Path

import jax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from rtd_jax.base.sharding import row_sharding
from rtd_jax.base.types import Params
from rtd_jax.data.formats import TextFormat
from rtd_jax.models.config import LlamaConfig, layers_to_copy
from rtd_jax.models.from_hf import load_config, load_params, resolve
from rtd_jax.models.model import LlamaModel
from rtd_jax.models.open import OpenModel
from rtd_jax.models.quantized_folders import save_quantized
from rtd_jax.models.quantized_tensors import check_storable
from rtd_jax.models.schemes import rounded
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.train.recipe import SIZES, StudentSettings


def student_config(student: StudentSettings, teacher: LlamaConfig) -> LlamaConfig:
    """The student's sizes: its checkpoint's, the teacher's with fewer layers, or the settings' own.

    Raises:
      ValueError: the checkpoint cannot be used, or the settings ask for more layers than the teacher has.
    """
    if student.init == "pretrained":
        return load_config(resolve(student.path))
    if student.init == "teacher_layers":
        if not 1 <= student.layers <= teacher.layers:
            raise ValueError(f"student.layers is {student.layers}; the teacher has {teacher.layers} to take them from")
        return replace(teacher, layers=student.layers)
    return replace(teacher, **{name: getattr(student, name) for name in SIZES})


def student_model(settings: StudentSettings, config: LlamaConfig, mesh: Mesh) -> LlamaModel:
    """The student without its weights. Raises ValueError where it cannot be quantised as the settings say."""
    scheme = settings.scheme
    if scheme is not None:
        try:
            scheme.check(config)
            check_storable(scheme, config)
        except ValueError as error:
            raise ValueError(f"student.{error}") from error
    return LlamaModel(
        config,
        settings.compute_dtype,
        settings.remat,
        activation_sharding=row_sharding(mesh),
        attention=settings.attention,
        quantization=scheme,
    )


def initial_student(
    settings: StudentSettings, student: LlamaModel, teacher: OpenModel, key: jax.Array, shardings: Params
) -> Params:
    """The weights that training starts from, float32: a checkpoint's, the teacher's own layers, or random ones."""
    if settings.init == "pretrained":
        return load_params(resolve(settings.path), student.config, dtype="float32", shardings=shardings)
    if settings.init == "teacher_layers":
        # From the files, not from the params in memory, which may be rounded.
        chosen = layers_to_copy(teacher.config.layers, settings.layers)
        return load_params(teacher.directory, teacher.config, dtype="float32", shardings=shardings, layers=chosen)
    return jax.jit(student.init, out_shardings=shardings)(key)


FOLDER, FLOAT_FOLDER = "student", "student_float"  # in a run's folder


def save_student(
    workdir: Path, student: LlamaModel, params: Params, tokenizer: PreTrainedTokenizerBase, text: TextFormat
) -> None:
    """Writes what a run has trained as a Hugging Face folder, as it computes.

    A student that was trained through rounded matrices is written rounded, bit by bit what its loss saw; the floats
    that the optimizer moved are in a folder of their own, to be trained on or rounded otherwise.

    Raises:
      ValueError, OSError: as `save_pretrained`.
    """
    scheme = student.quantization
    if scheme is None:
        save_pretrained(workdir / FOLDER, student.config, params, tokenizer=tokenizer, text=text)
        return
    save_pretrained(workdir / FLOAT_FOLDER, student.config, params, tokenizer=tokenizer, text=text)
    matrices = jax.jit(rounded, static_argnums=1)(params, scheme)
    save_quantized(workdir / FOLDER, student.config, matrices, scheme, tokenizer=tokenizer, text=text)
