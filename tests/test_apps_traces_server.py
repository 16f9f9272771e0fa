"""The traces command against real servers: one that misbehaves in every way at once, and `transformers serve`."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
from completions_server import CompletionsServer, answer
from test_train_run import ROOT, environment

from rtd_jax.apps.traces.local_settings import JaxSettings
from rtd_jax.apps.traces.select import SelectionSettings
from rtd_jax.apps.traces.traces import OutputSettings, TracesRecipe, write_traces
from rtd_jax.base.files import read_json
from rtd_jax.base.sharding import MeshSettings
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.manifest import NAME
from rtd_jax.data.sources import SourceSettings, load_traces
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT
from rtd_jax.teacher.served.requests import OpenAISettings, SamplingSettings

PROBLEMS = SourceSettings("synthetic", split="train", limit=12)
TRACES = load_traces(PROBLEMS)
BUNDLED = ROOT / "rtd_jax" / "bundled" / "tiny_teacher"


def asking(url: str, *, chat: bool = False, samples: int = 4, **server) -> TracesRecipe:
    options = {"model": "m", "concurrency": 4, "retries": 3, "timeout": 5.0} | server
    return TracesRecipe(
        PROBLEMS,
        "openai",
        text=TextFormat("chat") if chat else TINY_FORMAT,
        sampling=SamplingSettings(samples, 1.0, 1.0, 64, stop=("\n\nQuestion:",)),
        openai=OpenAISettings(url, **options),
        output=OutputSettings(rows_per_shard=5),
    )


def logged(folder: Path) -> dict[str, dict]:
    rows = [json.loads(line) for line in (folder / "responses.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def outputs(folder: Path) -> dict[str, bytes]:
    names = [path.name for path in folder.glob("train-*")]
    return {name: (folder / name).read_bytes() for name in [*names, NAME, "requests.json"]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with CompletionsServer(TRACES) as server:
        write_traces(asking(server.url), folder)
        assert len(server.seen) == 48
        assert server.most_in_flight <= 4
        (body, *_) = server.bodies
    assert body.keys() == {"model", "temperature", "top_p", "max_tokens", "seed", "stop", "prompt"}
    return folder


def test_what_is_kept_is_what_the_server_had_right(undisturbed):
    manifest = read_json(undisturbed / NAME)
    total = manifest["counts"]["all"]
    assert sum(total.values()) == 48
    drawn = Counter()
    for row in logged(undisturbed).values():
        drawn[row["finish"]] += 1
    assert total["unfinished"] == drawn["length"]
    traces = load_traces(SourceSettings("stepwise", str(undisturbed)))
    assert len(traces) == total["kept"]
    truth = {trace.prompt: trace for trace in TRACES}
    for trace in traces:
        assert (trace.steps, trace.answer) == (truth[trace.prompt].steps, truth[trace.prompt].answer)
    # One of four right ones is kept of a server that always finds the same words.
    assert total["kept"] == len(traces) == len({trace.prompt for trace in traces})
    table = datasets.load_dataset(str(undisturbed), split="train")
    assert table.num_rows == len(traces)
    assert table[0]["completions"] == list(traces[0].steps)
    assert [shard["rows"] for shard in manifest["shards"]][:-1] == [5] * (len(manifest["shards"]) - 1)
    assert sum(manifest["kept_by_depth"].values()) == len(traces)


def test_whatever_a_server_does_the_chains_are_the_same(undisturbed, tmp_path):
    failures = ["429", "500", "truncated", "garbage", "html", "empty", "aborted", "dropped", "503"]
    failures += ["null", "[1, 2]", "7", '{"choices": [7]}']
    with CompletionsServer(TRACES, failures) as server:
        write_traces(asking(server.url), tmp_path)
    assert len(server.seen) == 48 + len(failures)
    assert outputs(tmp_path) == outputs(undisturbed)
    assert logged(tmp_path) == logged(undisturbed)
    # 429 came with Retry-After: 0.3.
    first = server.seen[0][1]
    times = [at for at, name in server.seen if name == first]
    assert times[1] - times[0] >= 0.3


def test_a_server_that_dies_and_returns_costs_nothing(undisturbed, tmp_path):
    server = CompletionsServer(TRACES, delay=0.05)
    recipe = asking(server.url, retries=8)
    errors = []

    def work() -> None:
        try:
            write_traces(recipe, tmp_path)
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while len(server.seen) < 10:
        time.sleep(0.01)
    server.close()
    time.sleep(0.5)
    with CompletionsServer(TRACES, port=server.port):
        thread.join(timeout=60)
    assert not thread.is_alive()
    assert not errors
    assert outputs(tmp_path) == outputs(undisturbed)


def test_a_server_that_stays_away_is_named_and_what_it_said_is_kept(undisturbed, tmp_path):
    with CompletionsServer(TRACES, ["", "", "", *["500"] * 60]) as server:
        with pytest.raises(ValueError, match=r"answered 500 .*: .*as told.*; run the command again to go on"):
            write_traces(asking(server.url, retries=0, concurrency=1), tmp_path)
        assert len(logged(tmp_path)) == 3
    assert not (tmp_path / NAME).exists()
    with pytest.raises(ValueError, match=r"gave no answer in 1 attempts \(\w*Error: .*; see that it runs"):
        write_traces(asking(server.url, retries=0), tmp_path)
    with (
        CompletionsServer(TRACES, ["html"] * 60) as server,
        pytest.raises(
            ValueError,
            match=r"every one of 1 attempts at .* with what is no .*it ends in /v1",
        ),
    ):
        write_traces(asking(server.url, retries=0), tmp_path)
    with CompletionsServer(TRACES) as server:
        write_traces(asking(server.url), tmp_path)
        assert len(server.seen) == 45
    assert outputs(tmp_path) == outputs(undisturbed)


def test_a_refused_request_stops_the_run_or_is_counted(tmp_path):
    with CompletionsServer(TRACES, ["400"] * 2 + ["422"]) as server:
        with pytest.raises(ValueError, match=r"answered 400 to the request of synthetic-train:1: .*skip_refused=True"):
            write_traces(asking(server.url, concurrency=1), tmp_path)
        write_traces(asking(server.url, concurrency=1, skip_refused=True), tmp_path)
    assert read_json(tmp_path / NAME)["counts"]["all"]["refused"] == 2
    with (
        CompletionsServer(TRACES, ["401"]) as server,
        pytest.raises(
            ValueError, match=r"answered 401 .* mend --config.openai.model, --config.openai.base_url, the key"
        ),
    ):
        write_traces(asking(server.url), tmp_path / "other")


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_hidden_thinking_that_is_cut_does_not_end_a_run(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("completions_server.answer", lambda traces, body: (None, "length"))
    with CompletionsServer(TRACES) as server:
        manifest = read_json(write_traces(asking(server.url, chat=kind == "chat", samples=1), tmp_path))
    assert (manifest["counts"]["all"]["unfinished"], manifest["shards"]) == (12, [])
    assert {row["finish"] for row in logged(tmp_path).values()} == {"length"}
    with pytest.raises(ValueError, match="no file of the split 'train'"):
        load_traces(SourceSettings("stepwise", str(tmp_path)))


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("empty", "0 choices in place of one: .*; see its log for request"),
        ("aborted", "finish_reason 'abort', so whether the text is whole is not known: .*; see its log for request"),
        ("html", "what is no completion: '<html>.*base_url"),
        ("7", "what is no completion: 7; see that --config.openai.base_url"),
    ],
)
def test_what_a_server_said_is_named(tmp_path, failure, words):
    with (
        CompletionsServer(TRACES, [failure]) as server,
        pytest.raises(ValueError, match=f"every one of 1 attempts at .* without a reply; the last time with {words}"),
    ):
        write_traces(asking(server.url, retries=0, concurrency=1), tmp_path)


def test_requests_are_paced_and_chats_are_chats(tmp_path):
    with CompletionsServer(TRACES) as server:
        write_traces(asking(server.url, chat=True, samples=1, requests_per_minute=600), tmp_path)
    times = sorted(at for at, _ in server.seen)
    assert len(times) == 12
    assert times[-1] - times[0] >= 0.7 * 11 * 60 / 600  # and not at once: the first may be late by its connection
    asked = [message for body in server.bodies for message in body["messages"]]
    assert sorted(message["content"] for message in asked) == sorted(trace.prompt for trace in TRACES)
    assert {message["role"] for message in asked} == {"user"}


def test_more_samples_and_another_selection_ask_for_nothing_twice(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    with CompletionsServer(TRACES) as server:
        recipe = asking(server.url, samples=5)
        write_traces(recipe, tmp_path)
        assert len(server.seen) == 12
        one = TracesRecipe(**{**vars(recipe), "selection": SelectionSettings("flexible", per_problem=1)})
        one = TracesRecipe(**{**vars(one), "output": OutputSettings("parquet", "validation", 100)})
        write_traces(one, tmp_path)
        assert len(server.seen) == 12
    assert not list(tmp_path.glob("train-*"))
    parquet = load_traces(SourceSettings("stepwise", str(tmp_path), split="validation"))
    assert len(parquet) == len({trace.prompt for trace in parquet})
    assert datasets.load_dataset(str(tmp_path), split="validation").num_rows == len(parquet)


def command(recipe: TracesRecipe, workdir: Path, folder: Path) -> list[str]:
    """launch/traces.py with this recipe as a config file."""
    path = folder / "traces_config.py"
    if not path.exists():
        options = {
            "backend": recipe.backend,
            "problems": {"schema": "synthetic", "limit": PROBLEMS.limit},
            "text": {"prompt_template": TINY_FORMAT.prompt_template, "completion_prefix": ""},
            "sampling": vars(recipe.sampling),
            "openai": vars(recipe.openai),
            "output": vars(recipe.output),
        }
        path.write_text(
            f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({options!r})\n"
        )
    return [sys.executable, "launch/traces.py", f"--config={path}", f"--workdir={workdir}"]


def test_killed_anywhere_it_goes_on_without_repeating_or_losing_a_row(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    with CompletionsServer(TRACES, delay=0.02) as server:
        recipe = asking(server.url, concurrency=3)
        for until in (5, 25):
            process = subprocess.Popen(
                command(recipe, workdir, tmp_path), cwd=ROOT, env=environment(), stdout=subprocess.PIPE
            )
            path = workdir / "responses.jsonl"
            while not path.exists() or path.read_bytes().count(b"\n") < until:
                assert process.poll() is None
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            known, asked = set(logged(workdir)), len(server.seen)
        done = subprocess.run(
            command(recipe, workdir, tmp_path), cwd=ROOT, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert not known & {name for _, name in server.seen[asked:]}
    assert len(server.seen) <= 48 + 2 * 3  # a kill costs the requests under way
    assert logged(workdir) == logged(undisturbed)
    assert outputs(workdir) == outputs(undisturbed)


SHALLOW = SourceSettings("synthetic", limit=6, depths=(1, 2))


def tiny(backend: str, **changes) -> TracesRecipe:
    settings = {
        "text": TINY_FORMAT,
        "sampling": SamplingSettings(2, 1.0, 1.0, 64),
        "jax": JaxSettings(str(BUNDLED), "float32", "float32", "fsdp", 8, MeshSettings(1, -1, 2)),
    }
    return TracesRecipe(SHALLOW, backend, **(settings | changes))


def test_a_teacher_in_this_process_goes_on_with_the_same_bits(tmp_path):
    write_traces(tiny("jax"), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    lines = (tmp_path / "whole" / "responses.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut" / "responses.jsonl").write_bytes(b"".join([*lines[:3], lines[3][:20]]))
    write_traces(tiny("jax"), tmp_path / "cut")
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert outputs(tmp_path / "cut") == outputs(tmp_path / "whole")
    # The bundled teacher solves nearly all; draws differ from one another.
    counts = read_json(tmp_path / "whole" / NAME)["counts"]["all"]
    assert counts["kept"] + counts["duplicate"] >= 9
    assert all(row["finish"] == "stop" for row in logged(tmp_path / "whole").values())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serving(folder: Path, port: int):
    """`transformers serve` with a model's folder on the loopback; gives the process, once it answers."""
    log = folder.with_name(f"{folder.name}.log")
    with log.open("a") as out:
        process = subprocess.Popen(
            [
                str(Path(sys.executable).with_name("transformers")),
                "serve",
                str(folder),
                "--host=127.0.0.1",
                f"--port={port}",
                "--device=cpu",
                "--dtype=float32",
            ],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The bundled teacher, served: (url, model)."""
    folder = tmp_path_factory.mktemp("served") / "tiny_teacher"
    shutil.copytree(BUNDLED, folder)
    config = read_json(folder / "config.json")
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in config}
    # Without this the server decodes greedily, whatever the temperature.
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, **ids}))
    port = free_port()
    with serving(folder, port):
        yield f"http://127.0.0.1:{port}/v1", str(folder)


@pytest.mark.slow
def test_transformers_serve_writes_chains_of_the_bundled_teacher(served, tmp_path):
    url, model = served
    server = OpenAISettings(url, model, concurrency=2)
    write_traces(tiny("openai", openai=server), tmp_path / "drawn")
    counts = read_json(tmp_path / "drawn" / NAME)["counts"]["all"]
    assert sum(counts.values()) == 12
    assert counts["kept"] + counts["duplicate"] >= 9  # 97% or more of held-out problems, greedily
    traces = load_traces(SourceSettings("stepwise", str(tmp_path / "drawn")))
    problems = load_traces(SHALLOW)
    assert {trace.prompt for trace in traces} <= {problem.prompt for problem in problems}


@pytest.mark.slow
def test_both_backends_write_the_same_greedy_chains(served, tmp_path):
    url, model = served
    greedy = {"sampling": SamplingSettings(1, 0.0, 1.0, 64)}
    write_traces(tiny("openai", openai=OpenAISettings(url, model, concurrency=2), **greedy), tmp_path / "server")
    write_traces(tiny("jax", **greedy), tmp_path / "here")
    texts = [
        sorted((row["text"], row["finish"]) for row in logged(tmp_path / name).values()) for name in ("server", "here")
    ]
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.real_weights
def test_a_server_of_real_weights_that_is_killed_midway(smollm2, tmp_path):
    """SmolLM2-135M-Instruct: the logs that two lives of a server filled are those of the model in this process."""
    port = free_port()
    # Eight tokens are no whole chain, so there is nothing to write; what counts here is the log.
    settings = {"sampling": SamplingSettings(1, 0.0, 1.0, 8)}
    plain = settings | {"text": TextFormat("plain", "Question: {prompt}\nAnswer:")}
    chat = settings | {"text": TextFormat("chat")}
    of_jax = JaxSettings(str(smollm2), "float32", "float32", "fsdp", 8, MeshSettings(1, -1, 1))
    of_server = OpenAISettings(f"http://127.0.0.1:{port}/v1", str(smollm2), concurrency=1, retries=1, timeout=60.0)
    log = tmp_path / "server plain" / "responses.jsonl"

    def answered() -> int:
        return len(log.read_text().splitlines()) if log.exists() else 0

    def kill_after_two(process: subprocess.Popen) -> None:
        while answered() < 2:
            time.sleep(0.01)
        process.kill()

    with serving(smollm2, port) as process:
        killer = threading.Thread(target=kill_after_two, args=(process,), daemon=True)
        killer.start()
        with pytest.raises(ValueError, match=rf"127.0.0.1:{port}"):
            write_traces(tiny("openai", openai=of_server, **plain), tmp_path / "server plain")
        killer.join()
    assert 2 <= answered() < 6
    with serving(smollm2, port):
        for name, form in (("plain", plain), ("chat", chat)):
            write_traces(tiny("openai", openai=of_server, **form), tmp_path / f"server {name}")
    for name, form in (("plain", plain), ("chat", chat)):
        write_traces(tiny("jax", jax=of_jax, **form), tmp_path / f"here {name}")
        served, here = (
            sorted((row["text"], row["finish"]) for row in logged(tmp_path / f"{where} {name}").values())
            for where in ("server", "here")
        )
        assert len(served) == 6
        assert served == here


def test_the_test_server_has_every_kind_of_chain():
    """Or the tests above would show less than they say."""
    found = {answer(TRACES, {"prompt": TRACES[0].prompt, "seed": seed}) for seed in range(60)}
    assert len(found) == 5
    assert Counter(finish for _, finish in found) == {"stop": 4, "length": 1}
