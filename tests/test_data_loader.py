"""Packing and the resumable stream: nothing crosses chains, nothing is lost, a restored position continues exactly."""

import json

import jax
import numpy as np
import pytest

from rtd_jax.base.types import Batch
from rtd_jax.data.encoding import EncodedChain, encode_traces
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.generators.word_problems import generate
from rtd_jax.data.loader import BatchLoader
from rtd_jax.data.packing import fixed_batches, to_batch
from rtd_jax.data.tiny_tokenizer import tiny_tokenizer

FORMAT = TextFormat(prompt_template="Question: {prompt}\nAnswer:\n", completion_prefix="")
ROWS, LENGTH, CHAINS, BOUNDARIES = 4, 200, 3, 5


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def traces():
    return generate(90, (1, 2, 4))


@pytest.fixture(scope="module")
def chains(tokenizer, traces):
    return encode_traces(tokenizer, traces, FORMAT, row_length=LENGTH)[0]


def loader(pools, seed=0, **kwargs):
    return BatchLoader(pools, ROWS, LENGTH, CHAINS, BOUNDARIES, seed, **kwargs)


def assert_same(first: Batch, second: Batch):
    for name, a, b in zip(Batch._fields, first, second, strict=True):
        if a is b is None:
            continue
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, err_msg=name)


def unpack(batch: Batch) -> list[EncodedChain]:
    """Chains of a batch, in the order of rows and places, read by plain loops."""
    found = []
    for row in range(len(batch.tokens_BL)):
        for chain_id in range(1, batch.chain_ids_BL[row].max() + 1):
            places = np.flatnonzero(batch.chain_ids_BL[row] == chain_id)
            mask = batch.boundary_mask_BCK[row, chain_id - 1]
            boundaries = batch.boundary_positions_BCK[row, chain_id - 1][mask] - places[0]
            assert places.tolist() == list(range(places[0], places[-1] + 1))
            assert batch.positions_BL[row, places].tolist() == list(range(len(places)))
            weights = batch.loss_weights_BL[row, places]
            found.append(EncodedChain(batch.tokens_BL[row, places], int(boundaries[0]) + 1, boundaries, weights))
    return found


def content(chains):
    return sorted((c.tokens.tolist(), c.boundaries.tolist(), c.loss_weights.tolist()) for c in chains)


def test_a_batch_by_hand():
    def chain(tokens, prompt_length, boundaries):
        weights = np.arange(len(tokens)) >= prompt_length
        return EncodedChain(np.array(tokens, np.int32), prompt_length, np.array(boundaries), weights.astype(np.float32))

    first, second, third = (
        chain([11, 12, 13, 14], 2, [1, 2]),
        chain([21, 22, 23], 1, [0, 1, 2]),
        chain([31, 32, 33], 1, [0, 2]),
    )
    (batch,) = fixed_batches([first, second, third], rows=3, row_length=7, chains_per_row=2, max_boundaries=4)
    assert batch.tokens_BL.tolist() == [[11, 12, 13, 14, 21, 22, 23], [31, 32, 33, 0, 0, 0, 0], [0] * 7]
    assert batch.positions_BL.tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 0, 0, 0, 0], [0] * 7]
    assert batch.chain_ids_BL.tolist() == [[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0], [0] * 7]
    assert batch.loss_weights_BL.tolist() == [[0, 0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 0, 0, 0], [0] * 7]
    assert batch.boundary_positions_BCK.tolist() == [
        [[1, 2, 0, 0], [4, 5, 6, 0]],
        [[0, 2, 0, 0], [0] * 4],
        [[0] * 4] * 2,
    ]
    assert batch.boundary_mask_BCK.tolist() == [
        [[True, True, False, False], [True, True, True, False]],
        [[True, True, False, False], [False] * 4],
        [[False] * 4] * 2,
    ]
    assert batch.conclusions_BL.tolist() == [[0, 0, 1, 0, 0, 1, 2], [0, 0, 1, 0, 0, 0, 0], [0] * 7]
    whole = np.int32
    assert [array.dtype for array in jax.tree.leaves(batch)] == [
        whole,
        whole,
        whole,
        np.float32,
        whole,
        np.bool_,
        whole,
    ]


@pytest.mark.parametrize("count", [1, 7, 90])
def test_validation_batches_hold_every_chain_once(chains, count):
    chains = chains[:count]
    batches = fixed_batches(chains, ROWS, LENGTH, CHAINS, BOUNDARIES)
    assert {array.shape for batch in batches for array in batch[:4]} == {(ROWS, LENGTH)}
    packed = [chain for batch in batches for chain in unpack(batch)]
    assert content(packed) == content(chains)
    if count == 1:
        assert [row.any() for row in batches[0].chain_ids_BL] == [True, False, False, False]
    assert fixed_batches([], ROWS, LENGTH, CHAINS, BOUNDARIES) == []


def test_one_epoch_of_the_stream_holds_every_chain_once(chains):
    stream = loader([(chains, 1.0)])
    drawn: list[EncodedChain] = []
    while len(drawn) < len(chains):
        drawn += unpack(next(stream))
    # First-fit may put a chain before an earlier one in the same batch, so the epoch's end is fuzzy by one batch.
    seen = {tuple(chain.tokens.tolist()) for chain in drawn}
    assert len(seen) >= len(chains) - CHAINS * ROWS
    for _ in range(len(chains) // ROWS):
        seen |= {tuple(chain.tokens.tolist()) for chain in unpack(next(stream))}
    assert seen == {tuple(chain.tokens.tolist()) for chain in chains}


def test_epochs_differ_in_order_and_seeds_too(chains):
    few = chains[:12]

    def order(seed):
        stream = BatchLoader([(few, 1.0)], 1, LENGTH, 1, BOUNDARIES, seed)
        drawn = [tuple(unpack(next(stream))[0].tokens.tolist()) for _ in range(24)]
        assert set(drawn[:12]) == set(drawn[12:]) == {tuple(chain.tokens.tolist()) for chain in few}
        return drawn[:12], drawn[12:]

    orders = [epoch for seed in (0, 1) for epoch in order(seed)]
    assert len({tuple(epoch) for epoch in orders}) == 4


def test_rows_are_fixed_in_shape_and_hold_no_more_chains_than_allowed(chains):
    stream = loader([(chains, 1.0)])
    most = 0
    for _ in range(10):
        batch = next(stream)
        tokens, slots = (ROWS, LENGTH), (ROWS, CHAINS, BOUNDARIES)
        assert [array.shape for array in jax.tree.leaves(batch)] == [*[tokens] * 4, slots, slots, tokens]
        assert batch.chain_ids_BL[:, 0].all(), "every row of a training batch has a chain"
        most = max(most, batch.chain_ids_BL.max())
    assert most == CHAINS


def test_labels_attention_and_transitions_stay_inside_a_chain(chains):
    for batch, _ in zip(loader([(chains, 1.0)]), range(6), strict=False):
        ids, weights = batch.chain_ids_BL, batch.loss_weights_BL
        starts = np.concatenate([np.ones((ROWS, 1), bool), ids[:, 1:] != ids[:, :-1]], axis=1)
        assert not weights[starts].any(), "the first token of a chain would be predicted from its neighbour"
        assert not weights[ids == 0].any()
        assert not batch.tokens_BL[ids == 0].any()
        row, chain, slot = np.nonzero(batch.boundary_mask_BCK)
        positions = batch.boundary_positions_BCK[row, chain, slot]
        assert (ids[row, positions] == chain + 1).all()
        assert not batch.boundary_positions_BCK[~batch.boundary_mask_BCK].any()
        # Valid slots come first, so consecutive slots are consecutive steps.
        assert (np.sort(batch.boundary_mask_BCK, axis=-1)[..., ::-1] == batch.boundary_mask_BCK).all()


def test_packed_boundaries_decode_to_the_steps_own_ends(tokenizer, traces, chains):
    by_prompt = {trace.prompt: trace for trace in traces}
    checked = 0
    for batch in fixed_batches(chains, ROWS, LENGTH, CHAINS, BOUNDARIES):
        for row, chain in zip(*np.nonzero(batch.boundary_mask_BCK.any(-1)), strict=True):
            places = np.flatnonzero(batch.chain_ids_BL[row] == chain + 1)
            text = tokenizer.decode(batch.tokens_BL[row, places])
            trace = by_prompt[text.split("Question: ")[1].split("\nAnswer:")[0]]
            mask = batch.boundary_mask_BCK[row, chain]
            assert mask.sum() == trace.depth + 1
            cuts = batch.boundary_positions_BCK[row, chain][mask]
            for start, end, step in zip(cuts[:-1], cuts[1:], trace.steps, strict=True):
                assert tokenizer.decode(batch.tokens_BL[row, start + 1 : end + 1]).strip() == step
                checked += 1
    assert checked == sum(trace.depth for trace in traces)


@pytest.mark.parametrize("taken", [0, 1, 2, 7, 30])
def test_a_restored_position_continues_bit_for_bit_in_a_fresh_loader(tokenizer, traces, chains, taken):
    def pools(chains):
        deep = [chain for chain in chains if chain.depth == 4]
        return [(deep, 0.7), ([chain for chain in chains if chain.depth < 4], 0.3)]

    stream = loader(pools(chains))
    for _ in range(taken):
        next(stream)
    saved = json.dumps(stream.get_state())
    expected = [next(stream) for _ in range(5)]  # past the end of an epoch for the later positions

    encoded_again = encode_traces(tokenizer, traces, FORMAT, row_length=LENGTH)[0]
    fresh = loader(pools(encoded_again))
    fresh.set_state(json.loads(saved))
    for batch in expected:
        assert_same(next(fresh), batch)
    stream.set_state(json.loads(saved))  # and going back works too
    assert_same(next(stream), expected[0])


def test_a_position_in_another_stream_is_refused(chains):
    stream = loader([(chains, 1.0)])
    state = stream.get_state()
    others = (
        loader([(chains, 1.0)], seed=1),
        loader([(chains[::-1], 1.0)]),
        loader([(chains, 0.7), (chains[:9], 0.3)]),
        BatchLoader([(chains, 1.0)], ROWS, LENGTH, CHAINS - 1, BOUNDARIES, 0),
    )
    for other in others:
        with pytest.raises(ValueError, match="the saved data position belongs to the stream"):
            other.set_state(state)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_rows_of_all_processes_join_to_the_batch_of_one(chains, processes):
    pools = [(chains[:40], 0.7), (chains[40:], 0.3)]
    whole = loader(pools)
    parts = [loader(pools, share=(i, processes)) for i in range(processes)]
    for _ in range(4):
        joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *(next(part) for part in parts))
        assert_same(joined, next(whole))
    states = {json.dumps(stream.get_state()) for stream in (whole, *parts)}
    assert len(states) == 1, "a run may resume on another number of processes"

    batches = fixed_batches(chains, ROWS, LENGTH, CHAINS, BOUNDARIES)
    shares = [fixed_batches(chains, ROWS, LENGTH, CHAINS, BOUNDARIES, share=(i, processes)) for i in range(processes)]
    for batch, *pieces in zip(batches, *shares, strict=True):
        assert_same(jax.tree.map(lambda *arrays: np.concatenate(arrays), *pieces), batch)


def test_pools_are_drawn_by_weight(chains):
    deep = [chain for chain in chains if chain.depth == 4]
    shallow = [chain for chain in chains if chain.depth == 1]
    stream = loader([(deep, 0.7), (shallow, 0.3), ([], 5.0)])
    depths = [chain.depth for _ in range(60) for chain in unpack(next(stream))]
    assert np.mean([depth == 4 for depth in depths]) == pytest.approx(0.7, abs=0.01)
    assert set(depths) == {1, 4}


def test_what_cannot_be_packed_is_named(chains):
    longest = max(len(chain) for chain in chains)
    with pytest.raises(
        ValueError, match=f"synthetic-train:.*: {longest} tokens do not fit into a row of {longest - 1}"
    ):
        BatchLoader([(sorted(chains, key=len)[-1:], 1.0)], ROWS, longest - 1, CHAINS, BOUNDARIES, 0)
    with pytest.raises(ValueError, match="synthetic-train:3: 5 boundaries, but max_boundaries is 4"):
        fixed_batches(chains, ROWS, LENGTH, CHAINS, 4)
    with pytest.raises(ValueError, match="none of the 2 pools has a chain"):
        loader([([], 1.0), ([], 1.0)])
    with pytest.raises(ValueError, match="pool 1 has weight 0"):
        loader([(chains, 1.0), (chains, 0.0)])
    with pytest.raises(ValueError, match="4 rows cannot be shared equally among 3 hosts; use 3 rows"):
        loader([(chains, 1.0)], share=(0, 3))
    with pytest.raises(ValueError, match="chains_per_row is 0"):
        fixed_batches(chains, ROWS, LENGTH, 0, BOUNDARIES)


def test_the_first_token_of_a_chain_is_never_predicted_even_if_asked_for():
    chain = EncodedChain(np.array([5, 6], np.int32), 1, np.array([0, 1]), np.ones(2, np.float32))
    (batch,) = fixed_batches([chain, chain], 1, 4, 2, 2)
    assert batch.loss_weights_BL.tolist() == [[0.0, 1.0, 0.0, 1.0]]
    assert chain.loss_weights.tolist() == [1.0, 1.0], "the chain itself is left as it was"


def test_to_batch_ignores_what_a_row_does_not_have():
    packed = {
        "tokens": np.zeros((2, 3), np.int32),
        "tokens_segment_ids": np.zeros((2, 3), np.int32),
        "tokens_positions": np.zeros((2, 3), np.int32),
        "loss_weights": np.zeros((2, 3), np.float32),
        "boundary_numbers": np.zeros((2, 3), np.int32),
        "conclusions": np.zeros((2, 3), np.int32),
    }
    assert not any(array.any() for array in jax.tree.leaves(to_batch(packed, 2, 2)))
