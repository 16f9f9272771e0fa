"""The student: its sizes, the model, and the weights it starts from."""

from dataclasses import replace

import jax
from jax.sharding import Mesh

from rtd_jax.base.sharding import row_sharding
from rtd_jax.base.types import Params
from rtd_jax.models.config import LlamaConfig, layers_to_copy
from rtd_jax.models.from_hf import load_config, load_params, resolve
from rtd_jax.models.model import LlamaModel
from rtd_jax.models.open import OpenModel
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
