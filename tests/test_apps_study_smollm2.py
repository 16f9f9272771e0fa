"""The study of a real model, with a tiny model of the same kind in its place: tied embeddings, a chat template."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl import flags
from llama3_like import llama3_like

from configs import study_smollm2
from rtd_jax.apps.command.parse import define_flags
from rtd_jax.apps.command.table import COMMANDS
from rtd_jax.apps.pretrain import SizeSettings, model_config
from rtd_jax.apps.study.recipe import StudyRecipe
from rtd_jax.base.settings import build
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.train.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
SMALL = (  # a few updates on a few short problems
    *(f"data.{split}.depths=(1,2)" for split in ("train", "validation", "test")),
    *("data.train.limit=24", "data.validation.limit=8", "data.test.limit=4"),
    *("total_updates=3", "curriculum.validate_every=2", "curriculum.validation_chains=2"),
    *("evaluation.problems_per_depth=1", "evaluation.max_new_tokens=8", "evaluation.batch_size=2", "log_every=1"),
)


def test_the_teacher_is_made_from_labels_alone_until_it_solves_the_problems(tmp_path):
    """The command of the preparation, as the command line reads it: no teacher is run, and both models are SmolLM2."""
    recipe = build(StudyRecipe, study_smollm2.get_config().to_dict())
    (made,) = recipe.preparations(tmp_path)
    name, *argv = made.command
    values = flags.FlagValues()
    with contextlib.chdir(ROOT):
        define_flags(COMMANDS[name], ["study", *argv], values)
        values(["study", *argv])
    taught = build(Recipe, values["config"].value.to_dict())
    assert not taught.loss.teaches()
    assert not taught.evaluation.teacher
    assert not taught.curriculum.solves_with_teacher
    assert (taught.curriculum.measures, taught.curriculum.spend_budget) == ("solved", False)
    assert taught.curriculum.solved_share * taught.curriculum.teacher_solves >= 0.95
    assert (taught.student.init, taught.student.path) == ("pretrained", taught.teacher.path)
    assert taught.data.test.wording == "natural"


def test_on_two_cores_the_teacher_is_another_so_the_docstring_names_another_folder(tmp_path):
    """A study refuses the folder of a preparation that another command made."""
    made = [build(StudyRecipe, study_smollm2.get_config(arg).to_dict()).preparations(tmp_path) for arg in ("", "cpu")]
    assert made[0] != made[1]
    assert "study_smollm2.py:six+cpu --workdir=runs/study_smollm2_cpu" in study_smollm2.__doc__


@pytest.mark.slow
def test_the_whole_study_in_small(tmp_path):
    """One command: the teacher is fine-tuned, two methods train on what it says, and the report is written."""
    tokenizer = llama3_like(400)
    sizes = SizeSettings(3, width=16, mlp_width=24, heads=2, kv_heads=1, head_dim=8)
    config = model_config(sizes, tokenizer)
    save_pretrained(tmp_path / "weights", config, DecoderModel(config).init(jax.random.key(0)), tokenizer=tokenizer)
    (tmp_path / "study_small.py").write_text(
        "from configs import study_smollm2\n"
        f"study_smollm2.WEIGHTS = {str(tmp_path / 'weights')!r}\n"
        "study_smollm2.LAYERS = {'six': 2}\n"
        f"study_smollm2.CPU_TEACHER = study_smollm2.CPU_STUDENT = {SMALL!r}\n"
        "def get_config():\n"
        "    c = study_smollm2.get_config('six+cpu')\n"
        "    c.seeds = (0,)\n"
        "    return c\n"
    )
    workdir = tmp_path / "study"
    done = subprocess.run(
        [sys.executable, "launch/study.py", f"--config={tmp_path / 'study_small.py'}", f"--workdir={workdir}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},  # one device
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report over 2 of 2 runs" in done.stdout
    report = (workdir / "study.md").read_text()
    assert all(f"| {name} |" in report for name in ("kd", "alignment_states", "teacher"))

    def run(folder: Path) -> tuple[str, dict, dict]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        log = folder / "log.txt" if (folder / "log.txt").exists() else folder.with_suffix(".log")
        return log.read_text(), [x for x in lines if "loss" in x][-1], json.loads((folder / "report.json").read_text())

    log, metrics, taught = run(workdir / "prepared" / "teacher")
    assert "teacher not needed" in log
    assert "distill/soft_loss" not in metrics
    assert taught["stages"][0]["ends_by"] == "solved"
    assert [update for update, _ in taught["stages"][0]["validations"]] == [2, 3]
    log, metrics, found = run(workdir / "runs" / "six" / "alignment_states" / "seed_0")
    assert metrics["distill/alignment"] > 0
    assert found["settings"]["teacher"]["path"] == str(workdir / "prepared" / "teacher" / "student")
    assert found["updates"] == 3
