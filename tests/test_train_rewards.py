"""Learning from rewards of steps: what is drawn and scored, the update, and a run that is resumed."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from tiny_run import one_device_mesh, recipe, source, trained, write_teacher

from rtd_jax.apps.cache import cache_teacher
from rtd_jax.apps.distill.judged_rewards import check_judged, judged_rewards
from rtd_jax.apps.distill.own_chains import drawn_chain, step_ends, step_texts
from rtd_jax.apps.distill.prepare import prepare
from rtd_jax.apps.distill.stages import Run
from rtd_jax.apps.distill.step_rewards import at_boundaries, make_reward_sampler
from rtd_jax.apps.pretrain import SizeSettings, model_config
from rtd_jax.apps.reward_model import LabelledSteps, RewardModelRecipe, fit_head, judge, train_reward_model
from rtd_jax.base.boundaries import step_boundaries
from rtd_jax.base.files import json_digest
from rtd_jax.base.records import save_arrays
from rtd_jax.base.sharding import MeshSettings, make_mesh, put_batch, to_host
from rtd_jax.base.types import Batch
from rtd_jax.data.encoding import encode_traces
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.generators.word_problems import generate
from rtd_jax.data.labelled import LabelledSettings
from rtd_jax.data.packing import fixed_batches
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT, tiny_tokenizer
from rtd_jax.data.trace import Trace
from rtd_jax.losses.policy import Rollouts
from rtd_jax.methods import LossSettings
from rtd_jax.methods.own_chains import RewardSettings
from rtd_jax.methods.term import Setup
from rtd_jax.models.model import DecoderModel
from rtd_jax.teacher.identity import CacheSettings
from rtd_jax.teacher.reward_head import (
    RewardIdentity,
    init_head,
    load_head,
    save_head,
    step_features,
    step_logits,
)
from rtd_jax.train.checkpoints import read_meta, restore_state
from rtd_jax.train.clock import Clock
from rtd_jax.train.curriculum import CurriculumSettings, stages
from rtd_jax.train.recipe import DataSettings, EvaluationSettings, TeacherSettings
from rtd_jax.train.splits import load_splits
from rtd_jax.train.state import create_state
from rtd_jax.train.update import UpdateSettings, make_train_step

TOKENIZER = tiny_tokenizer()


def pieces_of(text: str) -> tuple[list[int], list[str]]:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return ids, [TOKENIZER.decode([i]) for i in ids]


def chain_of(text: str, ended: bool = True, row_length: int = 64, max_steps: int = 9):
    ids, pieces = pieces_of(text)
    return drawn_chain([5, 6, 7], ids, step_ends(pieces, ended)[0], row_length, max_steps), pieces


def test_a_drawn_chain_has_its_own_ids_and_a_boundary_at_the_end_of_each_line():
    chain, pieces = chain_of("March 3 found: <<5+3=8>>8.\n\nApril 4 lost: <<8-4=4>>4.\n#### 4")
    ends = [3 + i for i, piece in enumerate(pieces) if piece.startswith(".")]
    assert chain.boundaries.tolist() == [2, *ends]
    assert chain.tokens.tolist()[:3] == [5, 6, 7]
    assert len(chain) == 3 + len(pieces)
    assert chain.loss_weights.tolist() == [0.0] * 3 + [1.0] * (ends[1] - 2) + [0.0] * (len(chain) - ends[1] - 1)


def test_the_conclusions_of_a_drawn_chain_are_those_of_the_same_text_as_data():
    steps = ["March 3 found: <<5+3=8>>8.", "April 4 lost: <<8-4=4>>4.", "May won"]
    trace = Trace.of_steps("How many pens does Lily have?", steps, "4", "#### 4")
    (wanted,), _ = encode_traces(TOKENIZER, [trace], TINY_FORMAT, row_length=96)
    prompt, written = np.split(wanted.tokens, [wanted.prompt_length])
    pieces = [TOKENIZER.decode([i]) for i in written]
    ends = wanted.boundaries[1:] - wanted.prompt_length
    chain = drawn_chain(prompt.tolist(), written.tolist(), ends.tolist(), 96, 9, whole=True, texts=pieces)
    np.testing.assert_array_equal(chain.conclusions, wanted.conclusions)
    assert set(chain.conclusions.tolist()) == {0, 1, 2, 3}


def test_only_finished_steps_before_the_answer_count():
    text = "March 3 found: <<5+3=8>>8.\nApril 4"
    assert chain_of(text, ended=False)[0].depth == 1  # cut off by the limit: nobody knows how the line would end
    assert chain_of(text, ended=True)[0].depth == 2
    assert chain_of("#### 4\nMarch 3 found", ended=True)[0].depth == 0
    assert chain_of("", ended=True)[0].loss_weights.sum() == 0
    assert chain_of("1\n2\n3\n4\n", max_steps=2)[0].depth == 2
    short, _ = chain_of("1\n2\n3\n4\n", row_length=6)  # 3 of prompt, then "1", line end, "2"
    assert len(short) == 6
    assert short.depth == 2


PENS = Trace.of_steps(
    "How many pens does Lily have? Lily starts with 2. November 9 won. December 6 dropped. January 4 earned.",
    ["November 9 won: <<2+9=11>>11.", "December 6 dropped: <<11-6=5>>5.", "January 4 earned: <<5+4=9>>9."],
    "9",
    "#### 9",
)
WON, DROPPED, EARNED = PENS.steps


@pytest.mark.parametrize(
    ("lines", "ended", "rewards"),
    [
        ((WON, DROPPED, EARNED, "#### 9"), True, [1, 1, 1, 1]),
        ((WON, DROPPED, EARNED), True, [1, 1, 1]),  # it ends in its answer
        ((WON, DROPPED, EARNED, "#### 9", "March 3"), False, [1, 1, 1, 1]),  # cut off behind its answer
        # Wrong in the middle. 4 + 4 goes on from there, what does not is right, and what says nothing earns nothing.
        ((WON, "<<11-6=4>>4.", "<<4+4=8>>8.", "#### 8"), True, [1, 0, 0, 0]),
        ((WON, "<<11-6=4>>4.", EARNED, "#### 9"), True, [1, 0, 1, 1]),
        (("Lily won.", "<<2+9=12>>12.", "Lily won.", EARNED, "#### 12"), True, [1, 0, 0, 1, 0]),
        ((WON, DROPPED, EARNED, "#### 8"), True, [1, 1, 1, 0]),  # the wrong answer is the first wrong step
        ((WON, DROPPED, "#### 5"), True, [1, 0, 0]),  # a result on the way, taken for the answer
        ((WON, DROPPED, "January 4"), False, [1, 0]),  # unfinished: no answer
        (("#### 9",), True, [1]),
        (("#### 9",), False, []),  # the number may go on
        ((), True, []),
    ],
)
def test_the_judge_rewards_the_steps_of_a_drawn_chain(lines, ended, rewards):
    """By hand, from the drawn ids to a reward at each boundary; the boundaries are those of the judged texts."""
    ids, pieces = pieces_of("\n".join(lines))
    ends, states_answer = step_ends(pieces, ended, with_answer=True)
    steps = step_texts(ids, ends, TOKENIZER.decode)
    assert steps == list(lines[: len(rewards)])
    found, is_right = judged_rewards(PENS, steps, states_answer, ended)
    assert found == rewards
    assert is_right == (bool(rewards) and all(rewards))
    chain = drawn_chain([5, 6, 7], ids, ends, 96, 9)
    assert chain.depth == len(rewards)
    assert chain.loss_weights.sum() == (ends[-1] + 1 if ends else 0)  # the answer line is learned from as well
    ((values,),) = at_boundaries([found], [chain], 10, 1, (0, 1))
    assert values[0].tolist() == [0, *rewards, *[0] * (9 - len(rewards))]


def test_a_step_that_ends_in_the_token_of_the_answer_line_is_as_right_as_the_answer():
    """Some tokenizers may have a line end and `####` in one token; a boundary has a token of its own."""
    pieces = [WON, "\n", DROPPED, "\n", EARNED.removesuffix("."), ".\n#### "]
    for answer, reward in (("9", 1.0), ("8", 0.0)):
        texts = [*pieces[:-1], pieces[-1] + answer]
        ends, states_answer = step_ends(texts, True, with_answer=True)
        assert (ends, states_answer) == ([0, 2, 5], True)
        steps = [WON, DROPPED, f"{EARNED}\n#### {answer}"]
        assert judged_rewards(PENS, steps, states_answer, True)[0] == [1.0, 1.0, reward]


def test_a_step_is_decoded_whole():
    """A token may hold a part of a character, which is no text."""
    written = list("½ = 0.5\nso".encode())
    ends, _ = step_ends([bytes([i]).decode(errors="replace") for i in written], True)
    assert step_texts(written, ends, lambda ids: bytes(ids).decode()) == ["½ = 0.5", "so"]


def test_rewards_lie_in_the_slots_of_their_steps_in_every_batch_and_process():
    texts = ["1\n2\n3\n", "1\n", "", "1\n2\n"]
    chains = [chain_of(text, max_steps=2)[0] for text in texts]
    rewards = [[1.0, 2.0, 3.0], [4.0], [], [5.0, 6.0]]  # the third step has no room
    whole = at_boundaries(rewards, chains, 3, 2, (0, 1))
    for values, batch in zip(whole, fixed_batches(chains, 2, 64, 1, 3), strict=True):
        np.testing.assert_array_equal(values > 0, step_boundaries(batch.boundary_mask_BCK))
    assert [values[:, 0].tolist() for values in whole] == [[[0, 1, 2], [0, 4, 0]], [[0, 0, 0], [0, 5, 6]]]
    parts = [at_boundaries(rewards, chains, 3, 2, (i, 2)) for i in range(2)]
    for joined, values in zip(map(np.concatenate, zip(*parts, strict=True)), whole, strict=True):
        np.testing.assert_array_equal(joined, values)


def test_features_of_a_step_are_its_boundary_state_and_the_surprise_at_its_tokens():
    zeros = np.zeros((1, 6), np.int32)
    batch = Batch(zeros, zeros, zeros, zeros.astype(np.float32), np.array([[[1, 3, 5]]]), np.ones((1, 1, 3), bool))
    states = jnp.arange(6.0).reshape(1, 6, 1)
    log_probs = -jnp.array([[9.0, 9.0, 1.0, 3.0, 0.5, 0.0]])
    found = step_features((states, 10 * states), log_probs, batch)
    np.testing.assert_allclose(found, [[[[1, 10, 0, 0], [3, 30, 2.0, 3.0], [5, 50, 0.25, 0.5]]]])
    np.testing.assert_allclose(step_features((states,), None, batch), [[[[1], [3], [5]]]])


def test_forms_of_text_are_the_same_where_their_texts_are():
    assert TextFormat("chat", completion_prefix="").identity == TextFormat("chat", "{prompt}").identity
    assert TextFormat("plain", completion_prefix="").identity != TextFormat("plain").identity
    assert TINY_FORMAT.identity == TextFormat("plain", "Question: {prompt}\nAnswer:\n", "").identity


def test_a_head_begins_undecided_and_learns_what_separates_the_steps():
    rng = np.random.default_rng(0)
    features = rng.normal(3.0, 2.0, (400, 2)).astype(np.float32)
    right = features[:, 0] + 0.3 * rng.normal(size=400) > 3.0
    steps = LabelledSteps(features, right, np.arange(400) // 4, np.arange(400) % 4)
    settings = LabelledSettings("synthetic", limit=1)
    options = RewardModelRecipe(
        TeacherSettings("x"), settings, settings, epochs=40, steps_per_update=100, learning_rate=0.05
    )
    assert np.all(np.asarray(step_logits(init_head(jax.random.key(0), 2, 3), features)) == 0)
    head, losses = fit_head(replace(options, hidden=4), steps)
    found = judge(head, steps, options)
    assert found["auroc"]["value"] > 0.97
    assert found["accuracy"]["mean"] > 0.9
    assert losses[-1] < 0.5 * losses[0]
    np.testing.assert_allclose(head["mean"], features.mean(0), rtol=1e-5)
    # By hand: standardised, then linear.
    linear = {
        "mean": np.array([1.0, 2.0]),
        "scale": np.array([2.0, 4.0]),
        "out": np.array([3.0, -1.0]),
        "out_bias": 0.5,
    }
    np.testing.assert_allclose(step_logits(linear, np.array([3.0, 10.0])), 3.0 * 1.0 - 1.0 * 2.0 + 0.5)
    with pytest.raises(ValueError, match="400 of 400 training steps are labelled right; a reward model needs both"):
        fit_head(options, steps._replace(right_M=np.ones(400, bool)))


def test_a_saved_head_belongs_to_its_teacher_and_its_file(tmp_path):
    identity = RewardIdentity("teacher", "tokenizer", "text", (1, 2), True, 66)
    params = init_head(jax.random.key(0), 66, 4)
    save_head(tmp_path, params, identity)
    loaded = load_head(tmp_path, "teacher", "tokenizer", "text")
    assert loaded.identity == identity
    jax.tree.map(np.testing.assert_array_equal, loaded.head, params)
    with pytest.raises(ValueError, match=r"was trained on another teacher .*; train one on this teacher"):
        load_head(tmp_path, "other", "tokenizer", "text")
    with pytest.raises(ValueError, match="was trained on another tokenizer"):
        load_head(tmp_path, "teacher", "other", "text")
    with pytest.raises(ValueError, match="was trained on another form of text: text, this run's is chat"):
        load_head(tmp_path, "teacher", "tokenizer", "chat")
    with pytest.raises(ValueError, match=r"holds no reward model \(no head.json\); train one with"):
        load_head(tmp_path / "nowhere", "teacher", "tokenizer", "text")
    (tmp_path / "head.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"is not the file that the JSON beside it was written with"):
        load_head(tmp_path, "teacher", "tokenizer", "text")


def test_a_head_of_another_shape_is_refused_by_name(tmp_path):
    identity = RewardIdentity("teacher", "tokenizer", "text", (1, 2), True, 66)
    save_head(tmp_path, init_head(jax.random.key(0), 66, 4), identity)
    path, weights = tmp_path / "head.json", tmp_path / "head.safetensors"
    saved, arrays = json.loads(path.read_text()), load_file(weights)
    del saved["digest"]

    def refused(message: str, record: dict, old: bool = False) -> None:
        path.write_text(json.dumps(record | ({"format": 2} if old else {"digest": json_digest(record)})))
        with pytest.raises(ValueError, match=rf"{tmp_path}.*({message})"):
            load_head(tmp_path, "teacher", "tokenizer", "text")

    for old in (False, True):
        for value in (None, [], {}, "x", 3, {"layers": [1]}):
            refused("identity", saved | {"identity": value}, old)
            refused("sha256|is not the file", saved | {"sha256": value}, old)
        for key in saved["identity"]:
            for value in (None, [], {}, -5, [None], 10**400, 2.5):
                refused("identity|another form|another t", saved | {"identity": saved["identity"] | {key: value}}, old)
        refused("sha256", {"format": 3, "identity": saved["identity"]}, old)
    path.write_text(json.dumps(saved | {"digest": "0" * 64}))
    with pytest.raises(ValueError, match="was changed or damaged after it was written"):
        load_head(tmp_path, "teacher", "tokenizer", "text")

    for name, array in arrays.items():
        for changed in (
            {key: x for key, x in arrays.items() if key != name},
            arrays | {name: np.full_like(array, np.inf)},
            arrays | {name: np.zeros((*array.shape, 2), np.float32)},
        ):
            refused(f"'{name}|'out'", saved | {"sha256": save_arrays(weights, changed)})
    refused(
        "'scale' has values that are not", saved | {"sha256": save_arrays(weights, arrays | {"scale": np.zeros(66)})}
    )
    path.write_text(json.dumps(saved | {"format": 2, "sha256": save_arrays(weights, arrays)}))
    assert load_head(tmp_path, "teacher", "tokenizer", "text").identity == identity  # of the earlier format


# One update, on 8 simulated devices.
STUDENT = DecoderModel(model_config(SizeSettings(2, 16, 24, 4, 2, 8), TOKENIZER))
TEACHER = DecoderModel(model_config(SizeSettings(1, 16, 24, 4, 2, 8), TOKENIZER))
CHAINS, _ = encode_traces(TOKENIZER, generate(16, (1, 2)), TINY_FORMAT, row_length=96)
SGD = optax.sgd(1.0)
KD = LossSettings(alpha=1.0, alignment_weight=0.0, coherence_weight=0.0)
POLICY = replace(KD, reward_weight=1.0)


def rows(count: int, first: int = 0) -> Batch:
    return fixed_batches(CHAINS[first : first + count], count, 96, 1, 3)[0]


def own_chains(count: int = 8) -> Rollouts:
    rng = np.random.default_rng(0)
    batch = rows(count, 8)
    old, advantages = rng.uniform(-7, -5, batch.tokens_BL.shape), rng.normal(size=batch.tokens_BL.shape)
    return Rollouts(batch, old.astype(np.float32), advantages.astype(np.float32))


@functools.cache
def compiled(loss: LossSettings, micro_batches: int, mesh_sizes: tuple[int, int, int]):
    mesh = make_mesh(MeshSettings(*mesh_sizes), jax.devices()[: int(np.prod(mesh_sizes))])
    own = RewardSettings(temperature=0.8, clip=0.3)
    objective = loss.objective(Setup(STUDENT.config, TEACHER.config, len(TOKENIZER), own, mesh))
    step = make_train_step(STUDENT, TEACHER, SGD, objective, UpdateSettings(micro_batches), mesh)
    return mesh, objective, step


def update(loss: LossSettings, rollouts: Rollouts | None, micro_batches: int = 1, mesh_sizes=(1, 1, 1)):
    """(what one SGD update moves, metrics)"""
    key = jax.random.PRNGKey(0)
    mesh, objective, step = compiled(loss, micro_batches, mesh_sizes)
    params = {"student": STUDENT.init(key), **objective.init_params(key, 16, 16)}
    before = jax.device_get(params)
    teacher = TEACHER.init(jax.random.key(1)) if objective.reads_teacher else {}
    own = () if rollouts is None else (put_batch(rollouts, mesh),)
    state, metrics = step(
        create_state(params, SGD, key), teacher, put_batch(rows(8), mesh), objective.coefficients(), *own
    )
    return jax.tree.map(lambda a, b: a - b, to_host(state.params), before), jax.device_get(metrics)


def test_the_policy_term_is_that_of_the_dense_formula_whatever_micro_batches_and_mesh():
    rollouts = own_chains()
    batch, params = rollouts.batch, STUDENT.init(jax.random.PRNGKey(0))
    hidden = STUDENT.hidden(params, *(jnp.asarray(x) for x in batch[:3]))
    log_probs = jax.nn.log_softmax(STUDENT.logits(params, hidden)[..., : len(TOKENIZER)] / 0.8)[:, :-1]
    ratio = jnp.exp(
        jnp.take_along_axis(log_probs, batch.tokens_BL[:, 1:, None], -1)[..., 0] - rollouts.old_log_probs_BL[:, 1:]
    )
    advantages, weights = rollouts.advantages_BL[:, 1:], batch.loss_weights_BL[:, 1:]
    losses = -jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.7, 1.3) * advantages)
    expected = jnp.sum(losses * weights) / jnp.sum(weights)

    moved, metrics = update(POLICY, rollouts)
    np.testing.assert_allclose(metrics["reward/policy_loss"].value(), expected, rtol=1e-4)
    assert 0 < metrics["reward/clip_fraction"].value() < 1
    again, _ = update(POLICY, rollouts, 2, (1, 2, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), moved, again)
    anchor, _ = update(POLICY, None)
    parts = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (moved, anchor)), strict=True)]
    assert max(parts) > 1e-3  # the term moves the student ..
    zero, _ = update(POLICY, rollouts._replace(advantages_BL=0 * rollouts.advantages_BL))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), zero, anchor)  # .. by its advantages


def test_labels_alone_give_the_update_of_alpha_zero_without_the_teacher():
    nearly = replace(KD, alpha=0.0, alignment_weight=1e-30)  # nothing is learned from the teacher, but it is run
    whole, metrics = update(nearly, None)
    alone, of_labels = update(replace(KD, alpha=0.0), None)  # its teacher is an empty dict
    assert "distill/soft_loss" in metrics
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, alone)
    np.testing.assert_allclose(of_labels["loss"].value(), metrics["loss"].value(), rtol=1e-5)
    assert set(of_labels) == {"loss", "distill/hard_loss", "grad_norm"}


# Runs.
@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random teacher, and a reward model on it."""
    folder = tmp_path_factory.mktemp("rewards")
    teacher = write_teacher(folder / "teacher")
    labelled = LabelledSettings("synthetic", limit=24, depths=(1, 2))
    train_reward_model(
        RewardModelRecipe(
            TeacherSettings(str(teacher), "float32", "float32"),
            labelled,
            replace(labelled, split="test"),
            TINY_FORMAT,
            row_length=96,
            batch_size=8,
            epochs=2,
            resamples=20,
        ),
        folder / "reward",
    )
    return folder


def reward_recipe(folder: Path, **changes):
    settings = {
        "loss": LossSettings(chunk_length=32, alignment_weight=0.0, coherence_weight=0.0, reward_weight=0.5),
        "reward": RewardSettings(
            str(folder / "reward" / "model"),
            prompts=4,
            samples=2,
            prompts_per_update=4,
            updates_per_refresh=2,
            max_new_tokens=32,
        ),
        "curriculum": CurriculumSettings(enabled=False, validate_every=8, validation_chains=8),
        "total_updates": 8,
        "evaluation": EvaluationSettings(problems_per_depth=1, max_new_tokens=4, batch_size=4, teacher=False, every=4),
    }
    return recipe(folder / "teacher", **(settings | changes))


def test_a_reward_model_is_reported_on_held_out_steps(folder):
    report = json.loads((folder / "reward" / "report.json").read_text())
    for split in ("train", "test"):
        assert 0 < report[split]["wrong"] < report[split]["steps"]
        assert 0 <= report[split]["auroc"]["low"] <= report[split]["auroc"]["value"] <= report[split]["auroc"]["high"]
        assert report[split]["accuracy"]["n"] == report[split]["steps"]


@pytest.fixture(scope="module")
def single(folder):
    """(experiment, initial state on the host), on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rtd_jax.apps.distill.prepare.make_mesh", one_device_mesh)
        experiment, state = prepare(reward_recipe(folder), lambda _: None)
    return experiment, jax.device_get(state)


def test_what_is_drawn_depends_on_the_update_and_not_on_the_mesh(folder, single):
    def draw(experiment, state, at):
        drawn = make_reward_sampler(experiment)(state._replace(step=state.step + at), experiment.stages[0])
        return to_host(drawn.chains), drawn.means

    (first,), means = draw(*single, 3)
    assert first.batch.tokens_BL.shape == (8, 96)
    (same,), _ = draw(*prepare(reward_recipe(folder, mesh=MeshSettings(2, 2, 2)), lambda _: None), 3)
    np.testing.assert_array_equal(same.batch.tokens_BL, first.batch.tokens_BL)
    np.testing.assert_allclose(same.old_log_probs_BL, first.old_log_probs_BL, atol=1e-4)
    np.testing.assert_allclose(same.advantages_BL, first.advantages_BL, atol=1e-2)
    (other,), _ = draw(*single, 4)
    assert not np.array_equal(first.batch.tokens_BL, other.batch.tokens_BL)
    assert 0 < means["reward/step_reward"] < 1


def test_a_resumed_run_draws_again_and_ends_with_the_same_bits(single, tmp_path):
    experiment, state = single
    whole = Run(jax.device_put(state, jax.sharding.SingleDeviceSharding(jax.devices()[0])), Clock())
    lines = trained(experiment, whole, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "stages")
    path = tmp_path / "checkpoints" / "rolling" / "4"
    resumed = Run.from_meta(restore_state(path, whole.state), Clock(), read_meta(path))
    assert int(resumed.state.step) == 4
    assert trained(experiment, resumed, tmp_path) == lines
    jax.tree.map(np.testing.assert_array_equal, to_host(resumed.state), to_host(whole.state))
    assert sum("reward/step_reward" in line for line in lines) == 4
    assert any(line["update"] > 4 and line.get("reward/policy_loss", 0) != 0 for line in lines)
    for curve in (whole.curve, resumed.curve):
        assert [point["update"] for point in curve] == [4, 8]
        assert curve[0].pop("seconds") < curve[1].pop("seconds")
    assert whole.curve == resumed.curve


@pytest.fixture(scope="module")
def judged(folder):
    """(experiment, initial state on the host) of a run whose rewards are the judge's and whose teacher is cached."""
    good = reward_recipe(folder)
    settings = replace(
        good,
        reward=replace(good.reward, model="judge"),
        teacher=replace(good.teacher, cache=str(folder / "cache")),
        cache=CacheSettings(4),
        data=replace(good.data, train=source("train", 8), validation=source("validation", 2)),
        curriculum=replace(good.curriculum, validation_chains=2),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rtd_jax.apps.cache.make_mesh", one_device_mesh)
        cache_teacher(settings, folder / "cache")
        patch.setattr("rtd_jax.apps.distill.prepare.make_mesh", one_device_mesh)
        experiment, state = prepare(settings, lambda _: None)
    return experiment, jax.device_get(state)


@pytest.fixture
def half_right(judged, monkeypatch):
    """Every second drawn chain is the reference: a student with random weights would have none right."""
    known = judged[0].train

    def write(_model, _params, prompts, _settings, **_):
        starts = [chain.tokens[: chain.prompt_length].tolist() for chain in known.encoded]
        traces = [known.traces[starts.index(prompt)] for prompt in prompts]
        texts = [trace.completion if i % 2 else f"{trace.steps[0]}\n#### 99" for i, trace in enumerate(traces)]
        return [pieces_of(text)[0] for text in texts]

    monkeypatch.setattr("rtd_jax.apps.distill.own_chains.generate", write)


@pytest.mark.usefixtures("half_right")
def test_a_run_with_the_judges_rewards_needs_no_teacher_and_resumes_with_the_same_bits(judged, tmp_path):
    experiment, state = judged
    assert (experiment.teacher, experiment.teacher_params, experiment.reward) == (None, {}, None)
    assert experiment.fingerprints["reward"] == "judge-1"  # so that no other rewards go on with its checkpoint
    whole = Run(jax.device_put(state, jax.sharding.SingleDeviceSharding(jax.devices()[0])), Clock())
    lines = trained(experiment, whole, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "stages")
    path = tmp_path / "checkpoints" / "rolling" / "4"
    resumed = Run.from_meta(restore_state(path, whole.state), Clock(), read_meta(path))
    assert trained(experiment, resumed, tmp_path) == lines
    jax.tree.map(np.testing.assert_array_equal, to_host(resumed.state), to_host(whole.state))
    assert sum("reward/chain_right" in line for line in lines) == 4
    assert any(line["update"] > 4 and line.get("reward/policy_loss", 0) != 0 for line in lines)


@pytest.mark.usefixtures("half_right")
def test_the_judges_rewards_are_the_same_in_micro_batches_and_on_any_mesh(judged):
    def draw(experiment, state):
        drawn = make_reward_sampler(experiment)(state, experiment.stages[0])
        return to_host(drawn.chains), drawn.means

    (first,), means = draw(*judged)
    assert means["reward/chain_right"] == 0.5  # every second one
    assert means["reward/step_reward"] == 1 - 4 / (8 * means["reward/steps_per_chain"])  # but for four answer lines
    assert len(np.unique(first.advantages_BL.round(3))) > 2
    elsewhere = replace(judged[0].recipe, mesh=MeshSettings(2, 2, 2), micro_batches=2)
    (same,), found = draw(*prepare(elsewhere, lambda _: None))
    np.testing.assert_array_equal(same.batch.tokens_BL, first.batch.tokens_BL)
    np.testing.assert_allclose(same.old_log_probs_BL, first.old_log_probs_BL, atol=1e-4)
    np.testing.assert_allclose(same.advantages_BL, first.advantages_BL, atol=1e-6)
    assert found == means


@pytest.mark.parametrize(
    ("answer", "final"), [("yes", "#### yes"), ("B", "#### B"), ("x^2", "#### x^2"), ("72", ""), ("", "")]
)
def test_the_judge_is_refused_chains_that_it_cannot_decide(answer, final):
    """Answers of StrategyQA, ARC and MATH, and none: the first such row is named."""
    odd = Trace.of_steps("Why?", ["So it is.", "So it was."], answer, final, "x:7")
    rows = [PENS, odd, replace(odd, source="x:8")]
    plan = stages(CurriculumSettings(depths=(1, 2, 3)))
    with pytest.raises(ValueError, match=r"^x:7: its answer is .*reward.model='judge' .*a number on a last line"):
        check_judged(rows, plan)
    check_judged(rows, plan[2:])  # of the stage of three steps and more
    check_judged([PENS], plan)


def test_a_run_whose_chains_the_judge_cannot_decide_never_begins(folder, tmp_path):
    good = reward_recipe(folder)
    traces = generate(9, (1, 2))
    rows = [{"prompt": trace.prompt, "completions": list(trace.steps), "answer": "A"} for trace in traces]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = replace(source("train", 9), schema="stepwise", location=str(tmp_path))
    bad = replace(good, reward=replace(good.reward, model="judge"), data=replace(good.data, train=train))
    with pytest.raises(ValueError, match=r"train.jsonl:1: its answer is 'A', but reward.model='judge'"):
        prepare(bad, lambda _: None)


def test_settings_that_cannot_work_are_refused_by_name(folder):
    good = reward_recipe(folder)
    with pytest.raises(ValueError, match=r"reward.model is empty; train one with launch/reward_model.py"):
        replace(good, reward=replace(good.reward, model=""))
    with pytest.raises(ValueError, match=r"the chains that the student draws are in no cache; set teacher.cache=''"):
        replace(good, teacher=replace(good.teacher, cache="somewhere"))
    by_judge = replace(good, reward=replace(good.reward, model="judge"), teacher=replace(good.teacher, cache="x"))
    assert by_judge.reward.by_judge  # whose rewards need no teacher
    with pytest.raises(ValueError, match=r"checkpoint_every 4 is not a multiple of reward.updates_per_refresh 3"):
        replace(good, reward=replace(good.reward, updates_per_refresh=3))
    with pytest.raises(ValueError, match=r"prompts is 4, which is not a multiple of prompts_per_update 3"):
        replace(good.reward, prompts_per_update=3)
    with pytest.raises(ValueError, match="samples is 1; advantages compare the chains"):
        replace(good.reward, samples=1)
    uneven = reward_recipe(folder, reward=replace(good.reward, samples=3), mesh=MeshSettings(data=1, fsdp=8, tensor=1))
    with pytest.raises(
        ValueError, match=r"reward.prompts_per_update x reward.samples = 12 is not divisible by the 8-way"
    ):
        prepare(uneven, lambda _: None)
    labels = replace(good.loss, alpha=0.0, reward_weight=0.0)
    assert not labels.teaches()
    with pytest.raises(ValueError, match=r"so no coherence loss can end a stage: set curriculum.enabled=False"):
        replace(good, loss=labels, curriculum=CurriculumSettings())


def test_fine_tuning_on_chains_of_thought_reads_a_file_and_never_the_teacher(folder, tmp_path, monkeypatch):
    rows = [
        {"prompt": trace.prompt, "completions": list(trace.steps), "answer": trace.answer}
        for trace in generate(80, (1, 2))
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = recipe(folder / "teacher").data
    chains = DataSettings(
        replace(source("train", 80), schema="stepwise", location=str(tmp_path)),
        base.test,
        base.validation,
        text=base.text,
        row_length=base.row_length,
        chains_per_row=2,
    )
    settings = reward_recipe(
        folder,
        loss=LossSettings(chunk_length=32, alpha=0.0, alignment_weight=0.0, coherence_weight=0.0),
        data=chains,
        total_updates=4,
        evaluation=EvaluationSettings(teacher=False),
    )
    monkeypatch.setattr("rtd_jax.apps.distill.prepare.make_mesh", one_device_mesh)
    experiment, state = prepare(settings, lambda _: None)
    assert experiment.teacher is None
    assert experiment.teacher_params == {}
    # The same chains as the generator's own, by another way: what is trained on is what the file says.
    for ours, theirs in zip(experiment.train.encoded, load_splits(base, TOKENIZER)[0].encoded, strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    run = Run(state, Clock())
    lines = trained(experiment, run, tmp_path)
    assert (run.records[0].updates, run.records[0].validations, run.records[0].coherence) == (4, [], None)
    losses = [line["distill/hard_loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    assert not any(key.startswith("distill/") and key != "distill/hard_loss" for line in lines for key in line)
