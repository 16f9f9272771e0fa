"""One update: the same for any mesh, any number of micro-batches and any packing, and equal to the plain formula."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rtd_jax.apps.pretrain import SizeSettings, model_config
from rtd_jax.base.boundaries import shifted_labels, transition_boundaries
from rtd_jax.base.sharding import MeshSettings, host_share, make_mesh, put_batch, to_host
from rtd_jax.data.encoding import encode_traces
from rtd_jax.data.generators.word_problems import generate
from rtd_jax.data.packing import fixed_batches, host_rows
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT, tiny_tokenizer
from rtd_jax.losses import alignment, coherence, kd_token_losses
from rtd_jax.methods import LossSettings
from rtd_jax.methods.maps import init_state_map, init_transition_map
from rtd_jax.methods.term import Objective, Setup
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.open import ModelSettings, make_model, weight_shardings
from rtd_jax.teacher.online import teacher_outputs
from rtd_jax.teacher.predictions import top_k_predictions
from rtd_jax.train.calibration import make_self_comparison
from rtd_jax.train.optimizer import OptimizerSettings, decay_mask, learning_rate_schedule, make_optimizer
from rtd_jax.train.state import create_state, state_shardings
from rtd_jax.train.update import UpdateSettings, make_term_eval, make_train_step

TOKENIZER = tiny_tokenizer()
VOCAB = len(TOKENIZER)
TEACHER = DecoderModel(model_config(SizeSettings(2, 32, 48, 4, 2, 8), TOKENIZER))
STUDENT = DecoderModel(model_config(SizeSettings(2, 16, 24, 4, 2, 8), TOKENIZER))
TEACHER_PARAMS = TEACHER.init(jax.random.key(1))
# With Adam's usual eps an entry whose gradient is rounding noise moves by a whole step, either way. This eps makes the
# update a continuous function of the gradient, so that equal gradients can be seen in equal parameters.
OPTIMIZER = make_optimizer(OptimizerSettings(learning_rate=1e-2, warmup_updates=1, eps=1e-2), total_updates=10)
CHAINS, _ = encode_traces(TOKENIZER, generate(14, (1, 2, 3)), TINY_FORMAT, row_length=128)
UPDATE = UpdateSettings()
PLACEMENT = ModelSettings("unused", "float32", "float32")


def batch(rows: int, chains_per_row: int, row_length: int):
    (one,) = fixed_batches(CHAINS, rows, row_length, chains_per_row, 4)
    return one


PACKED, UNPACKED = batch(8, 4, 256), batch(16, 1, 128)


def objective(mesh=None, teacher: DecoderModel = TEACHER, **changes) -> Objective:
    """The published one, or with other settings."""
    return LossSettings(**changes).objective(Setup(STUDENT.config, teacher.config, VOCAB, mesh=mesh))


def maps(key, student_width: int, teacher_width: int, kind="separate"):
    sizes = (kind, ((2, 2),), student_width, teacher_width)
    return init_state_map(key, *sizes) | init_transition_map(key, *sizes)


AXES = objective().param_axes()
WEIGHTS = objective().coefficients()


def fresh_state(wanted: Objective | None = None):
    key = jax.random.PRNGKey(0)
    params = {"student": STUDENT.init(key), **(wanted or objective()).init_params(key, 16, 32)}
    return create_state(params, OPTIMIZER, key)


START = jax.device_get(fresh_state().params)


def after_updates(
    mesh_settings: MeshSettings,
    data=PACKED,
    settings: UpdateSettings = UPDATE,
    updates: int = 3,
    placement: ModelSettings = PLACEMENT,
    **changes,
):
    count = abs(mesh_settings.data * mesh_settings.fsdp * mesh_settings.tensor)
    mesh = make_mesh(mesh_settings, jax.devices()[:count])
    data = host_rows(data, host_share(mesh))  # all rows, unless there are several processes
    wanted = objective(mesh, **changes)
    state, teacher_params = jax.device_get((fresh_state(wanted), TEACHER_PARAMS))
    axes = wanted.param_axes()
    shardings = state_shardings(jax.eval_shape(lambda: state), OPTIMIZER, mesh, axes, settings.offload_optimizer)
    state = jax.device_put(state, shardings)
    teacher = make_model(placement, TEACHER.config, mesh)
    teacher_params = jax.device_put(teacher_params, weight_shardings(placement, teacher, mesh))
    step = make_train_step(STUDENT, teacher, OPTIMIZER, wanted, settings, mesh)
    metrics = {}
    for _ in range(updates):
        state, metrics = step(state, teacher_params, put_batch(data, mesh), wanted.coefficients())
    if count > 1:  # on one device the ways to say where an array lies differ, and nothing is compiled for it
        assert step._cache_size() == 1  # what an update gives back lies where it lay: nothing is compiled twice
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim}
    assert kinds == {"pinned_host" if settings.offload_optimizer else "device"}
    return to_host(state), jax.device_get(metrics)


def cached_outputs(data, k: int, hidden_layer: int = 2):
    """What a cache with float32 storage would hold of the batch."""
    rows = jax.tree.map(jnp.asarray, data)
    outputs = teacher_outputs(TEACHER, TEACHER_PARAMS, rows, (hidden_layer,))
    top_k = top_k_predictions(
        outputs.hidden_BLD, outputs.head_DV, k=k, temperature=4.0, vocab_size=VOCAB, chunk_length=64
    )
    return jax.device_get(outputs._replace(hidden_BLD=None, head_DV=None, top_k=top_k))


def after_cached_updates(
    mesh_settings: MeshSettings, data=PACKED, settings: UpdateSettings = UPDATE, k: int = VOCAB, updates: int = 3
):
    """As `after_updates`, from the teacher's outputs alone."""
    mesh = make_mesh(mesh_settings, jax.devices()[: mesh_settings.data * mesh_settings.fsdp * mesh_settings.tensor])
    state = jax.device_get(fresh_state())
    state = jax.device_put(state, state_shardings(jax.eval_shape(lambda: state), OPTIMIZER, mesh, AXES))
    step = make_train_step(STUDENT, None, OPTIMIZER, objective(mesh), settings, mesh)
    metrics = {}
    for _ in range(updates):
        batch, outputs = put_batch((data, cached_outputs(data, k)), mesh)
        state, metrics = step(state, outputs, batch, WEIGHTS)
    if mesh.size > 1:
        assert step._cache_size() == 1
    return to_host(state), jax.device_get(metrics)


def assert_same_update(state, expected):
    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert int(state.step) == int(expected.step) == 3
    moved = [np.max(np.abs(a - b)) for a, b in zip(*map(jax.tree.leaves, (state.params, START)), strict=True)]
    assert min(moved) > 1e-4  # every array took part, so equality says something


@pytest.fixture(scope="module")
def single():
    return after_updates(MeshSettings(1, 1, 1))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 2), (2, 2, 2)])
def test_any_mesh_gives_the_same_update(single, sizes):
    state, metrics = after_updates(MeshSettings(*sizes))
    assert_same_update(state, single[0])
    for name, mean in metrics.items():
        np.testing.assert_allclose(mean.value(), single[1][name].value(), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("sizes", "placement", "offload"),
    [
        ((2, 2, 2), replace(PLACEMENT, sharding="tensor"), False),
        ((1, 4, 2), replace(PLACEMENT, offload=True), True),
        ((1, 2, 2), replace(PLACEMENT, sharding="tensor", offload=True), True),
    ],
    ids=["tensor-parallel teacher", "host memory", "both"],
)
def test_where_the_teacher_and_the_moments_lie_does_not_change_the_update(single, sizes, placement, offload):
    settings = replace(UPDATE, offload_optimizer=offload)
    state, _ = after_updates(MeshSettings(*sizes), settings=settings, placement=placement)
    assert_same_update(state, single[0])


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_micro_batches_gives_the_same_update(single, count):
    state, metrics = after_updates(MeshSettings(1, 1, 1), settings=replace(UPDATE, micro_batches=count))
    assert_same_update(state, single[0])
    for name, mean in metrics.items():
        np.testing.assert_allclose(mean.value(), single[1][name].value(), rtol=1e-4, err_msg=name)
        assert float(mean.count) == float(single[1][name].count)


def test_every_term_adds_up_over_micro_batches():
    """Regressors of several layers and states at every token, too: what a term learns must take part in the sums."""
    weights = {"intermediate_weight": 0.5, "token_alignment_weight": 0.3, "look_ahead_weight": 0.2}
    key = jax.random.PRNGKey(0)
    wanted = objective(**weights)

    def after(micro_batches: int):
        params = {"student": STUDENT.init(key), **wanted.init_params(key, 16, 32)}
        step = make_train_step(STUDENT, TEACHER, OPTIMIZER, wanted, UpdateSettings(micro_batches))
        state = create_state(params, OPTIMIZER, jnp.array(key))
        state, metrics = step(state, TEACHER_PARAMS, PACKED, wanted.coefficients())
        return jax.device_get((state.params, metrics))

    (whole, of_whole), (parts, of_parts) = after(1), after(2)
    assert set(whole) == {"student", "f", "g", "regressors", "ahead"}
    chex.assert_trees_all_close(parts, whole, rtol=1e-5, atol=1e-6)
    for name in of_whole:
        np.testing.assert_allclose(of_parts[name].value(), of_whole[name].value(), rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("step_state", ["mean", "result"])
def test_states_of_several_tokens_and_layers_give_the_same_update_on_any_split(step_state):
    changes = {"step_state": step_state, "layers": "1:1,1:2,2:2", "distance": "squared"}
    expected, metrics = after_updates(MeshSettings(1, 1, 1), **changes)
    assert expected.params["f"].shape == (3, 16, 32)
    for sizes, data, count in (((2, 2, 2), PACKED, 1), ((1, 1, 1), PACKED, 2), ((1, 1, 1), UNPACKED, 1)):
        settings = replace(UPDATE, micro_batches=count)
        state, found = after_updates(MeshSettings(*sizes), data, settings, **changes)
        assert_same_update(state, expected)
        for name in ("distill/alignment", "distill/coherence"):
            np.testing.assert_allclose(found[name].value(), metrics[name].value(), rtol=1e-4, err_msg=name)


def test_packing_does_not_change_the_update(single):
    state, _ = after_updates(MeshSettings(1, 1, 1), data=UNPACKED)
    assert_same_update(state, single[0])


@pytest.mark.parametrize(
    ("sizes", "count", "data"),
    [((1, 1, 1), 1, PACKED), ((2, 2, 2), 2, PACKED), ((1, 1, 1), 4, UNPACKED)],
    ids=["one device", "mesh and micro-batches", "unpacked"],
)
def test_a_cache_of_every_token_gives_the_online_update(single, sizes, count, data):
    state, metrics = after_cached_updates(MeshSettings(*sizes), data, replace(UPDATE, micro_batches=count))
    assert_same_update(state, single[0])
    for name, mean in metrics.items():
        np.testing.assert_allclose(mean.value(), single[1][name].value(), rtol=1e-4, err_msg=name)


def test_a_cache_of_some_tokens_gives_the_same_update_on_any_mesh():
    expected, metrics = after_cached_updates(MeshSettings(1, 1, 1), k=8)
    state, again = after_cached_updates(MeshSettings(1, 2, 2), settings=replace(UPDATE, micro_batches=2), k=8)
    assert_same_update(state, expected)
    for name, mean in again.items():
        np.testing.assert_allclose(mean.value(), metrics[name].value(), rtol=1e-4, err_msg=name)


def test_cached_updates_donate_the_state_only_and_read_states_at_every_token_nowhere():
    step = make_train_step(STUDENT, None, OPTIMIZER, objective())
    state, outputs = fresh_state(), jax.tree.map(jnp.asarray, cached_outputs(PACKED, 8))
    donated = state.params["student"]["embedding"]
    step(state, outputs, PACKED, WEIGHTS)
    assert donated.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(outputs))
    for name in ("token_alignment_weight", "intermediate_weight"):
        with pytest.raises(ValueError, match=rf"a cache has no teacher states at every token: set loss\.{name} to 0"):
            make_train_step(STUDENT, None, OPTIMIZER, objective(**{name: 1.0}))


@pytest.mark.parametrize("distance", ["cosine", "squared"])
def test_thresholds_are_measured_by_the_loss_that_is_validated(distance):
    """The teacher against itself under another context, as `make_term_eval` would compare it with a student."""
    measure = make_self_comparison(TEACHER, objective(distance=distance).yardstick)
    plain, other = (jax.tree.map(jnp.asarray, UNPACKED) for _ in range(2))
    other = other._replace(tokens_BL=(other.tokens_BL + 1) % VOCAB)
    found = measure(TEACHER_PARAMS, plain, TEACHER_PARAMS, other)
    states = [teacher_outputs(TEACHER, TEACHER_PARAMS, x, (2,)).boundary_states[2] for x in (other, plain)]
    mask = transition_boundaries(plain.boundary_mask_BCK, anchor_prompt=True)
    expected = coherence(*states, mask, distance=distance)
    np.testing.assert_allclose(found.value(), expected, rtol=1e-5)
    both = [coherence(*states, mask, distance=x) for x in ("cosine", "squared")]
    assert float(both[0]) != float(both[1])


def test_thresholds_of_several_layers_compare_each_of_the_teachers_with_itself():
    """One layer of the student may be matched with two of the teacher; the threshold knows the teacher's only."""
    measure = make_self_comparison(TEACHER, objective(layers="1:1,1:2", step_state="mean").yardstick)
    plain, other = (jax.tree.map(jnp.asarray, UNPACKED) for _ in range(2))
    other = other._replace(tokens_BL=(other.tokens_BL + 1) % VOCAB)
    found = measure(TEACHER_PARAMS, plain, TEACHER_PARAMS, other)
    of_other, of_plain = (
        teacher_outputs(TEACHER, TEACHER_PARAMS, x, (1, 2), step_state="mean").boundary_states for x in (other, plain)
    )
    wanted = np.mean([coherence(of_other[layer], of_plain[layer], plain.boundary_mask_BCK) for layer in (1, 2)])
    np.testing.assert_allclose(found.value(), wanted, rtol=1e-5)


@pytest.mark.parametrize("hidden_layer", [2, 1])
def test_validation_reads_the_teachers_states_from_either(hidden_layer):
    term, state = objective(hidden_layer=hidden_layer).yardstick, fresh_state()
    online = make_term_eval(STUDENT, TEACHER, term)(state.params, TEACHER_PARAMS, PACKED)
    outputs = cached_outputs(PACKED, 1, hidden_layer)._replace(top_k=None)
    cached = make_term_eval(STUDENT, None, term)(state.params, outputs, PACKED)
    np.testing.assert_allclose(cached, online, rtol=1e-6)
    assert float(online.sum) > 0


@pytest.mark.parametrize("anchor_prompt", [True, False])
def test_the_loss_is_the_sum_of_its_published_terms(anchor_prompt):
    """KD + 0.3 alignment + 0.5 coherence, from unpacked rows and whole logits, chain by chain."""
    _, metrics = after_updates(MeshSettings(1, 1, 1), updates=1, anchor_prompt=anchor_prompt)

    state, data = fresh_state(), jax.tree.map(jnp.asarray, UNPACKED)
    rows = (data.tokens_BL, data.positions_BL, data.chain_ids_BL)
    hidden_s, hidden_t = STUDENT.hidden(state.params["student"], *rows), TEACHER.hidden(TEACHER_PARAMS, *rows)
    labels, weights = shifted_labels(data)
    soft, hard, _, _ = kd_token_losses(
        STUDENT.logits(state.params["student"], hidden_s), TEACHER.logits(TEACHER_PARAMS, hidden_t), labels, 4.0, VOCAB
    )
    kd = jnp.sum(weights * (0.7 * soft + 0.3 * hard)) / jnp.sum(weights)
    aligned, coherent = [], []
    for row, chain in enumerate(CHAINS):
        student, teacher = hidden_s[row, chain.boundaries], hidden_t[row, chain.boundaries]
        ones = jnp.ones(len(chain.boundaries), bool)
        aligned.append(alignment(student[1:], teacher[1:], ones[1:], state.params["f"]))
        first = 0 if anchor_prompt else 1
        if chain.depth > first:
            coherent.append(coherence(student[first:], teacher[first:], ones[first:], state.params["g"]))
    expected = kd + 0.3 * np.mean(aligned) + 0.5 * np.mean(coherent)
    np.testing.assert_allclose(metrics["loss"].value(), expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["distill/alignment"].value(), np.mean(aligned), rtol=1e-5)
    np.testing.assert_allclose(metrics["distill/coherence"].value(), np.mean(coherent), rtol=1e-5)


def test_only_the_state_is_donated_and_weights_do_not_recompile():
    step = make_train_step(STUDENT, TEACHER, OPTIMIZER, objective())
    state = fresh_state()
    donated = state.params["student"]["embedding"]
    state, _ = step(state, TEACHER_PARAMS, PACKED, WEIGHTS)
    assert donated.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(TEACHER_PARAMS))
    kept = np.asarray(state.params["f"]), np.asarray(state.params["g"])
    compiled = step._cache_size()
    state, _ = step(state, TEACHER_PARAMS, PACKED, objective(**NO_TRAJECTORY, alpha=0.5).coefficients())
    assert step._cache_size() == compiled
    # Without the terms nothing but the optimizer's memory of the first update moves f and g.
    assert kept[0].shape == (16, 32)
    assert all(np.all(g == 0) for g in _map_gradients(**NO_TRAJECTORY))
    assert all(np.any(g != 0) for g in _map_gradients())


NO_TRAJECTORY = {"alignment_weight": 0.0, "coherence_weight": 0.0}


def _map_gradients(**changes):
    """f's and g's gradients, read off one plain SGD update."""
    sgd = optax.sgd(1.0)
    key = jax.random.PRNGKey(0)
    params = {"student": STUDENT.init(key), **maps(key, 16, 32)}
    before = {name: np.asarray(params[name]) for name in ("f", "g")}
    wanted = objective(**changes)
    step = make_train_step(STUDENT, TEACHER, sgd, wanted)
    state, _ = step(create_state(params, sgd, key), TEACHER_PARAMS, PACKED, wanted.coefficients())
    return [before[name] - np.asarray(state.params[name]) for name in ("f", "g")]


def test_one_map_for_both_gets_both_gradients_and_none_is_the_identity():
    key, sgd = jax.random.PRNGKey(0), optax.sgd(1.0)

    def update(teacher, teacher_params, own, **changes):
        params = {"student": STUDENT.init(key), **jax.tree.map(jnp.array, own)}
        wanted = objective(teacher=teacher, **changes)
        step = make_train_step(STUDENT, teacher, sgd, wanted)
        state, metrics = step(create_state(params, sgd, jnp.array(key)), teacher_params, PACKED, wanted.coefficients())
        return jax.device_get((state.params, metrics))

    both = maps(key, 16, 32)
    shared = maps(key, 16, 32, "shared")
    assert list(shared) == ["f"]
    start = np.array(both["f"])
    got, _ = update(TEACHER, TEACHER_PARAMS, shared, projections="shared")
    apart, _ = update(TEACHER, TEACHER_PARAMS, {"f": start, "g": start})
    np.testing.assert_allclose(got["f"] - start, (apart["f"] - start) + (apart["g"] - start), rtol=1e-4, atol=1e-7)

    # A teacher as wide as the student: no map is a map that is the identity.
    twin_params = STUDENT.init(jax.random.PRNGKey(1))
    eye = np.eye(16, dtype=np.float32)
    tokens = {"token_alignment_weight": 1.0}
    bare, of_bare = update(STUDENT, twin_params, maps(key, 16, 16, "none"), projections="none", **tokens)
    mapped, of_mapped = update(STUDENT, twin_params, {"f": eye, "g": eye.copy()}, **tokens)
    assert list(bare) == ["student"]
    for name in ("distill/alignment", "distill/coherence", "distill/token_alignment"):
        np.testing.assert_allclose(of_bare[name].value(), of_mapped[name].value(), rtol=1e-6)
    chex.assert_trees_all_close(bare["student"], mapped["student"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="student's width is 16 and the teacher's 32"):
        maps(key, 16, 32, "none")

    # Lengths of transitions change the coherence loss, and what it asks of the student.
    _, with_lengths = update(TEACHER, TEACHER_PARAMS, maps(key, 16, 32), distance="squared")
    _, directions = update(TEACHER, TEACHER_PARAMS, maps(key, 16, 32))
    assert float(with_lengths["distill/coherence"].value()) != float(directions["distill/coherence"].value())


def test_schedule_counts_updates_and_ends_at_the_last():
    schedule = learning_rate_schedule(OptimizerSettings(learning_rate=2e-5, warmup_updates=500), 40_000)
    assert float(schedule(500)) == pytest.approx(2e-5)
    assert float(schedule(250)) == pytest.approx(1e-5)
    assert float(schedule(500 + 39_500 // 2)) == pytest.approx(1e-5, rel=1e-3)  # half-way down the cosine
    assert float(schedule(40_000)) == pytest.approx(0.0, abs=1e-12)


def test_norm_scales_are_not_decayed():
    mask = decay_mask({"student": STUDENT.abstract_params(), "f": 0})
    flat = {jax.tree_util.keystr(path): keep for path, keep in jax.tree_util.tree_leaves_with_path(mask)}
    spared = {name for name, keep in flat.items() if not keep}
    assert len(spared) == 3
    assert all("norm" in name and name.endswith("['scale']") for name in spared)
