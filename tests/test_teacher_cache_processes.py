"""The cache in real processes: killed and resumed with the same bytes, trained from, and written by two at once."""

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_multihost import together
from test_train_run import ROOT, command, config, environment, metrics, run  # noqa: F401  (config is a fixture)

from rtd_jax.base.files import read_json
from rtd_jax.teacher.cache import TeacherCache
from rtd_jax.teacher.identity import Identity

pytestmark = pytest.mark.slow

EXACT = ("--config.cache.predictions=float32", "--config.cache.states=float32", "--config.cache.chains_per_shard=16")


def caching(config: Path, folder: Path, *flags: str) -> list[str]:  # noqa: F811
    (python, _, *rest) = command(config, folder.parent, f"--config.teacher.cache={folder}", *EXACT, *flags)
    return [python, "launch/cache_teacher.py", *rest]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_when(ready, started: list[str]) -> None:
    """Starts a process and kills it as soon as `ready()` is true."""
    process = subprocess.Popen(
        started, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def finish(started: list[str]) -> str:
    done = subprocess.run(started, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def whole(config) -> Path:  # noqa: F811
    folder = config.parent / "cache"
    assert "0 chains are in" in finish(caching(config, folder))
    return folder


def test_a_cache_whose_writer_was_killed_goes_on_with_the_same_bytes(config, whole, tmp_path):  # noqa: F811
    folder = tmp_path / "cache"
    kill_when(lambda: len(list(folder.glob("shard-*.json"))) >= 2, caching(config, folder))
    assert 2 <= len(list(folder.glob("shard-*.json"))) < len(list(whole.glob("shard-*.json")))
    output = finish(caching(config, folder))
    begun = int(output.split(" chains are in")[0].splitlines()[-1])
    assert begun >= 32
    for left in folder.glob(".*.tmp"):  # what a kill inside a write leaves; no reader looks at it
        left.unlink()
    assert files(folder) == files(whole)


def test_a_run_from_a_cache_that_was_killed_goes_on_with_the_same_bits(config, whole):  # noqa: F811
    from_cache = (f"--config.teacher.cache={whole}", *EXACT)
    finished, killed = config.parent / "from_cache", config.parent / "from_cache_killed"
    run(config, finished, *from_cache)
    kill_when(lambda: (killed / "checkpoints" / "rolling" / "4").is_dir(), command(config, killed, *from_cache))
    assert not (killed / "report.json").exists()
    assert "resuming at update" in run(config, killed, *from_cache)
    assert metrics(killed) == metrics(finished)
    ours, theirs = (load_file(path / "student" / "model.safetensors") for path in (killed, finished))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    reports = [json.loads((path / "report.json").read_text()) for path in (killed, finished)]
    assert reports[0]["stages"] == reports[1]["stages"]


def test_two_processes_write_shards_of_their_own_and_a_reader_sees_the_union(config, whole, tmp_path):  # noqa: F811
    folder = tmp_path / "cache"

    def worker(coordinator: str, process: int) -> list[str]:
        joined = (f"--coordinator={coordinator}", "--processes=2", f"--process={process}")
        return caching(config, folder, *joined, "--config.mesh.fsdp=4")

    first, second = together(worker, devices=2)
    assert "chains are in" in first
    assert "chains are in" not in second  # one speaks
    written, wanted = (list(path.glob("shard-*.json")) for path in (folder, whole))
    assert len(written) >= 2 * len(wanted) - 2  # each of both has written its part of every block of 16
    keys, wanted_keys = (sorted(key for x in paths for key in read_json(x)["keys"]) for paths in (written, wanted))
    assert keys == wanted_keys  # no chain twice, none missing

    stored = read_json(whole / "manifest.json")["identity"]
    identity = Identity(**stored, hidden_layers=tuple(stored["layers"][:1]))
    readers = [TeacherCache(path, identity) for path in (folder, whole)]
    for key in keys[::5]:
        (top, states), (own_top, own_states) = (reader.read(key) for reader in readers)
        np.testing.assert_allclose(states, own_states, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(top[1:], own_top[1:], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)
