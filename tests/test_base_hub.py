"""Models and data of the Hugging Face hub: revisions, the commit that was read, and what to do when it refuses.

The hub itself is not asked: its client is replaced, and raises the client's own errors.
"""

from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow as pa
import pytest
from huggingface_hub import errors

from rtd_jax.apps.evaluate import EvaluateSettings
from rtd_jax.base.hub import hub_name, model_name, place_commit, snapshot_commit
from rtd_jax.data.sources import SourceSettings, load_traces
from rtd_jax.models.from_hf import resolve
from rtd_jax.models.open import ModelSettings, open_model
from rtd_jax.train.recipe import StudentSettings
from rtd_jax.train.student import start_folder

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40
ROW = {"prompt": "How many?", "completions": ["1+1=2"], "answer": "2"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The calls that were made of the client, which has one model in its cache."""
    calls = []
    folder = tmp_path / "models--org--name" / "snapshots" / COMMIT
    folder.mkdir(parents=True)

    def download(name, **options):
        calls.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return SimpleNamespace(calls=calls, folder=folder)


@pytest.mark.parametrize(
    ("path", "revision", "asked"),
    [
        ("org/name", "", ("org/name", None)),
        ("org/name", "v1", ("org/name", "v1")),
        ("org/name@v1", "", ("org/name", "v1")),
        ("org/name@refs/pr/3", "", ("org/name", "refs/pr/3")),
        ("name", COMMIT, ("name", COMMIT)),
    ],
)
def test_a_revision_goes_to_the_hub(hub, path, revision, asked):
    assert resolve(path, revision) == hub.folder
    ((name, options),) = hub.calls
    assert (name, options["revision"]) == asked


def test_settings_give_their_revision(hub):
    assert start_folder(StudentSettings("pretrained", path="org/name", revision="v2")) == hub.folder
    with pytest.raises(ValueError, match=r"config\.json: no such file"):  # the model was found; it is empty
        open_model(ModelSettings("org/name", revision="v3"), None, lambda _: None)
    assert [options["revision"] for _, options in hub.calls] == ["v2", "v3"]
    with pytest.raises(ValueError, match="init='teacher_layers' does not read revision"):
        StudentSettings("teacher_layers", layers=2, revision="v1")


def test_licences_and_the_card_are_downloaded_with_the_model(hub):
    def wanted(name: str, **changes) -> bool:
        hub.calls.clear()
        resolve("org/name", **changes)
        patterns = {key: hub.calls[0][1][key] for key in ("allow_patterns", "ignore_patterns")}
        return bool(list(huggingface_hub.utils.filter_repo_objects([name], **patterns)))

    for name in ("README.md", "LICENSE", "LICENSE.txt", "LICENCE.md", "license.txt", "NOTICE", "USE_POLICY.md"):
        assert wanted(name), name
    assert wanted("model-00001-of-00002.safetensors")
    assert not wanted("model-00001-of-00002.safetensors", has_weights=False)
    second = ("consolidated.safetensors", "original/model.safetensors")  # the same weights in another layout
    for name in ("pytorch_model.bin", "modeling_evil.py", "original/consolidated.00.pth", *second):
        assert not wanted(name), name


def test_a_model_that_was_cached_without_its_card_is_found_without_a_connection(hub, monkeypatch):
    def offline(name, *, allow_patterns, local_files_only=False, **options):
        if "README.md" in allow_patterns or not local_files_only:
            raise errors.LocalEntryNotFoundError("README.md is not there")
        return str(hub.folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert resolve("org/name") == hub.folder

    def away(name, *, local_files_only=False, **options):
        raise errors.LocalEntryNotFoundError("traffic has been disabled" if local_files_only else "no route to it")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", away)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"the hub cannot be reached \(no route to it\)"):
        resolve("org/name")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set. Unset it, or download it"):
        resolve("org/name")


def test_what_is_local_has_no_revision(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path} is local, and has no revisions, but revision is 'v1'; leave it"):
        resolve(tmp_path, "v1")
    (tmp_path / "train.jsonl").write_text('{"question": "How many?", "answer": "1+1=<<1+1=2>>2\\n#### 2"}\n')
    for location in (tmp_path, tmp_path / "train.jsonl"):
        assert load_traces(SourceSettings("gsm8k", str(location)))
        with pytest.raises(ValueError, match=r"is local, and has no revisions"):
            load_traces(SourceSettings("gsm8k", str(location), revision="main"))
    with pytest.raises(ValueError, match=r"revision is 'v1', of data on the hub, but data_root"):
        EvaluateSettings(("x",), data_root=str(tmp_path), revision="v1")


def test_a_revision_is_given_once():
    with pytest.raises(ValueError, match="org/name@v1 ends in the revision 'v1', but revision is 'v2' too"):
        resolve("org/name@v1", "v2")
    assert hub_name("org/name@v1", "") == ("org/name", "v1")
    for text in ("a/b/c", "./a", "a b", "", "@v1", "/a"):
        assert hub_name(text, "") is None, text


def test_the_commit_is_in_the_folder_of_a_snapshot(hub, tmp_path):
    assert snapshot_commit(hub.folder) == COMMIT
    assert model_name(hub.folder) == f"org/name@{COMMIT[:7]}"
    assert snapshot_commit(tmp_path / COMMIT) == ""
    assert model_name(tmp_path / "tiny") == "tiny"


def http(cls, status, message="the hub said no"):
    return cls(message, response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            http(errors.GatedRepoError, 403),
            r"a gated model.*Ask for access on https://huggingface.co/org/name;.*auth log",
        ),
        (http(errors.RepositoryNotFoundError, 404), r"nor a model of the hub.*name is right.*ORG/NAME.*auth login"),
        (
            http(errors.RevisionNotFoundError, 404),
            r"no revision 'v9' of this model.*commits/main lists, or no revision",
        ),
        (errors.LocalEntryNotFoundError("x"), r"hub cannot be reached.*hf download org/name --revision v9 --local-dir"),
        (ConnectionError("no route"), r"hub cannot be reached \(no route\)"),
        (
            http(errors.HfHubHTTPError, 500),
            r"nor a model the hub would give \(HfHubHTTPError: the hub said no\).*Run again",
        ),
    ],
)
def test_a_model_that_the_hub_does_not_give(monkeypatch, error, says):
    def refuse(name, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=f"(?s)^org/name.*{says}"):
        resolve("org/name", "v9")


def prepared(folder, commit, rows):
    """Rows in a file where `datasets` keeps what it has prepared of a hub's data set."""
    file = folder / "org___rows" / "main" / "0.0.0" / commit / "rows-train.arrow"
    file.parent.mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return datasets.Dataset.from_file(str(file))


def test_rows_of_the_hub_say_of_which_commit_they_are(tmp_path, monkeypatch):
    calls, published = [], prepared(tmp_path, COMMIT, [ROW, ROW])

    def load(name, subset, *, split, revision):
        calls.append((name, subset, split, revision))
        return published

    monkeypatch.setattr(datasets, "load_dataset", load)
    traces = load_traces(SourceSettings("stepwise", "org/rows", subset="main", revision="v1"))
    assert [trace.source for trace in traces] == [f"org/rows@{COMMIT}/main/train:{i}" for i in (1, 2)]
    assert place_commit(traces[0].source) == COMMIT
    assert load_traces(SourceSettings("stepwise", "org/rows@v2"))
    assert load_traces(SourceSettings("stepwise", "org/rows", revision=COMMIT))
    assert calls == [
        ("org/rows", "main", "train", "v1"),
        ("org/rows", None, "train", "v2"),
        ("org/rows", None, "train", COMMIT),
    ]
    assert place_commit("/data/train.jsonl:1") == ""


def test_another_commit_from_the_cache_is_not_taken_for_the_one_that_was_asked_for(tmp_path, monkeypatch):
    """Without a connection `datasets` takes the newest that its cache has, whatever the revision."""
    published = prepared(tmp_path, OTHER, [ROW])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: published)
    with pytest.raises(ValueError, match=rf"revision {COMMIT} was asked for.*the cache has commit {OTHER}"):
        load_traces(SourceSettings("stepwise", "org/rows", revision=COMMIT))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            "Dataset 'org/rows' is a gated dataset on the Hub.",
            r"a gated data set.*https://huggingface.co/datasets/org/rows",
        ),
        (
            "Dataset 'org/rows' doesn't exist on the Hub or cannot be accessed.",
            "nor a data set of the hub.*name is right",
        ),
        ("Revision 'v9' doesn't exist for dataset 'org/rows' on the Hub.", "no revision 'v9' of this data set"),
    ],
)
def test_data_that_the_hub_does_not_give(monkeypatch, error, says):
    def refuse(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError(error) from None  # as `datasets` cuts the chain

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=f"^org/rows.*{says}"):
        load_traces(SourceSettings("stepwise", "org/rows", revision="v9"))
