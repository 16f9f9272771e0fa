"""The student: its sizes, the model, and the weights it starts from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from rtd_jax.base.sharding import row_sharding
from rtd_jax.base.types import Params
from rtd_jax.data.encoding import EncodedChain
from rtd_jax.data.formats import TextFormat
from rtd_jax.models.config import DecoderConfig, layers_to_copy
from rtd_jax.models.from_hf import load_config, load_params, resolve
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.open import OpenModel
from rtd_jax.models.pruning import PRUNED_SIZES, prune_model, pruned_config
from rtd_jax.models.quantization_config import check_storable
from rtd_jax.models.quantized_folders import quantization_of, save_quantized
from rtd_jax.models.schemes import rounded
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.models.weight_files import tensor_files
from rtd_jax.train.recipe import SIZES, StudentSettings

Chain = TypeVar("Chain")
FOLDER, FLOAT_FOLDER = "student", "student_float"  # in a run's folder


def student_config(student: StudentSettings, teacher: DecoderConfig) -> DecoderConfig:
    """The student's sizes: its checkpoint's, the teacher's with fewer layers or pruned, or the settings' own.

    Raises:
      ValueError: the checkpoint cannot be used, or the settings ask for more than the teacher has.
    """
    if student.init == "pretrained":
        return load_config(resolve(student.path))
    if student.init == "teacher_layers":
        if not 1 <= student.layers <= teacher.layers:
            raise ValueError(f"student.layers is {student.layers}; the teacher has {teacher.layers} to take them from")
        return teacher.of_layers(layers_to_copy(teacher.layers, student.layers))
    if student.init == "pruned":
        try:
            return pruned_config(teacher, student.share, **{name: getattr(student, name) for name in PRUNED_SIZES})
        except ValueError as error:
            raise ValueError(f"student.{error}") from error
    sizes = {name: getattr(student, name) for name in SIZES}
    if teacher.layers_differ and sizes["layers"] > teacher.layers:
        raise ValueError(
            f"student.layers is {sizes['layers']}, more than the teacher's {teacher.layers}, whose layers differ "
            "(rotary embedding, sliding window); give at most as many"
        )
    if sizes["layers"] > 0:
        few = sizes["layers"] <= teacher.layers
        teacher = teacher.of_layers(layers_to_copy(teacher.layers, sizes["layers"]) if few else (0,) * sizes["layers"])
    config = replace(teacher, **sizes)
    try:
        config.check_readable()
    except ValueError as error:
        raise ValueError(f"student.{error}") from error
    return config


def student_model(settings: StudentSettings, config: DecoderConfig, mesh: Mesh) -> DecoderModel:
    """The student without its weights. Raises ValueError where it cannot be quantised as the settings say."""
    scheme = settings.scheme
    if scheme is not None:
        try:
            scheme.check(config)
            check_storable(scheme, config)
        except ValueError as error:
            raise ValueError(f"student.quantization={settings.quantization!r}: {error}") from error
    return DecoderModel(
        config,
        settings.compute_dtype,
        settings.remat,
        activation_sharding=row_sharding(mesh),
        attention=settings.attention,
        quantization=scheme,
    )


def check_weights(student: StudentSettings, teacher: OpenModel) -> None:
    """Raises ValueError where a student is to be pruned, but there are no weights of the teacher to prune; or where it
    is to be trained through the rounding from weights that are rounded already, and would be rounded twice.
    """
    if student.init == "pretrained" and student.scheme is not None:
        folder = resolve(student.path)
        if (found := quantization_of(folder)) is not None:
            raise ValueError(
                f"student.path {folder} is quantised ({found.name}), and rounded again its weights would shrink; give "
                f"the floats that it was made from, of a run {FLOAT_FOLDER}/ beside it"
            )
    if student.init == "pruned":
        try:
            tensor_files(teacher.directory)
        except ValueError as error:
            raise ValueError(
                f"student.init is 'pruned', for which the teacher's weights are read even where its outputs come from "
                f"a cache or a server: {error}. Give a teacher.path with weights, or another student.init"
            ) from error


def initial_student(
    settings: StudentSettings,
    student: DecoderModel,
    teacher: OpenModel,
    key: jax.Array,
    shardings: Params,
    chains: Sequence[EncodedChain],
) -> tuple[Params, np.ndarray | None]:
    """The weights that training starts from, float32: a checkpoint's, the teacher's own or pruned, or random ones.

    Args:
      chains: of the training data, for the importance of what is pruned.

    Returns:
      (params, kept_S): the teacher's hidden unit that each of the student's was, int32 [S], or None but where it is
      pruned.
    """
    if settings.init == "pretrained":
        return load_params(resolve(settings.path), student.config, dtype="float32", shardings=shardings), None
    if settings.init == "teacher_layers":
        # From the files, not from the params in memory, which may be rounded.
        chosen = layers_to_copy(teacher.config.layers, settings.layers)
        params = load_params(teacher.directory, teacher.config, dtype="float32", shardings=shardings, layers=chosen)
        return params, None
    if settings.init == "pruned":
        chosen_chains = evenly_spaced(chains, settings.calibration_chains)
        teacher.note(f"pruning the teacher to the student's sizes, by importance on {len(chosen_chains)} chains")
        # Every process does the same on one of its devices, so that the choice does not depend on the mesh. The device
        # holds the whole teacher in float32 for that time.
        whole = load_params(teacher.directory, teacher.config, dtype="float32")
        _, params, kept = prune_model(DecoderModel(teacher.config), whole, chosen_chains, student.config)
        return jax.tree.map(_placed, jax.device_get(params), shardings), kept.units_S.astype(np.int32)
    return jax.jit(student.init, out_shardings=shardings)(key), None


def evenly_spaced(chains: Sequence[Chain], count: int) -> list[Chain]:
    """`count` of the chains at equal distances, which may lie in order of depth; all of them if there are no more."""
    count = min(count, len(chains))
    return [chains[i * len(chains) // count] for i in range(count)]


def _placed(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def student_folders(settings: StudentSettings) -> tuple[str, ...]:
    """The folders that `save_student` writes."""
    return (FOLDER,) if settings.scheme is None else (FOLDER, FLOAT_FOLDER)


def save_student(
    workdir: Path, student: DecoderModel, params: Params, tokenizer: PreTrainedTokenizerBase, text: TextFormat
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
