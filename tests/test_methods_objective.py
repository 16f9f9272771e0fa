"""Terms are asked what they need, and the update holds them to it."""

import jax
import numpy as np
import optax
import pytest

from rtd_jax.base.boundaries import shifted_labels
from rtd_jax.base.types import Batch, StudentOutputs, TeacherOutputs
from rtd_jax.losses import kd_sums, top_k_kd_sums
from rtd_jax.methods import LossSettings
from rtd_jax.methods.alignment import Alignment
from rtd_jax.methods.own_chains import RewardSettings
from rtd_jax.methods.term import Objective, Outputs, Reads, Setup, reads_of
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel
from rtd_jax.teacher.predictions import top_k_predictions
from rtd_jax.train.update import make_train_step

CONFIG = DecoderConfig(vocab_size=32, width=16, mlp_width=24, layers=4, heads=2, kv_heads=2, head_dim=8)
SETUP = Setup(CONFIG, CONFIG, 32, RewardSettings())
FINAL = CONFIG.layers


def objective(**changes) -> Objective:
    return LossSettings(**changes).objective(SETUP)


def test_the_published_objective_reads_final_states_at_boundaries_and_predictions():
    assert reads_of(objective().terms) == Reads((FINAL,), (), (FINAL,), (), teacher_predictions=True)
    assert [term.name for term in objective().terms] == ["kd", "alignment", "coherence"]


def test_every_method_has_a_term_and_a_weight_that_switches_it_on():
    weights = {"token_alignment_weight": 0.1, "intermediate_weight": 0.2, "reward_weight": 0.3}
    weights |= {"look_ahead_weight": 0.4}
    found = {term.name: term.weight for term in objective(**weights).terms}
    assert found == {
        "kd": 1.0,
        "alignment": 0.3,
        "coherence": 0.5,
        "look_ahead": 0.4,
        "token_alignment": 0.1,
        "intermediate": 0.2,
        "reward": 0.3,
    }
    coefficients = objective(**weights, alpha=0.4).coefficients()
    assert coefficients["kd"] == {"weight": 1.0, "temperature": 4.0, "alpha": 0.4, "beta": 0.5}


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_logit_matching_is_by_the_divergence_of_the_settings_online_and_from_a_cache(divergence):
    (term, *_) = objective(divergence=divergence, beta=0.1).terms
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, of_teacher = (jax.random.normal(key, (2, 5, 16)) for key in keys[:2])
    head, teachers_head = (jax.random.normal(key, (16, 32)) for key in keys[2:])
    tokens, places = np.arange(10, dtype=np.int32).reshape(2, 5), np.zeros((2, 1, 2), np.int32)
    batch = Batch(tokens, tokens, tokens, np.ones((2, 5), np.float32), places, places.astype(bool))
    top = top_k_predictions(of_teacher, teachers_head, k=4, temperature=4.0, vocab_size=32)
    named = {"temperature": 4.0, "alpha": 0.7, "divergence": divergence, "beta": 0.1, "vocab_size": 32}
    for teacher, expected in (
        (
            TeacherOutputs(of_teacher, teachers_head, {}, {}),
            kd_sums(hidden, head, of_teacher, teachers_head, *shifted_labels(batch), **named),
        ),
        (
            TeacherOutputs(None, None, {}, {}, top),
            top_k_kd_sums(hidden, head, top, *shifted_labels(batch), **named),
        ),
    ):
        outputs = Outputs(StudentOutputs(hidden, head, {}, {}), teacher, batch)
        loss, metrics = term.sums(outputs, {}, term.coefficients())
        np.testing.assert_array_equal(loss, expected.loss)
        np.testing.assert_array_equal(metrics["distill/soft_loss"].sum, expected.soft)
        np.testing.assert_array_equal(metrics["distill/kl_div_T1"].sum, expected.kl_T1)


def test_reading_layers_are_counted_from_the_embeddings():
    found = reads_of(objective(hidden_layer=-2, student_hidden_layer=1, intermediate_weight=1.0).terms)
    assert (found.student_boundaries, found.teacher_boundaries) == ((1,), (FINAL - 1,))
    assert found.student_tokens == (1, 2, 3, 4)
    with pytest.raises(ValueError, match="hidden layer 9 does not exist"):
        objective(hidden_layer=9)


def test_labels_take_the_place_of_a_teacher_that_teaches_nothing_but_the_maps_stay():
    nothing = {"alpha": 0.0, "alignment_weight": 0.0, "coherence_weight": 0.0}
    labels = objective(**nothing, reward_weight=0.5)
    assert [term.name for term in labels.terms] == ["labels", "reward"]
    assert not labels.reads_teacher
    assert objective(**(nothing | {"coherence_weight": 0.1})).reads_teacher
    shapes = [jax.eval_shape(lambda o=o: o.init_params(jax.random.PRNGKey(0), 16, 16)) for o in (labels, objective())]
    assert shapes[0] == shapes[1]
    assert labels.param_axes().keys() == shapes[0].keys() == {"f", "g"}


def test_what_is_learned_does_not_depend_on_the_other_terms():
    key = jax.random.PRNGKey(0)
    alone = objective().init_params(key, 16, 24)
    beside = objective(intermediate_weight=1.0, token_alignment_weight=1.0, look_ahead_weight=1.0).init_params(
        key, 16, 24
    )
    assert beside["regressors"].shape == (4, 16, 24)
    for name in ("f", "g"):
        np.testing.assert_array_equal(alone[name], beside[name])
    assert not np.array_equal(alone["f"], alone["g"])
    assert list(objective(projections="shared").init_params(key, 16, 24)) == ["f"]


def test_a_cache_serves_no_term_on_the_students_own_chains():
    own = Objective((*objective().terms, Alignment(1.0, ((FINAL, FINAL),), text="own")))
    model = DecoderModel(CONFIG)
    with pytest.raises(ValueError, match=r"no outputs on chains that the student draws: set on_policy\.fraction"):
        make_train_step(model, None, optax.sgd(1.0), own)
    make_train_step(model, model, optax.sgd(1.0), own)


def test_terms_of_one_name_are_a_mistake():
    with pytest.raises(AssertionError, match="told apart by their keys"):
        Objective((Alignment(1.0, ((1, 1),)), Alignment(2.0, ((2, 2),))))
