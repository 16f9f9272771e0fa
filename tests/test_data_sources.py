"""Folders, files, the hub out of reach, and rows that are damaged: errors name the place and the way out."""

import json

import datasets
import huggingface_hub
import pytest

from rtd_jax.data.generators.word_problems import generate, generate_rows
from rtd_jax.data.schemas.gsm8k import from_gsm8k
from rtd_jax.data.sources import SourceSettings, load_traces

ROWS = generate_rows(12, (1, 2, 3))


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def gsm8k(location, **kwargs):
    return load_traces(SourceSettings("gsm8k", str(location), **kwargs))


def prompts(traces):
    return [trace.prompt for trace in traces]


def test_folder_of_jsonl(tmp_path):
    file = write_lines(tmp_path / "train.jsonl", ROWS)
    write_lines(tmp_path / "test.jsonl", ROWS[:2])
    traces = gsm8k(tmp_path)
    assert traces == [from_gsm8k(row, f"{file}:{i + 1}") for i, row in enumerate(ROWS)]
    assert prompts(gsm8k(tmp_path, split="test")) == [row["question"] for row in ROWS[:2]]
    assert gsm8k(file, limit=3) == traces[:3]
    assert {trace.depth for trace in gsm8k(tmp_path, depths=(1, 3))} == {1, 3}
    assert prompts(gsm8k(tmp_path, depths=(3,), limit=2)) == [row["question"] for row in ROWS[2:6:3]]
    assert all("<<" not in step for trace in gsm8k(tmp_path, keep_marks=False) for step in trace.steps)


def test_folder_of_parquet_shards_as_the_hub_lays_them_out(tmp_path):
    folder = tmp_path / "main"
    folder.mkdir()
    for shard, rows in enumerate((ROWS[:5], ROWS[5:])):
        datasets.Dataset.from_list(rows).to_parquet(folder / f"train-0000{shard}-of-00002.parquet")
    traces = gsm8k(tmp_path, subset="main")
    assert prompts(traces) == [row["question"] for row in ROWS]
    assert traces[5].source.endswith("train-00001-of-00002.parquet:1")
    datasets.Dataset.from_list(ROWS[:3]).to_parquet(tmp_path / "test.parquet")
    assert prompts(gsm8k(tmp_path, split="test")) == [row["question"] for row in ROWS[:3]]


def test_blank_lines_are_no_rows(tmp_path):
    write_lines(tmp_path / "train.jsonl", [ROWS[0], "", ROWS[1], ""])
    assert prompts(gsm8k(tmp_path)) == [row["question"] for row in ROWS[:2]]


def test_changed_file_is_read_anew(tmp_path):
    file = write_lines(tmp_path / "train.jsonl", ROWS[:2])
    assert len(gsm8k(file)) == 2
    write_lines(file, ROWS[:5])
    assert len(gsm8k(file)) == 5


def test_synthetic():
    settings = SourceSettings("synthetic", split="validation", limit=8, depths=(2, 3), seed=4)
    assert load_traces(settings) == generate(8, (2, 3), "validation", 4)
    assert {trace.depth for trace in load_traces(SourceSettings("synthetic", limit=12))} == set(range(1, 7))


def test_published_files(shared_data):
    assert len(gsm8k(shared_data / "gsm8k", split="test")) == 1319
    traces = load_traces(SourceSettings("strategyqa", str(shared_data / "strategyqa"), limit=40))
    assert len(traces) == 40
    with pytest.raises(ValueError, match=r"test.jsonl:1: field 'reasoning' is None; ARC itself has no reasoning"):
        load_traces(SourceSettings("arc", str(shared_data / "arc_challenge"), split="test"))


@pytest.mark.parametrize("schema", ["math", "arc", "stepwise"])
def test_other_schemas_from_a_folder(tmp_path, schema):
    row = {
        "math": {"problem": "p", "level": "Level 1", "type": "Algebra", "solution": r"So $\boxed{A}$."},
        "arc": {"question": "p", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A", "why": "so"},
        "stepwise": {"prompt": "p", "completions": ["so"], "labels": [True], "answer": "A"},
    }[schema]
    write_lines(tmp_path / "train.jsonl", [row])
    (trace,) = load_traces(SourceSettings(schema, str(tmp_path), reasoning_field="why"))
    assert (trace.answer, trace.depth) == ("A", 1)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [ROWS[0], '{"question": "q", "ans', ROWS[1]],
            r"train.jsonl:2: not valid JSON .*; write one JSON object a line",
        ),
        ([ROWS[0], ROWS[1], {"question": "q"}], "train.jsonl:3: field 'answer' is missing"),
        ([ROWS[0], {"question": "q", "answer": "#### 4"}], "train.jsonl:2: the chain is empty"),
        ([ROWS[0], {"question": "q", "answer": 4}], "train.jsonl:2: field 'answer' is"),
        ([ROWS[0], {"question": "q", "answer": "why\n4"}], "train.jsonl:2: the last line of 'answer' is '4'"),
        ([ROWS[0], "[1, 2]"], r"train.jsonl:2: .*\[1, 2\]"),
    ],
)
def test_damaged_rows_are_named(tmp_path, lines, message):
    write_lines(tmp_path / "train.jsonl", lines)
    with pytest.raises(ValueError, match=message):
        gsm8k(tmp_path)


def test_damaged_parquet_is_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(ValueError, match=r"train\.parquet: damaged, or no parquet file .*write it again"):
        gsm8k(tmp_path)


def test_missing_file_names_what_there_is(tmp_path):
    write_lines(tmp_path / "main" / "test.jsonl", ROWS)
    (tmp_path / "notes.txt").write_text("")
    message = r"no file of the split 'train' \(looked for train.jsonl, .*the folder has main/test.jsonl$"
    with pytest.raises(ValueError, match=message):
        gsm8k(tmp_path)
    (tmp_path / "main" / "test.jsonl").unlink()
    with pytest.raises(ValueError, match="the folder has no data files"):
        gsm8k(tmp_path)


def test_other_places_that_do_not_work(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"train\.jsonl: the file is empty"):
        gsm8k(tmp_path)
    with pytest.raises(ValueError, match="no such folder or file, and not a hub name"):
        gsm8k(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"unknown kind of file; expected one of \.jsonl, \.json, \.parquet"):
        gsm8k(write_lines(tmp_path / "train.csv", ["a"]))
    write_lines(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"none of its 12 rows has a depth among \(7,\)"):
        gsm8k(tmp_path, depths=(7,))


def test_unreachable_hub_says_how_to_point_to_a_folder(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = (
        r"(?s)no/such-data: neither a local directory nor a data set.*put test.jsonl or test.parquet .* location to"
    )
    with pytest.raises(ValueError, match=message):
        gsm8k("no/such-data", split="test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"schema": "gms8k", "location": "x"},
            "schema 'gms8k' is unknown; use one of synthetic, cups, lift, synthetic\\+cups, gsm8k",
        ),
        ({"schema": "gsm8k"}, "schema 'gsm8k' needs a location"),
        ({"schema": "synthetic"}, "needs the number of problems"),
        ({"schema": "gsm8k", "location": "x", "limit": -1}, "limit is -1"),
    ],
)
def test_settings_that_cannot_work(arguments, message):
    with pytest.raises(ValueError, match=message):
        SourceSettings(**arguments)


def test_levels_of_math_are_kept(tmp_path):
    rows = [
        {"problem": f"p{i}", "level": f"Level {i}", "type": "Algebra", "solution": r"\boxed{1}"} for i in range(1, 6)
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = SourceSettings("math", str(tmp_path), "test", levels=(3, 5), limit=2)
    assert [trace.prompt for trace in load_traces(settings)] == ["p3", "p5"]
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match=r"none of its 1 rows has a level among \(3, 5\)"):
        load_traces(settings)
    with pytest.raises(ValueError, match="math has the levels 1 to 5"):
        SourceSettings("gsm8k", str(tmp_path), levels=(3,))
