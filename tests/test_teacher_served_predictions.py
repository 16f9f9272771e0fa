"""A cache filled from a server that gives log-probabilities of prompts is the cache that the weights would have filled.

The server is one of ours; its numbers are the bundled teacher's. It speaks vLLM's API and SGLang's.
"""

import copy
import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from completions_server import FaultyServer
from safetensors.numpy import load_file
from test_train_run import ROOT, environment
from tiny_run import recipe

from rtd_jax.apps.cache import cache_teacher
from rtd_jax.apps.distill.prepare import prepare
from rtd_jax.apps.distill.run import train
from rtd_jax.base.files import read_json
from rtd_jax.base.settings import unread_settings
from rtd_jax.base.sharding import make_mesh
from rtd_jax.eval.states import open_cache
from rtd_jax.models.from_hf import load_config, load_params
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.open import open_model
from rtd_jax.teacher.cache import TeacherCache
from rtd_jax.teacher.identity import CacheSettings
from rtd_jax.teacher.served.predictions import ServingSettings, _most_probable
from rtd_jax.train.cache_identity import cache_identity
from rtd_jax.train.curriculum import CurriculumSettings
from rtd_jax.train.optimizer import OptimizerSettings
from rtd_jax.train.recipe import LossSettings, Recipe, TeacherSettings

BUNDLED = ROOT / "rtd_jax" / "bundled" / "tiny_teacher"
K = 8
APIS = ("vllm", "sglang")
NAME = "team/tiny-teacher"
KD = LossSettings(temperature=1.0, alignment_weight=0.0, coherence_weight=0.0)
STORAGE = CacheSettings(K, "float32", chains_per_shard=32)


class Teacher:
    """The bundled teacher's log-probabilities of what comes at each token, [L, V]."""

    def __init__(self) -> None:
        self._config = load_config(BUNDLED)
        self._known: dict[tuple[int, ...], np.ndarray] = {}
        self._lock = threading.Lock()

    @cached_property
    def _log_probs(self):
        model = DecoderModel(self._config, "float32")
        params = load_params(BUNDLED, self._config)

        @jax.jit
        def log_probs(tokens_BL):
            ones = jnp.ones_like(tokens_BL)
            hidden_BLD = model.hidden(params, tokens_BL, jnp.cumsum(ones, axis=-1) - 1, ones)
            return jax.nn.log_softmax(model.logits(params, hidden_BLD)[0])

        return log_probs

    def __call__(self, tokens: list[int]) -> np.ndarray:
        key = tuple(tokens)
        with self._lock:
            if key not in self._known:
                padded = np.zeros((1, 128), np.int32)
                padded[0, : len(tokens)] = tokens
                self._known[key] = np.asarray(self._log_probs(padded))[: len(tokens)]
            return self._known[key]


TEACHER = Teacher()


class PredictionServer(FaultyServer):
    """Answers as vLLM and SGLang do; `change` spoils an answer."""

    def __init__(self, *args, change=None, **options):
        self._change = change
        super().__init__(*args, **options)

    def listed(self) -> dict:
        return {"object": "list", "data": [{"id": "another"}, {"id": NAME}]}

    def reply(self, path: str, body: dict, failure: str) -> dict:
        answer = (self._vllm if path == "/v1/completions" else self._sglang)(body)
        if self._change is not None:
            answer = copy.deepcopy(answer)
            self._change(answer)
        return answer

    @staticmethod
    def _vllm(body: dict) -> dict:
        assert body["model"] == NAME
        assert (body["max_tokens"], body["temperature"]) == (1, 1.0)
        rows = [None]
        for token, log_probs_V in zip(body["prompt"][1:], TEACHER(body["prompt"]), strict=False):
            ids = np.argsort(-log_probs_V, kind="stable")
            ranks = {int(id): rank for rank, id in enumerate(ids, start=1)}
            chosen = [token, *ids[: body["prompt_logprobs"]].tolist()]  # the own token first, as vLLM has it
            rows.append(
                {str(i): {"logprob": float(log_probs_V[i]), "rank": ranks[i], "decoded_token": "x"} for i in chosen}
            )
        choice = {"index": 0, "text": " a", "finish_reason": "length", "prompt_logprobs": rows}
        return {"id": "x", "object": "text_completion", "created": 1, "model": NAME, "choices": [choice]}

    @staticmethod
    def _sglang(body: dict) -> dict:
        assert body["return_logprob"] is True
        assert (body["logprob_start_len"], body["sampling_params"]["max_new_tokens"]) == (0, 0)
        own, rows = [[None, body["input_ids"][0], None]], [None]
        for token, log_probs_V in zip(body["input_ids"][1:], TEACHER(body["input_ids"]), strict=False):
            ids = np.argsort(-log_probs_V, kind="stable")[: body["top_logprobs_num"]]
            own.append([float(log_probs_V[token]), token, None])
            rows.append([[float(log_probs_V[i]), int(i), None] for i in ids])
        about = {"finish_reason": {"type": "length", "length": 0}, "prompt_tokens": len(own)}
        return {"text": "", "meta_info": about | {"input_token_logprobs": own, "input_top_logprobs": rows}}


@pytest.fixture(scope="module")
def weightless(tmp_path_factory) -> Path:
    """The teacher's config and tokenizer."""
    folder = tmp_path_factory.mktemp("weightless") / "teacher"
    return Path(shutil.copytree(BUNDLED, folder, ignore=shutil.ignore_patterns("*.safetensors*")))


def kd(path: Path, folder: Path, storage: CacheSettings = STORAGE, **changes) -> Recipe:
    """Logit matching from a cache."""
    settings = {
        "teacher": TeacherSettings(str(path), "float32", "float32", cache=str(folder)),
        "cache": storage,
        "loss": KD,
        "curriculum": CurriculumSettings(enabled=False),
        # With this eps an update is a continuous function of the gradient (test_training_step.py).
        "optimizer": OptimizerSettings(learning_rate=1e-2, warmup_updates=2, eps=1e-2),
    }
    return dataclasses.replace(recipe(path), **(settings | changes))


def served(teacher: Path, folder: Path, url: str = "", api: str = "vllm", *, retries: int = 3, **changes) -> Recipe:
    """The same from a server's predictions."""
    serving = ServingSettings(api, concurrency=4, timeout=5.0, retries=retries)
    settings = TeacherSettings(str(teacher), cache=str(folder), server=url, served_model=NAME, serving=serving)
    return kd(teacher, folder, **({"teacher": settings} | changes))


def opened(of: Recipe) -> TeacherCache:
    identity = cache_identity(of, open_model(of.teacher, make_mesh(of.mesh), lambda _: None))
    return TeacherCache(Path(of.teacher.cache), identity)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def from_weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("from_weights")
    return cache_teacher(kd(BUNDLED, folder), folder)


@pytest.fixture(scope="module")
def from_server(weightless, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("from_server")
    with PredictionServer() as server:
        cache_teacher(served(weightless, folder, server.url), folder)
    assert server.most_in_flight <= 4
    return folder


@pytest.mark.parametrize("api", APIS)
def test_whatever_a_server_does_its_cache_is_that_of_the_weights(api, weightless, from_weights, from_server, tmp_path):
    failures = ["429", "500", "dropped", "truncated", "garbage", "html", "empty", "503", "null", "[1, 2]", "7"]
    with PredictionServer(failures) as server:
        of = served(weightless, tmp_path, server.url, api)
        cache_teacher(of, tmp_path)
    ours, theirs = opened(of), opened(kd(BUNDLED, from_weights))
    keys = sorted(ours._places)
    assert len(server.seen) == len(keys) + len(failures)
    assert set(keys) <= set(theirs._places)  # these have the chains behind solved examples too, for their states
    assert len(keys) == 96
    for key in keys:
        (top, no_states), (want, states_NKD) = ours.read(key), theirs.read(key)
        assert no_states.shape == (0, states_NKD.shape[1], 0)
        np.testing.assert_array_equal(top.ids_BLM, want.ids_BLM)
        np.testing.assert_allclose(top.log_probs_BLM, want.log_probs_BLM, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(top.tail_BL, want.tail_BL, rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(top.tail_BL, top.soft_tail_BL)
    identity = read_json(tmp_path / "manifest.json")["identity"]
    assert (identity["teacher"], identity["teacher_dtypes"]) == (f"served:{NAME}", "as served")
    assert (identity["states"], identity["layers"], identity["temperature"], identity["top_k"]) == ("none", [], 1.0, K)
    assert files(tmp_path) == files(from_server)  # neither the API nor the address nor a failure shows in it


def test_training_from_it_needs_neither_weights_nor_server_and_is_that_from_the_weights_cache(
    weightless, from_weights, from_server, tmp_path
):
    blind = cache_teacher(kd(BUNDLED, tmp_path / "blind", dataclasses.replace(STORAGE, states="none")), tmp_path)
    runs = {
        "weights": kd(BUNDLED, from_weights),
        "blind": kd(BUNDLED, blind, dataclasses.replace(STORAGE, states="none")),
        "served": served(weightless, from_server),
    }
    for name, of in runs.items():
        train(dataclasses.replace(of, total_updates=5), tmp_path / name)
    students = {name: load_file(tmp_path / name / "student" / "model.safetensors") for name in runs}
    for name in ("blind", "served"):
        for key, want in students["weights"].items():
            np.testing.assert_allclose(students[name][key], want, rtol=1e-4, atol=1e-5, err_msg=f"{name} {key}")
    report = json.loads((tmp_path / "served" / "report.json").read_text())
    assert report["updates"] == 5
    (stage,) = report["stages"]
    assert (stage["ended_by"], stage["coherence"], stage["validations"]) == ("budget", None, [])
    logged = [json.loads(line) for line in (tmp_path / "served" / "metrics.jsonl").read_text().splitlines()]
    assert not any("distill/coherence" in line or "validation/coherence" in line for line in logged)
    assert all(np.isfinite(line["loss"]) for line in logged if "loss" in line)


def test_a_run_goes_on_where_it_ended_and_asks_for_nothing_that_is_written(weightless, from_server, tmp_path, capsys):
    with PredictionServer([""] * 70 + ["400"] * 8) as server:
        of = served(weightless, tmp_path, server.url)
        with pytest.raises(
            ValueError, match=r"answered 400 to the request of synthetic-\w+:\d+: .*as told.*served_mod"
        ):
            cache_teacher(of, tmp_path)
    written = len(list(tmp_path.glob("shard-*.json")))
    assert written == 2
    with PredictionServer(delay=0.01) as server:
        cache_teacher(served(weightless, tmp_path, server.url), tmp_path)
    assert len(server.seen) == 96 - 32 * written
    assert files(tmp_path) == files(from_server)
    assert "32 of 32 chains, " in capsys.readouterr().out
    with PredictionServer() as server:
        cache_teacher(served(weightless, tmp_path, server.url), tmp_path)
    assert not server.seen


@pytest.mark.slow
def test_killed_while_it_asks_it_goes_on_with_the_same_bytes(weightless, tmp_path):
    with PredictionServer(delay=0.02) as server:
        changes = {"batch_size": 8, "student.layers": 2, "evaluation.teacher": False, "curriculum.enabled": False}
        changes |= {"data.train.limit": 60, "data.validation.limit": 6, "cache.chains_per_shard": 8, "cache.top_k": K}
        changes |= {"loss.temperature": 1, "loss.alignment_weight": 0, "loss.coherence_weight": 0}
        changes |= {"teacher.path": weightless, "teacher.server": server.url, "teacher.served_model": NAME}
        changes |= {"teacher.serving.concurrency": 4, "data.train.depths": (1, 2), "data.validation.depths": (1, 2)}

        def command(folder: Path) -> list[str]:
            flags = [f"--config.{key}={value}" for key, value in (changes | {"teacher.cache": folder}).items()]
            return [sys.executable, "launch/cache_teacher.py", "--config=configs/rtd_tiny.py", *flags]

        cut, whole = tmp_path / "cut", tmp_path / "whole"
        process = subprocess.Popen(command(cut), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
        while len(list(cut.glob("shard-*.json"))) < 3:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        before = len(server.seen)
        for folder in (cut, whole):
            done = subprocess.run(command(folder), cwd=ROOT, env=environment(), capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        assert len(server.seen) - before <= 2 * 66 - 3 * 8
    for left in cut.glob(".*.tmp"):  # what a kill inside a write leaves; no reader looks at it
        left.unlink()
    assert files(cut) == files(whole)


def in_row(change):
    """Changes the entry of the last token, whichever API the answer is of."""

    def spoil(answer: dict) -> None:
        if "choices" in answer:
            rows = answer["choices"][0]["prompt_logprobs"]
            rows[-1] = change({int(id): entry["logprob"] for id, entry in rows[-1].items()})
            rows[-1] = {str(id): {"logprob": value} for id, value in rows[-1].items()}
        else:
            rows = answer["meta_info"]["input_top_logprobs"]
            rows[-1] = [[value, id, None] for id, value in change({id: value for value, id, _ in rows[-1]}).items()]

    return spoil


def put(value, *path):
    def spoil(answer: dict) -> None:
        for key in path[:-1]:
            answer = answer[key]
        answer[path[-1]] = value

    return spoil


def shortened(answer: dict) -> None:
    """As a server does that cuts prompts."""
    rows = answer["choices"][0]["prompt_logprobs"] if "choices" in answer else answer["meta_info"]["input_top_logprobs"]
    rows.pop()


VLLM, SGLANG = (("choices", 0, "prompt_logprobs"),), (("meta_info", "input_top_logprobs"),)
EVERYWHERE = [
    (
        in_row(lambda row: {445: -0.1, **row}),
        r"names the token id 445, but the tokenizer in --config.teacher.path has 445",
    ),
    (in_row(lambda row: {**row, min(row, key=row.get): float("nan")}), r"log-probability of token id \d+ is nan"),
    (in_row(lambda row: {**row, min(row, key=row.get): None}), r"log-probability of token id \d+ is None"),
    (
        in_row(lambda row: {id: value + 30 for id, value in row.items()}),
        r"is \d+\.\d+; expected a number up to 0 \(vLLM",
    ),
    (
        in_row(lambda row: dict.fromkeys(row, -0.5)),
        r"add up to [45]\.\d+, .*; expected 1: .* leave out --logprobs-mode",
    ),
    (
        in_row(lambda row: {id: value - 9 for id, value in row.items()}),
        r"and with the others to at most 0\.\d+; expected",
    ),
    (shortened, r"log-probabilities of \d+ tokens, where \d+ were sent; start the server without truncation"),
]
OF_ONE_API = [
    ("vllm", put(None, "choices", 0, "prompt_logprobs"), r"no prompt_logprobs \(None\): .*serving.api=sglang"),
    ("vllm", put([], "choices", 0, "prompt_logprobs", 1), r"prompt_logprobs of token 1 that are \[\]; this version"),
    (
        "vllm",
        put({"3": {"logprob": -1.0}}, "choices", 0, "prompt_logprobs", 5),
        r"token 5 is not the \d+ that was sent",
    ),
    ("sglang", put(None, "meta_info", "input_top_logprobs"), r"no input_top_logprobs and input_token_logprobs"),
    ("sglang", put(None, "meta_info", "input_top_logprobs", 1), r"input_top_logprobs of token 1 that are None"),
    ("sglang", put([-1.0, 444, None], "meta_info", "input_token_logprobs", 5), r"token 5 is not the \d+ that was sent"),
]


@pytest.mark.parametrize(
    ("api", "change", "words"),
    [*((api, *case) for api in APIS for case in EVERYWHERE), *OF_ONE_API],
)
def test_a_wrong_answer_is_refused_at_once_with_its_chain(api, change, words, weightless, tmp_path):
    with (
        PredictionServer(change=change) as server,
        pytest.raises(ValueError, match=rf"http://127.*answered the request of synthetic-train:\d+ with .*{words}"),
    ):
        cache_teacher(served(weightless, tmp_path, server.url, api), tmp_path)
    assert len(server.seen) <= 8  # those under way; none is asked for again
    assert not list(tmp_path.iterdir())  # nothing that would bind the next run to these settings


def test_a_server_with_a_lower_limit_is_told_from_its_count(weightless, tmp_path):
    change = in_row(lambda row: dict(sorted(row.items(), key=lambda entry: -entry[1])[:5]))
    with (
        PredictionServer(change=change) as server,
        pytest.raises(ValueError, match=r"there are 5 different tokens, not the 8 .*cache.top_k=5, .*--max-logprobs 8"),
    ):
        cache_teacher(served(weightless, tmp_path, server.url, "sglang"), tmp_path)


@pytest.mark.parametrize("api", APIS)
def test_what_is_no_such_server_is_named(api, weightless, tmp_path):
    def ask(**changes) -> None:
        cache_teacher(served(weightless, tmp_path, server.url, api, retries=0, **changes), tmp_path)

    for failure, words in (
        ("html", r"attempts at synthetic-.* without a reply; the last time with what is no .*<html>.*serving.api"),
        ("garbage", "without a reply; the last time with what is no JSON"),
        ("503", r"answered 503 to the request of .*as told.*; run the command again to go on; the shards"),
        (
            "400",
            r"answered 400 to the request of .*as told.*docs/teacher-cache.md",
        ),  # as where the context is too short
    ):
        with PredictionServer([failure] * 4) as server, pytest.raises(ValueError, match=words):
            ask()
    with PredictionServer() as server:
        server.listed = lambda: {"data": [{"id": "llama"}]}
        with pytest.raises(
            ValueError, match=r"the models that it serves with llama, and no 'team/tiny-teacher'; set .*served_model"
        ):
            ask()
        server.listed = lambda: {"detail": "Not Found"}
        with pytest.raises(ValueError, match=r"what is no list of models: .*Not Found"):
            ask()
        assert not server.seen
    with pytest.raises(ValueError, match=r"gave no answer in 1 attempts .*see that it runs"):
        ask()


def test_what_reads_states_is_told_so_before_anything_is_asked(weightless, from_server, tmp_path):
    everything = {
        "loss": LossSettings(intermediate_weight=1.0),
        "curriculum": CurriculumSettings(),
        "evaluation": dataclasses.replace(recipe(weightless).evaluation, drift_problems=2),
        "data": dataclasses.replace(recipe(weightless).data, segmentation="classifier:x"),
    }
    wanted = (
        r"served_model 'team/tiny-teacher' gives no hidden states.*set loss.alignment_weight=0, "
        r"loss.coherence_weight=0, loss.intermediate_weight=0, curriculum.enabled=False, evaluation.drift_problems=0, "
        r"data.segmentation=annotated, loss.temperature=1; or have the teacher's weights"
    )
    with pytest.raises(ValueError, match=wanted):
        served(weightless, tmp_path, "http://localhost:1", **everything)
    hot = dataclasses.replace(KD, temperature=4.0)
    with pytest.raises(
        ValueError, match=r"tokens that it leaves out is known at temperature 1 only.*: set loss.temperature=1; or"
    ):
        served(weightless, tmp_path, loss=hot)
    with pytest.raises(
        ValueError, match=r"cache.states is 'none', so only logit matching .*set loss.alignment_weight=0;"
    ):
        kd(BUNDLED, tmp_path, CacheSettings(states="none"), loss=dataclasses.replace(KD, alignment_weight=0.3))
    assert (
        kd(BUNDLED, tmp_path, CacheSettings(states="none"), loss=hot).has_states is False
    )  # computed at any temperature
    for changes in ({"server": ""}, {"served_model": ""}):
        of = served(weightless, tmp_path, "http://localhost:1")
        of = dataclasses.replace(of, teacher=dataclasses.replace(of.teacher, **changes))
        with pytest.raises(ValueError, match=r"give both the address of a server and the name"):
            cache_teacher(of, tmp_path)


def test_a_recipe_that_does_not_know_that_its_cache_is_a_servers_is_told_so(weightless, from_server):
    with pytest.raises(
        ValueError, match=rf"filled by the server of a model '{NAME}'.*set teacher.served_model={NAME} to"
    ):
        prepare(kd(weightless, from_server), lambda _: None)
    of = served(weightless, from_server)
    of = dataclasses.replace(of, teacher=dataclasses.replace(of.teacher, served_model="llama"))
    with pytest.raises(
        ValueError, match=rf"written with another teacher: 'served:{NAME}', this run has 'served:llama'"
    ):
        prepare(of, lambda _: None)


def test_its_states_are_not_there_to_be_read(weightless, from_server):
    experiment, _ = prepare(served(weightless, from_server), lambda _: None)
    (batch, *_) = experiment.batches(experiment.train.encoded[:8])
    assert experiment.cache.outputs(batch).boundary_states == {}
    with pytest.raises(ValueError, match=r"has no hidden states, only predictions"):
        experiment.on_devices(batch, states_only=True)

    class Diagnosed:
        model = DecoderModel(load_config(BUNDLED), "float32")

    with pytest.raises(ValueError, match=r"has no hidden states, only predictions; leave out --cache"):
        open_cache(str(from_server), Diagnosed())


def test_keys_that_a_servers_cache_leaves_unread_are_said(weightless, from_server):
    unread = unread_settings(served(weightless, from_server))
    for key in (
        "teacher.server",
        "teacher.serving",
        "teacher.param_dtype",
        "cache.states",
        "curriculum.validate_every",
    ):
        assert key in unread, key
    assert "teacher.served_model" not in unread
    assert unread_settings(recipe(weightless))["teacher.served_model"] == "teacher.cache is empty"


def test_of_equally_probable_tokens_the_lower_ids_are_kept_and_one_of_probability_0_has_a_number():
    half = float(np.log(0.5))
    assert _most_probable([(half, 7), (half, 3), (float("-inf"), 5), (float("-inf"), 4)], 3, 9) == (
        [3, 7, 4],
        [half, half, -9999.0],
    )
    assert _most_probable([(1e-6, 2), (-20.0, 1)], 1, 9) == ([2], [0.0])  # rounding


def test_log_probabilities_that_were_rounded_to_bfloat16_are_taken():
    """Whose sum is above 1 for some; the mass of the others is then 0."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        log_probs_V = np.array(jax.nn.log_softmax(2 * rng.standard_normal(64)))
        rounded_V = np.asarray(log_probs_V, jnp.bfloat16).astype(float)
        ids, kept = _most_probable([(value, i) for i, value in enumerate(rounded_V.tolist())], 64, 64)
        assert sorted(ids) == list(range(64))
        assert abs(np.exp(kept).sum() - 1) < 0.02
