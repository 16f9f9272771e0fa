"""The chains of the calibration, behind solved examples."""

import dataclasses

import pytest
from tiny_run import recipe

from rtd_jax.data.encoding import encode_traces
from rtd_jax.data.formats import solved_examples
from rtd_jax.data.sources import load_traces
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT, tiny_tokenizer
from rtd_jax.train.splits import encode_split, prefixed_chains


def test_no_chain_of_the_calibration_sees_its_own_solution(tmp_path):
    """A validation chain that is among the first training chains has the next one before it, and others the first."""
    settings, tokenizer = recipe(tmp_path), tiny_tokenizer()
    train, other = load_traces(settings.data.train)[:4], load_traces(settings.data.validation)[0]
    repeated = dataclasses.replace(train[0], source="elsewhere", prompt=f" {train[0].prompt}")
    held_out = encode_split([repeated, other], settings.data, tokenizer)
    chains = prefixed_chains(settings, tokenizer, [train[0], repeated, *train[1:]], held_out)

    def behind(shot, trace):
        text = dataclasses.replace(TINY_FORMAT, context=solved_examples(TINY_FORMAT, [(shot.prompt, shot.completion)]))
        return encode_traces(tokenizer, [trace], text, row_length=10_000)[0][0].tokens

    assert [list(chain.tokens) for chain in chains] == [
        list(behind(train[1], repeated)),
        list(behind(train[0], other)),
    ]
    with pytest.raises(ValueError, match="calibration_shots is 1, but the training data have 0 other"):
        prefixed_chains(settings, tokenizer, [train[0], repeated], encode_split([repeated], settings.data, tokenizer))
