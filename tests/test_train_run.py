"""Whole runs in real processes: killed and resumed with the same bits, refused with one clear line."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import recipe, write_teacher

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A config file for launch/train.py with a random tiny teacher."""
    folder = tmp_path_factory.mktemp("run")
    settings = dataclasses.asdict(recipe(write_teacher(folder / "teacher")))
    path = folder / "tiny_config.py"
    path.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({settings!r})\n"
    )
    return path


def command(config: Path, workdir: Path, *flags: str) -> list[str]:
    return [sys.executable, "launch/train.py", f"--config={config}", f"--workdir={workdir}", *flags]


def environment(devices: int = 1) -> dict[str, str]:
    wait = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
    flags = f"--xla_force_host_platform_device_count={devices} {wait}"
    inherited = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}  # the command's own matter
    return inherited | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "HF_HUB_OFFLINE": "1"}


def run(config: Path, workdir: Path, *flags: str, devices: int = 1, status: int = 0) -> str:
    done = subprocess.run(
        command(config, workdir, *flags),
        cwd=ROOT,
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def refused(config: Path, workdir: Path, *flags: str, devices: int = 1) -> str:
    """What a run prints that a user's mistake ends: one error line, and no traceback."""
    text = run(config, workdir, *flags, devices=devices, status=2)
    assert "Traceback" not in text
    # The storage library may print complaints of its own around ours.
    assert sum(line.startswith("error: ") for line in text.splitlines()) == 1
    return text


def same_student(workdir: Path, other: Path, atol: float = 0.0) -> None:
    ours, theirs = (load_file(path / "student" / "model.safetensors") for path in (workdir, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0.0, atol=atol, err_msg=name)


def metrics(workdir: Path) -> list[dict]:
    """Every line without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


@pytest.fixture(scope="module")
def finished(config) -> Path:
    workdir = config.parent / "whole"
    run(config, workdir)
    return workdir


def test_a_run_leaves_what_the_readme_says(finished):
    report = json.loads((finished / "report.json").read_text())
    assert [stage["depth"] for stage in report["stages"]] == ["1", "2+"]
    assert sum(stage["updates"] for stage in report["stages"]) == report["updates"] == 12
    assert all(stage["ended_by"] in ("threshold", "plateau", "budget") for stage in report["stages"])
    for name in ("student", "teacher"):
        for depth in ("1", "2"):
            assert report[name]["chain_accuracy"][depth]["n"] == 2
            assert set(report[name]["step_accuracy"][depth]) == {"mean", "stderr", "n"}
        assert report["perplexity"][name] > 1
    assert (finished / "student" / "tokenizer.json").is_file()
    assert sorted(path.name for path in (finished / "checkpoints" / "stages").iterdir()) == ["1", "2"]
    assert any((finished / "tensorboard").iterdir())
    assert len((finished / "generations.jsonl").read_text().splitlines()) == 2 * 4
    assert {line["update"] for line in metrics(finished)} >= {2, 4, 6, 8, 10, 12}


def test_killed_inside_a_stage_and_resumed_gives_the_same_bits(config, finished):
    workdir = config.parent / "killed"
    # A long stage is what a kill would hit; here every update is slow enough to be met by one.
    process = subprocess.Popen(
        command(config, workdir), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 300
    while not (workdir / "checkpoints" / "rolling" / "4").is_dir():
        assert process.poll() is None, process.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (workdir / "report.json").exists()

    output = run(config, workdir)
    assert "resuming at update" in output
    assert metrics(workdir) == metrics(finished)
    same_student(workdir, finished)
    reports = [json.loads((path / "report.json").read_text()) for path in (workdir, finished)]
    assert reports[0]["stages"] == reports[1]["stages"]
    assert reports[0]["student"] == reports[1]["student"]


def test_a_stage_checkpoint_of_another_run_is_a_start_on_other_devices(config, finished):
    workdir = config.parent / "branch"
    stage = finished / "checkpoints" / "stages" / "1"
    output = run(config, workdir, f"--config.resume_from={stage}", devices=4)
    assert "mesh data 1 x fsdp 4 x tensor 1" in output
    first = json.loads((finished / "report.json").read_text())["stages"][0]["updates"]
    assert f"resuming at update {first}" in output
    # Adam moves entries whose gradient is rounding noise by a whole step; test_train_update has the exact claim.
    same_student(workdir, finished, atol=2e-3)


def test_what_does_not_match_is_refused_by_name(config, finished):
    before = sorted(path.name for path in (finished / "checkpoints").rglob("*"))
    text = refused(config, finished, "--config.loss.coherence_weight=0.7")
    assert "loss.coherence_weight was 0.5, is 0.7" in text
    assert "--workdir" in text
    other = write_teacher(config.parent / "other_teacher", seed=1)
    assert "another teacher" in refused(config, finished, f"--config.teacher.path={other}")
    text = refused(config, config.parent / "x", f"--config.resume_from={config.parent}")
    assert "is not a readable checkpoint" in text
    assert sorted(path.name for path in (finished / "checkpoints").rglob("*")) == before


def test_bad_settings_are_one_line(config):
    workdir = config.parent / "never"
    text = refused(config, workdir, "--config.batch_size=7", devices=4)
    assert "error: batch_size 7 is not divisible by the 4-way data axis x 1 micro-batches; use 4 or 8" in text
    assert "row_length" in refused(config, workdir, "--config.data.row_length=40")
    assert "cannot write in /dev/null/run" in refused(config, Path("/dev/null/run"))


@pytest.fixture
def after_stage_one(finished, tmp_path) -> Path:
    """A run that stopped right after its first stage."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoints" / "stages" / "2")
    shutil.rmtree(workdir / "checkpoints" / "rolling")
    return workdir


def test_a_full_disk_is_an_error_and_the_checkpoint_before_it_survives(config, finished, after_stage_one):
    # A limit on the size of files stands in for a full disk: the same call fails, in the same place.
    limited = ["bash", "-c", 'ulimit -f 16; exec "$@"', "bash", *command(config, after_stage_one)]
    done = subprocess.run(limited, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400)
    text = done.stdout + done.stderr
    assert done.returncode == 2, text
    assert "could not write checkpoint" in text
    assert "Free space or choose another --workdir" in text
    # The storage library prints complaints of its own before.
    assert text.rstrip().splitlines()[-1].startswith("error: ")
    run(config, after_stage_one)  # with space again, the same command finishes, and with the same bits
    same_student(after_stage_one, finished)


def test_a_damaged_checkpoint_is_named(config, after_stage_one):
    state = after_stage_one / "checkpoints" / "stages" / "1" / "state"
    largest = max((path for path in state.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    assert "checkpoints/stages/1 is not a readable checkpoint" in refused(config, after_stage_one)
