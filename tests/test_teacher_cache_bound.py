"""A teacher cache is of one teacher: manifest, shards and records are bound together; what breaks it is named."""

import copy
import json
import os
import resource
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load, save
from test_teacher_cache import identity, outputs_of

from rtd_jax.apps.cache import _records
from rtd_jax.base.files import json_digest
from rtd_jax.base.types import TopK
from rtd_jax.data.encoding import EncodedChain
from rtd_jax.data.packing import fixed_batches
from rtd_jax.teacher import shards
from rtd_jax.teacher.cache import CacheWriter, TeacherCache, read_identity
from rtd_jax.teacher.identity import CacheSettings
from rtd_jax.teacher.records import decode_record, encode_record

OLD = Path(__file__).parent / "golden" / "artefacts" / "cache"
SETTINGS = CacheSettings(4)
OWN = identity(SETTINGS, 50, 8)


def records_of(count: int, seed: int = 0, settings: CacheSettings = SETTINGS) -> list[tuple[str, bytes]]:
    outputs = [outputs_of(3, 4, 50, 2, 8, seed=1000 * seed + i) for i in range(count)]
    return [(f"{i:064x}", encode_record(top, states[None], settings)) for i, (top, states) in enumerate(outputs)]


def written(folder: Path, *blocks: list[tuple[str, bytes]], own=OWN) -> Path:
    writer = CacheWriter(folder, own)
    for block in blocks:
        writer.write(block)
    return folder


def read_all(folder: Path, own=OWN) -> None:
    cache = TeacherCache(folder, own)
    for key in sorted(cache._places):
        cache.read(key)


def refusal(folder: Path, own=OWN) -> str:
    """Why the folder is refused; "" where it is not."""
    try:
        read_all(folder, own)
    except ValueError as error:
        return str(error)
    return ""


def lists(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.json"))


def other_teacher():
    return type(OWN)(**OWN.stored() | {"teacher": "another"}, hidden_layers=(2,))


def test_without_its_manifest_a_cache_is_signed_for_its_own_teacher_alone(tmp_path):
    folder = written(tmp_path, records_of(3))
    before = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest\.json\); the shards in it have lost theirs: run"):
        TeacherCache(folder, OWN)
    with pytest.raises(ValueError, match=rf"{lists(folder)[0].name} belongs to another teacher cache"):
        CacheWriter(folder, other_teacher())
    assert not (folder / "manifest.json").exists()
    assert len(CacheWriter(folder, OWN).keys) == 3
    assert (folder / "manifest.json").read_bytes() == before

    copied = Path(shutil.copytree(OLD, tmp_path / "old"))
    own = read_identity(copied, (4,))
    (copied / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is of format 2 and does not say which cache it belongs to"):
        CacheWriter(copied, own)


@pytest.mark.parametrize(
    "change", [{"teacher": "another"}, {"tokenizer": "another"}, {"layers": (1, 2)}, {"temperature": 2.0}]
)
def test_shards_of_another_cache_are_refused_by_name(tmp_path, change):
    own = written(tmp_path / "own", records_of(3))
    theirs = type(OWN)(**OWN.stored() | change, hidden_layers=(2,))
    other = written(tmp_path / "other", records_of(5, seed=1)[3:], own=theirs)
    for path in other.glob("shard-*"):
        shutil.copy(path, own)
    (listed,) = lists(other)
    for attempt in (lambda: TeacherCache(own, OWN), lambda: CacheWriter(own, OWN)):
        with pytest.raises(ValueError, match=rf"{listed.name} belongs to another teacher cache .* move .* back"):
            attempt()
    # Their records alone, under this cache's list: the same chains have the same names in both.
    same = written(tmp_path / "same", records_of(3, seed=1), own=theirs)
    for path in own.glob("shard-*"):
        path.unlink()
    written(own, records_of(3))
    shutil.copy(next(same.glob("*.array_record")), own)
    with pytest.raises(ValueError, match=r"record 0 is damaged \(its checksum differs\)"):
        read_all(own)


def test_shards_of_one_identity_are_joined_by_moving_them(tmp_path):
    records = records_of(6)
    first, second = written(tmp_path / "a", records[:3]), written(tmp_path / "b", records[3:], records[2:4])
    for path in second.glob("shard-*"):
        shutil.move(path, first)
    cache = TeacherCache(first, OWN)
    assert sorted(cache._places) == [key for key, _ in records]
    for key, record in records:
        np.testing.assert_array_equal(cache.read(key)[1], decode_record(record, OWN)[1])
    assert CacheWriter(first, OWN).keys == {key for key, _ in records}


def test_the_earlier_format_is_read_and_added_to(tmp_path):
    folder = Path(shutil.copytree(OLD, tmp_path / "cache"))
    own = read_identity(folder, (4,))
    read_all(folder, own)
    top, states = outputs_of(3, own.top_k, own.vocab_size, 2, own.width)
    before = (folder / "manifest.json").read_bytes()
    writer = CacheWriter(folder, own)
    assert len(writer.keys) > 4
    writer.write([("a" * 64, encode_record(top, states[None], own))])
    assert (folder / "manifest.json").read_bytes() == before
    assert "a" * 64 in TeacherCache(folder, own)
    read_all(folder, own)
    # Moved under a manifest of today, its shards do not say whose they are.
    mine = written(tmp_path / "mine", [("b" * 64, encode_record(top, states[None], own))], own=own)
    for path in folder.glob("shard-*"):
        shutil.copy(path, mine)
    with pytest.raises(ValueError, match=r"shard-\w+\.json is of format 2 and does not say"):
        TeacherCache(mine, own)


def test_a_record_under_another_key_is_noticed_even_where_the_list_was_signed_again(tmp_path):
    folder = written(tmp_path, records_of(3))
    (path,) = lists(folder)
    listed = json.loads(path.read_text())
    for keys in (listed["keys"][1:] + listed["keys"][:1], listed["keys"][::-1]):
        changed = {name: value for name, value in listed.items() if name != "digest"} | {"keys": keys}
        path.write_text(json.dumps(listed | {"keys": keys}))
        with pytest.raises(ValueError, match=rf"{path.name} was changed or damaged .*; delete {path.stem}"):
            TeacherCache(folder, OWN)
        path.write_text(json.dumps(changed | {"digest": json_digest(changed)}))
        with pytest.raises(ValueError, match=r"record \d is damaged \(its checksum differs\)"):
            read_all(folder)


def mutations(value: dict) -> dict[str, object]:
    """Valid JSON of another shape, by what was done."""

    def changed(key: str, item: object) -> dict:
        return copy.deepcopy(value) | {key: item}

    found: dict[str, object] = {"a list": [value], "null": None, "a text": "x", "a number": 3, "nothing in it": {}}
    for key in value:
        found[f"{key} left out"] = {name: item for name, item in value.items() if name != key}
        for item in (None, -1, 1.5, "x", [], {}, True, [[]], [None], ["zz"], 10**400):
            found[f"{key} = {str(item)[:20]}"] = changed(key, item)
    return found


@pytest.mark.parametrize("signed", [False, True], ids=["as it is", "with a new digest"])
@pytest.mark.parametrize("of", ["manifest.json", "shard", "old manifest", "old shard", "identity"])
def test_json_of_another_shape_is_refused_by_name(tmp_path, of, signed):
    """Even where the digest fits, as nothing but a program that writes it wrongly would leave it."""
    if of.startswith("old"):
        folder = Path(shutil.copytree(OLD, tmp_path / "cache"))
        own = read_identity(folder, (4,))
    else:
        folder, own = written(tmp_path / "cache", records_of(3)), OWN
    path = lists(folder)[0] if of.endswith("shard") else folder / "manifest.json"
    value = json.loads(path.read_text())
    variants = mutations(value)
    if of == "identity":
        variants = {name: value | {"identity": item} for name, item in mutations(value["identity"]).items()}
    for name, variant in variants.items():
        if signed and isinstance(variant, dict) and not of.startswith("old"):
            record = {key: item for key, item in variant.items() if key != "digest"}
            variant = record | {"digest": json_digest(record)}
        path.write_text(json.dumps(variant))
        if variant == value:
            continue
        assert str(folder) in refusal(folder, own), name
    for text in ("", "{", "\0" * 50, '{"format": 3, "a": NaN}', "[" * 5000, "[" * 900 + "]" * 900, '{"format": 1e999}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=str(path)):
            read_all(folder, own)


def test_damaged_shard_files_are_named(tmp_path):
    folder = written(tmp_path / "cache", records_of(3))
    (shard,) = folder.glob("*.array_record")
    whole = shard.read_bytes()
    for content in (b"", whole[:1000], bytes(len(whole)), whole[:300] + bytes(len(whole) - 300), whole[::-1]):
        shard.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{shard.name}.*delete {shard.stem}\.\* and run launch/cache_teacher"):
            read_all(folder)
    for position in np.random.default_rng(0).integers(0, len(whole), 40):
        shard.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        assert shard.name in (refusal(folder) or shard.name)  # the bit may have been in no record


def test_a_record_that_says_too_much_or_has_too_little_is_refused():
    (_, record), *_ = records_of(1)
    planes = load(record)

    def refused(message: str, content: bytes) -> None:
        with pytest.raises(ValueError, match=message):
            decode_record(content, OWN)

    for sizes in ("-1 2", "3 -2", "1000000000000 2", "3 1000000000000", "4 2", "3 3", "x y", "3", f"{2**70} 2"):
        refused("it says|should be|header cannot be read", save(planes, {"sizes": sizes}))
    for name in ("states0", "scales0", "log_probs", "tails"):
        refused(f"it has no {name}", save({key: x for key, x in planes.items() if key != name}, {"sizes": "3 2"}))
        refused(f"its {name} are not", save(planes | {name: planes[name][:-3]}, {"sizes": "3 2"}))
    refused(r"it has token ids from", save(planes | {"gaps1": planes["gaps0"]}, {"sizes": "3 2"}))
    refused("header cannot be read", (2**60).to_bytes(8, "little") + record[8:])
    refused("header cannot be read", record[:4])
    refused("header cannot be read", b"")
    refused("header cannot be read", save(planes))


def test_outputs_that_are_not_finite_fill_no_cache():
    """The chain whose outputs they are is named; int8 and 8-bit codes would hide them."""
    top, states = outputs_of(3, 4, 50, 2, 8)
    for bad in (np.nan, np.inf, -np.inf):
        for part, name in ((top.log_probs_BLM, "predictions"), (top.tail_BL, "masses"), (states, "states")):
            before, part.flat[0] = part.flat[0], bad
            with pytest.raises(ValueError, match=f"the teacher's {name} are not finite"):
                encode_record(top, states[None], SETTINGS)
            part.flat[0] = before
    encode_record(top, states[None], SETTINGS)

    chains = [
        EncodedChain(np.arange(5, dtype=np.int32), 2, np.array([1, 4]), np.float32([0, 0, 1, 1, 1]), f"data.jsonl:{i}")
        for i in (1, 2)
    ]
    chains[1].tokens[0] = 7
    (batch,) = fixed_batches(chains, 2, 8, 1, 2)
    arrays = TopK(jnp.zeros((2, 8, 4), jnp.int32), jnp.zeros((2, 8, 4)), jnp.zeros((2, 8)), jnp.zeros((2, 8)))
    states_BNCKD = jnp.zeros((2, 1, 1, 2, 8)).at[1].set(jnp.nan)
    with pytest.raises(ValueError, match=r"data\.jsonl:2: on this chain the teacher's states are not finite"):
        list(_records([(batch, (arrays, states_BNCKD))], OWN, chains))


def test_a_cache_of_many_shards_needs_few_open_files(tmp_path, monkeypatch):
    records = records_of(40)
    folder = written(tmp_path, *([record] for record in records))
    monkeypatch.setattr(shards, "_MOST_OPEN", 5)
    cache = TeacherCache(folder, OWN)
    before = len(os.listdir("/proc/self/fd"))
    for key, record in records * 2:
        np.testing.assert_array_equal(cache.read(key)[1], decode_record(record, OWN)[1])
        assert len(os.listdir("/proc/self/fd")) <= before + 5


def test_a_process_that_may_open_no_more_files_is_told_so_and_no_damage_is_claimed(tmp_path):
    records = records_of(12)
    folder = written(tmp_path, *([record] for record in records))
    cache, unread = TeacherCache(folder, OWN), TeacherCache(folder, OWN)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    try:  # room for fewer files than there are shards: files are closed again, so it is enough
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, limits[1]))
        for key, _ in records:
            cache.read(key)
        while True:
            try:
                held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        with pytest.raises(ValueError, match=r"array_record: could not be read \(Too many open files\); allow"):
            unread.read(records[0][0])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in held:
            os.close(descriptor)


def test_a_shard_that_is_replaced_while_it_is_read_is_opened_again(tmp_path):
    records = records_of(4)
    folder = written(tmp_path, records)
    (shard,) = folder.glob("*.array_record")
    whole = shard.read_bytes()
    cache = TeacherCache(folder, OWN)
    cache.read(records[0][0])
    with shard.open("r+b") as file:  # in place, as `cp` does it
        file.truncate(0)
        file.write(whole)
    for key, _ in records:
        cache.read(key)
    written(folder, records)  # by rename
    shutil.copy(shard, tmp_path / "kept")
    shard.unlink()
    shutil.move(tmp_path / "kept", shard)
    for key, _ in records:
        cache.read(key)


@pytest.mark.parametrize("name", ["lr[1]", "a*b", "x?", "[!a]", "a b", "a@3", "a%20b", "ü"])
def test_a_folder_may_have_any_name(tmp_path, name):
    folder = written(tmp_path / name, records_of(3))
    read_all(folder)
    assert len(CacheWriter(folder, OWN).keys) == 3


def test_checksums_of_the_earlier_format_still_hold(tmp_path):
    """They are taken over the record alone."""
    folder = Path(shutil.copytree(OLD, tmp_path / "cache"))
    own = read_identity(folder, (4,))
    cache = TeacherCache(folder, own)
    key, place = next(iter(cache._places.items()))
    assert place.start == 0
    path = folder / f"{place.shard}.json"
    listed = json.loads(path.read_text())
    listed["crc32"][place.row] ^= 1
    path.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=f"record {place.row} is damaged"):
        TeacherCache(folder, own).read(key)
