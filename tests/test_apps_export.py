"""launch/export.py: a student's folder, its card, which says what the run says, its teacher's licence, its upload."""

import contextlib
import dataclasses
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, errors
from tiny_run import recipe, write_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

import rtd_jax
from rtd_jax.apps.command.run import run as run_command
from rtd_jax.apps.distill.run import train
from rtd_jax.apps.export.card import Parent, licence_warnings
from rtd_jax.apps.export.export import RECORD, ExportSettings, _reachable, export
from rtd_jax.apps.export.licence import Licence, combined, find_licence
from rtd_jax.base.lock import locked
from rtd_jax.train.curriculum import CurriculumSettings
from rtd_jax.train.recipe import StudentSettings, TeacherSettings
from rtd_jax.train.saved_models import load_model

COMMIT = "0123456789abcdef" * 2 + "01234567"
CARD = "---\nlicense: other\nlicense_name: tiny-community\nlicense_link: LICENSE\n---\n\n# A teacher\n"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The client's cache, with a teacher of the hub in it."""
    folder = tmp_path_factory.mktemp("hub") / "models--org--tiny-teacher" / "snapshots" / COMMIT
    folder.parent.mkdir(parents=True)
    write_teacher(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE").write_text("TINY COMMUNITY LICENSE\n\nBe kind.\n")
    (folder / "USE_POLICY.md").write_text("Be kind.\n")
    asked: list[tuple[str, str | None]] = []

    def download(name, *, revision=None, **_):
        asked.append((name, revision))
        if name != "org/tiny-teacher" or revision not in ("v1", COMMIT):
            raise errors.LocalEntryNotFoundError("not in the cache")
        return str(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub, "snapshot_download", download)
        yield SimpleNamespace(folder=folder, asked=asked)


@pytest.fixture(scope="module")
def finished(hub, tmp_path_factory):
    """A run's folder: four updates on the teacher of the hub."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = dataclasses.replace(
        recipe(Path("org/tiny-teacher")),
        teacher=TeacherSettings("org/tiny-teacher", "float32", "float32", revision="v1"),
        student=StudentSettings("teacher_layers", layers=1, compute_dtype="float32"),
        curriculum=CurriculumSettings(enabled=False, validate_every=4, validation_chains=8),
        total_updates=4,
    )
    train(settings, folder)
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    """The run's folder, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def settings_of(run, **changes) -> ExportSettings:
    return ExportSettings(run=str(run), **changes)


def exported(run, **changes) -> tuple[Path, list[str]]:
    notes: list[str] = []
    return export(settings_of(run, **changes), notes.append), notes


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change_report(run: Path, change) -> None:
    report = json.loads((run / "report.json").read_text())
    change(report)
    (run / "report.json").write_text(json.dumps(report))


def test_a_run_says_which_commit_it_read(finished):
    origins = json.loads((finished / "report.json").read_text())["origins"]
    assert origins["teacher"] == {"path": "org/tiny-teacher", "revision": "v1", "is_local": False, "commit": COMMIT}
    assert origins["data"]["train"] == {"location": "", "revision": "", "is_local": True, "commit": ""}


def test_transformers_loads_the_folder_with_our_logits(finished, tmp_path):
    out, _ = exported(finished, out=str(tmp_path / "shared"))
    ours = load_model(str(out))
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == ours.tokenizer.get_vocab()
    tokens_BL = np.random.default_rng(0).integers(3, 400, (8, 24))
    with torch.no_grad():
        expected_BLV = theirs(torch.from_numpy(tokens_BL)).logits.numpy()
    positions_BL = np.broadcast_to(np.arange(24), tokens_BL.shape)
    hidden_BLD = ours.model.hidden(ours.params, tokens_BL.astype(np.int32), positions_BL, np.ones_like(positions_BL))
    np.testing.assert_allclose(ours.model.logits(ours.params, hidden_BLD), expected_BLV, rtol=0, atol=1e-4)
    assert ours.text == load_model(str(finished / "student")).text


def test_the_card_says_what_the_run_says(finished, hub, tmp_path):
    hub.asked.clear()
    out, notes = exported(finished, out=str(tmp_path / "shared"))
    assert hub.asked == [("org/tiny-teacher", COMMIT)]  # of the commit that the run read, not of the newest
    card = ModelCard.load(out / "README.md")
    head = card.data.to_dict()
    assert (head["license"], head["license_name"], head["license_link"]) == ("other", "tiny-community", "LICENSE")
    assert (head["base_model"], head["base_model_relation"]) == ("org/tiny-teacher", "finetune")
    assert (head["library_name"], head["pipeline_tag"], head["language"]) == ("transformers", "text-generation", "en")
    assert "model-index" not in head
    assert "datasets" not in head
    text = card.text
    assert f"[org/tiny-teacher](https://huggingface.co/org/tiny-teacher) at commit `{COMMIT}`" in text
    assert "its licence is **tiny-community**, as its README.md says" in text
    assert "c.total_updates = 4 " in text
    assert "c.student.layers = 1 " in text
    report = json.loads((finished / "report.json").read_text())
    for depth, chains in report["student"]["chain_accuracy"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {depth} |"))
        shown = [cell.split(" ±")[0].strip() for cell in row.split("|")[2:-1]]
        means = [
            report[name][key][depth]["mean"] for key in ("chain_accuracy", "answer") for name in ("student", "teacher")
        ]
        assert shown == [str(chains["n"]), *(f"{100 * mean:.1f}" for mean in means)]
    for name in ("LICENSE", "USE_POLICY.md"):
        assert (out / name).read_bytes() == (hub.folder / name).read_bytes()
    assert not any("warning" in note for note in notes)
    # Nothing of this machine is in it.
    for path in (finished, tmp_path, hub.folder):
        for name, content in files(out).items():
            assert str(path).encode() not in content, name


def test_the_commands_of_the_card_run(finished, tmp_path, monkeypatch):
    out, _ = exported(finished, out=str(tmp_path / "shared"))
    monkeypatch.chdir(tmp_path)
    text = (out / "README.md").read_text()
    code = text.rpartition("```python\n")[2].partition("```")[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert len(printed.getvalue()) > 1
    command = text.rpartition("```bash\n")[2].partition("```")[0]
    assert command.split()[:3] == ["python", "launch/evaluate.py", "--model=shared"]
    assert "--tasks=synthetic" in command


def test_an_export_replaces_an_earlier_one_and_nothing_else(copy, tmp_path):
    out, _ = exported(copy)
    assert out == copy / "export"
    before = files(out)
    (out / "model.safetensors").unlink()
    assert files(exported(copy)[0]) == before
    (out / "README.md").write_text((out / "README.md").read_text() + "\nMy own words.\n")
    kept = files(out)
    with pytest.raises(ValueError, match=r"README.md was changed after it was exported.*give another --out"):
        exported(copy)
    assert files(out) == kept
    (out / "README.md").write_bytes(before["README.md"])
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis.tex, which no export wrote"):
        exported(copy)
    model = Path(shutil.copytree(copy / "student", tmp_path / "model"))
    with pytest.raises(ValueError, match=rf"holds config.json and no {RECORD}, so it is no earlier export"):
        exported(copy, out=str(model))
    assert files(model) == files(copy / "student")
    for place in (copy / "student", copy / "student" / "export"):
        with pytest.raises(ValueError, match="in the student that is exported"):
            exported(copy, out=str(place))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="a file; give a folder"):
        exported(copy, out=str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"student is 'student_float', but .* without rounding"):
        exported(copy, student="student_float")


def test_what_is_no_finished_run_is_refused(copy, tmp_path):
    out = {"out": str(tmp_path / "shared")}
    with locked(copy), pytest.raises(ValueError, match=r"is being written by .*; export it when that has ended"):
        exported(copy, **out)
    with pytest.raises(ValueError, match=r"is no folder of a run of launch/train.py: there is no settings.json"):
        exported(copy / "student", **out)
    with pytest.raises(ValueError, match=r"is no folder of a run"):
        exported(tmp_path / "absent", **out)
    (copy / "student" / "model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(ValueError, match=r"model.safetensors"):
        exported(copy, **out)
    shutil.rmtree(copy / "student")
    with pytest.raises(ValueError, match=r"student: no such folder; start the run's command again"):
        exported(copy, **out)
    change_report(copy, lambda report: report.update(student={"accuracy": 1}))
    with pytest.raises(ValueError, match=r"report.json is not what launch/train.py writes of a distillation"):
        exported(copy, **out)
    (copy / "report.json").unlink()
    with pytest.raises(ValueError, match=r"is not finished: there is no report.json.*start its command again"):
        exported(copy, **out)
    assert not (tmp_path / "shared").exists()
    assert not (tmp_path / "absent").exists()


def test_a_teacher_that_is_gone_leaves_no_licence(copy, tmp_path):
    """The model can be exported; the card and the command say that somebody has to be asked."""

    def move(report):
        report["origins"]["teacher"] |= {"path": str(tmp_path / "teacher"), "is_local": True, "commit": ""}
        report["settings"]["teacher"] |= {"path": str(tmp_path / "teacher"), "revision": ""}

    change_report(copy, move)
    out, notes = exported(copy)
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "other"
    assert "base_model" not in card.data.to_dict()  # the hub knows no local folders
    assert (
        "`teacher` (a local folder); the licence of the teacher could not be found: ask before you share" in card.text
    )
    assert sum("could not be found: ask before you share" in note for note in notes) == 1
    assert ModelCard.load(exported(copy, license="mit")[0] / "README.md").data.license == "mit"


def test_a_run_of_before_does_not_say_which_commit_it_read(copy):
    """The licence is then of the revision that its settings name, and the card claims no commit."""
    change_report(copy, lambda report: report.pop("origins"))
    text = (exported(copy)[0] / "README.md").read_text()
    assert "[org/tiny-teacher](https://huggingface.co/org/tiny-teacher) at revision `v1`; its licence is **tiny" in text
    assert COMMIT not in text
    change_report(copy, lambda report: report["settings"]["teacher"].update(path="runs/teacher", revision=""))
    text = (exported(copy)[0] / "README.md").read_text()  # gone, and not to be taken for a hub name
    assert "The teacher is `teacher` (a local folder); the licence of the teacher could not be found" in text
    assert "base_model" not in text


def test_a_student_that_began_as_another_model_has_both_licences(copy, hub, tmp_path):
    start = write_teacher(tmp_path / "start")
    (start / "README.md").write_text("---\nlicense: mit\n---\n")
    (start / "LICENSE").write_text("MIT License\n")

    def begin(report):
        student = {"init": "pretrained", "path": str(start), "layers": 0}
        report["settings"]["student"] |= student
        report["origins"]["student"] = {"path": str(start), "revision": "", "is_local": True, "commit": ""}

    change_report(copy, begin)
    out, notes = exported(copy)
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "tiny-community-and-mit")
    assert "The model that it began as is `start` (a local folder); its licence is **mit**" in card.text
    assert (out / "LICENSE").read_bytes() == (hub.folder / "LICENSE").read_bytes()
    assert (out / "START_LICENSE").read_text() == "MIT License\n"
    assert "base_model" not in card.data.to_dict()  # which is local
    assert any("two licences hold at once" in note for note in notes)


def test_a_link_to_a_licence_leads_somewhere(copy, hub, tmp_path):
    local = Path(shutil.copytree(hub.folder, tmp_path / "teacher", ignore=shutil.ignore_patterns("LICENSE")))
    change_report(
        copy,
        lambda report: (
            report["settings"]["teacher"].update(path=str(local), revision=""),
            report["origins"]["teacher"].update(path=str(local), is_local=True, commit=""),
        ),
    )
    assert "license_link" not in ModelCard.load(exported(copy)[0] / "README.md").data.to_dict()
    parent = Parent("teacher", "org/x", False, "", COMMIT, Licence("other", "x", "LICENSE", "README.md"))
    assert _reachable(parent).link == f"https://huggingface.co/org/x/blob/{COMMIT}/LICENSE"


def test_a_licence_that_the_teacher_has_is_not_given(finished, tmp_path):
    with pytest.raises(ValueError, match=r"license is 'mit', but the README.md of the teacher .* says tiny-community"):
        exported(finished, out=str(tmp_path / "shared"), license="mit")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ({"README.md": "---\nlicense: apache-2.0\n---\n# x"}, ("apache-2.0", "", "", "README.md")),
        ({"README.md": CARD, "LICENSE": "x"}, ("other", "tiny-community", "LICENSE", "README.md")),
        ({"README.md": "# no head", "LICENSE": "MIT License\n\nx"}, ("other", "mit-license", "LICENSE", "LICENSE")),
        ({"LICENSE.txt": "\n   Apache License\n   Version 2.0, January 2004"}, ("apache-2.0", "", "", "LICENSE.txt")),
        (
            {"LICENSE.md": "# LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n", "USE_POLICY.md": "x"},
            ("other", "llama-3.2-community-license-agreement", "LICENSE.md", "LICENSE.md"),
        ),
        ({"config.json": '{"license": "mit"}'}, ("mit", "", "", "config.json")),
        ({"config.json": "{}", "NOTICE": "x"}, ("", "", "", "")),
        ({}, ("", "", "", "")),
    ],
)
def test_where_a_licence_is_said(tmp_path, written, expected):
    for name, content in written.items():
        (tmp_path / name).write_text(content)
    found = find_licence(tmp_path)
    assert (found.id, found.name, found.link, found.said_in) == expected
    assert {path.name for path in found.files} == set(written) - {"README.md", "config.json"}


def test_a_damaged_card_is_named(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(ValueError, match=r"README.md: its front matter.*is not valid YAML.*mend or remove it"):
        find_licence(tmp_path)


def test_two_models_have_two_licences():
    llama, mit = Licence("llama3.1", said_in="README.md"), Licence("mit", said_in="README.md")
    assert combined([mit, dataclasses.replace(mit, said_in="LICENSE")]) == mit
    assert (combined([llama, mit]).id, combined([llama, mit]).name) == ("other", "llama3.1-and-mit")
    assert combined([llama, Licence()]) == Licence("other")
    parents = [
        Parent(role, "org/x", False, "", "", x) for role, x in (("teacher", llama), ("model that it began as", mit))
    ]
    (warning,) = licence_warnings(parents, combined([llama, mit]))
    assert "llama3.1 (of the teacher) and mit (of the model that it began as)" in warning


class FakeHub:
    """Stands for huggingface_hub.HfApi: repositories in memory."""

    repositories: dict[str, dict]
    error: Exception | None

    def repo_exists(self, name):
        if self.error:
            raise self.error
        return name in self.repositories

    def list_repo_files(self, name):
        return list(self.repositories[name]["files"])

    def repo_info(self, name):
        return SimpleNamespace(private=self.repositories[name]["private"])

    def create_repo(self, name, *, private, exist_ok):
        self.repositories[name] = {"private": private, "files": {".gitattributes": b""}}

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        held = self.repositories[repo_id]["files"]
        assert delete_patterns == "*"
        kept = {name: held[name] for name in held if name == ".gitattributes"}
        self.repositories[repo_id]["files"] = kept | files(Path(folder_path))


@pytest.fixture
def fake(monkeypatch):
    FakeHub.repositories, FakeHub.error = {}, None
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return FakeHub


def test_what_is_pushed_is_the_folder(finished, fake, tmp_path):
    push = {"out": str(tmp_path / "shared"), "push_to_hub": "me/tiny-student"}
    out, notes = exported(finished, private=True, **push)
    assert notes[-1] == "uploaded: https://huggingface.co/me/tiny-student"
    repository = fake.repositories["me/tiny-student"]
    assert repository["private"]
    assert repository["files"] == {".gitattributes": b"", **files(out)}
    text = (out / "README.md").read_text()
    assert "# tiny-student\n" in text
    assert "from_pretrained('me/tiny-student')" in text
    repository["files"]["model-00001-of-00002.safetensors"] = b"of an earlier export"
    exported(finished, **push)
    assert repository["files"] == {".gitattributes": b"", **files(out)}
    assert repository["private"]  # and stays so


def test_a_repository_that_is_something_else_is_left_alone(finished, fake, tmp_path):
    push = {"out": str(tmp_path / "shared"), "push_to_hub": "me/other"}
    fake.repositories["me/other"] = {"private": False, "files": {"model.safetensors": b"theirs"}}
    with pytest.raises(
        ValueError, match=rf"me/other holds model.safetensors and no {RECORD}, so it is no earlier export"
    ):
        exported(finished, **push)
    assert fake.repositories["me/other"]["files"] == {"model.safetensors": b"theirs"}
    fake.repositories["me/other"]["files"][RECORD] = b"{}"
    with pytest.raises(ValueError, match=r"exists and is public, so --private would not hide"):
        exported(finished, private=True, **push)
    assert fake.repositories["me/other"]["files"]["model.safetensors"] == b"theirs"


def http(status):
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return errors.HfHubHTTPError(f"{status} from the hub", response=response)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            errors.LocalTokenNotFoundError("no token"),
            r"does not know who you are \(no token\). Log in with `hf auth login`",
        ),
        (http(401), r"does not know who you are \(401 from the hub\)"),
        (http(403), r"your token may not write there.*have me give you that right"),
        (http(500), r"the upload failed \(HfHubHTTPError: 500 from the hub\)"),
        (ConnectionError("no route"), r"the upload failed \(ConnectionError: no route\)"),
    ],
)
def test_an_upload_that_fails_leaves_the_folder_and_says_what_to_do(finished, fake, tmp_path, error, says):
    fake.error = error
    out = tmp_path / "shared"
    with pytest.raises(ValueError, match=rf"me/x: .*{says}.*{out} is whole; run the same command again, or `hf upload"):
        exported(finished, out=str(out), push_to_hub="me/x")
    assert (out / "README.md").is_file()


def test_settings_that_do_not_go_together(finished, capfd):
    for name in ("me", "me/", "a/b/c"):
        with pytest.raises(ValueError, match=r"push_to_hub is .*; expected ORG/NAME"):
            ExportSettings("x", push_to_hub=name)
    with pytest.raises(ValueError, match=r"push_to_hub is 'me/a--b': Cannot have -- or \.\. in repo_id"):
        exported(finished, push_to_hub="me/a--b")
    with pytest.raises(ValueError, match="private is True, but push_to_hub is empty"):
        ExportSettings("x", private=True)
    with pytest.raises(SystemExit):
        run_command("export", ["export"])
    assert "--run is missing" in capfd.readouterr().err


def test_the_bundled_teacher_says_its_licence():
    assert str(find_licence(Path(rtd_jax.__file__).parent / "bundled" / "tiny_teacher")) == "apache-2.0"
