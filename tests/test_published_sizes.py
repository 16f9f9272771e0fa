"""The published recipe at its published sizes: the step is traced with abstract weights, none of which is allocated."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from rtd_jax.base.settings import build
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.base.types import Batch
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel
from rtd_jax.train.optimizer import make_optimizer
from rtd_jax.train.recipe import Recipe
from rtd_jax.train.state import create_state, state_shardings
from rtd_jax.train.update import make_train_step

LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
}
SIZES = {  # config.json of the three checkpoints
    "70b": {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "8b": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
}
PARAMETERS = {"70b": 70_553_706_496, "8b": 8_030_261_248, "1b": 1_235_814_400}  # as the model cards count them


@pytest.mark.parametrize(
    ("recipe_name", "student_size"), [("rtd_8b", "8b"), ("rtd_recommended_8b", "8b"), ("rtd_1b", "1b")]
)
def test_the_published_step_traces_at_full_size(recipe_name, student_size):
    recipe = build(Recipe, importlib.import_module(f"configs.{recipe_name}").get_config().to_dict())
    teacher, student = (
        DecoderModel(DecoderConfig.from_hf(LLAMA3 | SIZES[size]), settings.compute_dtype)
        for size, settings in (("70b", recipe.teacher), (student_size, recipe.student))
    )
    teacher_params = teacher.abstract_params("bfloat16")
    mesh = make_mesh(MeshSettings())
    optimizer = make_optimizer(recipe.optimizer, recipe.total_updates)
    key = jax.random.PRNGKey(0)
    widths = (student.config.width, teacher.config.width)
    objective = recipe.objective(student.config, teacher.config, vocab_size=128_256)
    state = jax.eval_shape(
        lambda p: create_state({"student": p, **objective.init_params(key, *widths)}, optimizer, key),
        student.abstract_params(),
    )
    for params, size in ((teacher_params, "70b"), (state.params["student"], student_size)):
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[size]

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
