"""A checkpoint is what was saved, or it is refused by name and the one before it is offered."""

import dataclasses
import json
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rtd_jax.apps.distill.stages import Run
from rtd_jax.base.files import json_digest
from rtd_jax.train.array_digests import array_digests
from rtd_jax.train.checkpoints import (
    Checkpoints,
    check_same_settings,
    numbered,
    read_meta,
    rename_settings,
    restore_params,
    restore_state,
)
from rtd_jax.train.clock import Clock
from rtd_jax.train.state import TrainState, create_state

STOPPED = Path(__file__).parent / "golden" / "artefacts" / "stopped"


def state_at(update: int, seed: int = 0) -> TrainState:
    keys = jax.random.split(jax.random.PRNGKey(seed), 2)
    params = {"student": {"w": jax.random.normal(keys[0], (64, 32)), "b": jnp.zeros(8)}, "f": jnp.eye(4)}
    state = create_state(params, optax.adam(1e-3), keys[1])
    return state._replace(step=jnp.int32(update))


def meta_at(finished: int = 0, update: int = 4) -> dict:
    record = {"threshold": 0.1, "teacher_coherence": 0.1, "budget": 6, "updates": 6}
    records = [record | {"depth": str(i + 1), "ended_by": "budget"} for i in range(finished)]
    return {"iterator": '{"next": 3}', "settings": {"seed": 0}, "records": records, "seconds": float(update)}


def saved(workdir: Path) -> Checkpoints:
    """A run with stage 1 (update 6), rolling checkpoints at 4 and 8, stage 2 (update 12) and a rolling one at 16."""
    checkpoints = Checkpoints(workdir, keep=3)
    for update, finished in ((4, 0), (6, 1), (8, 1), (12, 2), (16, 2)):
        if update in (6, 12):
            checkpoints.save_stage(finished, state_at(update, seed=update), meta_at(finished, update))
        else:
            checkpoints.save_rolling(state_at(update, seed=update), meta_at(finished, update))
    return checkpoints


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("whole")
    saved(workdir)
    return workdir


@pytest.fixture
def workdir(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def same(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_digest_is_the_same_on_every_mesh_and_another_for_every_bit_order_shape_and_dtype():
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    x = jax.random.normal(jax.random.key(0), (8, 16))
    (alone,) = array_digests([x]).values()
    for spec in (PartitionSpec("a"), PartitionSpec(None, ("a", "b")), PartitionSpec("b", "a"), PartitionSpec()):
        assert list(array_digests([jax.device_put(x, NamedSharding(mesh, spec))]).values()) == [alone]
    in_host = NamedSharding(mesh, PartitionSpec("a"), memory_kind="pinned_host")
    assert list(array_digests([jax.device_put(x, in_host)]).values()) == [alone]
    assert list(array_digests([np.asarray(x)]).values()) == [alone]
    bits = np.asarray(x).view(np.uint32)
    seen = {alone}
    for place in range(0, 128, 9):
        for bit in (0, 1, 15, 23, 31):
            flipped = bits.copy()
            flipped.flat[place] ^= np.uint32(1 << bit)
            seen |= set(array_digests([flipped.view(np.float32)]).values())
    assert len(seen) == 1 + 15 * 5
    others = [x[::-1], x[:, ::-1], x.T, x.reshape(16, 8), bits, x.at[0].set(x[1]).at[1].set(x[0]), -x]
    seen |= {digest for other in others for digest in array_digests([other]).values()}
    assert len(seen) == 1 + 15 * 5 + len(others)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "bfloat16", "float16", "int32", "float32", "int4"])
def test_every_dtype_has_a_digest(dtype):
    zeros = jnp.zeros((3, 5), dtype)
    first, second = (next(iter(array_digests([x]).values())) for x in (zeros, zeros.at[2, 4].set(1)))
    assert first != second
    assert first.startswith(f"{dtype}[3, 5] ")


def test_every_flipped_bit_of_every_file_is_noticed_or_harmless(workdir):
    """And the newest intact checkpoint before it is offered."""
    like, want = state_at(0), state_at(16, seed=16)
    path = Checkpoints(workdir, 3).latest()
    assert path.name == "16"
    same(restore_state(path, like), want)
    rng, noticed, of_tensors = np.random.default_rng(0), 0, 0
    for file in sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size):
        content = file.read_bytes()
        for _ in range(3):
            place = int(rng.integers(len(content)))
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.integers(8)]) + content[place + 1 :])
            refusal = ""
            try:
                same(restore_state(Checkpoints(workdir, 3).latest(), like), want)
            except ValueError as error:
                refusal = str(error)
            if refusal:
                noticed += 1
                of_tensors += "/d/" in str(file)
                assert f"{path}" in refusal
                assert f"The newest intact checkpoint before it is {workdir}/checkpoints/stages/2: delete" in refusal
        file.write_bytes(content)
    assert of_tensors
    assert noticed > 8


def test_a_state_beside_the_meta_of_another_checkpoint_is_refused(workdir):
    like = jax.eval_shape(lambda: state_at(0).params)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: one, like)
    for stage, other in ((2, workdir / "checkpoints" / "stages" / "1"), (1, saved_with_another_seed(workdir))):
        path = workdir / "checkpoints" / "stages" / str(stage)
        kept = Path(shutil.move(path / "state", path / "kept"))
        shutil.copytree(other / "state", path / "state")
        with pytest.raises(ValueError, match=rf"{path} was changed or damaged .*its meta says"):
            restore_state(path, state_at(0))
        with pytest.raises(ValueError, match=rf"{path} was changed or damaged .*params/student/w is float32\[64, 32\]"):
            restore_params(path, like, shardings)
        shutil.rmtree(path / "state")
        shutil.move(kept, path / "state")
        same(restore_params(path, like, shardings), restore_state(path, state_at(0)).params)


def saved_with_another_seed(workdir: Path) -> Path:
    Checkpoints(workdir / "other", 1).save_stage(1, state_at(6, seed=99), meta_at(1))
    return workdir / "other" / "checkpoints" / "stages" / "1"


def test_meta_that_was_changed_is_refused(workdir):
    path = Checkpoints(workdir, 3).latest()
    file = path / "meta" / "metadata"
    meta = json.loads(file.read_text())
    for change in ({"update": 15}, {"seconds": 0.0}, {"arrays": {}}, {"settings": {"seed": 1}}, {"format": 1}):
        file.write_text(json.dumps(meta | change))
        with pytest.raises(
            ValueError, match=rf"{file} was changed or damaged .*before it is .*stages/2: delete {path}"
        ):
            Checkpoints(workdir, 3).latest()


def test_a_whole_checkpoint_under_the_name_of_another_is_refused(workdir):
    root = workdir / "checkpoints"
    shutil.rmtree(root / "stages" / "2")
    shutil.copytree(root / "stages" / "1", root / "stages" / "2")
    with pytest.raises(ValueError, match=r"stages/2 holds stage 1, not the one of its name"):
        read_meta(root / "stages" / "2")
    shutil.rmtree(root / "stages" / "2")
    shutil.copytree(root / "rolling" / "8", root / "rolling" / "20")
    with pytest.raises(ValueError, match=r"rolling/20 holds update 8, not .* checkpoint before it is .*rolling/16"):
        Checkpoints(workdir, 3).latest()


@pytest.mark.parametrize("old", [False, True], ids=["format 2", "format 1"])
def test_meta_of_another_shape_is_refused_by_name(workdir, old):
    path = workdir / "checkpoints" / "rolling" / "16"
    if old:
        path = Path(shutil.copytree(STOPPED, workdir / "old")) / "checkpoints" / "rolling" / "8"
    file = path / "meta" / "metadata"
    meta = json.loads(file.read_text())
    values = (None, -1, "x", [], {}, [None], [{}], [[]], True, "[" * 3000, 10**400, '"a"')
    for key in meta.keys() - {"digest", "arrays"}:
        for value in values:
            record = {name: item for name, item in meta.items() if name != "digest"} | {key: value}
            if value == meta[key] or (key, value) in (("settings", {}), ("fingerprints", {}), ("records", [])):
                continue
            if (key, value) == ("curve", "[]") or (key == "iterator" and value in ("null", "{}")):
                continue
            file.write_text(json.dumps(record if old else record | {"digest": json_digest(record)}))
            with pytest.raises(ValueError, match=str(file)):
                read_meta(path)
    for content in (b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 10**5, b'{"format": NaN}', bytes(100)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=str(file)):
            read_meta(path)


def test_a_damaged_older_checkpoint_blocks_nothing(workdir):
    for damaged in ("stages/1", "stages/2", "rolling/8"):
        (workdir / "checkpoints" / damaged / "meta" / "metadata").write_bytes(b"")
        latest = Checkpoints(workdir, 3).latest()
        assert latest == workdir / "checkpoints" / "rolling" / "16"
        same(restore_state(latest, state_at(0)), state_at(16, seed=16))
    # Where it would be used, it is named, with the one before it.
    shutil.rmtree(workdir / "checkpoints" / "rolling" / "16")
    with pytest.raises(ValueError, match=r"stages/2/meta/metadata.*intact checkpoint before it is .*rolling/4: delete"):
        Checkpoints(workdir, 3).latest()
    shutil.rmtree(workdir / "checkpoints" / "stages")
    with pytest.raises(
        ValueError, match=r"rolling/8/meta/metadata.*intact checkpoint before it is .*rolling/4: delete"
    ):
        Checkpoints(workdir, 3).latest()
    shutil.rmtree(workdir / "checkpoints" / "rolling" / "8")
    (workdir / "checkpoints" / "rolling" / "4" / "meta" / "metadata").write_bytes(b"")
    with pytest.raises(ValueError, match=r"rolling/4/meta/metadata.*No intact checkpoint is before it; without"):
        Checkpoints(workdir, 3).latest()


def test_a_list_of_arrays_that_lacks_one_is_refused(workdir):
    """Orbax then gives back what was asked for, a shape without values."""
    path = workdir / "checkpoints" / "stages" / "2"
    listed = json.loads((path / "state" / "_METADATA").read_text())
    del listed["tree_metadata"]["('params', 'f')"]["key_metadata"][1]
    (path / "state" / "_METADATA").write_text(json.dumps(listed))
    like = state_at(0)
    abstract = {"f": jax.ShapeDtypeStruct((4, 4), jnp.float32)}
    with pytest.raises(ValueError, match=r"stages/2 is not a readable checkpoint.*Give another stage"):
        restore_params(path, abstract, jax.tree.map(lambda x: x.sharding, {"f": like.params["f"]}))


def test_a_full_disk_is_reported_once(tmp_path, capfd, caplog):
    """Many arrays are written at one time, and each of them would print a traceback of its own."""
    params = {"student": {str(i): jnp.arange(3000.0) + i for i in range(30)}}
    state = create_state(params, optax.adam(1e-3), jax.random.PRNGKey(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # bytes of a file
        with pytest.raises(ValueError, match=r"could not write checkpoint .*rolling/0: .* Free space"):
            Checkpoints(tmp_path, 2).save_rolling(state, meta_at())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert Checkpoints(tmp_path, 2).latest() is None


def test_what_is_offered_was_tried(workdir):
    """The one before a damaged checkpoint may be damaged too."""
    for name in ("rolling/16", "stages/2"):
        files = (workdir / "checkpoints" / name / "state").rglob("d/*")
        for file in files:
            file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"rolling/16 .* before it is .*rolling/8: delete .*rolling/16, and the same"):
        restore_state(Checkpoints(workdir, 3).latest(), state_at(0))


def test_other_files_and_folders_are_no_checkpoints(workdir):
    rolling = workdir / "checkpoints" / "rolling"
    (rolling / ".DS_Store").write_text("x")
    (rolling / "99").write_text("a file")
    for name in ("2.bak", "tmp", "-1", "1e3", "٣", "007", "20.orbax-checkpoint-tmp-5"):
        (rolling / name).mkdir()
    checkpoints = Checkpoints(workdir, 3)
    assert checkpoints.latest() == rolling / "16"
    checkpoints.save_rolling(state_at(20), meta_at(2, 20))
    assert [path.name for path in numbered(rolling)] == ["8", "16", "20"]
    assert not (rolling / "20.orbax-checkpoint-tmp-5").exists()  # what a killed run left
    (rolling / "21").mkdir()
    with pytest.raises(
        ValueError, match=r"rolling/21 is not a readable checkpoint: no 'state' and 'meta' .*rolling/20"
    ):
        Checkpoints(workdir, 3).latest()
    for content in (b"", b"[]", b"null", b"\xff"):
        (rolling / "20" / "_CHECKPOINT_METADATA").write_bytes(content)
        same(restore_state(rolling / "20", state_at(0)), state_at(20))
        checkpoints.save_rolling(state_at(24), meta_at(2, 24))
        shutil.rmtree(rolling / "24")
        if not (rolling / "20").exists():
            checkpoints.save_rolling(state_at(20), meta_at(2, 20))


def test_the_earlier_format_is_read(tmp_path):
    latest = Checkpoints(Path(shutil.copytree(STOPPED, tmp_path / "run")), 1).latest()
    meta = read_meta(latest)
    assert (latest.name, meta["format"], meta["arrays"]) == ("8", 1, {})
    run = Run.from_meta(state_at(8), Clock(), meta)
    assert [record.ended_by for record in run.records] == ["budget", None]


def test_digests_can_be_left_out(tmp_path):
    checkpoints = Checkpoints(tmp_path, 1, digest=False)
    checkpoints.save_rolling(state_at(4), meta_at())
    latest = checkpoints.latest()
    assert read_meta(latest)["arrays"] == {}
    same(restore_state(latest, state_at(0)), state_at(4))


def test_a_read_error_is_not_called_damage(workdir, monkeypatch):
    """Nor is another checkpoint offered for it."""
    import orbax.checkpoint as ocp

    def refuse(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: Error opening file: Too many open files")

    monkeypatch.setattr(ocp.Checkpointer, "restore", refuse)
    with pytest.raises(ValueError, match=r"rolling/16 could not be read: .* It need not be damaged") as caught:
        restore_state(workdir / "checkpoints" / "rolling" / "16", state_at(0))
    assert "delete" not in str(caught.value)


@pytest.mark.parametrize("name", ["lr[1]", "[!a]", "a*b", "x?"])
def test_a_workdir_with_glob_characters_is_refused_before_anything_is_trained(tmp_path, name, whole):
    """Orbax would write checkpoints there that nobody can read; one that was copied there can be read."""
    with pytest.raises(ValueError, match=r"has one of the characters \[ \* \? in its path.*choose another --workdir"):
        Checkpoints(tmp_path / name, 2)
    copied = Path(shutil.copytree(whole / "checkpoints" / "stages", tmp_path / name / "checkpoints" / "stages"))
    same(restore_state(copied / "2", state_at(0)), state_at(12, seed=12))


@pytest.mark.parametrize("name", ["a b", "a#b", "a:b", "{a}", "~x", "a%20b", "ü"])
def test_other_characters_in_the_workdir_are_fine(tmp_path, name):
    checkpoints = Checkpoints(tmp_path / name, 2)
    checkpoints.save_rolling(state_at(4), meta_at())
    same(restore_state(checkpoints.latest(), state_at(0)), state_at(4))


def test_a_backslash_in_a_path_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has a backslash, which is read as a slash"):
        Checkpoints(tmp_path / "a\\b", 2)
    with pytest.raises(ValueError, match="has a backslash"):
        restore_state(tmp_path / "a\\b" / "checkpoints" / "stages" / "1", state_at(0))


@dataclasses.dataclass(frozen=True)
class SomeRecipe:
    seed: int = 0  # of a run
    newer: float = 0.5  # came after the checkpoint was written


def test_a_setting_that_is_newer_than_the_checkpoint_had_its_default(workdir):
    stage = workdir / "checkpoints" / "stages" / "2"
    check_same_settings(stage, SomeRecipe())
    with pytest.raises(ValueError, match=r"run with other settings: newer was 0.5, is 0.7\. Use another --workdir"):
        check_same_settings(stage, SomeRecipe(newer=0.7))
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        check_same_settings(stage, SomeRecipe(seed=1))


@pytest.mark.parametrize(
    ("form", "alignment", "wanted"),
    [
        ("direction", 0.3, {}),
        ("difference", 0.0, {"distance": "squared"}),
        ("difference", 0.3, {"transition_form": "difference"}),  # the alignment would be squared too: not the same
    ],
)
def test_settings_of_before_have_the_names_of_today_where_these_mean_the_same(form, alignment, wanted):
    settings = {"loss": {"alignment_weight": alignment, "transition_form": form}}
    rename_settings(settings)
    assert settings == {"loss": {"alignment_weight": alignment} | wanted}
