"""A recipe's train state, teacher and batch as shapes with shardings. Nothing is allocated."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rtd_jax.base.files import read_json
from rtd_jax.base.sharding import check_rows, row_sharding
from rtd_jax.base.types import Batch, Params, TeacherOutputs, TopK
from rtd_jax.methods.term import Objective, reads_of
from rtd_jax.models.config import LlamaConfig
from rtd_jax.models.from_hf import load_config
from rtd_jax.models.model import LlamaModel
from rtd_jax.models.open import make_model, weight_shardings
from rtd_jax.train.optimizer import make_optimizer
from rtd_jax.train.recipe import Recipe
from rtd_jax.train.state import TrainState, create_state, state_shardings
from rtd_jax.train.student import student_config, student_model
from rtd_jax.train.update import TeacherSource, make_train_step

ARCHITECTURES = Path(__file__).resolve().parents[2] / "bundled" / "architectures.json"
MAX_BOUNDARIES = 17  # boundary slots of a chain: 16 steps and the prompt's end. A real run counts them in the data


class Abstract(NamedTuple):
    """A jitted update and the shapes of its arguments."""

    teacher: LlamaModel | None  # None where the teacher's outputs are read from a cache
    teacher_config: LlamaConfig
    student: LlamaModel
    vocab_size: int
    objective: Objective
    state: TrainState
    source: TeacherSource
    batch: Batch
    step: Any  # a jitted TrainStep


def architecture(path: str) -> LlamaConfig:
    """Sizes of a checkpoint, read from its folder if that is here, else looked up by hub name in the bundled table.

    Raises:
      ValueError: neither the folder nor the name is known; names the models of the table.
    """
    if (Path(path).expanduser() / "config.json").is_file():
        return load_config(Path(path).expanduser())
    table = read_json(ARCHITECTURES)
    if path not in table:
        raise ValueError(
            f"the sizes of {path!r} are not known here; give a folder with its config.json, or one of "
            f"{', '.join(table)}"
        )
    return LlamaConfig.from_hf(table[path], path)


def abstract_step(recipe: Recipe, mesh: Mesh) -> Abstract:
    """The update that `launch/train.py` would run on this mesh, with its arguments as shapes.

    With `teacher.cache` it is the update that takes the teacher's outputs; the cache's folder need not exist.

    Raises:
      ValueError: the models' sizes are not known, or the mesh does not divide the rows.
    """
    if recipe.loss.reward_weight:
        raise ValueError(
            "plans do not cover loss.reward_weight: drawing and scoring the student's own chains is not in them; plan "
            "the KD part with loss.reward_weight=0"
        )
    check_rows(recipe.batch_size, mesh, recipe.micro_batches)
    of_teacher = architecture(recipe.teacher.path)
    pretrained = architecture(recipe.student.path) if recipe.student.init == "pretrained" else None
    of_student = pretrained or student_config(recipe.student, of_teacher)
    teacher = None if recipe.teacher.cache else make_model(recipe.teacher, of_teacher, mesh)
    student = student_model(recipe.student, of_student, mesh)
    optimizer = make_optimizer(recipe.optimizer, recipe.total_updates)
    vocab_size = min(of_teacher.vocab_size, of_student.vocab_size)
    objective = recipe.objective(of_student, of_teacher, vocab_size, mesh)
    return Abstract(
        teacher,
        of_teacher,
        student,
        vocab_size,
        objective,
        _state(recipe, student, of_teacher, objective, optimizer, mesh),
        _source(recipe, teacher, of_teacher, objective, mesh),
        _batch(recipe, mesh),
        make_train_step(student, teacher, optimizer, objective, recipe.update, mesh),
    )


def _source(
    recipe: Recipe, teacher: LlamaModel | None, config: LlamaConfig, objective: Objective, mesh: Mesh
) -> TeacherSource:
    if teacher is not None:
        shardings = weight_shardings(recipe.teacher, teacher, mesh)
        return _placed(teacher.abstract_params(recipe.teacher.param_dtype), shardings)
    rows, length, chains = recipe.batch_size, recipe.data.row_length, recipe.data.chains_per_row
    top_k = TopK(
        jax.ShapeDtypeStruct((rows, length, recipe.cache.top_k), jnp.int32),  # type: ignore[arg-type]  # only shapes
        jax.ShapeDtypeStruct((rows, length, recipe.cache.top_k), jnp.float32),  # type: ignore[arg-type]
        *[jax.ShapeDtypeStruct((rows, length), jnp.float32)] * 2,  # type: ignore[arg-type]
    )
    states = jax.ShapeDtypeStruct((rows, chains, MAX_BOUNDARIES, config.width), jnp.dtype(recipe.teacher.compute_dtype))
    layers = reads_of(objective.on("data")).teacher_boundaries
    outputs = TeacherOutputs(None, None, dict.fromkeys(layers, states), {}, top_k)  # type: ignore[arg-type]
    return _placed(outputs, jax.tree.map(lambda _: row_sharding(mesh), outputs))


def _state(
    recipe: Recipe,
    student: LlamaModel,
    of_teacher: LlamaConfig,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    def assemble(params: Params) -> TrainState:
        key = jax.random.PRNGKey(recipe.seed)
        maps = objective.init_params(key, student.config.width, of_teacher.width)
        return create_state({"student": params, **maps}, optimizer, key)

    state = jax.eval_shape(assemble, student.abstract_params())
    return _placed(state, state_shardings(state, optimizer, mesh, objective.param_axes(), recipe.optimizer.offload))


def _batch(recipe: Recipe, mesh: Mesh) -> Batch:
    rows, length, chains = recipe.batch_size, recipe.data.row_length, recipe.data.chains_per_row
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    boundaries = [jax.ShapeDtypeStruct((rows, chains, MAX_BOUNDARIES), dtype) for dtype in (jnp.int32, jnp.bool_)]
    weights = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    batch: Any = Batch._make([tokens, tokens, tokens, weights, *boundaries])
    return _placed(batch, jax.tree.map(lambda _: row_sharding(mesh), batch))


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
