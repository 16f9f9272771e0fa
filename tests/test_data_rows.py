"""Rows of files are read as they were written, or refused by file, row and cause."""

import bz2
import datetime
import decimal
import errno
import gzip
import json
import lzma
import os

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rtd_jax.data.rows import read_file
from rtd_jax.data.schemas.stepwise import from_stepwise
from rtd_jax.data.sources import SourceSettings, load_problems, load_rows, load_traces

ROW = {"prompt": "q", "completions": ["s 1"], "answer": "1"}


def stepwise(location, **kwargs):
    return load_traces(SourceSettings("stepwise", str(location), **kwargs))


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return path


def write_parquet(path, columns):
    rows = len(next(iter(columns.values())))
    known = {"prompt": ["q"] * rows, "completions": pa.array([["s 1"]] * rows, pa.list_(pa.string()))}
    pq.write_table(pa.table(known | columns), path)
    return path


def finals(location):
    return [trace.final for trace in stepwise(location)]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["2024-01-31", "2023-02-01"], ["#### 2024-01-31", "#### 2023-02-01"]),  # no dates are looked for
        (["10:30", "2024-01-31T10:00:00Z"], ["#### 10:30", "#### 2024-01-31T10:00:00Z"]),
        ([72, 2.5, "eighteen", None], ["#### 72", "#### 2.5", "#### eighteen", ""]),  # nor one type for a column
        ([2**100, -(2**64)], [f"#### {2**100}", f"#### -{2**64}"]),
        (["", " ", None, "5"], ["", "", "", "#### 5"]),
        (["007", "1,000", "1\n2"], ["#### 007", "#### 1,000", "#### 1 2"]),
    ],
)
def test_answers_of_json_are_as_written(tmp_path, answers, expected):
    rows = [ROW | {"answer": answer} for answer in answers]
    assert finals(write_lines(tmp_path / "train.jsonl", rows)) == expected
    (tmp_path / "train.json").write_text(json.dumps(rows, indent=1))
    assert finals(tmp_path / "train.json") == expected


def test_numbers_of_json_keep_their_digits(tmp_path):
    written = ["7.10", "0.12345678901234567890123", "1e3", "1.0", "-0.0"]
    lines = [json.dumps(ROW).replace('"1"', number) for number in written]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    assert [trace.answer for trace in stepwise(tmp_path)] == written
    _, row = next(read_file(tmp_path / "train.jsonl"))
    assert row["answer"] == 7.1
    assert json.dumps(row["answer"]) == "7.1"


def test_a_file_replaced_under_its_old_time_is_read_anew(tmp_path):
    for name, write in (
        ("train.jsonl", lambda path, answer: write_lines(path, [ROW | {"answer": answer}])),
        ("train.parquet", lambda path, answer: write_parquet(path, {"answer": [answer]})),
    ):
        for answer in ("1", "2"):
            write(tmp_path / name, answer)
            os.utime(tmp_path / name, (1e9, 1e9))
            assert [trace.answer for trace in stepwise(tmp_path / name)] == [answer]


def test_optional_fields_may_come_late_or_be_null(tmp_path):
    rows = [ROW | {"labels": None, "extra": None}] + [ROW] * 3_000 + [ROW | {"labels": [True], "extra": {"a": [1]}}]
    assert len(stepwise(write_lines(tmp_path / "late.jsonl", rows))) == 3_002


def test_forms_of_json(tmp_path):
    two = [ROW, ROW | {"answer": "2"}]
    forms = {
        "lines.json": "\n\n".join(map(json.dumps, two)),  # no line end at the end, a blank line between
        "array.json": "\n " + json.dumps(two),
        "array.jsonl": json.dumps(two),
        "windows.jsonl": "\ufeff" + "".join(f"{json.dumps(row)}\r\n" for row in two) + "\r\n \n",
    }
    for name, text in forms.items():
        (tmp_path / name).write_bytes(text.encode())
        assert finals(tmp_path / name) == ["#### 1", "#### 2"], name
    (tmp_path / "one.json").write_text(json.dumps(ROW, indent=2))
    assert finals(tmp_path / "one.json") == ["#### 1"]
    for number, pack in enumerate((gzip.compress, bz2.compress, lzma.compress)):
        file = tmp_path / f"packed{number}.jsonl"
        file.write_bytes(pack(json.dumps(ROW).encode()))
        assert finals(file) == ["#### 1"]
        file.write_bytes(pack(os.urandom(4_000))[:3_000])
        with pytest.raises(ValueError, match=rf"packed{number}.jsonl.*"):
            stepwise(file)


def test_separators_of_unicode_and_null_bytes_are_text(tmp_path):
    prompt = "a\u2028b\u0085c\u0000d"
    assert stepwise(write_lines(tmp_path / "train.jsonl", [ROW | {"prompt": prompt}]))[0].prompt == prompt


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(ROW | {"prompt": "café"}, ensure_ascii=False).encode("latin-1"), "f.jsonl:1: not UTF-8 .*LATIN1"),
        (("\ufeff" + json.dumps(ROW)).encode("utf-16-le"), "f.jsonl:1: not UTF-8 .*UTF-16"),
        (b'{"prompt": "q \\ud83d"}', r"f.jsonl:1: .*half a surrogate pair, \\ud83d"),
        (b'{"a": 1}\n{"answer": NaN}', "f.jsonl:2: not valid JSON .NaN is not JSON"),
        (b'{"a": 1}\n{"answer": 1e999}', "f.jsonl:2: .*1e999 is beyond the range of a number"),
        (b'{"a": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", "f.jsonl:1: its JSON is nested too deeply"),
        (b"[" * 5_000, "f.jsonl: its JSON is nested too deeply"),
        (b'[{"a": 1}, 3]', "f.jsonl:2: '3' is no JSON object"),
        (b'{"a": 1}\n7\n', "f.jsonl:2: b'7.*' is no JSON object"),
        (b"\n \n", "f.jsonl: there is no row in it"),
        (b"[]", "f.jsonl: there is no row in it"),
        (b"", "f.jsonl: the file is empty"),
    ],
)
def test_what_is_no_row_is_named_with_its_cause(tmp_path, content, message):
    (tmp_path / "f.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_rows(SourceSettings("stepwise", str(tmp_path / "f.jsonl")))
    assert "\n" not in str(caught.value)


def test_columns_of_parquet_become_what_a_person_would_write(tmp_path):
    day, moment = datetime.date(2024, 1, 31), datetime.datetime(2024, 1, 31, 10, 30)
    columns = {
        "narrow": (pa.array([72, 0.1], pa.float32()), ["#### 72", "#### 0.1"]),
        "wide": (pa.array([72.0, 0.1, None]), ["#### 72", "#### 0.1", ""]),
        "day": (pa.array([day]), ["#### 2024-01-31"]),
        "moment": (pa.array([moment], pa.timestamp("s")), ["#### 2024-01-31 10:30:00"]),
        "decimal": (pa.array([decimal.Decimal("72.50")]), ["#### 72.50"]),
        "bytes": (pa.array(["é".encode()]), ["#### é"]),
        "dictionary": (pa.array(["a", "b", "a"]).dictionary_encode(), ["#### a", "#### b", "#### a"]),
        "large": (pa.array(["a"], pa.large_string()), ["#### a"]),
    }
    for name, (column, expected) in columns.items():
        assert finals(write_parquet(tmp_path / f"{name}.parquet", {"answer": column})) == expected


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            pa.array(np.array([1, np.nan], np.float32), from_pandas=False),
            "f.parquet:2: field 'answer' is nan; expected",
        ),
        (pa.array([1.0, float("inf")]), "f.parquet:2: field 'answer' is inf; expected"),
        (pa.array([b"1", b"\xff\xd8"]), r"f.parquet:2: field 'answer' is b'\\xff\\xd8'; expected"),
        (pa.array([True]), "f.parquet:1: field 'answer' is True; expected"),
        (pa.array([b"1", b"\xff"]).view(pa.string()), "f.parquet:2: field 'answer' cannot be read as string"),
        (pa.array([[1]]), r"f.parquet:1: field 'answer' is \[1\]; expected"),
    ],
)
def test_values_of_parquet_that_are_no_answer_are_named(tmp_path, column, message):
    write_parquet(tmp_path / "f.parquet", {"answer": column})
    with pytest.raises(ValueError, match=message):
        stepwise(tmp_path / "f.parquet")


def test_damaged_and_empty_parquet(tmp_path):
    file = write_parquet(tmp_path / "none.parquet", {"answer": pa.array([], pa.string())})
    with pytest.raises(ValueError, match=r"none.parquet: there is no row in it"):
        stepwise(file)
    file = write_parquet(tmp_path / "f.parquet", {"answer": [str(i) for i in range(3_000)]})
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:40] + bytes(len(whole) - 80) + whole[-40:], b"{}" * 100):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"f.parquet"):
            stepwise(file)


def test_rows_of_the_hub_are_read_like_parquet(monkeypatch):
    columns = {"prompt": ["p", "q"], "completions": [["s"]] * 2}
    answers = pa.array([0.1, float("nan")], pa.float32())
    published = datasets.Dataset(pa.table(columns | {"answer": answers, "day": [datetime.date(2024, 1, 31)] * 2}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: published)
    settings = SourceSettings("stepwise", "someone/something")
    (place, row), _ = load_rows(settings)
    assert (place, str(row["answer"]), row["day"]) == ("someone/something/train:1", "0.1", "2024-01-31")
    with pytest.raises(ValueError, match="someone/something/train:2: field 'answer' is nan"):
        load_traces(settings)


@pytest.mark.parametrize("folder", ["set[1]", "a*b?", "{x}", "träin 1"])
def test_characters_of_globs_in_names(tmp_path, folder):
    write_lines(tmp_path / folder / "train.jsonl", [ROW])
    assert len(stepwise(tmp_path / folder)) == len(stepwise(tmp_path / folder / "train.jsonl")) == 1
    write_lines(tmp_path / "x" / "te[s]t-0-of-1.jsonl", [ROW])
    write_lines(tmp_path / folder / "sub[1]" / "test.jsonl", [ROW])
    assert len(stepwise(tmp_path / folder, subset="sub[1]", split="test")) == 1
    assert len(stepwise(tmp_path / "x", split="te[s]t")) == 1
    with pytest.raises(ValueError, match="no file of the split"):
        stepwise(tmp_path / folder, split="trai*")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train.jsonl", "train-00000-of-00001.jsonl"), r"train-00000-of-00001.jsonl and .*train.jsonl could each be"),
        (("train.jsonl", "train.parquet"), r"train.jsonl and .*train.parquet could each be the split 'train'"),
        (("train.json", "train.jsonl"), r"train.json and .*train.jsonl could each be"),
        (("train-a.jsonl", "train-a.parquet"), r"train-a.jsonl and .*train-a.parquet could each be"),
        (("train-00000-of-00002.jsonl", "train-00001-of-00003.jsonl"), "-of-00002.jsonl and .*-of-00003.jsonl could"),
        (
            ("train-0-of-1-aa.jsonl", "train-0-of-1-bb.jsonl"),
            r"train-0-of-1-aa.jsonl and .*train-0-of-1-bb.jsonl could",
        ),
        (("train-0-of-1.jsonl", "train-old.jsonl"), r"train-old.jsonl and .*train-0-of-1.jsonl could each be"),
        (("train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"), "shard 1 of 3 of the split 'train' is missing"),
        (("train.jsonl", "data/train.jsonl"), r"train.jsonl and .*data/train.jsonl could each be"),
        (("train.jsonl.gz",), "no file of the split 'train' .*the folder has train.jsonl.gz"),
    ],
)
def test_files_that_could_each_be_the_split_are_refused(tmp_path, names, message):
    for name in names:
        write_lines(tmp_path / name, [ROW])
    with pytest.raises(ValueError, match=message):
        stepwise(tmp_path)


def test_shards_that_belong_together_are_read_in_order(tmp_path):
    for folder, names in {
        "hub": ["train-00000-of-00002-0a1b.jsonl", "train-00001-of-00002-2c3d.jsonl"],
        "from one": ["train-1-of-2.jsonl", "train-2-of-2.jsonl"],
        "named": ["train-a.jsonl", "train-b.jsonl"],
    }.items():
        for number, name in enumerate(names):
            write_lines(tmp_path / folder / name, [ROW | {"answer": number}])
        write_lines(tmp_path / folder / "training.jsonl", [ROW])
        assert finals(tmp_path / folder) == ["#### 0", "#### 1"]


def test_what_is_no_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "folder" / "train.jsonl").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"train.jsonl: a folder; expected a regular file"):
        stepwise(tmp_path / "folder")
    (tmp_path / "train.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for location in (tmp_path, tmp_path / "train.jsonl"):
        with pytest.raises(ValueError, match=r"train.jsonl: a symbolic link to .*gone.jsonl, which does not exist"):
            stepwise(location)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match=r"pipe.jsonl: a pipe or a device"):
        stepwise(tmp_path / "pipe.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data/gone.jsonl: no such file"):  # and not: no such name on the hub
        stepwise("data/gone.jsonl")


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EACCES, "Permission denied.*chmod"), (errno.EMFILE, "Too many open files.*ulimit"), (errno.EIO, "dmesg")],
)
@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet"])
def test_errors_of_the_system_are_not_called_damage(tmp_path, monkeypatch, number, words, name):
    write = write_lines if name.endswith("jsonl") else lambda path, rows: write_parquet(path, {"answer": ["1"]})
    file = write(tmp_path / name, [ROW])

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(type(file), "open", refuse)
    with pytest.raises(ValueError, match=f"{name}: could not be read .*{words}") as caught:
        stepwise(file)
    assert "damaged" not in str(caught.value)


def test_problems_to_ask_a_teacher_need_an_answer(tmp_path):
    for answer in ("", " ", None):
        write_lines(tmp_path / "train.jsonl", [ROW, ROW | {"answer": answer}])
        with pytest.raises(ValueError, match=r"train.jsonl:2: no answer"):
            load_problems(SourceSettings("stepwise", str(tmp_path)))


def test_long_values_are_cut_in_messages():
    with pytest.raises(ValueError, match="field 'completions' is") as caught:
        from_stepwise(ROW | {"completions": ["x" * 10_000, 1]})
    assert len(str(caught.value)) < 400
