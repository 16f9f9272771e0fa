"""The vocabulary ends at a tokenizer's highest id, however many of the ids below it belong to no token."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import recipe, write_teacher

from rtd_jax.apps.distill.prepare import Experiment, prepare
from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.data.packing import fixed_batches
from rtd_jax.data.tiny_tokenizer import tiny_tokenizer
from rtd_jax.data.tokenizer_match import vocab_size
from rtd_jax.eval.choices import choice_log_likelihoods
from rtd_jax.eval.scoring import ScoringSettings
from rtd_jax.models.open import load_tokenizer, open_model
from rtd_jax.train.cache_identity import cache_identity
from rtd_jax.train.splits import load_splits

ROWS = vocab_size(tiny_tokenizer())
HOLES = 30  # ids that belong to no token


def take_out(directory: Path, words: list[str]) -> None:
    """Removes words from a folder's tokenizer; the ids of the others stay."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    for word in words:
        del content["model"]["vocab"][word]
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A teacher whose tokenizer lacks words that the chains do not have, and has words of higher ids that they have."""
    directory = write_teacher(tmp_path_factory.mktemp("holes") / "teacher")
    whole = load_tokenizer(directory)
    train, validation = load_splits(recipe(directory).data, whole)
    used = {int(token) for chain in (*train.encoded, *validation.encoded) for token in chain.tokens}
    unused = [word for word, token in whole.get_vocab().items() if 4 <= token < max(used) and token not in used]
    take_out(directory, sorted(unused)[:HOLES])
    return directory


@pytest.fixture(scope="module")
def experiment(teacher) -> tuple[Experiment, object]:
    return prepare(recipe(teacher), lambda _: None)


def test_the_bound_is_the_highest_id_and_one(teacher):
    assert len(tiny_tokenizer()) == ROWS
    found = load_tokenizer(teacher)
    assert (len(found), vocab_size(found)) == (ROWS - HOLES, ROWS)


def test_training_and_the_cache_have_that_bound(teacher, experiment):
    made, state = experiment
    assert made.vocab_size == ROWS
    assert {term.vocab_size for term in made.objective.terms if hasattr(term, "vocab_size")} == {ROWS}
    chains = [chain for chain in made.train.encoded if max(chain.tokens) >= len(made.tokenizer)]
    assert chains, "no chain has an id that len(tokenizer) would leave out"
    (batch,) = fixed_batches(chains[:8], 8, made.recipe.data.row_length, 1, made.max_boundaries)
    source, placed = made.on_devices(batch)
    _, metrics = made.step(jax.tree.map(jnp.copy, state), source, placed, made.objective.coefficients())
    assert float(metrics["distill/hard_loss"].value()) < 2 * np.log(ROWS)


def test_a_caches_identity_has_it_too(teacher):
    made = recipe(teacher)
    assert cache_identity(made, open_model(made.teacher, make_mesh(MeshSettings()), lambda _: None)).vocab_size == ROWS


def test_texts_with_the_highest_ids_can_be_evaluated(teacher, experiment):
    made, state = experiment
    student, params = made.student, state.params["student"]
    highest = next(word for word, token in made.tokenizer.get_vocab().items() if token == ROWS - 1)
    ((nats,),) = choice_log_likelihoods(student, params, made.tokenizer, [("Question", [highest])], ScoringSettings(64))
    assert nats > -100
    ids = [max(made.tokenizer(trace.completion)["input_ids"]) for trace in made.train.traces]
    chosen = [trace for trace, highest in zip(made.train.traces, ids, strict=True) if highest >= len(made.tokenizer)]
    report, _ = made.evaluator(student, params, chosen[:2])
    assert report["perplexity"] < 2 * ROWS
