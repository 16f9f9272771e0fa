"""Which chains are kept, by values worked out by hand; and the files around them, refused by name when damaged."""

import dataclasses
import json
import re

import pytest

from rtd_jax.apps.traces.select import OUTCOMES, SelectionSettings, depth_cap, judge, select
from rtd_jax.apps.traces.traces import OutputSettings
from rtd_jax.base.files import json_digest, write_jsonl
from rtd_jax.data.manifest import NAME, begin_manifest, check_shards, finish_manifest
from rtd_jax.data.schemas.stepwise import from_stepwise
from rtd_jax.data.sources import SourceSettings, load_problems
from rtd_jax.data.trace import Problem
from rtd_jax.eval.chains import score_chain
from rtd_jax.teacher.served.requests import OpenAISettings, Reply, SamplingSettings, make_requests

STATED, STRICT, FLEXIBLE = map(SelectionSettings, ("stated", "strict", "flexible"))
APPLES = Problem("How many apples?", "18", depth=2)


@pytest.mark.parametrize(
    ("answer", "text", "stated", "strict", "flexible"),
    [
        ("18", "9 + 9 = 18.\n#### 18", "kept", "kept", "kept"),
        ("1,800", "It is 1800.\n#### 1800.00", "kept", "kept", "kept"),
        ("18", "9 + 9 = 18.\n#### 81", "wrong", "wrong", "wrong"),
        ("18", "9 + 9 = 18.\nSo the answer is 18.", "kept", "unparsable", "kept"),
        ("18", "9 + 9 = 18.\n#### 18\n\nQuestion: 2 + 2?\n#### 4", "kept", "kept", "kept"),
        ("18", r"9 + 9 = 18. $\boxed{18}$ points before scoring 14", "kept", "unparsable", "wrong"),
        ("70", r"35 * 2 = 70. $\boxed{\$70.00}$", "kept", "unparsable", "kept"),
        ("18", "#### 18", "unparsable", "unparsable", "unparsable"),  # an answer without a step is no chain
        ("18", "I cannot say.", "unparsable", "unparsable", "unparsable"),
        ("18", "", "unparsable", "unparsable", "unparsable"),
        ("yes", "Cats purr. So it does.\n#### yes", "kept", "kept", "kept"),
        ("yes", "Cats purr, so no.\n#### no", "wrong", "wrong", "wrong"),
        ("B", "Ice melts.\n#### B", "kept", "kept", "kept"),
        ("B", "Ice melts.\nThe answer is (B).", "unparsable", "unparsable", "kept"),
        (r"\frac{1}{2}", r"Half of one is $\boxed{\dfrac12}$.", "wrong", "wrong", "kept"),  # math-verify reads it
        (r"\frac{1}{2}", r"Half of one is $\boxed{\frac{1}{2}}$.", "kept", "kept", "kept"),
    ],
)
def test_a_chain_is_judged_by_its_answer(answer, text, stated, strict, flexible):
    problem = dataclasses.replace(APPLES, answer=answer)
    assert judge(problem, Reply(text, "stop"), STATED)[0] == stated
    assert judge(problem, Reply(text, "stop"), STRICT)[0] == strict
    assert judge(problem, Reply(text, "stop"), FLEXIBLE)[0] == flexible


def test_a_chain_with_a_false_step_is_kept_unless_only_sound_ones_are():
    false, true = Reply("9 + 8 = 18.\n#### 18", "stop"), Reply("9 + 9 = 18.\n#### 18", "stop")
    sound = SelectionSettings(sound=True)
    assert [judge(APPLES, reply, STATED)[0] for reply in (false, true)] == ["kept", "kept"]
    assert [judge(APPLES, reply, sound)[0] for reply in (false, true)] == ["unsound", "kept"]
    assert judge(APPLES, Reply("9 + 8 = 17.\n#### 17", "stop"), sound)[0] == "wrong"


def test_a_chain_that_was_cut_or_refused_is_not_judged():
    assert judge(APPLES, Reply("9 + 9 = 18.\n#### 18", "length"), STRICT)[0] == "unfinished"
    assert judge(APPLES, Reply("", "refused"), STRICT) == ("refused", [])


def test_steps_are_lines_or_sentences():
    reply = Reply("  First, 9 + 0 = 9.\n\nThen  9 + 9 = 18. It is $x. Y$ now.\n#### 18", "stop")
    lines = ["First, 9 + 0 = 9.", "Then 9 + 9 = 18. It is $x. Y$ now."]
    assert judge(APPLES, reply, STRICT) == ("kept", lines)
    cut = ["First, 9 + 0 = 9.", "Then 9 + 9 = 18.", "It is $x. Y$ now."]
    assert judge(APPLES, reply, SelectionSettings(steps="sentences")) == ("kept", cut)


def test_steps_of_prose_are_written_as_the_stepwise_schema_reads_them():
    """Layout is read from the reply as it was written: blank lines, indents, and a formula over several lines."""
    text = (
        "Let's solve it step by step.\n\n1. **Red apples:**\n\n   There are\n   \\[\n   4 + 5 = 9\n   \\]\n\n"
        "2. **All apples:**\n   9 + 9 = 18.\n\nSo there are 18 apples.\n#### 18\n\nStep 3: 18 + 1 = 19."
    )
    steps = [
        r"Let's solve it step by step. 1. **Red apples:** There are \[ 4 + 5 = 9 \]",
        "2. **All apples:** 9 + 9 = 18. So there are 18 apples.",
    ]
    (request,) = make_requests([APPLES], 1, 0, {"model": "m"})
    selected = select([request], {request.id: Reply(text, "stop")}, SelectionSettings(steps="prose"))
    (row,) = selected.rows
    assert (row["completions"], row["depth"]) == (steps, 2)
    trace = from_stepwise(row)
    assert trace.steps == tuple(steps)
    assert score_chain(trace.completion, trace)["correct"]


def test_every_request_has_one_outcome():
    problems = [APPLES, Problem("How many pears?", "3", depth=6)]
    requests = make_requests(problems, 4, 0, {"model": "m"})
    texts = ["9.\n18.\n#### 18", "9.\n 18.\n#### 18.0", "18.\n#### 18", "20.\n#### 20"]
    texts += ["1.\n2.\n3.\n#### 3", "3.\n#### 3", "2+1=3.\n#### 3", "3"]
    replies = {request.id: Reply(text, "stop") for request, text in zip(requests, texts, strict=True)}
    found = select(requests, replies, STRICT)
    none = dict.fromkeys(OUTCOMES, 0)
    assert found.counts == {
        "2": none | {"kept": 2, "duplicate": 1, "wrong": 1},
        "5+": none | {"kept": 3, "unparsable": 1},
        "all": none | {"kept": 5, "duplicate": 1, "wrong": 1, "unparsable": 1},
    }
    assert found.kept_by_depth == {"1": 3, "2": 1, "3": 1}
    assert [row["completions"] for row in found.rows[:2]] == [["9.", "18."], ["18."]]
    # Half of the kept at most: two chains of one step, and of the two problems one each.
    halved = select(requests, replies, SelectionSettings("strict", max_depth_share=0.5))
    assert halved.kept_by_depth == {"1": 2, "2": 1, "3": 1}
    assert halved.counts["all"]["surplus"] == 1
    one = select(requests, replies, SelectionSettings("strict", per_problem=1))
    assert [row["completions"] for row in one.rows] == [["9.", "18."], ["1.", "2.", "3."]]
    assert one.counts["all"]["surplus"] == 3
    unknown = select(requests, replies, STRICT, lambda text: "2+1" not in text)
    assert unknown.counts["5+"] == none | {"kept": 2, "unparsable": 2}
    for result in (found, halved, one, unknown):
        assert sum(result.counts["all"].values()) == len(requests)
        assert len(result.rows) == result.counts["all"]["kept"] == sum(result.kept_by_depth.values())


def test_the_cap_on_a_depth_is_the_largest_that_holds():
    # 6 of 6 + 4 + 2 is half; 7 of 13 would be more.
    assert depth_cap([10, 4, 2], 0.5) == 6
    assert depth_cap([10, 4, 2], 1.0) == 10
    assert depth_cap([3, 3], 0.5) == 3
    assert depth_cap([], 0.2) == 0
    with pytest.raises(ValueError, match=r"max_depth_share is 0.3, but the right chains have 2 depths, .* 0.50"):
        depth_cap([3, 3], 0.3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplingSettings(samples=0), "samples is 0"),
        (lambda: SamplingSettings(samples=2, temperature=0.0), "writes the same chain each time"),
        (lambda: SamplingSettings(stop=("",)), "would end every chain at once"),
        (lambda: OpenAISettings(extra_body="[1]"), "expected a JSON object"),
        (lambda: SelectionSettings(max_depth_share=0.0), "max_depth_share is 0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The manifest of the shards.


@pytest.fixture
def shards(tmp_path):
    rows = [{"prompt": f"p{i}", "completions": ["s"], "answer": "1"} for i in range(3)]
    paths = [tmp_path / f"train-{i:05d}-of-00003.jsonl" for i in range(3)]
    begin_manifest(tmp_path, [path.name for path in paths])
    for path, row in zip(paths, rows, strict=True):
        write_jsonl(path, [row])
    finish_manifest(tmp_path, [(path, 1) for path in paths], {"about": "x"})
    return paths


def test_shards_that_are_not_those_listed_are_refused(shards, tmp_path):
    source = SourceSettings("stepwise", str(tmp_path))
    assert [problem.prompt for problem in load_problems(source)] == ["p0", "p1", "p2"]

    def refused(message):
        with pytest.raises(ValueError, match=message):
            load_problems(source)

    content = shards[1].read_bytes()
    shards[1].write_bytes(content.replace(b"p1", b"p7"))
    refused("train-00001-of-00003.jsonl has SHA-256 .* was changed or damaged")
    shards[1].unlink()
    refused("train-00001-of-00003.jsonl is missing")
    shards[1].write_bytes(content)
    (tmp_path / "train-00003-of-00003.jsonl").write_bytes(content)
    refused(f"train-00003-of-00003.jsonl is not listed in {NAME}")
    (tmp_path / "train-00003-of-00003.jsonl").unlink()
    manifest = json.loads((tmp_path / NAME).read_text())
    for damaged, message in (
        ({"kind": "other"}, f"{NAME} is no manifest that"),
        ({"format": 3}, f"{NAME} has format 3, this version reads 1 or 2"),
        ({"shards": [{"name": "../x", "sha256": ""}]}, "lists '../x', which is no name of a shard"),
        ({"shards": [{"name": "train-00000-of-00001.jsonl", "sha256": 5}]}, "its list of shards is damaged"),
        ({"shards": ["train-00000-of-00001.jsonl"]}, "its list of shards is damaged"),
        ({"shards": {}}, "its list of shards is damaged"),
        ({"complete": 1}, "its list of shards is damaged"),
        ({"about": "y"}, f"{NAME} was changed or damaged after it was written"),
    ):
        record = manifest | damaged
        if "about" not in damaged:
            record["digest"] = json_digest({key: value for key, value in record.items() if key != "digest"})
        (tmp_path / NAME).write_text(json.dumps(record))
        refused(message)
    (tmp_path / NAME).write_text("{")
    refused(f"{NAME}: not valid JSON")


def test_shards_under_way_are_refused_and_old_ones_leave_with_their_manifest(shards, tmp_path):
    begin_manifest(tmp_path, ["train-00000-of-00001.jsonl"])
    assert [path.name for path in tmp_path.glob("train-*")] == []
    (tmp_path / "train-00000-of-00001.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"are not complete; run launch/traces\.py again"):
        check_shards(tmp_path, [tmp_path / "train-00000-of-00001.jsonl"])


@pytest.mark.parametrize(
    "name", ["responses.jsonl", "requests.json", NAME, "notes.txt", "a/train-00000-of-00001.jsonl"]
)
@pytest.mark.parametrize("version", [1, 2])
def test_nothing_but_shards_is_ever_removed(shards, tmp_path, name, version):
    """A manifest that lists another file is refused by that file's name, and nothing is deleted."""
    (tmp_path / "a").mkdir()
    for other in {"responses.jsonl", "requests.json", "notes.txt", "a/train-00000-of-00001.jsonl"}:
        (tmp_path / other).write_text("x")
    manifest = json.loads((tmp_path / NAME).read_text()) | {"format": version}
    manifest["shards"][0]["name"] = name
    del manifest["digest"]
    (tmp_path / NAME).write_text(json.dumps(manifest | ({"digest": json_digest(manifest)} if version == 2 else {})))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=re.escape(f"lists '{name}', which is no name of a shard")):
        begin_manifest(tmp_path, ["train-00000-of-00001.jsonl"])
    assert sorted(tmp_path.rglob("*")) == before


def test_what_this_program_did_not_write_is_left_alone(shards, tmp_path):
    """Shards that were changed since, files that no manifest lists, and what is no plain file."""
    content, new = shards[2].read_bytes(), ["train-00000-of-00001.jsonl"]

    def refused(message):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match=message):
            begin_manifest(tmp_path, new)
        assert sorted(tmp_path.rglob("*")) == before

    shards[2].write_text("my own\n")
    refused("train-00002-of-00003.jsonl was changed after it was written, and would be removed now; move it away")
    shards[2].unlink()
    shards[2].symlink_to(shards[1])
    refused("train-00002-of-00003.jsonl is in the way of the shards: it is no plain file")
    shards[2].unlink()
    shards[2].mkdir()
    refused("train-00002-of-00003.jsonl is in the way of the shards: it is no plain file")
    shards[2].rmdir()
    shards[2].write_bytes(content)
    (tmp_path / new[0]).write_text("my own\n")
    refused(f"train-00000-of-00001.jsonl is in the way of the shards: no {NAME} lists it")
    (tmp_path / new[0]).rename(tmp_path / "test-00000-of-00001.jsonl")  # of another split
    begin_manifest(tmp_path, new)
    assert [path.name for path in tmp_path.glob("t*-0*")] == ["test-00000-of-00001.jsonl"]


def test_shards_beside_a_log_are_not_read_without_their_manifest(shards, tmp_path):
    (tmp_path / NAME).unlink()
    (tmp_path / "responses.jsonl").write_text("")
    with pytest.raises(ValueError, match=f"{NAME} is missing, without which its shards cannot be trusted"):
        load_problems(SourceSettings("stepwise", str(tmp_path)))
    with pytest.raises(ValueError, match=f"train-00000-of-00003.jsonl is in the way of the shards: no {NAME} lists it"):
        begin_manifest(tmp_path, [path.name for path in shards])


@pytest.mark.parametrize("split", ["", "a/b", "../a", ".hidden", "a\\b"])
def test_a_split_names_files_of_its_folder(split):
    with pytest.raises(ValueError, match="it begins the names of files"):
        OutputSettings(split=split)


def test_arc_needs_no_reasoning_to_be_asked(shared_data):
    problems = load_problems(SourceSettings("arc", str(shared_data / "arc_challenge"), "validation"))
    assert len(problems) == 299
    assert all(problem.answer in ("A", "B", "C", "D", "E") and problem.depth == 0 for problem in problems)
    assert all("\nA. " in problem.prompt and f"\n{problem.answer}. " in problem.prompt for problem in problems)
