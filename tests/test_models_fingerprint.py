"""The identity of weights: every byte counts, large files are read once, what earlier versions recorded still fits."""

import copy
import dataclasses
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import pytest

from rtd_jax.models import fingerprint
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.fingerprint import Fingerprint, weights_fingerprint
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.teacher.cache import TeacherCache, read_identity
from rtd_jax.teacher.served.log import recorded_identity

CONFIG = DecoderConfig(64, 8, 8, layers=2, heads=1, kv_heads=1, head_dim=8)
BUNDLED = Path(__file__).parents[1] / "rtd_jax" / "bundled"
ARTEFACTS = Path(__file__).parent / "golden" / "artefacts"


@pytest.fixture
def directory(tmp_path) -> Path:
    return save_pretrained(tmp_path / "model", CONFIG, DecoderModel(CONFIG).init(jax.random.key(0)))


@pytest.fixture
def hashed(monkeypatch, tmp_path) -> list[Path]:
    """Every file is large enough for its digest to be kept, in a folder of the test; the files that were read."""
    read: list[Path] = []
    plain = fingerprint.file_digest
    monkeypatch.setattr(fingerprint, "file_digest", lambda path: read.append(path) or plain(path))
    monkeypatch.setattr(fingerprint, "KEPT_FROM", 0)
    monkeypatch.setattr(fingerprint, "_SETTLED", -1e9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return read


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9, 0.999])
def test_one_flipped_bit_anywhere_in_the_weights_is_another_model(directory, share):
    before, path = weights_fingerprint(directory), directory / "model.safetensors"
    flip(path, int(share * path.stat().st_size))
    assert weights_fingerprint(directory) != before


def test_every_byte_of_the_config_and_the_names_of_files_count(directory, tmp_path):
    before = weights_fingerprint(directory)
    assert weights_fingerprint(shutil.copytree(directory, tmp_path / "copy")) == before
    path = tmp_path / "copy" / "config.json"
    path.write_text(path.read_text() + " ")
    assert weights_fingerprint(tmp_path / "copy") != before


def test_a_large_file_is_read_once(directory, hashed):
    first = weights_fingerprint(directory)
    assert weights_fingerprint(directory) == first
    assert hashed == [directory / "model.safetensors"]


def test_another_file_under_the_same_name_size_and_time_is_read_again(directory, hashed, tmp_path):
    path, before = directory / "model.safetensors", weights_fingerprint(directory)
    stat = path.stat()
    flip(path, stat.st_size // 2)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp -p` and `rsync -t` do
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert weights_fingerprint(directory) != before
    other = tmp_path / "other"
    shutil.copy2(path, other)
    flip(other, 300)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    now = weights_fingerprint(directory)
    other.replace(path)  # as an archive does
    assert weights_fingerprint(directory) not in (before, now)
    assert len(hashed) == 3


def test_a_digest_of_a_file_that_has_just_changed_is_not_kept(directory, hashed, monkeypatch):
    """A second change within one tick of the file system's clock would not be seen."""
    monkeypatch.setattr(fingerprint, "_SETTLED", 3600.0)
    weights_fingerprint(directory)
    weights_fingerprint(directory)
    assert len(hashed) == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"format": 1, "sha256": "0"}'])
def test_a_damaged_note_of_a_digest_is_written_again(directory, hashed, tmp_path, content):
    before = weights_fingerprint(directory)
    (kept,) = (tmp_path / "cache" / "rtd_jax" / "digests").iterdir()
    kept.write_bytes(content)
    assert weights_fingerprint(directory) == before
    assert len(hashed) == 2
    assert weights_fingerprint(directory) == before
    assert len(hashed) == 2


def test_a_home_that_cannot_be_written_costs_time_only(directory, hashed, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert weights_fingerprint(directory) == weights_fingerprint(directory)
    assert len(hashed) == 2


def test_many_may_keep_digests_at_one_time(directory, hashed):
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(weights_fingerprint, [directory] * 32))
    assert len(found) == 1


# What earlier versions recorded ---------------------------------------------------------------------------------------


def test_the_bundled_classifier_knows_its_teacher_by_the_earlier_form():
    recorded = json.loads((BUNDLED / "tiny_boundaries" / "classifier.json").read_text())["teacher"]
    now = weights_fingerprint(BUNDLED / "tiny_teacher")
    assert recorded == now
    assert now == recorded
    assert (recorded != now) is False
    assert str(now) != recorded
    assert {"teacher": recorded} == {"teacher": now}


def test_a_cache_and_the_checkpoints_that_read_it_are_known_by_the_earlier_form():
    folder = ARTEFACTS / "cache"
    stored = read_identity(folder, hidden_layers=(4,))
    cache = TeacherCache(folder, dataclasses.replace(stored, teacher=weights_fingerprint(BUNDLED / "tiny_teacher")))
    assert cache.fingerprint == TeacherCache(folder, stored).fingerprint  # what a checkpoint has recorded
    assert str(cache.fingerprint) != str(TeacherCache(folder, stored).fingerprint)
    with pytest.raises(ValueError, match="written with another teacher"):
        TeacherCache(folder, dataclasses.replace(stored, teacher=Fingerprint("v2-0", "of another model")))


def test_replies_of_an_earlier_version_answer_the_same_requests(tmp_path):
    """Requests are named by the text of the identity, so it has to be the recorded one."""
    shutil.copy(ARTEFACTS / "traces" / "requests.json", tmp_path)
    recorded = json.loads((tmp_path / "requests.json").read_text())
    del recorded["format"]
    now = recorded | {"model": weights_fingerprint(BUNDLED / "tiny_teacher")}
    assert json.dumps(recorded_identity(tmp_path, now)) == json.dumps(recorded) != json.dumps(now)
    assert json.dumps(recorded_identity(tmp_path / "elsewhere", now)) == json.dumps(now)
    other = now | {"model": Fingerprint("v2-0", "of another model")}
    assert recorded_identity(tmp_path, other) == other


def test_two_models_that_differ_in_the_middle_only_are_told_apart_although_the_earlier_form_is_one(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    path.write_bytes((8).to_bytes(8, "little") + bytes(5 * 2**20))
    before = weights_fingerprint(tmp_path)
    flip(path, 2**21)
    now = weights_fingerprint(tmp_path)
    assert now.earlier == before.earlier
    assert now != before
    assert before != now


def test_a_fingerprint_is_text_in_files_and_survives_a_copy():
    @dataclasses.dataclass
    class Holder:
        teacher: str

    made = Fingerprint("v2-ab", "cd")
    assert json.dumps({"x": made}) == '{"x": "v2-ab"}'
    for other in (copy.deepcopy(made), dataclasses.asdict(Holder(made))["teacher"]):
        assert other == "cd"
        assert other == "v2-ab"
        assert other != "ab"
        assert other != ""
    assert Fingerprint("v2-ab") != ""
