"""CKA, cosines through maps, AUROC and correlations: by hand, against references, on what must not matter."""

import json

import numpy as np
import pytest

from rtd_jax.apps.diagnose.findings import verdict
from rtd_jax.eval.cka import linear_cka, resampled_cka
from rtd_jax.eval.drift import (
    BoundaryStates,
    auroc,
    cka_by_step,
    cosines,
    cross_fitted,
    decline,
    drift_starts,
    mean_by_step,
    measure,
    rank_correlation,
    roc_points,
    transitions,
)


def reference_cka(x, y):
    """Both estimates from their definitions, with explicit n x n matrices in float64."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n
    one = np.ones(n)

    def hsic_0(k, l):  # noqa: E741
        return np.trace(k @ h @ l @ h)

    def hsic_1(k, l):  # noqa: E741
        k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
        total = np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        return (total - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))

    k, l = x @ x.T, y @ y.T  # noqa: E741
    return tuple(hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l)) for hsic in (hsic_0, hsic_1))


def related(seed=0, n=40, student=7, teacher=11, noise=0.5):
    """Two models' states of the same examples, far from zero as real states are. float32."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, 5))
    x = common @ rng.normal(size=(5, student)) + noise * rng.normal(size=(n, student)) + 20
    y = common @ rng.normal(size=(5, teacher)) + noise * rng.normal(size=(n, teacher)) - 30
    return x.astype(np.float32), y.astype(np.float32)


def test_cka_worked_by_hand():
    # Centred columns (-1, 0, 1) and (-1, 2, -1): <x, y> = 0, so CKA is 0; with x itself 1.
    x, y = np.array([[0.0], [1.0], [2.0]]), np.array([[-1.0], [2.0], [-1.0]])
    assert linear_cka(x, y).biased == pytest.approx(0.0, abs=1e-12)
    # (-1, 0, 1) with (0, 1, -1): squared correlation (-1)^2 / (2 * 2) = 1/4.
    assert linear_cka(x, np.array([[0.0], [1.0], [-1.0]])).biased == pytest.approx(0.25)
    assert np.isnan(linear_cka(x, y).debiased)  # three examples cannot give it


@pytest.mark.parametrize("sizes", [(40, 7, 11), (12, 30, 50), (4, 3, 3)])
def test_cka_equals_the_float64_reference(sizes):
    x, y = related(3, *sizes)
    np.testing.assert_allclose(linear_cka(x, y), reference_cka(x, y), atol=1e-6)


def test_cka_does_not_see_rotation_scale_shift_or_order():
    x, y = related()
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(7, 7)))[0]
    order = np.random.default_rng(2).permutation(len(x))
    plain = linear_cka(x, y)
    changed = linear_cka((3.0 * np.asarray(x, np.float64) @ rotation + 5.0)[order], (0.1 * y)[order])
    np.testing.assert_allclose(changed, plain, atol=1e-6)
    assert plain.biased < 0.99  # there is something to see
    np.testing.assert_allclose(linear_cka(x, 2.0 * x @ rotation.astype(np.float32)), (1.0, 1.0), atol=1e-5)


def test_biased_cka_of_unrelated_models_is_high_with_few_examples_and_debiased_is_not():
    rng = np.random.default_rng(0)
    found = [linear_cka(rng.normal(size=(20, 100)), rng.normal(size=(20, 100))) for _ in range(50)]
    biased, debiased = np.mean(found, axis=0)
    assert biased > 0.7
    assert abs(debiased) < 0.05


def test_spread_over_halves_is_the_standard_error():
    # The truth: the spread of CKA over fresh draws of 60 examples from the same two models.
    def draw(seed):
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(4, 6)), rng.normal(size=(4, 9))
        rng = np.random.default_rng(seed)
        common = rng.normal(size=(60, 4))
        return common @ a + rng.normal(size=(60, 6)), common @ b + rng.normal(size=(60, 9))

    truth = np.std([linear_cka(*draw(seed)) for seed in range(1, 200)], axis=0)
    estimates = [np.std(resampled_cka(*draw(seed), 60, np.random.default_rng(seed)), axis=0) for seed in range(1, 20)]
    np.testing.assert_allclose(np.mean(estimates, axis=0), truth, rtol=0.25)


def test_resamples_with_copies_would_be_far_off():
    # Why halves: of unrelated models, resamples with replacement give a debiased CKA of about 0.59.
    rng = np.random.default_rng(0)
    with_copies, halves = [], []
    for _ in range(60):
        x, y = rng.normal(size=(40, 60)), rng.normal(size=(40, 60))
        drawn = rng.integers(0, 40, 40)
        with_copies.append(linear_cka(x[drawn], y[drawn]).debiased)
        halves.append(resampled_cka(x, y, 1, rng)[0].debiased)
    assert np.mean(with_copies) == pytest.approx(0.59, abs=0.03)
    assert np.mean(halves) == pytest.approx(0.0, abs=0.05)


def test_bad_states_are_named():
    x, y = related()
    x[3, 2] = np.nan
    with pytest.raises(ValueError, match="student's state of example 3 is not finite"):
        linear_cka(x, y)
    with pytest.raises(ValueError, match="expected \\[examples, width\\]"):
        linear_cka(x[:5], y)


def chains(seed=0, count=60, slots=5, student=6, teacher=9, drift=0.0):
    """Chains of 2..slots-1 steps; the student is a linear image of the teacher plus noise that grows by `drift`."""
    rng = np.random.default_rng(seed)
    teacher_CKD = np.cumsum(rng.normal(size=(count, slots, teacher)), axis=1)
    mapping = rng.normal(size=(teacher, student))
    noise = drift * np.arange(slots)[None, :, None] * rng.normal(size=(count, slots, student))
    student_CKS = teacher_CKD @ mapping + noise
    depths = 2 + np.arange(count) % (slots - 2)
    mask = np.arange(slots)[None, :] <= depths[:, None]
    return BoundaryStates(student_CKS.astype(np.float32), teacher_CKD.astype(np.float32), mask)


def test_a_model_against_itself_is_one_everywhere_even_with_few_chains():
    states = chains(count=8, teacher=40)
    same = BoundaryStates(states.teacher_CKD, states.teacher_CKD, states.mask_CK)
    for biased, debiased in cka_by_step(same, resamples=5, seed=0).values():
        assert biased.value == pytest.approx(1.0)
        assert debiased.value == pytest.approx(1.0)
    for maps in ([None] * 8, cross_fitted(transitions(same), seed=0)):
        values = cosines(transitions(same), maps)
        np.testing.assert_allclose(values[np.isfinite(values)], 1.0, atol=1e-9)


def test_cosines_worked_by_hand_and_masked():
    student = np.array([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [9.0, 9.0]]])
    teacher = np.array([[[0.0, 0.0], [2.0, 2.0], [2.0, 2.0], [7.0, 7.0]]])
    states = BoundaryStates(student, teacher, np.array([[True, True, True, False]]))
    # Transitions (1,0) and (2,2): cos 45 degrees. Then (0,1) and (0,0): no direction. Then masked.
    np.testing.assert_allclose(cosines(transitions(states), [None]), [[np.sqrt(0.5), np.nan, np.nan]])
    # States: zero; (1,0) with (2,2); (1,1) with (2,2); masked.
    np.testing.assert_allclose(cosines(states, [None]), [[np.nan, np.sqrt(0.5), 1.0, np.nan]])
    # Through g that turns by 45 degrees, the first transition agrees.
    turn = np.array([[1.0, 1.0], [-1.0, 1.0]])
    assert cosines(transitions(states), [turn])[0, 0] == pytest.approx(1.0)


def test_the_map_is_fitted_on_one_half_and_measured_on_the_other():
    # The student holds a linear image of 6 of the teacher's 9 dimensions: what can be read back is well below 1, and
    # pure noise is not read back at all, which a map fitted on the same chains would pretend.
    states = chains(count=200)
    value = np.nanmean(cosines(transitions(states), cross_fitted(transitions(states), seed=0)))
    assert 0.7 < value < 0.95
    rng = np.random.default_rng(1)
    noise = states._replace(student_CKS=rng.normal(size=(200, 5, 300)))
    held_out = np.nanmean(cosines(transitions(noise), cross_fitted(transitions(noise), seed=0)))
    assert abs(held_out) < 0.1


def test_masked_slots_do_not_matter():
    states = chains(drift=0.3)
    spoiled = states._replace(
        student_CKS=np.where(states.mask_CK[..., None], states.student_CKS, np.nan),
        teacher_CKD=np.where(states.mask_CK[..., None], states.teacher_CKD, 1e9),
    )
    for pair in ((states, spoiled), (transitions(states), transitions(spoiled))):
        np.testing.assert_array_equal(*(cosines(x, cross_fitted(x, seed=0)) for x in pair))
    assert cka_by_step(states, resamples=3, seed=0) == cka_by_step(spoiled, resamples=3, seed=0)


def test_drift_is_seen_where_it_is():
    steady, drifting = chains(count=200), chains(count=200, drift=2.0)
    values = [cosines(x, cross_fitted(x, seed=0)) for x in (steady, drifting)]
    assert decline(values[1]).high < 0
    assert decline(values[1]).value < decline(values[0]).value
    assert drift_starts(values[1][:, 1:]) is not None
    cka = [[pair[1].value for pair in cka_by_step(x, resamples=3, seed=0).values()] for x in (steady, drifting)]
    assert cka[1][-1] < cka[0][-1] - 0.1
    by_step = mean_by_step(values[1])
    assert by_step[0].n == 200
    assert by_step[4].n == np.sum(drifting.mask_CK[:, 4])


def test_states_that_are_not_finite_are_left_out_and_counted():
    """A model that overflows in some places, or everywhere: null and words in place of an error."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(12, 4, 6)), rng.normal(size=(12, 4, 5))
    mask = np.ones((12, 4), bool)
    mask[0, 3] = False
    failed, right = np.arange(12) % 2 == 0, [[True, False, True]] * 12

    def measured(student):
        states = BoundaryStates(student, teacher, mask)
        maps = cross_fitted(states, 0), cross_fitted(transitions(states), 0)
        return measure(states, maps, right, failed, resamples=20, seed=0)

    whole, some, student_all = measured(student), student.copy(), np.full_like(student, np.nan)
    some[3, 2, 1], some[4, 2] = np.inf, np.nan
    found = measured(some)
    assert "not_finite" not in whole
    assert found["not_finite"] == 2
    assert [step["chains"] for step in found["steps"]] == [12, 12, 10, 11]
    assert found["steps"][1]["cka"] == whole["steps"][1]["cka"]
    nothing = measured(student_all)
    assert nothing["not_finite"] == 47
    assert nothing["steps"][1]["cka"] is None
    assert nothing["decline"]["transition_cosine"]["value"] is None
    json.dumps(nothing, allow_nan=False)
    for text in (found, nothing):
        for all_fail in (failed, np.ones(12, bool)):
            assert verdict({"reference": text}, all_fail)["sentence"]


def test_drift_starts_where_it_starts_and_decline_follows_chains():
    # Falls from the third value on; chains that are longer begin higher, which must not look like a rise.
    rng = np.random.default_rng(0)
    values = np.array([[0.9, 0.9, 0.7, 0.6, 0.5], [0.8, 0.8, 0.6, np.nan, np.nan]] * 20)
    values = values + 0.01 * rng.normal(size=values.shape)
    assert drift_starts(values) == 2
    assert decline(values).value == pytest.approx((-0.11 - 0.1) / 2, abs=0.01)
    assert drift_starts(0.9 + 0.01 * rng.normal(size=(40, 5))) is None


def test_auroc_worked_by_hand():
    scores, correct = np.array([0.9, 0.8, 0.3, 0.1]), np.array([True, False, True, False])
    # Pairs (right, wrong): (.9,.8) yes, (.9,.1) yes, (.3,.8) no, (.3,.1) yes.
    found = auroc(scores, correct, np.arange(4), resamples=50, seed=0)
    assert found.value == pytest.approx(0.75)
    assert found.low <= found.value <= found.high
    assert roc_points(scores, correct)[0] == (0.0, 0.0)
    assert roc_points(scores, correct)[-1] == (1.0, 1.0)
    assert np.isnan(auroc(scores, np.ones(4, bool), np.arange(4), resamples=5, seed=0).value)
    assert roc_points(scores, np.ones(4, bool)) == []


def test_depth_alone_does_not_predict_within_depth():
    # Shallow chains score high and are mostly right, deep ones low and mostly wrong; within a depth, scores are noise.
    rng = np.random.default_rng(0)
    depths = np.repeat([2, 5], 300)
    scores = np.where(depths == 2, 1.0, 0.0) + 0.1 * rng.normal(size=600)
    correct = rng.random(600) < np.where(depths == 2, 0.9, 0.1)
    options = {"resamples": 50, "seed": 0}
    assert auroc(scores, correct, np.arange(600), **options).value > 0.85
    within = auroc(scores, correct, np.arange(600), depths, **options)
    assert within.low < 0.5 < within.high
    assert rank_correlation(-scores, ~correct, **options).low > 0.5
    conditional = rank_correlation(-scores, ~correct, depths, **options)
    assert conditional.low < 0 < conditional.high
