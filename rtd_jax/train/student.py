"""The student: its sizes, the model, and the weights it starts from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from rtd_jax.base.files import json_digest
from rtd_jax.base.hub import HubName, hub_name
from rtd_jax.base.sharding import row_sharding
from rtd_jax.base.types import Params
from rtd_jax.data.encoding import EncodedChain
from rtd_jax.data.formats import TextFormat, stop_token_ids
from rtd_jax.models.adapter_folders import save_adapter
from rtd_jax.models.adapters import base_as_float, frozen, has_adapter, init_adapter, merged
from rtd_jax.models.config import DecoderConfig, as_ids, layers_to_copy
from rtd_jax.models.from_hf import load_config, load_params, resolve
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.open import OpenModel
from rtd_jax.models.pruning import PRUNED_SIZES, prune_model, pruned_config
from rtd_jax.models.quantization_config import check_storable
from rtd_jax.models.quantized import ROUNDED
from rtd_jax.models.quantized_folders import quantization_of, save_quantized
from rtd_jax.models.schemes import rounded
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.models.weight_files import tensor_files
from rtd_jax.models.weights import ADAPTER, BASE
from rtd_jax.train.array_digests import array_digests
from rtd_jax.train.recipe import SIZES, StudentSettings

Chain = TypeVar("Chain")
FOLDER, FLOAT_FOLDER = "student", "student_float"  # in a run's folder
ADAPTER_FOLDER, BASE_FOLDER = "student_adapter", "student_base"  # likewise, of a student with an adapter


def start_folder(student: StudentSettings) -> Path:
    """The folder of the model that a "pretrained" student starts from. Raises ValueError where there is none."""
    try:
        return resolve(student.path, student.revision)
    except ValueError as error:
        raise ValueError(f"student.path: {error}") from error


def student_config(student: StudentSettings, teacher: DecoderConfig) -> DecoderConfig:
    """The student's sizes: its checkpoint's, the teacher's with fewer layers or pruned, or the settings' own.

    Raises:
      ValueError: the checkpoint cannot be used, or the settings ask for more than the teacher has.
    """
    if student.init == "pretrained":
        return load_config(start_folder(student))
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
    """The student without its weights.

    Raises:
      ValueError: it cannot be quantised as the settings say, or its matrices are too small for the adapter's rank.
    """
    scheme, adapter = settings.scheme, settings.adapter if settings.adapter.rank else None
    if adapter is not None:
        try:
            adapter.check(config)
        except ValueError as error:
            raise ValueError(f"student.{error}") from error
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
        adapter=adapter,
    )


def check_weights(student: StudentSettings, teacher: OpenModel) -> None:
    """Raises ValueError where a student is to be pruned, but there are no weights of the teacher to prune; or where its
    weights are to be rounded, in training or under an adapter, but are rounded already, and would be rounded twice.
    """
    if student.init == "pretrained" and (student.scheme is not None or student.frozen_dtype in ROUNDED):
        folder = start_folder(student)
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

    With an adapter these are frozen, in `adapter.base_dtype`, and the adapter beside them begins without effect.

    Args:
      chains: of the training data, for the importance of what is pruned.

    Returns:
      (params, kept_S): the teacher's hidden unit that each of the student's was, int32 [S], or None but where it is
      pruned.
    """
    if student.adapter is not None:
        base, kept_S = _first_weights(settings, student.config, teacher, shardings[BASE], chains)
        adapter = jax.jit(init_adapter, static_argnums=(0, 1), out_shardings=shardings[ADAPTER])
        return {BASE: base, ADAPTER: adapter(student.adapter, student.config, key)}, kept_S
    if settings.init == "random":
        return jax.jit(student.init, out_shardings=shardings)(key), None
    return _first_weights(settings, student.config, teacher, shardings, chains)


def _first_weights(
    settings: StudentSettings,
    config: DecoderConfig,
    teacher: OpenModel,
    shardings: Params,
    chains: Sequence[EncodedChain],
) -> tuple[Params, np.ndarray | None]:
    """Weights that are not random, in `settings.frozen_dtype`, and `initial_student`'s `kept_S`."""
    if settings.init == "pruned":
        chosen_chains = evenly_spaced(chains, settings.calibration_chains)
        teacher.note(f"pruning the teacher to the student's sizes, by importance on {len(chosen_chains)} chains")
        # Every process does the same on one of its devices, so that the choice does not depend on the mesh. The device
        # holds the whole teacher in float32 for that time.
        whole = load_params(teacher.directory, teacher.config, dtype="float32")
        _, params, kept = prune_model(DecoderModel(teacher.config), whole, chosen_chains, config)
        if settings.frozen_dtype != "float32":
            params = jax.jit(frozen, static_argnums=1)(params, settings.frozen_dtype)
        return jax.tree.map(_placed, jax.device_get(params), shardings), kept.units_S.astype(np.int32)
    return read_weights(settings, teacher, shardings), None


def read_weights(settings: StudentSettings, teacher: OpenModel, shardings: Params) -> Params:
    """The weights that training starts from where they are in files: a checkpoint's, or layers of the teacher.

    Raises:
      ValueError: they cannot be read, or `init` is another.
    """
    if settings.init == "pretrained":
        folder = start_folder(settings)
        return load_params(folder, load_config(folder), dtype=settings.frozen_dtype, shardings=shardings)
    if settings.init != "teacher_layers":
        raise ValueError(f"student.init is {settings.init!r}, so the weights that it began with are in no file")
    # From the files, not from the params in memory, which may be rounded.
    layers = layers_to_copy(teacher.config.layers, settings.layers)
    return load_params(
        teacher.directory, teacher.config, dtype=settings.frozen_dtype, shardings=shardings, layers=layers
    )


def frozen_fingerprint(params: Params) -> str:
    """Of a student's params: a digest of every frozen array, equal on every mesh; "" where none is frozen.

    All processes must call it.
    """
    return json_digest(array_digests(params[BASE])) if has_adapter(params) else ""


def evenly_spaced(chains: Sequence[Chain], count: int) -> list[Chain]:
    """`count` of the chains at equal distances, which may lie in order of depth; all of them if there are no more."""
    count = min(count, len(chains))
    return [chains[i * len(chains) // count] for i in range(count)]


def _placed(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def student_folders(settings: StudentSettings) -> tuple[str, ...]:
    """The folders that `save_student` writes."""
    if settings.adapter.rank:
        return (FOLDER, ADAPTER_FOLDER) if settings.init == "pretrained" else (FOLDER, ADAPTER_FOLDER, BASE_FOLDER)
    return (FOLDER,) if settings.scheme is None else (FOLDER, FLOAT_FOLDER)


def save_student(
    workdir: Path,
    settings: StudentSettings,
    student: DecoderModel,
    params: Params,
    tokenizer: PreTrainedTokenizerBase,
    text: TextFormat,
) -> None:
    """Writes what a run has trained as a Hugging Face folder, as it computes.

    A student that was trained through rounded matrices is written rounded, bit by bit what its loss saw; the floats
    that the optimizer moved are in a folder of their own, to be trained on or rounded otherwise. One with an adapter is
    written merged, and its adapter in a folder of `peft`; where the weights under it are in no folder, such as layers
    of the teacher, they are written too, as floats.

    The token with which its chains end is among the eos_token_id of its config.json, so that other programs stop there.

    Raises:
      ValueError, OSError: as `save_pretrained`.
    """
    scheme, config = student.quantization, ending_with(student.config, stop_token_ids(tokenizer, text)[0])
    if student.adapter is not None:
        whole = merged(params, student.adapter, "float32")
        save_pretrained(workdir / FOLDER, config, whole, tokenizer=tokenizer, text=text)
        del whole
        path, base = Path(settings.path).expanduser(), hub_name(settings.path, settings.revision)
        if settings.init != "pretrained":
            base = HubName(str((workdir / BASE_FOLDER).resolve()), "")
            floats = jax.jit(base_as_float, static_argnums=1)(params, "float32")
            save_pretrained(base.name, config, floats, tokenizer=tokenizer, text=text)
        elif path.is_dir() or base is None:
            base = HubName(str(path.resolve()), "")
        save_adapter(workdir / ADAPTER_FOLDER, config, params[ADAPTER], student.adapter, *base)
        return
    if scheme is None:
        save_pretrained(workdir / FOLDER, config, params, tokenizer=tokenizer, text=text)
        return
    save_pretrained(workdir / FLOAT_FOLDER, config, params, tokenizer=tokenizer, text=text)
    matrices = jax.jit(rounded, static_argnums=1)(params, scheme)
    save_quantized(workdir / FOLDER, config, matrices, scheme, tokenizer=tokenizer, text=text)


def ending_with(config: DecoderConfig, token: int) -> DecoderConfig:
    """The config, with a token among those that end a generation."""
    known = as_ids(config.eos_token_id)
    if token in known:
        return config
    return replace(config, eos_token_id=(*known, token) if known else token)
