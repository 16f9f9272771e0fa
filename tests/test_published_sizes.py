"""The published recipe at its published sizes: the step is traced with abstract weights, none of which is allocated."""

import importlib
import json

import jax
import jax.numpy as jnp
import pytest

from rtd_jax.base.settings import build
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.base.types import Batch
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel
from rtd_jax.train.abstract import ARCHITECTURES
from rtd_jax.train.optimizer import make_optimizer
from rtd_jax.train.recipe import Recipe
from rtd_jax.train.state import create_state, state_shardings
from rtd_jax.train.update import make_train_step

# Parameters of the recipes' models, as their cards count them.
PARAMETERS = {
    "meta-llama/Meta-Llama-3-70B-Instruct": 70_553_706_496,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
}


@pytest.mark.parametrize("recipe_name", ["rtd_8b", "rtd_recommended_8b", "rtd_1b", "rtd_qwen3", "rtd_qwen2_5"])
def test_the_published_step_traces_at_full_size(recipe_name):
    recipe = build(Recipe, importlib.import_module(f"configs.{recipe_name}").get_config().to_dict())
    known = json.loads(ARCHITECTURES.read_text())
    teacher, student = (
        DecoderModel(DecoderConfig.from_hf(known[settings.path]), settings.compute_dtype)
        for settings in (recipe.teacher, recipe.student)
    )
    teacher_params = teacher.abstract_params("bfloat16")
    mesh = make_mesh(MeshSettings())
    optimizer = make_optimizer(recipe.optimizer, recipe.total_updates)
    key = jax.random.PRNGKey(0)
    widths = (student.config.width, teacher.config.width)
    objective = recipe.objective(student.config, teacher.config, vocab_size=teacher.config.vocab_size)
    state = jax.eval_shape(
        lambda p: create_state({"student": p, **objective.init_params(key, *widths)}, optimizer, key),
        student.abstract_params(),
    )
    for params, settings in ((teacher_params, recipe.teacher), (state.params["student"], recipe.student)):
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[settings.path]

    # Every big array of the state is spread over the 8 devices.
    shardings = state_shardings(state, optimizer, mesh, objective.param_axes())
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        if leaf.size > 10**6:
            assert sharding.shard_shape(leaf.shape) != leaf.shape

    rows, length, chains, boundaries = recipe.batch_size, recipe.data.row_length, recipe.data.chains_per_row, 9
    assert (rows, recipe.total_updates) == (64, 40_000)
    ints = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = Batch(
        ints,
        ints,
        ints,
        jax.ShapeDtypeStruct((rows, length), jnp.float32),
        jax.ShapeDtypeStruct((rows, chains, boundaries), jnp.int32),
        jax.ShapeDtypeStruct((rows, chains, boundaries), jnp.bool_),
    )
    step = make_train_step(student, teacher, optimizer, objective, recipe.update)
    new_state, metrics = jax.eval_shape(step, state, teacher_params, batch, objective.coefficients())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["distill/coherence"].sum.shape == ()


def test_the_published_numbers():
    recipe = build(Recipe, importlib.import_module("configs.rtd_8b").get_config().to_dict())
    loss, optimizer = recipe.loss, recipe.optimizer
    assert (loss.temperature, loss.alpha, loss.alignment_weight, loss.coherence_weight) == (4.0, 0.7, 0.3, 0.5)
    assert (optimizer.learning_rate, recipe.total_updates, recipe.batch_size) == (2e-5, 40_000, 64)
    assert recipe.curriculum.depths == (1, 2, 3, 4, 5)
    assert (recipe.teacher.path, recipe.student.path) == (
        "meta-llama/Meta-Llama-3-70B-Instruct",
        "meta-llama/Meta-Llama-3-8B-Instruct",
    )
