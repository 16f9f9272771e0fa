"""A pretraining that is resumed ends with the same bits."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from tiny_run import source

from rtd_jax.apps.pretrain import Phase, PretrainRecipe, SizeSettings, pretrain
from rtd_jax.base import signals
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT
from rtd_jax.train.loop import Loop
from rtd_jax.train.optimizer import OptimizerSettings

pytestmark = pytest.mark.slow


def results(workdir: Path) -> tuple:
    """The lines of the log without the speed, the report without its time, and the weights."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((workdir / "report.json").read_text())
    return (
        [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines],
        report | {"wall_seconds": 0.0},
        (workdir / "model" / "model.safetensors").read_bytes(),
    )


def test_a_pretraining_that_is_resumed_and_stopped_ends_with_the_same_bits(tmp_path, monkeypatch):
    recipe = PretrainRecipe(
        SizeSettings(layers=1, width=16, mlp_width=24, heads=2, kv_heads=2, head_dim=8),
        source("train", 60),
        source("test", 4),
        (Phase(3, 1, 8, 96, 1), Phase(5, 2, 8, 128, 2)),
        OptimizerSettings(learning_rate=1e-2, warmup_updates=2),
        TINY_FORMAT,
        problems_per_depth=1,
        max_new_tokens=8,
        log_every=2,
        checkpoint_every=2,
    )
    pretrain(recipe, tmp_path)
    whole = results(tmp_path)
    assert [(line["update"], line["phase"]) for line in whole[0]] == [(2, 1), (3, 1), (4, 2), (6, 2), (8, 2)]
    rolling = tmp_path / "checkpoints" / "rolling"
    assert sorted(path.name for path in rolling.iterdir()) == ["6", "8"]  # it keeps two
    shutil.rmtree(rolling / "8")
    (tmp_path / "model").rename(tmp_path / "before")
    seven = Loop.settle

    def settle_and_send(self):
        if self.update == 7 and not signals.asked():
            os.kill(os.getpid(), signal.SIGTERM)
        seven(self)

    with monkeypatch.context() as patch, signals.stoppable():
        patch.setattr(Loop, "settle", settle_and_send)
        with pytest.raises(signals.Stopped, match="143") as caught:
            pretrain(recipe, tmp_path)
    assert caught.value.note == " after update 7; saved; the same command continues"
    assert not (tmp_path / "model").exists()
    pretrain(recipe, tmp_path)
    assert results(tmp_path) == whole
