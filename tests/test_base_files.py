"""Files that several processes, or a killed one, touch."""

import errno
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from rtd_jax.base.files import (
    check_writable,
    finite_report,
    null_notes,
    read_json,
    read_jsonl,
    read_object,
    read_record,
    reading,
    write_json,
    write_record,
)


def test_a_folder_is_probed_by_many_at_once_and_nothing_is_left(tmp_path):
    """Two processes of one run begin in the same folder: neither may take away what the other has just written."""
    folder = tmp_path / "run"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check_writable, [folder] * 2000))
    assert list(folder.iterdir()) == []


def test_a_file_in_the_way_is_refused_by_name(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match=r"cannot write in .*run: File exists; choose another folder with --workdir"):
        check_writable(tmp_path / "run")


@pytest.mark.parametrize("name", ["report.json", "study.md", "loss.png"])
def test_a_folder_in_the_place_of_a_file_is_found_before_the_work(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{name} is no file, .* choose another folder with --out"):
        check_writable(tmp_path, "--out")
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(ValueError, match=f"{name} is no file"):
        check_writable(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' stands twice in one object"),
        (b'{"a": "q \\ud83d"}', r"half a surrogate pair, \\ud83d"),
        (b"[" * 100_000, "nested too deeply"),
        ('{"a": "caf\u00e9"}'.encode("latin-1"), "not UTF-8 .*byte 0xe9 at position 10.*iconv -f LATIN1"),
        ('\ufeff{"a": 1}'.encode("utf-16-le"), "not UTF-8 .*it looks like UTF-16"),
        (b'{"a": 1', "not valid JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b"", "not valid JSON"),
    ],
)
def test_a_damaged_json_file_is_refused_by_name(tmp_path, content, words):
    path = tmp_path / "meta.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"meta.json: .*{words}.*; restore it or write it again"):
        read_object(path)


def test_what_is_legal_json_is_read(tmp_path):
    """A byte order mark, a whole surrogate pair, numbers of any size, and U+2028, which ends no line of JSON."""
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "2+3=\u20285.\x85"}, {"n": 2**100}, {"x": 0.1}]
    escaped = b'{"smile": "\\ud83d\\ude00"}\n'
    path.write_bytes(
        b"\xef\xbb\xbf" + "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode() + escaped
    )
    assert list(read_jsonl(path)) == [(f"{path}:{i}", row) for i, row in enumerate([*rows, {"smile": "\U0001f600"}], 1)]


def test_a_read_that_fails_for_another_reason_is_not_called_damage(tmp_path):
    """Permissions and too many open files say nothing about the content: no advice to write the file again."""
    for number, words in ((errno.EACCES, "let this user read it"), (errno.EMFILE, "ulimit -n"), (errno.EIO, "dmesg")):
        with (
            pytest.raises(ValueError, match=f"x.json: could not be read .*{words}") as refused,
            reading(tmp_path / "x.json", "delete it"),
        ):
            raise OSError(number, os.strerror(number))
        assert "delete it" not in str(refused.value)
    (tmp_path / "x.json").mkdir()
    with pytest.raises(ValueError, match=r"x.json: could not be read \(Is a directory\); it is a folder"):
        read_json(tmp_path / "x.json")


def test_every_changed_character_of_a_record_is_noticed(tmp_path):
    path, content = tmp_path / "manifest.json", {"name": "a", "layers": [1, 2], "share": 0.25}
    write_record(path, 2, content)
    assert read_record(path, 2, "make it again") == {"format": 2, **content}
    whole = path.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        outcome = None
        try:
            outcome = read_record(path, 2, "make it again")
        except ValueError as error:
            outcome = str(error)
        # A changed space between two values changes nothing.
        is_named = isinstance(outcome, str) and str(path) in outcome and "make it again" in outcome
        assert is_named or outcome == {"format": 2, **content}, (place, outcome)


def test_a_record_of_an_earlier_format_needs_no_digest(tmp_path):
    path = tmp_path / "manifest.json"
    write_json(path, {"format": 1, "name": "a"})
    assert read_record(path, 2, "make it again", undigested=(1,)) == {"format": 1, "name": "a"}
    for seen in (2, "1", None, True, 7):
        write_json(path, {"format": seen, "name": "a"})
        with pytest.raises(ValueError, match=r"manifest.json .*; make it again"):
            read_record(path, 2, "make it again", undigested=(1,))


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power loss after the rename must find the content, and after the return the name."""
    calls = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), rename(a, b)))
    write_json(tmp_path / "a.json", {})
    temporary, renamed, folder = calls
    assert (temporary.endswith(".tmp"), renamed, folder) == (True, "rename", str(tmp_path))


def test_a_report_has_null_for_what_no_json_can_hold_and_says_where():
    report = {"a": [1.5, math.inf], "b": {"c": math.nan, "d": None}, "e": (True, "inf", -math.inf)}
    clean, reasons = finite_report(report)
    assert clean == {"a": [1.5, None], "b": {"c": None, "d": None}, "e": [True, "inf", None]}
    assert reasons == ["a.1 is inf", "b.c is nan", "e.2 is -inf"]
    assert finite_report(math.nan) == (None, ["the value is nan"])
    assert finite_report({}) == ({}, [])
    assert null_notes([]) == []
    note = "null in the report, because the number overflowed or is none: a, b, c, d, and 2 more"
    assert null_notes(list("abcdef")) == [note]
    json.dumps(clean, allow_nan=False)
