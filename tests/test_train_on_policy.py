"""On-policy distillation: what is drawn, what the update makes of it, and a run that is resumed."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from tiny_run import one_device_mesh, recipe, trained, write_teacher

from rtd_jax.apps.distill.on_policy import before_answer, make_on_policy_sampler, step_finder
from rtd_jax.apps.distill.own_chains import drawn_chain, span_ends
from rtd_jax.apps.distill.prepare import Experiment, prepare
from rtd_jax.apps.distill.run import train
from rtd_jax.apps.distill.stages import Run
from rtd_jax.base.sharding import MeshSettings, make_mesh, put_batch, to_host
from rtd_jax.base.types import Batch
from rtd_jax.data.encoding import EncodedChain, encode_traces
from rtd_jax.data.generators.word_problems import generate
from rtd_jax.data.packing import fixed_batches, one_batch
from rtd_jax.data.prose import prose_steps
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT, tiny_tokenizer
from rtd_jax.data.trace import Trace
from rtd_jax.methods import LossSettings
from rtd_jax.methods.own_chains import OnPolicySettings, RewardSettings
from rtd_jax.methods.term import Setup
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel
from rtd_jax.train.checkpoints import read_meta, restore_state
from rtd_jax.train.clock import Clock
from rtd_jax.train.curriculum import CurriculumSettings
from rtd_jax.train.recipe import EvaluationSettings
from rtd_jax.train.state import create_state
from rtd_jax.train.update import UpdateSettings, make_train_step

TOKENIZER = tiny_tokenizer()
TEACHER = DecoderModel(DecoderConfig(len(TOKENIZER), 16, 24, layers=2, heads=2, kv_heads=2, head_dim=8, init_std=0.3))
STUDENT = DecoderModel(replace(TEACHER.config, layers=1))
SGD = optax.sgd(1.0)  # the update is the gradient
SOFT = LossSettings(chunk_length=64, alpha=1.0, intermediate_weight=0.2)
METRICS = ("soft_loss", "kl_div_T1", "alignment", "coherence", "intermediate")


@functools.cache
def chains(split: str, rows: int = 8) -> Batch:
    encoded, _ = encode_traces(TOKENIZER, generate(rows, (1, 2, 3), split), TINY_FORMAT, row_length=96)
    (batch,) = fixed_batches(encoded, rows, 96, 1, 4)
    return batch


def update(fraction: float, data: Batch | None, own: Batch | None, micro_batches: int = 1, sizes=(1, 1, 1), loss=SOFT):
    """(what one SGD update moves, metrics)"""
    mesh = make_mesh(MeshSettings(*sizes), jax.devices()[: int(np.prod(sizes))])
    setup = Setup(STUDENT.config, TEACHER.config, len(TOKENIZER), mesh=mesh, on_policy=OnPolicySettings(fraction))
    objective = loss.objective(setup)
    step = make_train_step(STUDENT, TEACHER, SGD, objective, UpdateSettings(micro_batches), mesh)
    key = jax.random.PRNGKey(0)
    params = {"student": STUDENT.init(key), **objective.init_params(key, 16, 16)}
    before = jax.device_get(params)
    given = [None if batch is None else put_batch(batch, mesh) for batch in (data, own)]
    state, metrics = step(
        create_state(params, SGD, key), TEACHER.init(jax.random.key(1)), given[0], objective.coefficients(), given[1]
    )
    return jax.tree.map(lambda a, b: a - b, to_host(state.params), before), jax.device_get(metrics)


def assert_close(found, wanted, atol: float):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), found, wanted)


def test_the_terms_that_read_the_teacher_are_there_twice_and_share_the_weight():
    def terms(fraction: float, **changes):
        setup = Setup(TEACHER.config, TEACHER.config, 32, on_policy=OnPolicySettings(fraction))
        return {term.key: term for term in LossSettings(**changes).objective(setup).terms}

    found = terms(0.25, alpha=0.6)
    assert {key: term.weight for key, term in found.items()} == pytest.approx(
        {"kd": 0.75, "alignment": 0.225, "coherence": 0.375}
        | {"own/kd": 0.25, "own/alignment": 0.075, "own/coherence": 0.125}
    )
    assert (found["kd"].alpha, found["own/kd"].alpha) == (0.6, 1.0)  # what the student drew is no label
    assert set(terms(1.0)) == {"own/kd", "own/alignment", "own/coherence"}
    # With alpha 0 nobody asked for the divergence.
    assert terms(0.5, alpha=0.0)["own/kd"].weight == 0.0
    assert set(terms(0.0)) == {"kd", "alignment", "coherence"}


def test_own_chains_that_are_the_datas_give_the_update_of_the_data():
    """Each term is averaged over its own chains, so the shares of one and the same batch make up the whole."""
    data = chains("train")
    plain, metrics = update(0.0, data, None)
    half, of_half = update(0.5, data, data)
    alone, of_alone = update(1.0, None, data)
    assert_close(half, plain, 1e-6)
    assert_close(alone, plain, 1e-6)
    for name in METRICS:
        wanted = metrics[f"distill/{name}"].value()
        np.testing.assert_allclose(of_half[f"own/{name}"].value(), wanted, rtol=1e-6)
        np.testing.assert_allclose(of_alone[f"own/{name}"].value(), wanted, rtol=1e-6)
    assert not any(name.startswith("distill/") for name in of_alone)
    np.testing.assert_allclose(of_half["loss"].value(), metrics["loss"].value(), rtol=1e-6)


def test_shares_are_weights_of_the_two_losses():
    data, own = chains("train"), chains("test")
    of_data, _ = update(0.0, data, None)
    of_own, _ = update(1.0, None, own)
    found, _ = update(0.25, data, own)
    assert_close(found, jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, of_data, of_own), 1e-6)


@pytest.mark.parametrize(("micro_batches", "sizes"), [(2, (1, 1, 1)), (1, (2, 1, 1)), (2, (1, 4, 1)), (1, (2, 2, 2))])
def test_the_update_does_not_depend_on_devices_and_micro_batches(micro_batches, sizes):
    # A mean that was taken over the rows of a part would show: the chains differ in length and steps.
    data, own = chains("train"), chains("test")
    wanted, metrics = update(0.5, data, own)
    found, again = update(0.5, data, own, micro_batches, sizes)
    assert_close(found, wanted, 3e-6)
    for name in ("own/kl_div_T1", "own/coherence", "loss"):
        np.testing.assert_allclose(again[name].value(), metrics[name].value(), rtol=1e-5)


def test_packing_changes_nothing_but_the_rows():
    encoded, _ = encode_traces(TOKENIZER, generate(8, (1, 2), "test"), TINY_FORMAT, row_length=96)
    (apart,) = fixed_batches(encoded, 8, 96, 1, 4)
    packed, fitting = one_batch(encoded, 4, 192, 4, 4)
    assert fitting == 8
    wanted, _ = update(1.0, None, apart)
    found, _ = update(1.0, None, packed)
    assert_close(found, wanted, 3e-6)


def chain_of(length: int) -> EncodedChain:
    tokens = np.arange(length, dtype=np.int32)
    return EncodedChain(tokens, 1, np.array([0, length - 1], np.int32), (tokens > 0).astype(np.float32), "x")


def test_chains_that_find_no_room_are_left_out_and_rows_that_no_chain_needs_are_empty():
    found, fitting = one_batch([chain_of(n) for n in (6, 5, 4, 5)], 2, 10, 2, 2)
    assert fitting == 4  # 6 + 4 and 5 + 5: the first row with room, though another was opened after it
    np.testing.assert_array_equal(found.chain_ids_BL[0], [1] * 6 + [2] * 4)
    np.testing.assert_array_equal(found.boundary_positions_BCK[0], [[0, 5], [6, 9]])
    _, fitting = one_batch([chain_of(n) for n in (6, 6, 6)], 2, 10, 2, 2)
    assert fitting == 2
    found, fitting = one_batch([chain_of(3)], 3, 10, 2, 2)
    assert fitting == 1
    assert not found.chain_ids_BL[1:].any()


def test_an_unfinished_chain_keeps_its_tokens_and_has_no_end():
    chain = drawn_chain([5, 6, 7], [8, 9, 10, 11], [1], 64, 9, whole=True)
    np.testing.assert_array_equal(chain.loss_weights, [0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(chain.boundaries, [2, 4])
    nothing = drawn_chain([5, 6, 7], [2], [], 64, 9, whole=True)
    np.testing.assert_array_equal(nothing.loss_weights, [0, 0, 0, 1])  # that it ended at once is to be learned from too
    cut = drawn_chain([5, 6, 7], [8, 9, 10, 11], [1, 3], 5, 9, whole=True)
    np.testing.assert_array_equal(cut.loss_weights, [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(cut.boundaries, [2, 4])


def test_steps_of_prose_end_at_the_last_token_of_their_characters():
    texts = ["First, ", "add 2 and 3", ". ", "It is 5.", "\n", "Next, double", " it: 10."]
    spans = prose_steps("".join(texts))
    assert len(spans) == 2
    assert span_ends(texts, spans, True) == [3, 6]
    assert span_ends(texts, spans, False) == [3]  # the last step is not finished where the text is not
    assert span_ends([], [], False) == []


def test_the_answer_line_is_no_step_for_a_classifier():
    assert before_answer("a\nb\n#### 5\nc") == "a\nb\n"
    assert before_answer("#### Step 2\na\n") == "#### Step 2\na\n"  # a heading


# Runs.
@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("on_policy")
    write_teacher(folder / "teacher")
    return folder


def own_recipe(folder: Path, **changes):
    settings = {
        "loss": LossSettings(chunk_length=32),
        "on_policy": OnPolicySettings(0.5, updates_per_refresh=2, max_new_tokens=24),
        "curriculum": CurriculumSettings(enabled=False, validate_every=8, validation_chains=8),
        "total_updates": 8,
        "evaluation": EvaluationSettings(problems_per_depth=1, max_new_tokens=4, batch_size=4, teacher=False),
    }
    return recipe(folder / "teacher", **(settings | changes))


def prepared(recipe) -> tuple[Experiment, object]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rtd_jax.apps.distill.prepare.make_mesh", one_device_mesh)
        experiment, state = prepare(recipe, lambda _: None)
    return experiment, jax.device_get(state)


@pytest.fixture(scope="module")
def single(folder):
    """(experiment, initial state on the host), on one device."""
    return prepared(own_recipe(folder))


def draw(experiment, state, at: int = 0):
    drawn = make_on_policy_sampler(experiment)(state._replace(step=state.step + at), experiment.stages[0])
    return drawn._replace(chains=to_host(drawn.chains))


def test_what_is_drawn_depends_on_the_update_and_not_on_the_mesh(folder, single):
    first = draw(*single, 2)
    assert len(first.chains) == 2  # as many as there are updates until new ones are due
    same = draw(*prepare(own_recipe(folder, mesh=MeshSettings(2, 2, 2)), lambda _: None), 2)
    jax.tree.map(np.testing.assert_array_equal, same.chains, first.chains)
    other = draw(*single, 4)
    assert not np.array_equal(first.chains[0].tokens_BL, other.chains[0].tokens_BL)
    assert not np.array_equal(first.chains[0].tokens_BL, first.chains[1].tokens_BL)


def test_drawn_chains_are_the_students_continuations_of_training_problems(single):
    experiment, state = single
    drawn = draw(experiment, state)
    prompts = {tuple(c.tokens[: c.prompt_length].tolist()) for c in experiment.train.encoded}
    batch = drawn.chains[0]
    assert batch.tokens_BL.shape == (experiment.recipe.own_rows, experiment.recipe.data.row_length)
    for row in range(len(batch.tokens_BL)):
        for number in range(1, int(batch.chain_ids_BL[row].max()) + 1):
            of_chain = batch.chain_ids_BL[row] == number
            tokens, weights = batch.tokens_BL[row, of_chain], batch.loss_weights_BL[row, of_chain]
            start = int(np.argmax(weights > 0))
            assert tuple(tokens[:start].tolist()) in prompts
            assert weights[start:].all()  # all that it wrote
            assert len(tokens) - start <= 24
    counted = sum(int(np.count_nonzero(batch.loss_weights_BL)) for batch in drawn.chains)
    assert counted == sum(predicted for _, predicted in drawn.tokens)
    assert 0.0 <= drawn.means["own/ended"] <= 1.0


def test_the_end_that_the_student_writes_is_learned_from(single, monkeypatch):
    experiment, state = single
    line = TOKENIZER("2 + 3 = 5.\n", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(
        "rtd_jax.apps.distill.own_chains.generate", lambda model, params, prompts, *_, **__: [line for _ in prompts]
    )
    drawn = draw(experiment, state)
    batch, end = drawn.chains[0], TOKENIZER.eos_token_id
    last = [np.flatnonzero(row == 1)[-1] for row in batch.chain_ids_BL if row.any()]
    assert [batch.tokens_BL[row, place] for row, place in enumerate(last)] == [end] * len(last)
    assert all(batch.loss_weights_BL[row, place] == 1 for row, place in enumerate(last))
    assert batch.boundary_mask_BCK[0, 0].sum() == 2  # the prompt's end and the line's
    assert drawn.means["own/ended"] == 1.0


def test_how_steps_are_found_is_a_setting(folder, single):
    experiment, _ = single
    written = ["Costs:", "\n", "2 + 3", " = 5", "\n", "#### 5"]
    given = [Trace("x", "a", ((0, 1),), "1")], [written], [True]
    rules = replace(experiment, recipe=replace(experiment.recipe, on_policy=OnPolicySettings(0.5, steps="prose")))
    assert step_finder(experiment)(*given) == [[0, 3]]  # every line
    assert step_finder(rules)(*given) == [[5]]  # what ends with a colon belongs to what follows, and so does the answer


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_resumed_run_draws_again_and_ends_with_the_same_bits(folder, fraction, tmp_path):
    settings = OnPolicySettings(fraction, updates_per_refresh=2, max_new_tokens=24)
    experiment, state = prepared(own_recipe(folder, on_policy=settings))
    whole = Run(jax.device_put(state, jax.sharding.SingleDeviceSharding(jax.devices()[0])), Clock())
    lines = trained(experiment, whole, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "stages")
    path = tmp_path / "checkpoints" / "rolling" / "4"
    resumed = Run.from_meta(restore_state(path, whole.state), Clock(), read_meta(path))
    assert int(resumed.state.step) == 4
    assert trained(experiment, resumed, tmp_path) == lines
    jax.tree.map(np.testing.assert_array_equal, to_host(resumed.state), to_host(whole.state))
    assert sum("own/ended" in line for line in lines) == 4
    assert (resumed.data_tokens, resumed.own_tokens) == (whole.data_tokens, whole.own_tokens)
    assert whole.own_tokens > 0
    assert (whole.data_tokens > 0) == (fraction < 1.0)
    assert any("own/kl_div_T1" in line for line in lines)


def test_a_run_says_what_it_drew_and_how_long_that_took(folder, tmp_path, capsys):
    evaluation = EvaluationSettings(1, max_new_tokens=48, batch_size=8, teacher=False, drift_problems=8, drift_own=True)
    changes = {"total_updates": 4, "log_every": 2, "batch_size": 16, "evaluation": evaluation}
    report = json.loads(train(own_recipe(folder, **changes), tmp_path).read_text())
    assert report["tokens"]["data"] > 0
    assert report["tokens"]["own"] > 0
    assert report["seconds"]["rollouts"] > 0
    assert "drawing" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["perf/drawing_share"] <= 1 for line in lines if "own/ended" in line)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": LossSettings(alpha=0.0, alignment_weight=0.0, coherence_weight=0.0)}, "nothing of the teacher"),
        (
            {"loss": LossSettings(reward_weight=0.1), "reward": RewardSettings("judge", updates_per_refresh=2)},
            "set one of them to 0",
        ),
        (
            {"on_policy": OnPolicySettings(0.5, updates_per_refresh=3)},
            "not a multiple of on_policy.updates_per_refresh",
        ),
        ({"on_policy": OnPolicySettings(0.5, steps="classifier")}, "expected classifier:<folder>"),
        ({"batch_size": 1}, "batch_size of 1 row cannot hold both kinds"),
    ],
)
def test_what_cannot_be_drawn_or_taught_is_refused(folder, changes, words):
    with pytest.raises(ValueError, match=words):
        own_recipe(folder, **changes)


def test_a_cached_teacher_cannot_read_drawn_chains(folder):
    good = own_recipe(folder)
    with pytest.raises(ValueError, match=r"on_policy\.fraction needs the teacher online"):
        replace(good, teacher=replace(good.teacher, cache="somewhere"))
