"""A loss that is not finite stops the run before anything of it is saved."""

import json

import numpy as np
import pytest
from tiny_run import recipe, write_teacher

from rtd_jax.apps.distill.run import train
from rtd_jax.data.loader import BatchLoader
from rtd_jax.train.checkpoints import Checkpoints, read_meta


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    settings = recipe(write_teacher(tmp_path / "teacher"))
    original, calls = BatchLoader.__next__, []

    def poisoned(self):
        batch = original(self)
        calls.append(None)
        return batch._replace(loss_weights_BL=batch.loss_weights_BL * np.inf) if len(calls) == 6 else batch

    monkeypatch.setattr(BatchLoader, "__next__", poisoned)
    with pytest.raises(ValueError, match=r"distill/\w+.* became non-finite at update 6 \(stage 1\)"):
        train(settings, tmp_path / "run")
    latest = Checkpoints(tmp_path / "run", 2).latest()
    assert latest is not None
    assert read_meta(latest)["update"] == 4  # checkpoint_every is 4: nothing from the broken update on was saved
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(line).get("loss", 0.0)) for line in lines)

    monkeypatch.setattr(BatchLoader, "__next__", original)
    train(settings, tmp_path / "run")  # the same command resumes and finishes
    assert json.loads((tmp_path / "run" / "report.json").read_text())["updates"] == 12
