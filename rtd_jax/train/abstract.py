"""A recipe's train state, teacher and batch as shapes with shardings. Nothing is allocated."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rtd_jax.base.files import read_json
from rtd_jax.base.sharding import check_rows, row_sharding
from rtd_jax.base.types import Batch, Params, TeacherOutputs, TopK
from rtd_jax.methods.term import Objective, reads_of
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.from_hf import load_config
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.open import make_model, weight_shardings
from rtd_jax.steps.select import soft_of
from rtd_jax.train.optimizer import make_optimizer
from rtd_jax.train.recipe import Recipe
from rtd_jax.train.state import TrainState, create_state, state_shardings
from rtd_jax.train.student import student_config, student_model
from rtd_jax.train.update import TeacherSource, make_train_step

ARCHITECTURES = Path(__file__).resolve().parents[1] / "bundled" / "architectures.json"
MAX_BOUNDARIES = 17  # boundary slots of a chain: 16 steps and the prompt's end. A real run counts them in the data


class Abstract(NamedTuple):
    """A jitted update and the shapes of its arguments."""

    teacher: DecoderModel | None  # None where the teacher's outputs are read from a cache
    teacher_config: DecoderConfig
    student: DecoderModel
    vocab_size: int
    objective: Objective
    state: TrainState
    source: TeacherSource
    batch: Batch | None  # chains of the data; None where all are the student's own
    own: Batch | None  # chains that the student drew
    step: Any  # a jitted TrainStep

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What `step` is called with."""
        own = () if self.own is None else (self.own,)
        return self.state, self.source, self.batch, self.objective.coefficients(), *own

    @property
    def row_sharding(self) -> Any:
        """Where rows lie."""
        return jax.tree.leaves((self.batch, self.own))[0].sharding


def architecture(path: str) -> DecoderConfig:
    """Sizes of a checkpoint, read from its folder if that is here, else looked up by hub name in the bundled table.

    Raises:
      ValueError: neither the folder nor the name is known; names the models of the table.
    """
    if (Path(path).expanduser() / "config.json").is_file():
        return load_config(Path(path).expanduser())
    table = read_json(ARCHITECTURES)
    path = path.partition("@")[0]  # all revisions of a name have its sizes
    if path not in table:
        raise ValueError(
            f"the sizes of {path!r} are not known here; give a folder with its config.json, or one of "
            f"{', '.join(table)}"
        )
    return DecoderConfig.from_hf(table[path])


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
    teacher_sizes = architecture(recipe.teacher.path)
    pretrained = architecture(recipe.student.path) if recipe.student.init == "pretrained" else None
    student_sizes = pretrained or student_config(recipe.student, teacher_sizes)
    teacher = None if recipe.teacher.cache else make_model(recipe.teacher, teacher_sizes, mesh)
    student = student_model(recipe.student, student_sizes, mesh)
    optimizer = make_optimizer(recipe.optimizer, recipe.total_updates)
    vocab_size = min(teacher_sizes.vocab_size, student_sizes.vocab_size)
    objective = recipe.objective(student_sizes, teacher_sizes, vocab_size, mesh)

    def assemble(params: Params) -> TrainState:
        key = jax.random.PRNGKey(recipe.seed)
        maps = objective.init_params(key, student_sizes.width, teacher_sizes.width)
        return create_state({"student": params, **maps}, optimizer, key)

    state = jax.eval_shape(assemble, student.abstract_params())
    shardings = state_shardings(state, optimizer, mesh, objective.param_axes(), recipe.optimizer.offload)
    if teacher is None:
        source = _cached_outputs(recipe, teacher_sizes.width, objective, mesh)
    else:
        weights = teacher.abstract_params(recipe.teacher.param_dtype)
        source = _placed(weights, weight_shardings(recipe.teacher, teacher, mesh))
    step = make_train_step(student, teacher, optimizer, objective, recipe.update, mesh)
    batch = _batch(recipe, mesh, recipe.data_rows, MAX_BOUNDARIES)
    own = _batch(recipe, mesh, recipe.own_rows, 2 * MAX_BOUNDARIES)  # a student that runs on writes more steps
    return Abstract(
        teacher, teacher_sizes, student, vocab_size, objective, _placed(state, shardings), source, batch, own, step
    )


def bytes_on_device(leaf: jax.ShapeDtypeStruct) -> float:
    """Bytes of a device's part of an array, given as a shape with its sharding."""
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * jax.dtypes.itemsize_bits(leaf.dtype) / 8


def _cached_outputs(recipe: Recipe, width: int, objective: Objective, mesh: Mesh) -> TeacherOutputs:
    length, top_k = recipe.data.row_length, recipe.cache.top_k
    rows = recipe.data_rows
    ids, log_probs = (_rows(mesh, dtype, rows, length, top_k) for dtype in (jnp.int32, jnp.float32))
    tail = _rows(mesh, jnp.float32, rows, length)
    dtype = jnp.dtype(recipe.teacher.compute_dtype)
    states = _rows(mesh, dtype, rows, recipe.data.chains_per_row, MAX_BOUNDARIES, width)
    yardstick = () if objective.yardstick is None else (objective.yardstick,)  # validation reads it in any case
    layers = reads_of((*objective.on("data"), *yardstick)).teacher_boundaries
    return TeacherOutputs(None, None, dict.fromkeys(layers, states), {}, TopK(ids, log_probs, tail, tail))


def _batch(recipe: Recipe, mesh: Mesh, rows: int, boundaries: int) -> Batch | None:
    if not rows:
        return None
    length, chains = recipe.data.row_length, recipe.data.chains_per_row
    tokens, weights = (_rows(mesh, dtype, rows, length) for dtype in (jnp.int32, jnp.float32))
    places, mask = (_rows(mesh, dtype, rows, chains, boundaries) for dtype in (jnp.int32, jnp.bool_))
    soft = weights if soft_of(recipe.data.segmentation) else None
    return Batch(tokens, tokens, tokens, weights, places, mask, tokens, soft)


def _rows(mesh: Mesh, dtype: Any, *shape: int) -> Any:
    """An array of rows, as a shape with its sharding."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=row_sharding(mesh))


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
