"""Statistics of the study against numbers worked by hand, its report, and a study of two tiny runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rtd_jax.study.report import markdown
from rtd_jax.study.runner import Job, run_jobs
from rtd_jax.study.statistics import (
    Interval,
    Outcome,
    accuracy,
    difference,
    read_outcome,
    share_of_gain_lost,
    verdict,
)

ROOT = Path(__file__).resolve().parents[1]


def outcome(method, seed, correct, depths=None):
    depths = np.array([1, 4] * (len(correct) // 2)) if depths is None else np.array(depths)
    return Outcome("task", method, seed, depths, np.array(correct, bool), None, 0.9, 1.1, 10, 5.0)


def everything(depths):
    return depths > 0


def test_accuracy_is_the_mean_over_seeds_and_problems_of_the_depths_asked_for():
    runs = [outcome("kd", 0, [1, 0, 1, 0]), outcome("kd", 1, [1, 1, 1, 0])]
    assert accuracy(runs, everything).mean == 5 / 8
    assert accuracy(runs, lambda depths: depths == 4).mean == 1 / 4


def test_the_interval_covers_seeds_as_well_as_problems():
    """Seeds that disagree wholly: over problems alone the interval would have no width."""
    runs = [outcome("kd", seed, [seed % 2] * 40) for seed in range(4)]
    interval = accuracy(runs, everything)
    assert (interval.low, interval.high) == pytest.approx((0.0, 1.0))
    runs = [outcome("kd", seed, [1, 0] * 200) for seed in range(4)]  # and problems alone: mean 1/2, sd 1/2 of 400
    interval = accuracy(runs, everything)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 0.5 / 400**0.5, rel=0.1)


def test_a_difference_is_paired_by_seed_and_tested_over_seeds():
    rng = np.random.default_rng(1)
    method = [outcome("rtd", seed, rng.random(50) < 0.8) for seed in range(5)]
    base = [outcome("kd", seed, rng.random(50) < 0.5) for seed in (4, 2, 3, 1, 0, 7)]
    found = difference(method, base, everything)
    by_seed = {run.seed: run.correct.mean() for run in base}
    per_seed = [run.correct.mean() - by_seed[run.seed] for run in method]
    assert found.mean == pytest.approx(np.mean(per_seed))
    assert found.p_value == pytest.approx(
        stats.ttest_rel([r.correct.mean() for r in method], [by_seed[s] for s in range(5)])[1]
    )
    assert found.low < found.mean < found.high
    assert found.seeds == 5
    assert difference(method, [outcome("kd", 9, [0] * 50)], everything) is None


def test_runs_on_different_problems_are_not_compared():
    with pytest.raises(ValueError, match="kd seed 1 was tested on other problems than seed 0"):
        accuracy([outcome("kd", 0, [1, 0]), outcome("kd", 1, [1, 0], depths=[1, 2])], everything)


def test_share_of_gain_and_verdicts():
    full, ablated, base = (Interval(mean, 0, 1, 5) for mean in (0.8, 0.5, 0.4))
    assert share_of_gain_lost(full, ablated, base) == pytest.approx(0.75)
    assert share_of_gain_lost(base, ablated, full) is None
    better = difference(
        [outcome("rtd", s, [1] * 20) for s in range(3)], [outcome("kd", s, [0] * 20) for s in range(3)], everything
    )
    assert verdict(1, better) == "agrees"
    assert verdict(-1, better) == "disagrees"
    unclear = difference([outcome("rtd", 0, [1, 0] * 4)], [outcome("kd", 0, [0, 1] * 4)], everything)
    assert verdict(1, unclear) == verdict(-1, unclear) == verdict(1, None) == "undecided"


def test_the_report_says_what_was_found():
    runs = [outcome("kd", seed, [1, 0] * 20) for seed in range(3)]
    runs += [outcome("rtd", seed, [1, 1] * 20) for seed in range(3)]
    runs += [outcome("rtd_no_coherence", seed, [1, 1, 1, 0] * 10) for seed in range(3)]
    text, numbers = markdown("kd", 4, ["kd", "rtd", "rtd_no_coherence", "rtd_no_alignment"], runs)
    assert "| rtd | 3 | 100.0 [100, 100] | 100.0 [100, 100] | 100.0 [100, 100] | 100.0 [100, 100] |" in text
    assert "| rtd_no_coherence | 50% | 62% | 62% |" in text
    assert (
        "RTD keeps more deep chains than logit matching: `rtd` - `kd` = +100.0 [+100.0, +100.0] p=-: **agrees**" in text
    )
    assert numbers["task"]["chain_accuracy"]["kd"]["4"]["mean"] == 0.0
    assert numbers["task"]["share_of_gain_lost"] == {"rtd_no_coherence": pytest.approx(0.5)}
    json.dumps(numbers, allow_nan=False)


@pytest.fixture
def fake_train(monkeypatch, tmp_path):
    """A trainer that counts its calls, and fails for seed 1 as long as the file `broken` is there."""
    script = tmp_path / "launch" / "train.py"
    script.parent.mkdir()
    script.write_text(
        "import json, os, pathlib, sys\n"
        "flags = dict(flag.lstrip('-').split('=', 1) for flag in sys.argv[1:])\n"
        "workdir = pathlib.Path(flags['workdir'])\n"
        "print(len(os.sched_getaffinity(0)), flags)\n"
        "calls = workdir / 'calls'\n"
        "calls.write_text(calls.read_text() + 'x' if calls.exists() else 'x')\n"
        "if flags['config.seed'] == '1' and pathlib.Path('broken').exists(): sys.exit(2)\n"
        "report = {'student': {'chain_accuracy': {'all': {'mean': 0.25}}}}\n"
        "(workdir / 'report.json').write_text(json.dumps(report))\n"
    )
    monkeypatch.setattr("rtd_jax.study.runner.TRAIN", script)
    monkeypatch.setattr("rtd_jax.study.runner.POLL_SECONDS", 0.01)
    base = tmp_path / "base.py"
    base.write_text("# a config\n")
    return base


def test_finished_runs_are_kept_and_failed_ones_named_and_repeated(fake_train, tmp_path):
    jobs = [Job("task", "kd", seed, (f"seed={seed}",), tmp_path / "runs" / str(seed)) for seed in range(3)]
    (tmp_path / "broken").touch()
    lines = []
    with pytest.raises(ValueError, match=r"1 of 3 runs failed, first task kd seed 1: its log is .*runs/1/log.txt"):
        run_jobs(jobs, fake_train, 1, lines.append)
    assert sum("chain accuracy 25.0%" in line for line in lines) == 2
    (tmp_path / "broken").unlink()
    run_jobs(jobs, fake_train, 2, lines.append)
    assert [(job.workdir / "calls").read_text() for job in jobs] == ["x", "xx", "x"]


def test_a_workdir_of_another_study_is_refused_before_anything_starts(fake_train, tmp_path):
    job = Job("task", "kd", 0, ("seed=0",), tmp_path / "runs" / "0")
    run_jobs([job], fake_train, 1, print)
    other = Job("task", "kd", 0, ("seed=0", "loss.alpha=0.5"), job.workdir)
    with pytest.raises(ValueError, match=r"runs/0 was begun with other settings .* give the study another --workdir"):
        run_jobs([other], fake_train, 1, print)
    fake_train.write_text("# another config\n")
    with pytest.raises(ValueError, match="begun with other settings"):
        run_jobs([job], fake_train, 1, print)


def test_a_damaged_record_is_refused_by_name(tmp_path):
    report = {"student": {"step_accuracy": {"all": {"mean": 1.0}}, "perplexity": 1.0}, "updates": 1, "wall_seconds": 1}
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "generations.jsonl").write_text('{"model": "student", "depth": 1, "correct": tr\n')
    with pytest.raises(ValueError, match=r"generations.jsonl is not what a run writes"):
        read_outcome("task", "kd", 0, tmp_path)


def test_a_study_of_two_real_runs(tmp_path):
    """The smallest real study: two methods, one seed, a few updates, one process at a time."""
    small = (
        "total_updates=2",
        "batch_size=4",
        "data.train.limit=60",
        "data.validation.limit=20",
        "data.test.limit=6",
        "evaluation.problems_per_depth=1",
        "evaluation.max_new_tokens=8",
        "evaluation.teacher=False",
        "curriculum.validation_chains=4",
    )
    config = tmp_path / "study_small.py"
    config.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        f"    base = {str(ROOT / 'configs' / 'rtd_tiny.py')!r}\n"
        f"    return ConfigDict(dict(base=base, seeds=(0,), tasks=dict(t={small!r}),\n"
        "        methods=dict(kd=('loss.alignment_weight=0.0', 'curriculum.enabled=False'),\n"
        "        matched=('loss.intermediate_weight=1.0', 'loss.token_alignment_weight=0.3',\n"
        "                 'data.segmentation=random', 'curriculum.enabled=False'))))\n"
    )
    command = [
        sys.executable,
        str(ROOT / "launch" / "study.py"),
        f"--config={config}",
        f"--workdir={tmp_path / 'study'}",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device

    def study():
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)

    run = study()
    assert run.returncode == 0, run.stdout + run.stderr
    assert "report over 2 of 2 runs" in run.stdout
    assert "| matched | 1 |" in (tmp_path / "study" / "study.md").read_text()
    metrics = (tmp_path / "study" / "runs" / "t" / "matched" / "seed_0" / "metrics.jsonl").read_text()
    last = json.loads(metrics.splitlines()[-1])
    assert last["distill/intermediate"] > 0
    assert last["distill/token_alignment"] > 0
    assert "2 runs, 2 of them finished" in study().stdout
