"""Soft windows: cut where the teacher's direction turns, with states that are means under weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_update import CHAINS, TEACHER, TEACHER_PARAMS, UPDATE, after_updates, assert_same_update
from tiny_run import one_device_mesh, recipe, source, trained, write_teacher

from configs.rtd_tiny import get_config
from rtd_jax.apps.cache import cache_teacher
from rtd_jax.apps.distill.prepare import prepare
from rtd_jax.apps.distill.stages import Run
from rtd_jax.base.boundaries import mean_states, step_states, window_weights
from rtd_jax.base.settings import build
from rtd_jax.base.sharding import MeshSettings
from rtd_jax.base.types import Batch
from rtd_jax.data.encoding import EncodedChain, chains_fingerprint
from rtd_jax.data.loader import BatchLoader, MembersLoader
from rtd_jax.data.packing import fixed_batches
from rtd_jax.methods.term import Reads
from rtd_jax.steps.select import is_windows, reads_teacher, soft_of, stride_of, window_ends
from rtd_jax.steps.soft import (
    SoftWindows,
    behind_another_prompt,
    in_soft_windows,
    places_among,
    teacher_turns,
    window_ends_at,
)
from rtd_jax.teacher.identity import CacheSettings
from rtd_jax.teacher.online import teacher_outputs
from rtd_jax.teacher.records import key_of
from rtd_jax.train.abstract import abstract_step
from rtd_jax.train.clock import Clock
from rtd_jax.train.curriculum import CurriculumSettings
from rtd_jax.train.optimizer import OptimizerSettings
from rtd_jax.train.recipe import LossSettings, Recipe
from rtd_jax.train.teacher_table import make_table, outputs_at


def chain_of(length: int, prompt_length: int) -> EncodedChain:
    """A chain of one step."""
    weights = (np.arange(length) >= prompt_length).astype(np.float32)
    tokens = np.arange(1, length + 1, dtype=np.int32)
    return EncodedChain(tokens, prompt_length, np.array([prompt_length - 1, length - 1]), weights, "x")


def soft(chain: EncodedChain, tokens: int, seed: int) -> EncodedChain:
    """The chain in soft windows of random turns, most of them small."""
    turns_T = np.random.default_rng(seed).uniform(0, 1, len(chain) - chain.prompt_length) ** 4
    return in_soft_windows(chain, turns_T.astype(np.float16), tokens)


def test_places_by_hand():
    """Half of the turning belongs to each of two windows; the token with the turn of 3 lies across."""
    cut = in_soft_windows(chain_of(7, 2), np.float16([1, 3, 0, 2, 2]), 3)
    np.testing.assert_array_equal(cut.places, np.float32([0, 0, 0.125, 0.625, 1.0, 1.25, 1.75]))
    assert cut.boundaries.tolist() == [1, 4, 6]
    assert (cut.places.dtype, cut.boundaries.dtype, cut.conclusions) == (np.float32, np.int32, None)


@pytest.mark.parametrize(
    ("turns", "count", "ends"),
    [
        ([0, 0, 10, 0, 0], 3, [1, 2, 4]),  # a jump over the middle window, which has the jump's own token
        ([10, 0, 0, 0], 3, [0, 1, 3]),  # no place is in the first two windows
        ([0, 0, 0, 10], 3, [1, 2, 3]),  # all but the last token are in the first
        ([1, 1, 1], 3, [0, 1, 2]),
        ([5], 1, [0]),
    ],
)
def test_every_window_ends_behind_the_one_before_and_the_last_with_the_chain(turns, count, ends):
    assert window_ends_at(places_among(np.float16(turns), count), count).tolist() == ends


@pytest.mark.parametrize("turn", [0.0, 0.25])
@pytest.mark.parametrize(("length", "tokens"), [(15, 4), (9, 2), (5, 100)])
def test_where_every_token_turns_alike_or_none_does_windows_are_those_of_a_stride(turn, length, tokens):
    chain = chain_of(length, 3)
    cut = in_soft_windows(chain, np.full(length - 3, turn, np.float16), tokens)
    assert cut.boundaries.tolist() == window_ends(3, length, tokens).tolist()
    count = len(cut.boundaries) - 1
    np.testing.assert_allclose(cut.places[3:], (np.arange(length - 3) + 0.5) * count / (length - 3), rtol=1e-6)


def two_chains() -> tuple[Batch, list[EncodedChain]]:
    """A row with two chains, of prompts of 2 and 1 tokens, and padding; the batch and its chains."""
    chains = [soft(chain_of(11, 2), 3, 0), soft(chain_of(6, 1), 4, 1)]
    (batch,) = fixed_batches(chains, 1, 20, 2, 5)
    return batch, chains


def dense_weights(batch: Batch, chains: list[EncodedChain]) -> np.ndarray:
    """The normalised weights [C, K, L] by plain loops in float64; slot 0 has the prompt's end."""
    weights = np.zeros((*batch.boundary_mask_BCK.shape[1:], batch.tokens_BL.shape[1]))
    begin = 0
    for c, chain in enumerate(chains):
        weights[c, 0, begin + chain.prompt_length - 1] = 1
        for j in range(1, len(chain.boundaries)):
            exponents = -2 * (chain.places[chain.prompt_length :].astype(np.float64) - (j - 0.5)) ** 2
            own = np.exp(exponents - exponents.max())
            weights[c, j, begin + chain.prompt_length : begin + len(chain)] = own / own.sum()
        begin += len(chain)
    return weights


def test_a_state_is_the_mean_under_its_windows_weights_and_so_is_its_gradient():
    batch, chains = two_chains()
    weights_CKL = dense_weights(batch, chains)
    hidden = jax.random.normal(jax.random.key(0), (1, 20, 4))
    found, back = jax.vjp(lambda x: step_states(x, batch, "mean"), hidden)
    mask_CK = batch.boundary_mask_BCK[0]
    assert mask_CK.sum(-1).tolist() == [4, 3]
    np.testing.assert_allclose(found[0][mask_CK], (weights_CKL @ hidden[0])[mask_CK], rtol=2e-5, atol=1e-6)
    upstream_BCKD = jax.random.normal(jax.random.key(1), found.shape) * mask_CK[None, :, :, None]
    wanted_LD = np.einsum("ckl,ckd->ld", weights_CKL, upstream_BCKD[0])
    np.testing.assert_allclose(back(upstream_BCKD)[0][0], wanted_LD, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(
        step_states(hidden, batch, "end")[0][mask_CK], hidden[0, batch.boundary_positions_BCK[0][mask_CK]]
    )


def test_a_window_that_is_far_from_every_token_has_a_state():
    """Of 100 windows one token's turn fills nearly all: exp(-2 * 25^2) is 0 in float32."""
    turns = np.zeros(100, np.float16)
    turns[50] = 1.0
    chain = in_soft_windows(chain_of(102, 2), turns, 1)
    (batch,) = fixed_batches([chain], 1, 102, 1, 101)
    weights = window_weights(batch)[0, 0]
    np.testing.assert_array_equal(weights.max(-1), 1.0)
    assert not weights[:, :2].any()
    found = step_states(jax.random.normal(jax.random.key(0), (1, 102, 4)), batch, "mean")
    assert np.all(np.isfinite(found))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_means_under_weights_need_not_add_up_to_one(dtype):
    hidden = jnp.array([[1.0, 2.0], [3.0, 5.0], [100.0, 100.0]], dtype)
    found = mean_states(hidden, jnp.array([[0.1, 0.3, 0.0], [1e-30, 0.0, 0.0], [0.0, 0.0, 0.0]], jnp.float32))
    assert found.dtype == hidden.dtype
    np.testing.assert_allclose(
        found.astype(np.float32), [[2.5, 4.25], [1, 2], [0, 0]], rtol=1e-6 if dtype == "float32" else 1e-2
    )


def test_places_are_packed_with_their_chains_and_belong_to_the_data():
    chains = [soft(chain, 8, i) for i, chain in enumerate(CHAINS)]
    slots = max(len(chain.boundaries) for chain in chains)
    (batch,) = fixed_batches(chains, 8, 256, 4, slots)
    by_tokens = {chain.tokens.tobytes(): chain.places for chain in chains}
    stream = BatchLoader([(chains, 1.0)], 8, 256, 4, slots, seed=0)
    for made in (batch, next(stream)):
        for row in range(8):
            for number in range(1, made.chain_ids_BL[row].max() + 1):
                own = made.chain_ids_BL[row] == number
                np.testing.assert_array_equal(made.places_BL[row, own], by_tokens[made.tokens_BL[row, own].tobytes()])
        assert not made.places_BL[made.chain_ids_BL == 0].any()
    assert fixed_batches(CHAINS, 8, 256, 4, slots)[0].places_BL is None
    hard = [dataclasses.replace(chain, places=None) for chain in chains]
    assert chains_fingerprint(hard) != chains_fingerprint(chains)
    assert key_of(hard[0]) != key_of(chains[0])
    with pytest.raises(ValueError, match="1 of 2 chains have places in soft windows, and "):
        fixed_batches([chains[0], hard[1]], 8, 256, 4, slots)
    with pytest.raises(ValueError, match="1 of 2 chains have places"):
        BatchLoader([(chains[:1], 0.5), (hard[1:2], 0.5)], 1, 256, 4, slots, seed=0)


def test_soft_windows_give_the_same_update_on_any_split():
    chains = [soft(chain, 12, i) for i, chain in enumerate(CHAINS)]
    slots = max(len(chain.boundaries) for chain in chains)
    (packed,), (unpacked,) = fixed_batches(chains, 8, 256, 4, slots), fixed_batches(chains, 16, 128, 1, slots)
    changes = {"step_state": "mean", "layers": "1:1,2:2", "distance": "squared"}
    expected, metrics = after_updates(MeshSettings(1, 1, 1), packed, **changes)
    for sizes, data, count in (((2, 2, 2), packed, 1), ((1, 1, 1), unpacked, 2)):
        state, found = after_updates(
            MeshSettings(*sizes), data, dataclasses.replace(UPDATE, micro_batches=count), **changes
        )
        assert_same_update(state, expected)
        for name in ("distill/alignment", "distill/coherence"):
            np.testing.assert_allclose(found[name].value(), metrics[name].value(), rtol=1e-4, err_msg=name)


def test_an_ensembles_table_has_the_states_of_soft_windows_whatever_row_a_chain_is_in():
    chains = [soft(chain, 12, i) for i, chain in enumerate(CHAINS)]
    slots = max(len(chain.boundaries) for chain in chains)
    (once,) = fixed_batches(chains, 16, 128, 1, slots)
    reads = Reads((), (), (1, 2), (), step_state="mean")
    table, places = make_table(TEACHER, TEACHER_PARAMS, [(once, once)], reads)
    loaders = [BatchLoader([(chains, 1.0)], 4, 256, 2, slots, seed) for seed in (0, 1)]
    stacked = next(MembersLoader(loaders))
    assert stacked.places_BL.shape == (2, 4, 256)
    batch = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked)
    found = outputs_at(table, places.of(batch)).boundary_states
    wanted = teacher_outputs(TEACHER, TEACHER_PARAMS, batch, (1, 2), step_state="mean").boundary_states
    for layer in (1, 2):
        of_both = (np.asarray(states[layer])[batch.boundary_mask_BCK] for states in (found, wanted))
        np.testing.assert_allclose(*of_both, rtol=1e-4, atol=1e-5)
    with pytest.raises(KeyError):
        places.of(batch._replace(places_BL=batch.places_BL / 2))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("soft") / "teacher")


def soft_recipe(teacher, steps, cache="", **changes) -> Recipe:
    """Three updates from 24 chains in soft windows, of means in two layers; turns are kept in `steps`."""
    base = recipe(teacher)
    data = dataclasses.replace(
        base.data, train=source("train", 24), segmentation="soft:12", steps_cache=str(steps), chains_per_row=1
    )
    common = {
        "teacher": dataclasses.replace(base.teacher, cache=str(cache)),
        "cache": CacheSettings(10**4, "float32", "float32"),
        "data": data,
        "total_updates": 3,
        "loss": LossSettings(chunk_length=32, step_state="mean", layers="1:1,-1:-1"),
        "optimizer": OptimizerSettings(learning_rate=1e-2, warmup_updates=1, eps=1e-2),
        "curriculum": CurriculumSettings(enabled=False, validate_every=2, validation_chains=4),
        "log_every": 1,
        "checkpoint_every": 10,
    }
    return dataclasses.replace(base, **(common | changes))


def test_a_run_from_the_teachers_cache_and_one_that_begins_again_have_the_same_windows(teacher, tmp_path, monkeypatch):
    """Their turns are on disk: nothing is read again, and from the cache the weights are never loaded."""
    monkeypatch.setattr("rtd_jax.apps.distill.prepare.make_mesh", one_device_mesh)
    monkeypatch.setattr("rtd_jax.apps.cache.make_mesh", one_device_mesh)
    steps, cache = tmp_path / "steps", tmp_path / "cache"
    experiment, state = prepare(soft_recipe(teacher, steps), lambda _: None)
    assert all(chain.places is not None for chain in (*experiment.train.encoded, *experiment.validation.encoded))
    (tmp_path / "online").mkdir()
    online = trained(experiment, Run(state, Clock()), tmp_path / "online")
    model, params = experiment.teacher, experiment.teacher_params
    chain = experiment.train.encoded[0]
    tokens_BL = chain.tokens[None]
    hidden_LD = np.asarray(model.hidden(params, tokens_BL, np.arange(len(chain))[None], np.ones_like(tokens_BL))[0])
    unit_LD = hidden_LD / np.linalg.norm(hidden_LD, axis=-1, keepdims=True)
    turns_T = 1 - np.sum(unit_LD[1:] * unit_LD[:-1], axis=-1)[chain.prompt_length - 1 :]
    places_T = places_among(turns_T, len(chain.boundaries) - 1)
    np.testing.assert_allclose(chain.places[chain.prompt_length :], places_T, rtol=1e-2)
    assert np.std(turns_T) > 0.1 * np.mean(turns_T)  # else any order of turns would do

    def refuse(*args):
        raise AssertionError("the teacher's turns were read again")

    monkeypatch.setattr("rtd_jax.steps.soft.teacher_turns", refuse)
    again, _ = prepare(soft_recipe(teacher, steps), lambda _: None)
    assert again.fingerprints == experiment.fingerprints
    cache_teacher(soft_recipe(teacher, steps, cache), cache)
    notes: list[str] = []
    cached, state = prepare(soft_recipe(teacher, steps, cache), notes.append)
    assert not any(note.startswith("loading the weights") for note in notes)
    assert cached.fingerprints["data"] == experiment.fingerprints["data"]
    (tmp_path / "cached").mkdir()
    for ours, theirs in zip(trained(cached, Run(state, Clock()), tmp_path / "cached"), online, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            if isinstance(ours[name], float):
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5, err_msg=name)
    monkeypatch.setattr("rtd_jax.steps.soft.teacher_turns", other_turns)
    with pytest.raises(ValueError, match=r"data\.steps_cache '' is not the one with the turns it was cut by"):
        prepare(soft_recipe(teacher, "", cache), lambda _: None)


def other_turns(model, params, tokens_BL, mask_BL):
    """As of a machine that computes otherwise."""
    return teacher_turns(model, params, tokens_BL, mask_BL) + jnp.linspace(0, 0.1, tokens_BL.shape[1])[:, None, None]


def test_kept_turns_are_the_teachers_and_its_dtypes_and_one_process_reads_them(tmp_path, monkeypatch):
    calls = []

    def load():
        calls.append(1)
        return None, {}

    def turns(model, params, tokens_BL, mask_BL):
        return (tokens_BL[..., None, None] * mask_BL[..., None, None]).astype(np.float16)

    monkeypatch.setattr("rtd_jax.steps.soft.teacher_turns", turns)
    windows = SoftWindows(3, "teacher", "float32", one_device_mesh(), load, tmp_path, note=lambda _: None)
    chains = [chain_of(7, 2), chain_of(9, 4)]
    first = windows.turns(chains)
    assert [x.tolist() for x in first] == [[3, 4, 5, 6, 7], [5, 6, 7, 8, 9]]  # of completions alone
    assert [x.tolist() for x in dataclasses.replace(windows, tokens=5).turns(chains)] == [x.tolist() for x in first]
    assert len(calls) == 1
    for other in ({"fingerprint": "other"}, {"described": "bfloat16"}):
        dataclasses.replace(windows, **other).turns(chains)
    assert len(calls) == 3
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert len(windows.turns(chains)) == 2
    with pytest.raises(ValueError, match="2 processes cannot share reading them"):
        windows.turns(chains[:1])


@pytest.mark.parametrize("is_kept", [False, True])
def test_turns_that_are_not_finite_are_refused_by_chain_whether_they_are_kept_or_not(is_kept, tmp_path, monkeypatch):
    """They would add up to no number, and the chain would silently be cut into windows of a stride."""

    def turns(model, params, tokens_BL, mask_BL):
        return jnp.where(tokens_BL == 9, jnp.nan, 1.0)[..., None, None].astype(jnp.float16)

    monkeypatch.setattr("rtd_jax.steps.soft.teacher_turns", turns)
    folder = tmp_path if is_kept else None
    windows = SoftWindows(3, "teacher", "float32", one_device_mesh(), lambda: (None, {}), folder, note=lambda _: None)
    chains = [dataclasses.replace(chain, source=f"text {len(chain)}") for chain in (chain_of(7, 2), chain_of(9, 4))]
    assert len(windows.cut(chains[:1])) == 1
    with pytest.raises(ValueError, match="text 9: the teacher's hidden states on this chain are not finite"):
        windows.cut(chains)


def test_behind_solved_examples_a_chain_keeps_its_windows():
    cut = soft(chain_of(12, 3), 4, 0)
    other = dataclasses.replace(
        chain_of(14, 5), tokens=np.concatenate([np.int32([91, 92, 93, 94, 95]), cut.tokens[3:]])
    )
    moved = behind_another_prompt(other, cut)
    assert moved.boundaries.tolist() == (cut.boundaries + 2).tolist()
    np.testing.assert_array_equal(moved.places, [0, 0, *cut.places])
    np.testing.assert_array_equal(moved.tokens, other.tokens)


@pytest.mark.parametrize("segmentation", ["soft:", "soft:0", "soft:x", "soft:-4"])
def test_soft_windows_of_no_number_of_tokens_are_refused(segmentation):
    with pytest.raises(ValueError, match=r"say how many tokens a window has, e\.g\. 'soft:16'"):
        soft_of(segmentation)


def test_what_a_segmentation_needs():
    known = ("annotated", "random", "classifier:x", "stride:12", "soft:12")
    assert [soft_of(x) for x in known] == [0, 0, 0, 0, 12]
    assert stride_of("soft:12") == 0
    assert [is_windows(x) for x in known] == [False, False, False, True, True]
    assert [reads_teacher(x) for x in known] == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_policy.fraction": 0.5}, "read each chain that the student draws .* use data.segmentation='stride:8'"),
        ({"teacher.cache": "x", "evaluation.drift_problems": 4}, "the teacher's cache has the states of windows"),
        (
            {"teacher.cache": "x", "teacher.served_model": "m", "loss.temperature": 1.0},
            "gives no hidden states, .*data.segmentation=stride:8",
        ),
    ],
)
def test_what_soft_windows_cannot_do_is_refused(changes, message):
    values = get_config()
    values.update_from_flattened_dict({"data.segmentation": "soft:8", "evaluation.teacher": False} | changes)
    with pytest.raises(ValueError, match=message):
        build(Recipe, values.to_dict())


def test_settings_that_soft_windows_read_are_not_said_to_be_unread():
    values = get_config()
    values.update_from_flattened_dict(
        {"data.segmentation": "soft:8", "teacher.cache": "x", "evaluation.drift_problems": 0}
    )
    found = build(Recipe, values.to_dict())
    assert "steps_cache" not in found.data.unread_settings()
    assert "teacher.attention" not in found.unread_settings()  # the teacher is loaded where turns are missing


def test_a_plan_has_places_in_its_batch(teacher):
    """So the update that it lowers is the one that runs."""
    planned = abstract_step(soft_recipe(teacher, "", batch_size=8), one_device_mesh())
    assert planned.batch.places_BL.shape == planned.batch.tokens_BL.shape
    assert planned.batch.places_BL.dtype == np.float32
    jax.eval_shape(planned.step, *planned.arguments)
