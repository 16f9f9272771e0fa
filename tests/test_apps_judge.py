"""The judge command, and evaluate's served judge: scores, damaged rows by name, and no verdict lost or asked twice."""

import hashlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from completions_server import CompletionsServer
from test_apps_traces_server import free_port, logged, serving
from test_train_run import ROOT, environment

from rtd_jax.apps.evaluate import EvaluateSettings, evaluate
from rtd_jax.apps.judge import JudgeSettings, judge
from rtd_jax.base.files import read_json
from rtd_jax.data.trace import Trace
from rtd_jax.eval.chains import score_chain
from rtd_jax.eval.judged_texts import verdict_fields

QUESTION = "Tom has {} apples and buys 3 more. How many apples does he have?"
RIGHT, WRONG = "He has {0} + 3 = {1} apples.", "He has {0} + 3 = 99 apples."


def row(number: int, *, is_right: bool, generator: str = "A") -> dict:
    """A solution of two steps, right or wrong in its first."""
    step = (RIGHT if is_right else WRONG).format(number, number + 3)
    return {
        "id": f"apples-{number}",
        "generator": generator,
        "problem": QUESTION.format(number),
        "steps": [step, f"The answer is {number + 3 if is_right else 99}."],
        "label": -1 if is_right else 0,
        "final_answer_correct": is_right,
    }


ROWS = [row(number, is_right=number % 3 > 0, generator="AB"[number % 2]) for number in range(10, 30)]


def write(path: Path, rows: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return str(path)


def references(folder: Path, numbers=range(10, 30)) -> str:
    """GSM8K's rows of the questions, with other white space; those of even numbers in the training split."""
    for split, remainder in (("train", 0), ("test", 1)):
        chains = [
            {
                "question": f" {QUESTION.format(number).replace(' buys', '  buys')}\n",
                "answer": f"{number} + 3 = <<{number}+3={number + 3}>>{number + 3}\n#### {number + 3}",
            }
            for number in numbers
            if number % 2 == remainder
        ]
        if chains:
            write(folder / f"{split}.jsonl", chains)
    return str(folder)


def verdicts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]


def finds_99(traces, body) -> tuple[str, str]:
    """A judge that finds the paragraph with 99; for 12 it has no index, for 13 one out of range, for 14 no end."""
    asked = body["messages"][0]["content"]
    number = int(re.search(r"Tom has (\d+)", asked)[1])
    if number in (12, 13, 14):
        return {12: ("It looks fine.", "stop"), 13: (r"\boxed{2}", "stop"), 14: ("Let me see", "length")}[number]
    paragraphs = re.findall(r"<paragraph_\d+>\n(.*?)\n</paragraph_\d+>", asked, re.DOTALL)
    found = next((i for i, paragraph in enumerate(paragraphs) if "99" in paragraph), -1)
    return f"I have checked it. \\boxed{{{found}}}", "stop"


@pytest.fixture
def judging(monkeypatch):
    """A server that judges by `finds_99`."""
    monkeypatch.setattr("completions_server.answer", finds_99)
    with CompletionsServer([]) as server:
        yield server


def asking(server: CompletionsServer, data: str, out: Path, **options) -> JudgeSettings:
    options = {"judge": ("openai",), "judge_concurrency": 4, "judge_retries": 2, "judge_timeout": 5.0} | options
    return JudgeSettings(data, out=str(out), judge_base_url=server.url, judge_model="m", **options)


def test_rules_are_scored_with_references_and_without(tmp_path, capsys):
    """References are joined by the question, whatever its white space, from both splits."""
    data, folder = write(tmp_path / "rows.jsonl", ROWS), references(tmp_path / "data" / "gsm8k", range(10, 20))
    report = read_json(judge(JudgeSettings(data, folder, str(tmp_path / "out"))))
    assert (report["n_right"], report["n_wrong"]) == (14, 6)
    assert (report["accuracy_right"], report["accuracy_wrong"], report["f1"]) == (100.0, 100.0, 100.0)
    assert (report["f1_stderr"], report["judge"]) == (0.0, "rules")
    assert (report["with_reference"], report["without_reference"]) == (10, 10)
    assert {name: part["n_right"] + part["n_wrong"] for name, part in report["by_generator"].items()} == {
        "A": 10,
        "B": 10,
    }
    found = verdicts(tmp_path / "out")
    assert [line["rules"]["first_error"] for line in found] == [line["label"] for line in ROWS]
    assert [line["id"] for line in found] == [line["id"] for line in ROWS]
    assert [line["reference"] is not None for line in found] == [True] * 10 + [False] * 10
    assert found[2]["rules"]["steps"][0] == {"right": False, "reason": found[2]["rules"]["steps"][0]["reason"]}
    assert "15" in found[2]["rules"]["steps"][0]["reason"]  # 12 + 3
    printed = capsys.readouterr().out
    assert "10 of 20 rows have a reference" in printed
    assert printed.count("next: ") == 1
    # The folder with gsm8k in it is as good.
    above = read_json(judge(JudgeSettings(data, str(tmp_path / "data"), str(tmp_path / "out"))))
    assert above["with_reference"] == 10


def test_one_split_of_the_references_is_enough_and_none_is_refused(tmp_path):
    data = write(tmp_path / "rows.jsonl", ROWS)
    folder = tmp_path / "gsm8k"
    references(folder, range(11, 30, 2))
    assert read_json(judge(JudgeSettings(data, str(folder), str(tmp_path / "out"))))["with_reference"] == 10
    (folder / "test.jsonl").rename(folder / "other.jsonl")
    for given, message in (
        (folder, r"no file of the split 'test' .* the folder has other\.jsonl"),
        (tmp_path / "nowhere", r"nowhere: no such file; give the folder that has gsm8k"),
        (folder / "other.jsonl", r"other\.jsonl.* give the folder that has gsm8k"),
    ):
        with pytest.raises(ValueError, match=message):
            judge(JudgeSettings(data, str(given), str(tmp_path / "out")))
    (folder / "test.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(ValueError, match=r"test.jsonl:1: the last line of 'answer'"):
        judge(JudgeSettings(data, str(folder), str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"problem": None}, "field 'problem' is missing"),
        ({"problem": " "}, "field 'problem' is blank"),
        ({"steps": "x"}, "field 'steps' is 'x'; expected a list of texts"),
        ({"steps": []}, "field 'steps' is an empty list"),
        ({"steps": ["x", " "]}, "field 'steps': step 1 of 2, counted from 0, is blank"),
        ({"label": 2}, "field 'label' is 2; expected the index of the first wrong of 2 steps, or -1"),
        ({"label": None}, "field 'label' is None"),
        ({"label": True}, "field 'label' is True"),
        ({"generator": ["x"]}, r"field 'generator' is \['x'\]; expected text"),
        ({"id": True}, "field 'id' is True; expected text"),
        ({"final_answer_correct": "yes"}, "field 'final_answer_correct' is 'yes'; expected true, false or null"),
    ],
)
def test_a_damaged_row_is_named_before_anything_is_judged(tmp_path, judging, damage, message):
    data = write(tmp_path / "rows.jsonl", [*ROWS[:3], ROWS[3] | damage])
    with pytest.raises(ValueError, match=rf"rows\.jsonl:4: {message}"):
        judge(asking(judging, data, tmp_path / "out"))
    assert not judging.seen
    assert [path.name for path in (tmp_path / "out").iterdir()] == []


def test_a_row_needs_no_more_than_problem_steps_and_label(tmp_path):
    data = write(tmp_path / "rows.jsonl", [{key: line[key] for key in ("problem", "steps", "label")} for line in ROWS])
    report = read_json(judge(JudgeSettings(data, out=str(tmp_path / "out"))))
    assert (list(report["by_generator"]), report["without_reference"]) == (["unknown"], 20)
    assert verdicts(tmp_path / "out")[0]["id"] == f"{data}:1"


def test_a_served_judge_is_asked_once_a_row_and_scored(tmp_path, judging, capsys):
    """A reply without an index in range is no verdict, counted, and wrong for the accuracy."""
    data = write(tmp_path / "rows.jsonl", [*ROWS, ROWS[0]])  # one row twice
    report = read_json(judge(asking(judging, data, tmp_path / "out")))
    assert len(judging.seen) == 20
    assert {body["temperature"] for body in judging.bodies} == {0.0}
    assert "<paragraph_1>" in judging.bodies[0]["messages"][0]["content"]
    assert report["judges"]["openai"]["replies"] == {"verdict": 18, "unparsable": 2, "unfinished": 1, "refused": 0}
    # 12 is wrong, 13 and 14 are right, and so is the row that is there twice.
    assert (report["n_right"], report["n_wrong"], report["no_verdict"]) == (15, 6, 3)
    assert report["accuracy_right"] == pytest.approx(100 * 13 / 15)
    assert report["accuracy_wrong"] == pytest.approx(100 * 5 / 6)
    found = verdicts(tmp_path / "out")
    assert [line["openai"]["first_error"] for line in found[:4]] == [-1, -1, None, None]
    assert found[2]["openai"]["outcome"] == "unparsable"
    assert found[0]["openai"]["request"] in logged(tmp_path / "out")
    # Again, nothing is asked, and the report is the same.
    assert read_json(judge(asking(judging, data, tmp_path / "out"))) == report
    assert len(judging.seen) == 20
    # Another prompt, model or sampling is another folder's.
    with pytest.raises(ValueError, match=r"replies of another sampling: .*2048.* 9.*, or another --out"):
        judge(asking(judging, data, tmp_path / "out", judge_max_tokens=9))


def test_two_judges_are_compared(tmp_path, judging, capsys):
    data = write(tmp_path / "rows.jsonl", ROWS)
    settings = asking(judging, data, tmp_path / "out", judge=("rules", "openai"))
    report = read_json(judge(settings))
    assert report["judge"] == "rules"
    assert report["accuracy_right"] == report["judges"]["rules"]["accuracy_right"] == 100.0
    assert report["judges"]["openai"]["model"] == "m"
    assert report["agreement"] == {
        **{"same_verdict": 100.0, "same_verdict_stderr": 0.0, "same_right": 100.0, "same_right_stderr": 0.0},
        **{"kappa": 1.0, "kappa_stderr": 0.0, "n": 17, "no_verdict": 3},
    }
    assert {"rules", "openai"} < set(verdicts(tmp_path / "out")[0])
    assert "kappa 1.00" in capsys.readouterr().out


def test_what_a_server_refuses_is_named_by_flags(tmp_path, monkeypatch):
    monkeypatch.setattr("completions_server.answer", finds_99)
    data = write(tmp_path / "rows.jsonl", ROWS[:6])
    with CompletionsServer([], ["400", "400", "400"]) as server:
        with pytest.raises(
            ValueError,
            match=r"answered 400 to the request of .*rows\.jsonl:1: .*; mend --judge_model, --judge_base_url, .* "
            r"with --judge_skip_refused=True",
        ):
            judge(asking(server, data, tmp_path / "out", judge_concurrency=1))
        assert not (tmp_path / "out" / "report.json").exists()
        report = read_json(judge(asking(server, data, tmp_path / "out", judge_concurrency=1, judge_skip_refused=True)))
    assert report["judges"]["openai"]["replies"]["refused"] == 2
    with pytest.raises(ValueError, match=r"gave no answer in 1 attempts"):
        judge(asking(server, data, tmp_path / "other", judge_retries=0))


def test_whatever_a_server_does_the_verdicts_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("completions_server.answer", finds_99)
    data = write(tmp_path / "rows.jsonl", ROWS)
    found = []
    for name, failures in (("calm", []), ("rough", ["500", "garbage", "empty", "dropped", "truncated"])):
        with CompletionsServer([], failures) as server:
            judge(asking(server, data, tmp_path / name))
            assert len(server.seen) == 20 + len(failures)
        found.append(verdicts(tmp_path / name))
    assert found[0] == found[1]


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="judge is 'people'; expected one of rules, openai"):
        JudgeSettings("x", judge=("people",))
    with pytest.raises(ValueError, match=r"judge is .*expected each value once"):
        JudgeSettings("x", judge=("rules", "rules"))
    with pytest.raises(ValueError, match="judge is empty"):
        JudgeSettings("x", judge=())
    with pytest.raises(ValueError, match="judge_model is empty"):
        JudgeSettings("x", judge=("openai",))


def command(data: str, out: Path, url: str, model: str = "m", *more: str) -> list[str]:
    flags = [f"--data={data}", f"--out={out}", "--judge=openai", f"--judge_base_url={url}", f"--judge_model={model}"]
    return [sys.executable, "launch/judge.py", *flags, *more]


def kill_after(arguments: list[str], out: Path, replies: int) -> None:
    """Starts the command and kills it once the log has so many replies."""
    process = subprocess.Popen(arguments, cwd=ROOT, env=environment(), stdout=subprocess.PIPE)
    path = out / "responses.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < replies:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_killed_and_started_again_it_loses_no_verdict_and_asks_none_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("completions_server.answer", finds_99)
    data, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    with CompletionsServer([], delay=0.05) as server:
        arguments = command(data, out, server.url, "m", "--judge_concurrency=2")
        kill_after(arguments, out, 5)
        known, asked = set(logged(out)), len(server.seen)
        done = subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not known & {name for _, name in server.seen[asked:]}
        assert len(server.seen) <= 20 + 2  # a kill costs the requests under way
    assert len(logged(out)) == 20
    with CompletionsServer([]) as server:
        judge(asking(server, data, tmp_path / "undisturbed"))
    assert verdicts(out) == verdicts(tmp_path / "undisturbed")


# Evaluation.


def generations(folder: Path) -> str:
    """Texts in words, whose chains no arithmetic decides."""
    chain = {"task": "strategyqa", "model": "writer", "reference": ["Cats purr.", "Dogs bark."], "answer": "yes"}
    return write(
        folder / "texts.jsonl",
        [
            chain | {"prompt": "Tom has 1 cat. Do cats purr?", "text": "Cats purr.\n#### yes"},
            chain | {"prompt": "Tom has 2 cats. Do they?", "text": "Cats have 99 legs.\nBut they purr.\n#### yes"},
            chain | {"prompt": "Tom has 3 cats. Do they?", "text": "Cats do not purr.\n#### no"},
            chain | {"prompt": "Tom has 12 cats. Do they?", "text": "Cats purr.\n#### yes"},
            chain | {"prompt": "Tom has 5 cats. Do they?", "text": " "},
        ],
    )


def test_evaluate_has_the_chains_judged_beside_its_own_reading(tmp_path, judging, capsys):
    """A chain is right where the judge finds no wrong step and the answer is right."""
    settings = {"judge": "openai", "judge_base_url": judging.url, "judge_model": "m"}
    path = evaluate(EvaluateSettings(generations=generations(tmp_path), out=str(tmp_path / "out"), **settings))
    assert len(judging.seen) == 4  # the text without a step is not asked about
    found = read_json(path)["sections"]["strategyqa"]["writer"]
    assert found["judged_chain_accuracy"]["all"] == {"mean": 0.2, "stderr": pytest.approx(0.2), "n": 5}
    assert list(found["judged_chain_accuracy"]) == ["2", "all"]
    assert found["judged_steps"]["all"]["mean"] == 0.4
    assert (found["judged_by"], found["judged_without_verdict"]) == ("m", 1)
    records = [json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text().splitlines()]
    assert [record["judged_first_error"] for record in records] == [-1, 0, -1, None, 0]
    assert "chain, judged" in capsys.readouterr().out
    assert "<th>chain, judged %</th>" in (tmp_path / "out" / "report.html").read_text()
    asked = [body["messages"][0]["content"] for body in judging.bodies]
    assert any("<paragraph_2>\n#### yes\n</paragraph_2>" in prompt for prompt in asked)
    # Started again it asks for nothing, and what it kept beside the log leads to the same report.
    kept = tmp_path / "out" / "judge" / "generations.jsonl"
    evaluate(EvaluateSettings(generations=str(kept), out=str(tmp_path / "out"), **settings))
    assert len(judging.seen) == 4
    assert read_json(path)["sections"]["strategyqa"]["writer"] == found
    # Without the judge, the verdicts in the file give the same report; not that of a text that was changed since.
    evaluate(EvaluateSettings(generations=str(tmp_path / "out" / "generations.jsonl"), out=str(tmp_path / "again")))
    assert read_json(tmp_path / "again" / "report.json")["sections"]["strategyqa"]["writer"] == found
    records[0]["text"] += "\n"
    evaluate(EvaluateSettings(generations=write(tmp_path / "changed.jsonl", records), out=str(tmp_path / "again")))
    changed = read_json(tmp_path / "again" / "report.json")["sections"]["strategyqa"]["writer"]
    assert "judged_chain_accuracy" not in changed


def test_evaluate_refuses_another_judge_s_log_before_a_model_is_run(tmp_path, judging):
    settings = {"judge": "openai", "judge_base_url": judging.url, "out": str(tmp_path / "out")}
    evaluate(EvaluateSettings(generations=generations(tmp_path), judge_model="m", **settings))
    with pytest.raises(ValueError, match=r"judge holds replies of another model: 'm', this run has 'other'"):
        evaluate(EvaluateSettings(("no such model",), judge_model="other", **settings))


def test_evaluate_refuses_a_judge_that_has_nothing_to_read(tmp_path):
    options = {"judge": "openai", "judge_model": "m"}
    with pytest.raises(ValueError, match="choices have no texts to judge"):
        EvaluateSettings(("model",), tasks=("arc_challenge",), **options)
    choice = {"prompt": "q", "choices": ["a", "b"], "answer": 0, "log_likelihoods": [-1.0, -2.0]}
    path = write(tmp_path / "choices.jsonl", [choice])
    with pytest.raises(ValueError, match="choices have no texts to judge"):
        evaluate(EvaluateSettings(generations=path, out=str(tmp_path / "out"), **options))
    with pytest.raises(ValueError, match="judge_model is 'm', but no server is to judge"):
        EvaluateSettings(("model",), judge_model="m")


def test_a_boxed_answer_is_right_beside_a_served_verdict():
    """Neither strict (no #### line) nor flexible (another number is the last) reads it; the judge's reading does."""
    trace = Trace.of_steps("How many?", ["9 + 9 = 18"], "18", "#### 18")
    record = score_chain("9 + 9 = 18, so \\boxed{18} of the 40.", trace)
    assert not record["answer_strict"]
    assert not record["answer_flexible"]
    digest = hashlib.sha256(record["text"].encode()).hexdigest()[:16]
    for first_error, judged in ((-1, True), (0, False), (None, False)):
        found = {"judged_by": "m", "judged_text": digest, "judged_first_error": first_error}
        assert verdict_fields(record, found)["judged"] is judged


@pytest.mark.slow
@pytest.mark.real_weights
def test_a_judge_of_real_weights_that_is_killed_midway(smollm2, tmp_path):
    """SmolLM2-135M-Instruct by `transformers serve`: the command is killed, then the server; no verdict is lost."""
    data, out, port = write(tmp_path / "rows.jsonl", ROWS[:8]), tmp_path / "out", free_port()
    url = f"http://127.0.0.1:{port}/v1"
    more = ("--judge_max_tokens=8", "--judge_concurrency=1", "--judge_retries=1")
    arguments = command(data, out, url, str(smollm2), *more)

    def kill_server_after(process: subprocess.Popen, replies: int) -> None:
        while len((out / "responses.jsonl").read_bytes().splitlines()) < replies:
            time.sleep(0.01)
        process.kill()

    with serving(smollm2, port) as process:
        kill_after(arguments, out, 2)
        before = logged(out)
        killer = threading.Thread(target=kill_server_after, args=(process, 4), daemon=True)
        killer.start()
        stopped = subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True)
        killer.join()
    assert stopped.returncode == 2
    assert f"127.0.0.1:{port}" in stopped.stderr
    assert 4 <= len(logged(out)) < 8
    assert before.items() <= logged(out).items()
    with serving(smollm2, port):
        done = subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        undisturbed = command(data, tmp_path / "undisturbed", url, str(smollm2), *more)
        subprocess.run(undisturbed, cwd=ROOT, env=environment(), check=True, capture_output=True)
    assert logged(out) == logged(tmp_path / "undisturbed")  # also: no request has two replies
    assert len(logged(out)) == 8
    assert verdicts(out) == verdicts(tmp_path / "undisturbed")
    report = read_json(out / "report.json")
    assert sum(report["judges"]["openai"]["replies"].values()) == report["n_right"] + report["n_wrong"] == 8
