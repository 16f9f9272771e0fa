"""The state of a step: of which tokens it is made, in which layers it is matched, and through which maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtd_jax.base.boundaries import step_states
from rtd_jax.base.types import Batch, StudentOutputs, TeacherOutputs
from rtd_jax.losses import alignment, coherence, mean_states
from rtd_jax.methods import LossSettings
from rtd_jax.methods.look_ahead import LookAhead
from rtd_jax.methods.term import Outputs, Reads, Setup, reads_of
from rtd_jax.models.config import DecoderConfig

STUDENT = DecoderConfig(vocab_size=32, width=8, mlp_width=24, layers=2, heads=2, kv_heads=2, head_dim=8)
TEACHER = DecoderConfig(vocab_size=32, width=16, mlp_width=24, layers=4, heads=2, kv_heads=2, head_dim=8)
SETUP = Setup(STUDENT, TEACHER, 32)


def two_chains() -> Batch:
    """A row of 12: a prompt of 2 and steps of 3 and 2 tokens; then a prompt of 1 and a step of 2; then padding."""
    ids = np.array([[1] * 7 + [2] * 3 + [0] * 2], np.int32)
    places = np.array([[[1, 4, 6], [7, 9, 0]]], np.int32)
    mask = np.array([[[True, True, True], [True, True, False]]])
    conclusions = np.array([[0, 0, 0, 1, 1, 2, 0, 0, 1, 0, 0, 0]], np.int32)
    weights = np.zeros(ids.shape, np.float32)
    return Batch(ids, ids, ids, weights, places, mask, conclusions)


@pytest.mark.parametrize(
    ("step_state", "wanted"),
    [
        ("end", [[1, 4, 6], [7, 9]]),
        ("mean", [[1, (2 + 3 + 4) / 3, (5 + 6) / 2], [7, (8 + 9) / 2]]),
        ("result", [[1, (3 + 4) / 2, 5], [7, 8]]),
    ],
)
def test_states_by_hand(step_state, wanted):
    """The state at token l is (l, -l); slot 0 is the prompt's end whatever the steps' states are."""
    hidden = jnp.arange(12.0)[None, :, None] * jnp.array([1.0, -1.0])
    found = step_states(hidden, two_chains(), step_state)
    assert found.shape == (1, 2, 3, 2)
    for chain, places in enumerate(wanted):
        for slot, place in enumerate(places):
            np.testing.assert_allclose(found[0, chain, slot], [place, -place], rtol=1e-6)


def test_a_mean_does_not_see_other_tokens_and_each_of_its_own_gets_its_share_of_the_gradient():
    batch = two_chains()
    hidden = jax.random.normal(jax.random.key(0), (1, 12, 4))
    gradient = jax.grad(lambda x: jnp.sum(step_states(x, batch, "mean")[0, 0, 1]))(hidden)
    np.testing.assert_allclose(gradient[0, :, 0], [0, 0, 1 / 3, 1 / 3, 1 / 3, 0, 0, 0, 0, 0, 0, 0], rtol=1e-6)


def test_means_are_added_in_float32_and_an_empty_set_gives_zero():
    """256 + 1 is 256 in bfloat16: added there, the mean of 256 ones and 256 would be off by half."""
    hidden = jnp.concatenate([jnp.full((1, 256, 1), 1.0), jnp.full((1, 1, 1), 256.0)], 1).astype(jnp.bfloat16)
    spans = jnp.stack([jnp.ones(257, bool), jnp.zeros(257, bool)])[None]
    found = mean_states(hidden, spans)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found[0, :, 0].astype(np.float32), [512 / 257, 0.0], rtol=1e-2)


def test_a_batch_that_does_not_know_its_conclusions_is_refused():
    with pytest.raises(ValueError, match="the batch has no `conclusions_BL`"):
        step_states(jnp.zeros((1, 12, 4)), two_chains()._replace(conclusions_BL=None), "result")


@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        ("", ((2, 4),)),
        ("evenly:4", ((1, 1), (1, 2), (2, 3), (2, 4))),
        ("evenly:2", ((1, 2), (2, 4))),
        ("0:0,1:2,-1:-1", ((0, 0), (1, 2), (2, 4))),
    ],
)
def test_which_layers_are_matched(layers, wanted):
    settings = LossSettings(layers=layers, step_state="mean")
    assert settings.matched_layers(SETUP) == wanted
    assert settings.teacher_layers(TEACHER) == tuple(its for _, its in wanted)
    reads = reads_of(settings.objective(SETUP).terms)
    students, teachers = (tuple(dict.fromkeys(column)) for column in zip(*wanted, strict=True))
    assert reads == Reads(students, (), teachers, (), teacher_predictions=True, step_state="mean")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("all", "layers is 'all'; expected evenly:<how many>, .* or pairs"),
        ("evenly:0", "layers is 'evenly:0'"),
        ("1:2,", "layers is '1:2,'"),
        ("1:2,1:2", "layers is '1:2,1:2'; expected each pair once"),
    ],
)
def test_layers_that_cannot_be_read_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        LossSettings(layers=layers)


def test_a_layer_that_a_model_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"hidden layer 5 .* a model of 4 layers"):
        LossSettings(layers="1:2,2:5").objective(SETUP)


@pytest.mark.parametrize("projections", ["separate", "shared"])
@pytest.mark.parametrize("distance", ["cosine", "squared"])
def test_a_term_on_several_layers_is_the_mean_over_them_each_by_its_own_map(projections, distance):
    batch = two_chains()
    settings = LossSettings(layers="1:2,2:2,2:4", distance=distance, projections=projections)
    objective = settings.objective(SETUP)
    params = objective.init_params(jax.random.PRNGKey(0), STUDENT.width, TEACHER.width)
    assert {name: x.shape for name, x in params.items()} == dict.fromkeys(
        ("f", "g") if projections == "separate" else ("f",), (3, STUDENT.width, TEACHER.width)
    )
    assert {name: len(axes) for name, axes in objective.param_axes().items()} == dict.fromkeys(params, 3)
    keys = jax.random.split(jax.random.PRNGKey(1), 4)
    shape = batch.boundary_mask_BCK.shape
    students = {layer: jax.random.normal(keys[layer], (*shape, STUDENT.width)) for layer in (1, 2)}
    teachers = {layer: jax.random.normal(keys[layer - 1], (*shape, TEACHER.width)) for layer in (2, 4)}
    nothing = jnp.zeros(())
    outputs = Outputs(StudentOutputs(nothing, nothing, students, {}), TeacherOutputs(None, None, teachers, {}), batch)
    _, align, cohere = objective.terms
    pairs = ((1, 2), (2, 2), (2, 4))
    mask = batch.boundary_mask_BCK
    steps = mask & (np.arange(3) > 0)
    for term, loss, name, kept in ((align, alignment, "f", steps), (cohere, coherence, "g", mask)):
        maps = params.get(name, params["f"])
        total, metrics = term.sums(outputs, params, term.coefficients())
        wanted = np.mean(
            [loss(students[own], teachers[its], kept, maps[i], distance) for i, (own, its) in enumerate(pairs)]
        )
        np.testing.assert_allclose(total / term.denominator(batch), wanted, rtol=1e-5)
        np.testing.assert_allclose(metrics[f"distill/{term.name}"].value(), wanted, rtol=1e-5)


def test_look_ahead_compares_where_a_step_begins_with_the_teachers_state_of_the_step():
    batch = two_chains()
    objective = LossSettings(look_ahead_weight=0.5, step_state="mean", distance="squared").objective(SETUP)
    (term,) = (term for term in objective.terms if isinstance(term, LookAhead))
    assert term.reads == Reads((), (2,), (4,), (), step_state="mean")
    params = term.init_params(jax.random.PRNGKey(0), STUDENT.width, TEACHER.width)
    keys = jax.random.split(jax.random.PRNGKey(1), 2)
    tokens = jax.random.normal(keys[0], (1, 12, STUDENT.width))
    states = jax.random.normal(keys[1], (*batch.boundary_mask_BCK.shape, TEACHER.width))
    nothing = jnp.zeros(())
    outputs = Outputs(
        StudentOutputs(nothing, nothing, {}, {2: tokens}), TeacherOutputs(None, None, {4: states}, {}), batch
    )
    total, metrics = term.sums(outputs, params, term.coefficients())
    head, found = np.asarray(params["ahead"]), []
    for chain, begins in enumerate(([1, 4], [7])):  # the last token before each step
        errors = [
            np.sum((tokens[0, place] @ head - states[0, chain, i + 1]) ** 2) / np.sum(states[0, chain, i + 1] ** 2)
            for i, place in enumerate(begins)
        ]
        found.append(np.mean(errors))
    np.testing.assert_allclose(total, np.sum(found), rtol=1e-5)
    np.testing.assert_allclose(metrics["distill/look_ahead"].value(), np.mean(found), rtol=1e-5)
    assert float(term.denominator(batch)) == 2.0


def test_the_keys_of_one_pair_are_unread_where_several_are_named():
    assert set(LossSettings(layers="evenly:2").unread_settings()) >= {"hidden_layer", "student_hidden_layer"}
    assert "hidden_layer" not in LossSettings().unread_settings()
