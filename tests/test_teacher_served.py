"""What is asked of a served model: requests by name, replies as they are read, and the log that loses none."""

import json
import zlib
from types import SimpleNamespace

import pytest

from rtd_jax.data.formats import TextFormat
from rtd_jax.data.trace import Problem
from rtd_jax.teacher.served.log import ResponseLog
from rtd_jax.teacher.served.requests import OpenAISettings, Reply, SamplingSettings, before_stop, make_requests
from rtd_jax.teacher.served.server import OpenAIBackend

APPLES = Problem("How many apples?", "18", depth=2)


def test_a_text_is_cut_before_the_first_stop_text():
    assert before_stop("a Q: b\n\nc", ("\n\n", "Q:")) == ("a ", True)
    assert before_stop("abc", ("Q:",)) == ("abc", False)


def test_requests_are_named_by_what_decides_their_reply():
    def ids(problems, samples=2, seed=0, model="m"):
        return [request.id for request in make_requests(problems, samples, seed, {"model": model, "seed": seed})]

    two = [APPLES, Problem("How many pears?", "3")]
    assert len(set(ids(two))) == 4
    assert ids(two[::-1]) == ids(two)[2:] + ids(two)[:2]
    assert set(ids(two, samples=3)) > set(ids(two))
    assert not set(ids(two)) & (set(ids(two, seed=1)) | set(ids(two, model="other")))
    seeds = [request.seed for request in make_requests(two, 50, 0, {})]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**31 for seed in seeds)


# Replies.


def test_half_a_character_is_no_reason_to_stop():
    """A server that cuts a reply inside a character sends what is JSON and what no file takes."""
    backend = OpenAIBackend(OpenAISettings(model="m"), TextFormat("chat"), SamplingSettings())
    message = SimpleNamespace(content="18 \ud83d\n#### 18")
    completion = SimpleNamespace(choices=[SimpleNamespace(message=message, finish_reason="stop")])
    assert backend._reply(completion) == ("18 ?\n#### 18", "stop")


def read(finish: str | None, *, chat: bool, text: str | None = None, **message):
    backend = OpenAIBackend(OpenAISettings(model="m"), TextFormat("chat" if chat else "plain"), SamplingSettings())
    choice = {"message": SimpleNamespace(content=text, **message)} if chat else {"text": text}
    return backend._reply(SimpleNamespace(choices=[SimpleNamespace(finish_reason=finish, **choice)]))


@pytest.mark.parametrize("chat", [True, False])
def test_a_reply_without_text_is_counted(chat):
    """A model that thinks out of sight has no text when it is cut, or calls a tool in place of an answer."""
    assert read("length", chat=chat) == ("", "length")
    assert read("length", chat=chat, reasoning_content="so ..") == ("", "length")
    assert read("stop", chat=chat) == ("", "stop")
    assert read("tool_calls", chat=chat) == ("", "stop")
    assert read("content_filter", chat=chat) == ("", "refused")
    assert read("stop", chat=chat, text="a\n#### 1") == ("a\n#### 1", "stop")
    assert read("stop", chat=True, refusal="I cannot") == ("", "refused")
    for finish in (None, "abort", "error"):
        with pytest.raises(Exception, match=f"finish_reason {finish!r}"):
            read(finish, chat=chat, text="half a")


@pytest.mark.parametrize("finish", ["eos", "eos_token", "stop_sequence"])
def test_other_names_of_a_text_s_own_end_are_read(finish):
    assert read(finish, chat=True, text="a\n#### 1") == ("a\n#### 1", "stop")


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("choice", [{}, {"message": None}, {"message": "text"}, {"message": [1]}])
def test_a_reply_without_the_field_of_its_text_is_not_an_empty_one(chat, choice):
    """A server of chats that is asked for completions, or the reverse, would otherwise fill the log with nothing."""
    backend = OpenAIBackend(OpenAISettings(model="m"), TextFormat("chat" if chat else "plain"), SamplingSettings())
    completion = SimpleNamespace(choices=[SimpleNamespace(finish_reason="stop", **choice)])
    with pytest.raises(Exception, match=f"reply without the field '{'content' if chat else 'text'}'"):
        backend._reply(completion)


# The log of replies.

IDENTITY = {"model": "m", "sampling": {"temperature": 1.0}}
REQUESTS = make_requests([APPLES], 3, 0, IDENTITY)


def fill(folder) -> bytes:
    with ResponseLog(folder, IDENTITY) as log:
        for request in REQUESTS:
            log.add([(request, Reply(f"é line {request.sample}\n#### 18", "stop"))])
        return log.path.read_bytes()


def test_every_kill_leaves_a_log_that_goes_on(tmp_path):
    whole = fill(tmp_path)
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        (tmp_path / "responses.jsonl").write_bytes(whole[:length])
        with ResponseLog(tmp_path, IDENTITY) as log:
            assert len(log.replies) == whole[:length].count(b"\n")
            for request in REQUESTS[len(log.replies) :]:
                log.add([(request, Reply(f"é line {request.sample}\n#### 18", "stop"))])
        assert (tmp_path / "responses.jsonl").read_bytes() == whole


def test_a_damaged_or_foreign_log_is_refused(tmp_path):
    whole = fill(tmp_path)
    path = tmp_path / "responses.jsonl"
    for place in (10, len(whole.splitlines()[0]) + 70):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        number = 1 + whole[:place].count(b"\n")
        with pytest.raises(ValueError, match=rf"responses.jsonl:{number} is damaged: .* delete this line"):
            ResponseLog(tmp_path, IDENTITY)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"replies of another sampling: .*1.0.*, this run has .*0.5"):
        ResponseLog(tmp_path, IDENTITY | {"sampling": {"temperature": 0.5}})
    with ResponseLog(tmp_path, IDENTITY), pytest.raises(ValueError, match="is being written by another process"):
        ResponseLog(tmp_path, IDENTITY)
    (tmp_path / "requests.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"requests.json has format 99, this version reads 1 or 2"):
        ResponseLog(tmp_path, IDENTITY)
    (tmp_path / "requests.json").unlink()
    with pytest.raises(ValueError, match=r"has no requests\.json beside it"):
        ResponseLog(tmp_path, IDENTITY)


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "5",
        "null",
        '"text"',
        "{}",
        "",
        "{",
        "[" * 100_000,
        {"crc32": "1"},
        {"crc32": True},
        {"crc32": None},
        {"id": 5},
        {"sample": "0"},
        {"sample": None},
        {"text": None},
        {"text": ["x"]},
        {"finish": "eos"},
        {"finish": []},
        {"more": 1},
    ],
)
def test_a_line_of_the_log_of_another_type_is_named(tmp_path, line):
    fill(tmp_path)
    path = tmp_path / "responses.jsonl"
    lines = path.read_text().splitlines()
    if isinstance(line, dict):
        row = json.loads(lines[1]) | line
        if "crc32" not in line:
            fields = {key: value for key, value in row.items() if key != "crc32"}
            row["crc32"] = zlib.crc32(json.dumps(fields, sort_keys=True).encode())
        line = json.dumps(row)
    path.write_text("\n".join([lines[0], line, *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"responses.jsonl:2 is damaged: .*; delete this line and run"):
        ResponseLog(tmp_path, IDENTITY)


def test_what_was_asked_is_a_record_and_an_earlier_one_is_read(tmp_path):
    fill(tmp_path)
    path = tmp_path / "requests.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({"format": 1, **IDENTITY}))  # as an earlier version wrote it
    with ResponseLog(tmp_path, IDENTITY) as log:
        assert len(log.replies) == len(REQUESTS)
    path.write_text(json.dumps(record | {"model": "another"}))
    with pytest.raises(ValueError, match=r"requests.json was changed or damaged after it was written"):
        ResponseLog(tmp_path, IDENTITY)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"requests.json: expected a JSON object"):
        ResponseLog(tmp_path, IDENTITY)
