"""Precision, recall, F1, step counts and calibration, by hand."""

import numpy as np
import pytest

from rtd_jax.eval.segmentation import boundary_scores, step_counts
from rtd_jax.steps.prose import Reading
from rtd_jax.steps.scores import (
    calibration,
    line_ends,
    matches,
    precision_recall_f1,
    sentence_ends,
)


def test_each_boundary_is_in_one_pair_at_most():
    assert matches(np.array([3, 7]), np.array([3, 8])) == 1
    assert matches(np.array([3, 7]), np.array([3, 8]), tolerance=1) == 2
    assert matches(np.array([4, 5]), np.array([5]), tolerance=1) == 1
    assert matches(np.array([1, 2, 3]), np.array([2, 3, 4]), tolerance=1) == 3  # not greedily from the exact ones
    assert matches(np.array([]), np.array([1])) == 0


def test_precision_recall_and_f1_are_over_all_chains_together():
    # 3 matched of 4 found and of 6 right: P 3/4, R 1/2, F1 6/10.
    assert precision_recall_f1(np.array([[1, 1, 3], [2, 3, 3]])) == (0.75, 0.5, 0.6)
    assert precision_recall_f1(np.array([[0, 0, 0]])) == (0, 0, 0)


def test_scores_with_and_without_the_last_boundary():
    right = [np.array([2, 5, 9]), np.array([4])]
    found = [np.array([3, 5, 9]), np.array([4])]
    scores = boundary_scores(found, right, resamples=50)
    assert scores["boundaries"] == 4
    assert scores["all"]["exact"]["f1"]["value"] == 0.75
    assert scores["inner"]["exact"]["f1"]["value"] == 0.5
    assert scores["all"]["within_1"]["f1"]["value"] == scores["inner"]["within_2"]["recall"]["value"] == 1.0
    f1 = scores["all"]["exact"]["f1"]
    assert f1["low"] == pytest.approx(2 / 3)  # only the first chain drawn
    assert f1["high"] == 1.0


def test_step_counts_by_annotated_depth():
    right = [np.arange(2), np.arange(2), np.arange(9)]
    found = [np.arange(3), np.arange(1), np.arange(9)]
    result = step_counts(found, right, resamples=10)
    assert set(result) == {"2", "8+"}
    assert (result["2"]["mean_error"]["value"], result["2"]["mean_absolute_error"], result["2"]["exact"]) == (0, 1, 0)
    assert result["8+"]["exact"] == 1


def test_calibration_error_is_the_gap_of_each_bin_by_its_size():
    # Two tokens at 0.25 of which one is right, two at 0.9 of which both are: (2 * 0.25 + 2 * 0.1) / 4.
    result = calibration(np.array([0.25, 0.25, 0.9, 0.9]), np.array([1, 0, 1, 1]))
    assert result["expected_calibration_error"] == pytest.approx(0.175)
    assert result["brier"] == pytest.approx((0.75**2 + 0.25**2 + 2 * 0.1**2) / 4)
    assert [x["count"] for x in result["bins"]] == [2, 2]


def test_rules_that_need_no_model():
    text = 'He said "no." Then 3.5\nmore'
    ends = np.array([m for m in range(1, len(text) + 1) if m == len(text) or text[m].isspace()])
    reading = Reading(text, np.zeros(len(ends), np.int32), ends, np.ones(len(ends), bool), np.zeros(len(ends), bool))
    assert [text[: ends[i]] for i in sentence_ends(reading)] == ['He said "no."', text]
    assert [text[: ends[i]] for i in line_ends(reading)] == ['He said "no." Then 3.5', text]
