"""launch/check.py: what it says of good and damaged recipes, how chains look in a terminal and on a page."""

import dataclasses
import html.parser
import importlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from llama3_like import llama3_like
from preflight_models import (
    CHAT,
    copy_of,
    from_teacher,
    recipe_of,
    row,
    set_json,
    write_pair,
    write_rows,
)
from rich.console import Console

from rtd_jax.apps.check import check as app
from rtd_jax.apps.check.chains import shown_chains
from rtd_jax.apps.check.check import CheckSettings, check, examine
from rtd_jax.apps.check.show import print_checks, summary
from rtd_jax.apps.command.help import help_text
from rtd_jax.apps.command.table import COMMANDS
from rtd_jax.base.settings import build
from rtd_jax.data.trace import Trace
from rtd_jax.train.preflight import Check
from rtd_jax.train.recipe import Recipe, StudentSettings
from rtd_jax.train.splits import encode_split

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "rtd_jax" / "bundled" / "tiny_teacher"
FEW = {"train": 240, "validation": 60, "test": 30}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def broken(pair, tmp_path):
    return copy_of(pair, tmp_path)


@pytest.fixture(autouse=True)
def few_problems_are_enough(monkeypatch):
    monkeypatch.setattr("rtd_jax.train.curriculum.FEW_PROBLEMS", 2)


def rtd_tiny(teacher: Path = BUNDLED) -> Recipe:
    config = importlib.import_module("configs.rtd_tiny").get_config()
    config.teacher.path = str(teacher)
    for split, limit in FEW.items():
        config.data[split].limit = limit
    return build(Recipe, config.to_dict())


def unwell(checks: list[Check]) -> list[tuple[str, str]]:
    return [(check.name, check.status) for check in checks if check.status != "ok"]


def line_of(checks: list[Check], name: str) -> str:
    (line,) = [check.line for check in checks if check.name == name]
    return line


def printed(found, terminal: bool = False) -> str:
    colours = "standard" if terminal else None
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=colours)
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr("rtd_jax.apps.check.show.wide_console", lambda: console)
        print_checks(*found)
    return console.file.getvalue()


def test_the_recipe_of_the_readme_passes_every_check():
    found = examine(rtd_tiny())
    assert unwell(found.checks) == []
    assert found.unreached == ""
    assert [check.name for check in found.checks] == [
        *("teacher", "student", "teacher weights", "student weights", "tokenizer", "vocabulary rows"),
        *("chat template", "form of text", "token ids", "end of a chain"),
        *("longest chain", "positions", "curriculum", "markup", "test problems", "memory"),
    ]
    assert "MiB on each of" in line_of(found.checks, "memory")
    assert [chain.title.split(": ")[1].split(",")[0] for chain in found.chains] == ["1 step", "4 steps", "6 steps"]
    assert summary(found.checks, "") == "16 checks: 0 fail, 0 warn"


def test_a_damaged_copy_of_the_bundled_teacher_is_told_what_is_wrong(tmp_path):
    teacher = Path(shutil.copytree(BUNDLED, tmp_path / "teacher"))
    set_json(teacher / "config.json", eos_token_id=5)
    found = examine(rtd_tiny(teacher))
    assert unwell(found.checks) == [("end of a chain", "fail")]
    assert "chains end with '<eos>' (2)" in line_of(found.checks, "end of a chain")

    set_json(teacher / "config.json", eos_token_id=2)
    recipe = rtd_tiny(teacher)
    chat = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, text=CHAT))
    found = examine(chat)
    assert ("chat template", "fail") in unwell(found.checks)
    assert "has no chat template; use format kind 'plain'" in line_of(found.checks, "chat template")
    assert found.unreached == "end of a chain, chains"
    assert found.chains == []

    llama3_like().save_pretrained(teacher)
    found = examine(rtd_tiny(teacher))
    assert ("tokenizer", "fail") in unwell(found.checks)
    assert "need an embedding of" in line_of(found.checks, "tokenizer")
    assert found.unreached == "vocabulary rows, chat template, token ids, chains"
    assert "not checked because of what fails: vocabulary rows, chat template, token ids, chains" in printed(found)

    shutil.copytree(BUNDLED, teacher, dirs_exist_ok=True)
    content = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["apples"], vocabulary["balls"] = vocabulary["balls"], vocabulary["apples"]
    (teacher / "tokenizer.json").write_text(json.dumps(content))
    recipe = rtd_tiny()
    student = StudentSettings("pretrained", str(teacher), compute_dtype="float32")
    found = examine(dataclasses.replace(recipe, student=student), count=1)
    assert unwell(found.checks) == [("same tokenizer", "fail")]
    assert "2 ids differ, first id " in line_of(found.checks, "same tokenizer")
    assert found.unreached.startswith("special tokens, ")
    assert len(found.chains) == 1


def test_what_stands_on_a_failure_is_said_not_to_be_checked(broken):
    (broken / "student" / "config.json").unlink()
    found = examine(recipe_of(broken))
    assert unwell(found.checks) == [("student", "fail")]
    assert found.unreached == "weights, tokenizers, chains, memory"
    (broken / "teacher" / "config.json").write_text("{}")
    found = examine(recipe_of(broken))
    assert unwell(found.checks) == [("teacher", "fail")]
    assert "model_type" in line_of(found.checks, "teacher")


def test_a_pair_passes_and_its_layers_scheme_and_files_are_tried(pair, broken):
    assert unwell(examine(recipe_of(pair)).checks) == []
    assert unwell(examine(from_teacher(recipe_of(pair))).checks) == []
    recipe = recipe_of(pair)
    layers = dataclasses.replace(recipe, loss=dataclasses.replace(recipe.loss, hidden_layer=9))
    assert "hidden layer 9 does not exist" in line_of(examine(layers).checks, "student")
    (broken / "train.jsonl").write_text('{"prompt": "a"}\n')
    found = examine(recipe_of(broken))
    assert unwell(found.checks) == [("data", "fail")]
    assert "train.jsonl:1" in line_of(found.checks, "data")
    assert found.chains == []


def test_rows_that_are_too_short_fail_with_the_length_that_would_do(broken):
    write_rows(broken, "test", [row(1, 1), row(1, 9)])
    write_rows(broken, "train", [*(row(number, 1 + number % 2) for number in range(8)), row(1, 9)])
    found = examine(recipe_of(broken))
    assert unwell(found.checks) == [("longest chain", "fail"), ("test problems", "fail")]
    line = line_of(found.checks, "longest chain")
    assert "1 of 9 chains do not fit" in line
    assert "would hold all, or allow max_dropped_fraction=0.1111" in line
    assert line_of(found.checks, "test problems").startswith("data.test: 1 of 2 chains do not fit")
    assert len(found.chains) == 3
    found = examine(recipe_of(broken, max_dropped_fraction=0.5))
    assert unwell(found.checks) == [("longest chain", "warn"), ("test problems", "warn")]
    assert "1 test problems are longer than a row of 128" in line_of(found.checks, "test problems")


def test_steps_that_only_the_teacher_can_find_are_named(pair):
    found = examine(recipe_of(pair, segmentation="soft:4"))
    assert unwell(found.checks) == [("steps", "warn")]
    assert "a run has the teacher read the chains" in line_of(found.checks, "steps")
    found = examine(recipe_of(pair, segmentation=f"classifier:{pair / 'nowhere'}"))
    assert unwell(found.checks) == [("steps", "fail")]
    windows = examine(recipe_of(pair, segmentation="stride:4")).chains[0]
    assert [segment.name for segment in windows.segments][:3] == ["prompt", "window 1", "window 2"]


def test_memory_that_cannot_be_counted_or_is_not_there_warns(pair, monkeypatch):
    recipe = recipe_of(pair)
    mesh = dataclasses.replace(recipe, mesh=dataclasses.replace(recipe.mesh, data=3, fsdp=5))
    line = line_of(examine(mesh).checks, "memory")
    assert line.startswith("not counted on this machine: mesh data 3 x fsdp 5")
    assert "launch/plan.py" in line

    class Small:
        device_kind = "toy"

        def memory_stats(self):
            return {"bytes_limit": 1000}

    real = app.jax.devices()
    monkeypatch.setattr(app, "make_mesh", lambda settings, _, make=app.make_mesh: make(settings, real[:1]))
    monkeypatch.setattr(app.jax, "devices", lambda: [Small()])
    found = examine(dataclasses.replace(recipe, mesh=dataclasses.replace(recipe.mesh, data=1, fsdp=1)))
    assert unwell(found.checks) == [("memory", "warn")]
    assert "on each of 1 x toy, which has 0.0 MiB; more devices, or less to hold" in line_of(found.checks, "memory")


def of_rows(pair: Path, prompt: str, steps: list[str]):
    tokenizer = llama3_like()
    traces = [Trace.of_steps(prompt, steps, "4", "#### 4", "rows.jsonl:1")]
    data = recipe_of(pair, row_length=400).data
    return shown_chains(encode_split(traces, data, tokenizer), 3, tokenizer, CHAT, 400, "step"), tokenizer


def test_a_chain_is_shown_token_by_token_with_labels_and_boundaries(pair):
    (chain,), tokenizer = of_rows(pair, "How many are 2 + 2? é€🙂", ["2 + 2 = 4 .", "So 4 apples."])
    prompt, first, second, end = chain.segments
    assert chain.title.startswith("rows.jsonl:1: 2 steps, ")
    assert (prompt.name, prompt.boundary, prompt.labels) == ("prompt", 0, "no label")
    assert (first.name, first.boundary, first.labels) == ("step 1", 1, f"{len(first.tokens)} labels")
    assert (second.name, second.boundary) == ("step 2", 2)
    assert (end.name, end.boundary, end.labels) == ("end", None, f"{len(end.tokens)} labels")
    assert "".join(token.text for token in first.tokens) == "2 + 2 = 4 .\n"  # one token, as Llama-3 has it
    assert [token.text for token in end.tokens][-1] == "<|eot_id|>"
    ids = [token.id for segment in chain.segments for token in segment.tokens]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False).endswith("#### 4<|eot_id|>")
    assert [token.position for segment in chain.segments for token in segment.tokens] == list(range(len(ids)))
    # A character of several tokens is whole at the first of them; the others are named.
    wide = [token.text for token in prompt.tokens if "🙂" in token.text or token.text.startswith("[")]
    assert wide[0] in ("é", " é") or "🙂" in "".join(wide)
    assert "How many are 2 + 2? " in chain.text


def test_a_terminal_and_a_file_show_the_same_words(pair):
    found = examine(recipe_of(pair))
    plain, coloured = printed(found), printed(found, terminal=True)
    assert "\x1b[" not in plain
    assert "\x1b[" in coloured
    lines = plain.splitlines()
    step = next(i for i, line in enumerate(lines) if line.startswith("  step 1"))
    tokens = found.chains[0].segments[1].tokens
    assert lines[step].endswith(" <- boundary 1")
    texts, ids = ([cell.strip() for cell in line[14:].split("│")[:-1]] for line in lines[step : step + 2])
    assert texts == [token.text.replace("\n", "\\n").strip() for token in tokens]
    assert ids == [str(token.id) for token in tokens]
    assert lines[step + 1].startswith(f"  {len(tokens)} labels")
    assert any(line.startswith("  no label") for line in lines)
    assert "<- boundary 0" in plain
    assert "<- boundary 2" in plain
    assert any(line.startswith("ok    chat template") for line in lines)
    assert lines[-1] == summary(found.checks, "")


def test_a_hostile_text_cannot_drive_a_terminal(pair):
    (chain,), _ = of_rows(pair, "Red \x1b[31m and [bold]markup[/] ?", ["1 + 1 = 2 ."])
    text = printed(([Check("a", "ok", "\x1b[2J[red]wiped[/]")], [chain], ""))
    assert "\x1b" not in text
    assert "\\x1b[2J[red]wiped[/]" in text
    words = "".join(token.text for segment in chain.segments for token in segment.tokens)
    assert "[bold]markup[/]" in words


class Balanced(html.parser.HTMLParser):
    """Fails on a tag that is closed out of turn, and collects the tags and the words."""

    VOID = ("meta", "link", "br")

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_well_formed_self_contained_and_escapes(broken, tmp_path, capsys):
    hostile = "<script>alert(1)</script> & <b>"
    write_rows(broken, "train", [row(number, 1 + number % 2, hostile) for number in range(8)])
    path = tmp_path / "new" / "check.html"
    check(recipe_of(broken, row_length=400), CheckSettings(html=str(path)))
    assert f"page: {path}" in capsys.readouterr().out
    page = Balanced()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    assert not {"script", "img"} & set(page.tags)
    assert page.tags.count("b") == path.read_text().count('<div class="segment">')  # their names alone are bold
    words = "".join(page.words)
    assert hostile in words
    assert "boundary 1" in words
    assert "chat template" in words
    assert "http" not in path.read_text().replace("https://", "http")


def test_the_exit_status_says_whether_a_check_fails(broken, tmp_path, capsys):
    check(recipe_of(broken), CheckSettings(chains=0))
    set_json(broken / "teacher" / "config.json", eos_token_id=1)
    with pytest.raises(SystemExit) as stop:
        check(recipe_of(broken), CheckSettings(chains=1, html=str(tmp_path / "check.html")))
    assert stop.value.code == 1
    assert "fail  end of a chain" in capsys.readouterr().out
    assert "one of the two is wrong" in (tmp_path / "check.html").read_text()
    with pytest.raises(ValueError, match="is a folder; give the name of a file"):
        check(recipe_of(broken), CheckSettings(html=str(tmp_path)))
    assert "exit status: 0; 1 where a check fails; 2 after an error" in " ".join(
        help_text(COMMANDS["check"], "launch/check.py", [_flag()]).split()
    )


def _flag():
    return type("Flag", (), {"name": "x", "default": None, "help": ""})()


@pytest.mark.slow
def test_the_command_checks_a_recipe_with_its_overrides(tmp_path):
    teacher = Path(shutil.copytree(BUNDLED, tmp_path / "teacher"))
    set_json(teacher / "config.json", eos_token_id=5)
    limits = [f"--config.data.{split}.limit={limit}" for split, limit in FEW.items()]
    flags = [f"--config.teacher.path={teacher}", "--chains=1", *limits]
    command = [sys.executable, "launch/check.py", "--config=configs/rtd_tiny.py", *flags]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "chain 1 of 1, synthetic-train:" in ended.stdout
    assert "warn  curriculum" in ended.stdout  # of 240 problems no stage has a hundred
    assert "fail  end of a chain" in ended.stdout
