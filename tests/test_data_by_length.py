"""Texts in batches: neighbours in length together, every text once, lengths rounded up."""

import numpy as np

from rtd_jax.data.by_length import batches_by_length, round_up, rows_at_once


def test_neighbours_in_length_share_a_batch_and_the_last_batch_is_filled_up():
    first, last = batches_by_length([[1, 2, 3, 4, 5], [6], [7, 8]], rows=2, multiple=2, pad_id=9)
    assert (first.indices, last.indices) == ([1, 2], [0])
    np.testing.assert_array_equal(first.tokens_BL, [[6, 9], [7, 8]])
    np.testing.assert_array_equal(first.lengths_B, [1, 2])
    np.testing.assert_array_equal(first.mask_BL, [[True, False], [True, True]])
    np.testing.assert_array_equal(last.tokens_BL, [[1, 2, 3, 4, 5, 9], [9] * 6])
    np.testing.assert_array_equal(last.lengths_B, [5, 0])


def test_nothing_gives_no_batch():
    assert list(batches_by_length([], rows=4, multiple=8)) == []


def test_rows_are_as_many_as_texts_rounded_up_to_the_devices():
    assert rows_at_once(16, texts=100, ways=4) == 16
    assert rows_at_once(16, texts=5, ways=4) == 8
    assert round_up(0, 64) == 0
    assert round_up(65, 64) == 128
