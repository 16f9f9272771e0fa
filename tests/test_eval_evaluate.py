"""The whole evaluation on synthetic problems, with models whose right scores are known without running them."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rtd_jax.data.encoding import encode_traces
from rtd_jax.data.formats import render
from rtd_jax.data.generators.word_problems import generate as problems
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT, tiny_tokenizer
from rtd_jax.eval.chains import score_texts
from rtd_jax.eval.evaluate import ChainEvaluator, DecodingSettings, first_of_each_depth
from rtd_jax.eval.metrics import make_report
from rtd_jax.eval.scoring import ScoringSettings
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel

FORMAT = TINY_FORMAT
WRONG = 0  # <unk>: never part of a text


class Oracle:
    """Knows texts by heart: the hidden state is the place in a text, the head the token that follows (or a wrong one).

    `params["next_PL"]` is text p's token after place l; a prompt is told apart by its ids.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def deployed(self, params):
        return self, params

    def prefill(self, params, tokens_BL, lengths_B, cache_length):
        known_PL, next_PL = params["known_PL"], params["next_PL"]
        length = min(tokens_BL.shape[1], known_PL.shape[1])
        inside = jnp.arange(length)[None, None, :] < lengths_B[:, None, None]
        same = jnp.all((tokens_BL[:, None, :length] == known_PL[None, :, :length]) | ~inside, axis=-1)
        text_B = jnp.argmax(same, axis=1)
        cache_NBGLE = jnp.broadcast_to(text_B[None, :, None, None, None], (1, len(text_B), 1, cache_length, 1))
        return self._states(next_PL[text_B, lengths_B - 1]), cache_NBGLE

    def decode(self, params, cache_NBGLE, tokens_B, positions_B, length):
        return self._states(params["next_PL"][cache_NBGLE[0, :, 0, 0, 0], positions_B]), cache_NBGLE

    def hidden(self, params, tokens_BL, positions_BL, chain_ids_BL):
        # Teacher forced, the next token of the text itself stands in the row; `wrong_V` marks ids it never gets right.
        following = jnp.roll(tokens_BL, -1, axis=1)
        return self._states(jnp.where(params["wrong_V"][following], WRONG, following))

    def head(self, params):
        return 50.0 * jnp.eye(self.vocab_size)

    def _states(self, ids):
        return jax.nn.one_hot(ids, self.vocab_size)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def traces():
    return problems(12, depths=(1, 2, 3), split="test", seed=3)


def oracle(tokenizer, traces, written, wrong_ids=()):
    """An oracle that writes `written[i]` for problem i, and the arrays that make it so."""
    rows = []
    for trace, completion in zip(traces, written, strict=True):
        text = render(tokenizer, trace.prompt, completion, FORMAT)
        rows.append(tokenizer(text.text, add_special_tokens=False)["input_ids"])
    width = max(map(len, rows)) + 64
    known, following = (np.full((len(rows), width), WRONG, np.int32) for _ in range(2))
    for row, ids in enumerate(rows):
        known[row, : len(ids)], following[row, : len(ids) - 1] = ids, ids[1:]
    wrong_V = np.isin(np.arange(len(tokenizer)), list(wrong_ids))
    params = {"known_PL": jnp.asarray(known), "next_PL": jnp.asarray(following), "wrong_V": jnp.asarray(wrong_V)}
    return Oracle(len(tokenizer)), params


def run(model, params, tokenizer, traces, *, open_from=None, progress=None, **changes):
    decoding = DecodingSettings(**{"max_new_tokens": 90, "batch_size": 5, **changes})
    evaluator = ChainEvaluator(tokenizer, FORMAT, decoding, ScoringSettings(batch_size=2), open_from=open_from)
    return evaluator(model, params, traces, progress=progress)


def test_perfect_model_is_perfect(tokenizer, traces):
    model, params = oracle(tokenizer, traces, [trace.completion for trace in traces])
    report, records = run(model, params, tokenizer, traces)
    for table in (
        report["chain_accuracy"],
        report["answer_strict"],
        report["answer_flexible"],
        report["step_accuracy"],
    ):
        assert list(table) == ["1", "2", "3", "all"]
        assert all(entry["mean"] == 1.0 and entry["stderr"] == 0.0 for entry in table.values())
    assert report["chain_accuracy"]["2"]["n"] == 4
    assert report["step_accuracy"]["3"]["n"] == 12
    assert report["step_accuracy"]["all"]["n"] == 4 * (1 + 2 + 3)
    assert report["perplexity"] == pytest.approx(1.0)
    assert (report["unfinished"], report["problems"], report["text_format"]) == (0, 12, "plain")
    for record, trace in zip(records, traces, strict=True):
        assert record["prompt"] == trace.prompt
        assert record["completions"] == record["reference"] == list(trace.steps)
        assert (record["final"], record["correct"], record["first_error"]) == (trace.final, True, -1)
    # The predicted tokens are those that training weighs.
    chains, _ = encode_traces(tokenizer, traces, FORMAT, row_length=1024)
    assert report["predicted_tokens"] == sum(int(chain.loss_weights.sum()) for chain in chains)
    json.dumps([report, records], allow_nan=False)


def test_wrong_chains_are_found_where_they_go_wrong(tokenizer, traces):
    written = [trace.completion for trace in traces]
    # Depth 2, second problem of its kind: the last step concludes a number that no problem has as its result.
    broken = [i for i, trace in enumerate(traces) if trace.depth == 2][1]
    result = traces[broken].answer
    steps = list(traces[broken].steps)
    steps[1] = steps[1].replace(f"={result}>>{result}", "=99>>99")
    written[broken] = "\n".join([*steps, traces[broken].final])
    # Depth 3: never answers, so it runs into the limit on nothing but <unk>.
    endless = next(i for i, trace in enumerate(traces) if trace.depth == 3)
    model, params = oracle(tokenizer, traces, written)
    prompt = render(tokenizer, traces[endless].prompt, "", FORMAT).prompt
    length = len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) - 1
    params["next_PL"] = params["next_PL"].at[endless, length:].set(WRONG)
    report, records = run(model, params, tokenizer, traces)
    assert {key: entry["mean"] for key, entry in report["chain_accuracy"].items()} == {
        "1": 1.0, "2": 0.75, "3": 0.75, "all": pytest.approx(10 / 12),
    }  # fmt: skip
    # One of four is wrong: sample sd 1/2, over root 4.
    assert report["chain_accuracy"]["2"]["stderr"] == pytest.approx(0.25)
    assert report["answer_strict"]["2"]["mean"] == 1.0
    assert report["answer_strict"]["3"]["mean"] == 0.75
    assert [record["first_error"] for record in records if not record["correct"]] == (
        [1, 0] if broken < endless else [0, 1]
    )
    assert (report["unfinished"], records[endless]["finished"]) == (1, False)
    # Teacher forcing does not see any of it.
    assert report["step_accuracy"]["all"]["mean"] == 1.0


def test_step_accuracy_looks_at_results_only(tokenizer, traces):
    written = [trace.completion for trace in traces]
    around = tokenizer.convert_tokens_to_ids([" <<", "=", ">>"])  # what stands right before and right after a result
    assert tokenizer.unk_token_id not in around
    model, params = oracle(tokenizer, traces, written, wrong_ids=around)
    report, _ = run(model, params, tokenizer, traces)
    assert report["step_accuracy"]["all"]["mean"] == 1.0
    assert report["perplexity"] > 1.5  # though those tokens are surely wrong

    number = traces[0].answer  # depth 1: the result of its only step
    model, params = oracle(tokenizer, traces, written, [tokenizer.convert_tokens_to_ids(number)])
    report, _ = run(model, params, tokenizer, traces, open_from=2)
    results = [step.split("=")[1].split(">>")[0] for trace in traces for step in trace.steps]
    right = np.asarray([result != number for result in results])
    assert report["step_accuracy"]["all"]["mean"] == pytest.approx(right.mean())
    # Steps of one problem are one cluster: sqrt(C / (C - 1) * sum of squared cluster sums of residuals) / n.
    sums = [part.sum() for part in np.split(right - right.mean(), np.cumsum([trace.depth for trace in traces])[:-1])]
    assert report["step_accuracy"]["all"]["stderr"] == pytest.approx(np.sqrt(12 / 11 * np.sum(np.square(sums))) / 24)
    assert list(report["step_accuracy"]) == ["1", "2+", "all"]
    deep = report["step_accuracy"]["2+"]["mean"]
    assert report["independent_chain_accuracy"]["2+"]["mean"] == pytest.approx((deep**2 + deep**3) / 2)


def test_random_model_runs_and_keeps_its_params(tokenizer, traces):
    config = DecoderConfig(
        vocab_size=len(tokenizer) + 11, width=16, mlp_width=24, layers=2, heads=2, kv_heads=1, head_dim=8
    )
    model = DecoderModel(config)
    params = jax.jit(model.init)(jax.random.key(0))
    before = jax.tree.map(np.array, params)
    seen = []
    report, records = run(
        model, params, tokenizer, traces, max_new_tokens=4, progress=lambda done, total: seen.append((done, total))
    )
    jax.tree.map(np.testing.assert_array_equal, before, params)
    assert report["chain_accuracy"]["all"]["mean"] == 0.0
    # Weights of 0.02 leave the logits near zero: all real words are about as likely.
    assert report["perplexity"] == pytest.approx(len(tokenizer), rel=0.05)
    assert math.isfinite(report["perplexity"])
    assert (seen[-1], len(records)) == ((12, 12), 12)


def test_no_problems_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="no problems to evaluate"):
        run(Oracle(len(tokenizer)), {}, tokenizer, [])


def test_texts_are_scored_without_a_model(traces):
    # Depths 1, 2, 3 in turn; two samples of each: one perfect, one that goes wrong in its last step's result.
    spoiled = [
        "\n".join([*t.steps[:-1], t.steps[-1].replace(f"={t.answer}>>{t.answer}", "=99>>99"), t.final]) for t in traces
    ]
    texts = [[t.completion, bad] for t, bad in zip(traces, spoiled, strict=True)]
    records = score_texts(traces, texts)
    scores = make_report(records, open_from=3)
    assert (scores["problems"], scores["samples"], scores["unfinished"]) == (12, 2, 0)
    assert scores["chain_accuracy"]["all"]["mean"] == 0.5
    assert scores["chain_accuracy"]["all"]["stderr"] == 0.0  # every problem is half right: problems are the sample
    assert scores["answer_strict"]["all"]["mean"] == scores["exact_match_flexible"]["all"]["mean"] == 1.0
    # One wrong result in each second sample: of 2 * 2 results at depth 2, three are right.
    assert [scores["step_accuracy_free"][key]["mean"] for key in ("1", "2", "3+")] == [0.5, 0.75, pytest.approx(5 / 6)]
    assert scores["independent_chain_accuracy_free"]["2"] == {
        "mean": pytest.approx(0.75**2),
        "stderr": 0.0,
        "n": 8,
    }
    assert scores["first_error"] == {"1": {"1": 4}, "2": {"2": 4}, "3+": {"3": 4}, "all": {"1": 4, "2": 4, "3": 4}}
    assert scores["first_error_position"]["3+"]["mean"] == 3.0
    again = score_texts(traces, [[r["text"] for r in records if r["problem"] == i] for i in range(12)])
    assert make_report(again, open_from=3) == scores
    with pytest.raises(ValueError, match="same number"):
        score_texts(traces, [["x"], *[["x", "y"]] * 11])


def test_stop_texts_end_a_generation_and_samples_are_grouped(tokenizer, traces):
    written = [trace.completion + "\n\nQuestion: How many" for trace in traces]
    model, params = oracle(tokenizer, traces, written)
    report, records = run(model, params, tokenizer, traces, stop_texts=("\n\nQuestion:",), samples=2)
    assert (report["problems"], report["samples"], report["unfinished"], len(records)) == (12, 2, 0, 24)
    assert report["chain_accuracy"]["all"]["mean"] == 1.0
    assert [record["text"] for record in records[::2]] == [trace.completion for trace in traces]
    assert [(record["problem"], record["sample"]) for record in records[:3]] == [(0, 0), (0, 1), (1, 0)]
    assert records[2]["teacher_forced"] == [True, True]
    assert report["perplexity_by_depth"]["2"] == {
        "mean": pytest.approx(1.0),
        "stderr": pytest.approx(0.0),
        "n": 4,
    }


def test_the_first_problems_of_each_depth_shallow_first(traces):
    assert first_of_each_depth(traces[::-1], 2) == [traces[i] for i in (9, 6, 10, 7, 11, 8)]
