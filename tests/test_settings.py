"""A recipe is read whole: what is misspelt, missing, of another type or unread is refused, with the near name."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from rtd_jax.apps.boundaries import BoundaryRecipe
from rtd_jax.apps.pretrain import PretrainRecipe
from rtd_jax.apps.reward_model import RewardModelRecipe
from rtd_jax.apps.study.study import StudyRecipe
from rtd_jax.apps.traces.traces import TracesRecipe
from rtd_jax.base.settings import build
from rtd_jax.train.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def tiny() -> dict:
    return importlib.import_module("configs.rtd_tiny").get_config().to_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_a_complete_recipe(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    kinds = {
        "pretrain": PretrainRecipe,
        "study": StudyRecipe,
        "traces": TracesRecipe,
        "reward": RewardModelRecipe,
        "boundaries": BoundaryRecipe,
    }
    settings = kinds.get(name.split("_")[0], Recipe)
    recipe = build(settings, config.to_dict())
    if isinstance(recipe, StudyRecipe):
        assert recipe.jobs(Path("runs/study"))
    elif isinstance(recipe, TracesRecipe):
        assert recipe.backend in ("jax", "openai")
        assert recipe.text.fill("How many?").count("How many?") == 1
    elif isinstance(recipe, RewardModelRecipe):
        assert recipe.train.limit > recipe.test.limit > 0
    elif isinstance(recipe, BoundaryRecipe):
        assert recipe.tests
    else:
        assert recipe.total_updates > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_of_a_config_has_a_comment(name):
    """A key says its unit or meaning where it is set; groups, loops over splits and tuples of phases do so above."""
    for number, line in enumerate((ROOT / "configs" / f"{name}.py").read_text().splitlines(), start=1):
        code = line.strip()
        if code.startswith("c.") and " = " in code and "ConfigDict()" not in code and not code.endswith("("):
            if code.startswith("c.methods."):  # named by the article
                continue
            assert "  # " in code, f"configs/{name}.py:{number}: {code}"


@pytest.mark.parametrize(
    ("group", "key", "message"),
    [
        (
            "loss",
            "coherence_wieght",
            r"config\.loss\.coherence_wieght is not a setting; did you mean config\.loss\.coherence_weight\?",
        ),
        ("curriculum", "validate_evry", r"did you mean config\.curriculum\.validate_every\?"),
        ("mesh", "qqq", r"config\.mesh\.qqq is not a setting; it has data, fsdp, tensor"),
    ],
)
def test_unknown_key_names_the_near_one(group, key, message):
    values = tiny()
    values[group][key] = 1.0
    with pytest.raises(ValueError, match=message):
        build(Recipe, values)


def test_missing_key_is_named():
    values = tiny()
    del values["teacher"]["path"]
    with pytest.raises(ValueError, match=r"config\.teacher\.path is missing"):
        build(Recipe, values)


@pytest.mark.parametrize(
    ("group", "key", "value", "message"),
    [
        ("loss", "alpha", "much", r"config\.loss\.alpha is 'much' \(str\); expected float"),
        ("curriculum", "enabled", 1, r"config\.curriculum\.enabled is 1 \(int\); expected bool"),
        ("curriculum", "depths", 3, r"config\.curriculum\.depths is 3; expected a tuple"),
        ("student", "init", "randm", r"config\.student\.init is 'randm'; .*did you mean 'random'\?"),
        ("loss", "alpha", 1.5, r"config\.loss: loss\.alpha is 1\.5"),
        ("loss", "temperature", 0.0, r"temperature is 0\.0; it must be positive"),
        ("curriculum", "depths", (3, 1), r"curriculum\.depths is \(3, 1\); give increasing step counts"),
        ("student", "path", "somewhere", r"init='teacher_layers' does not read path; leave them out"),
    ],
)
def test_bad_value_is_named(group, key, value, message):
    values = tiny()
    values[group][key] = value
    with pytest.raises(ValueError, match=message):
        build(Recipe, values)


def test_numbers_of_the_right_kind_pass():
    values = tiny()
    values["loss"]["alpha"] = 1  # an int for a float
    values["curriculum"]["depths"] = [1, 3]  # a list for a tuple
    recipe = build(Recipe, values)
    assert recipe.loss.alpha == 1.0
    assert isinstance(recipe.loss.alpha, float)
    assert recipe.curriculum.depths == (1, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=configs/rtd_tiny.py", "--config.loss.coherence_wieght=1"], "coherence_weight"),
        ([], "--config is missing"),
        (["--config=configs/nothing.py"], "nothing.py"),
    ],
)
def test_command_line_mistakes_say_what_to_do(flags, message, tmp_path):
    done = subprocess.run(
        [sys.executable, "launch/train.py", f"--workdir={tmp_path}", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
