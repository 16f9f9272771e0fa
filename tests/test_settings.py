"""A recipe is read whole: what is misspelt, missing, of another type or unread is refused, with the near name."""

import dataclasses
import importlib
import os
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict

from rtd_jax.apps.boundaries import BoundaryRecipe
from rtd_jax.apps.check.check import CheckSettings
from rtd_jax.apps.command.help import config_text, help_text, unread_overrides
from rtd_jax.apps.command.parse import define_flags
from rtd_jax.apps.command.table import COMMANDS
from rtd_jax.apps.compress.compress import CompressSettings
from rtd_jax.apps.diagnose.diagnose import DiagnoseSettings
from rtd_jax.apps.evaluate import EvaluateSettings
from rtd_jax.apps.export.export import ExportSettings
from rtd_jax.apps.judge import JudgeSettings
from rtd_jax.apps.plan.plan import PlanSettings
from rtd_jax.apps.pretrain import PretrainRecipe
from rtd_jax.apps.reward_model import RewardModelRecipe
from rtd_jax.apps.segment import SegmentSettings
from rtd_jax.apps.study.study import StudyRecipe
from rtd_jax.apps.traces.traces import TracesRecipe
from rtd_jax.base.settings import Setting, build, comments, defaults, settings_of, value_types
from rtd_jax.train.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
COMMAND_OF = {
    **{"pretrain": "pretrain", "study": "study", "traces": "traces", "reward": "reward_model"},
    **{"boundaries": "boundaries", "rtd": "train", "opd": "train"},
}
RECIPES = {
    "train": Recipe,
    "pretrain": PretrainRecipe,
    "study": StudyRecipe,
    "traces": TracesRecipe,
    "reward_model": RewardModelRecipe,
    "boundaries": BoundaryRecipe,
}


def tiny() -> dict:
    return importlib.import_module("configs.rtd_tiny").get_config().to_dict()


def parsed(name: str, *overrides: str) -> flags.FlagValues:
    """The flags of a config's own command, with overrides ("loss.alpha=0.5") as they are read from a command line."""
    argv = ["test", f"--config={ROOT / 'configs' / name}.py", *(f"--config.{override}" for override in overrides)]
    values = flags.FlagValues()
    define_flags(COMMANDS[COMMAND_OF[name.split("_")[0]]], argv, values)
    values(argv)
    return values


def built(name: str, *overrides: str) -> typing.Any:
    return build(recipe_type(name), parsed(name, *overrides)["config"].value.to_dict())


def recipe_type(name: str) -> type:
    return RECIPES[COMMAND_OF[name.split("_")[0]]]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_a_complete_recipe(name):
    recipe = build(recipe_type(name), importlib.import_module(f"configs.{name}").get_config().to_dict())
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
def test_every_deviation_of_a_config_has_a_comment(name):
    """A key says its unit or reason where it is set; tuples over several lines do so above or within."""
    for number, line in enumerate((ROOT / "configs" / f"{name}.py").read_text().splitlines(), start=1):
        code = line.strip()
        is_set = code.startswith(("c.", "c[", "source.", "facts.")) and " = " in code
        if is_set and "ConfigDict()" not in code and "defaults(" not in code and not code.endswith("("):
            if code.startswith("c.methods."):  # named by the article
                continue
            assert "  # " in code, f"configs/{name}.py:{number}: {code}"


@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("study")])
def test_a_config_states_only_what_differs_from_the_defaults(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    same = {x.key for x in settings_of(recipe_type(name), config) if x.value == x.default}
    for line in (ROOT / "configs" / f"{name}.py").read_text().splitlines():
        key, _, value = line.strip().removeprefix("c.").partition(" = ")
        assert not (value and line.startswith("    c.") and key in same), f"configs/{name}.py repeats a default: {line}"


def groups_of(cls: type) -> set[type]:
    """The dataclass and all that are in it."""
    found = {cls}
    for hint in typing.get_type_hints(cls).values():
        for kind in (*value_types(hint), *typing.get_args(hint)):
            if dataclasses.is_dataclass(kind):
                found |= groups_of(kind)
    return found


@pytest.mark.parametrize(
    "cls",
    [
        *RECIPES.values(),
        EvaluateSettings,
        DiagnoseSettings,
        JudgeSettings,
        PlanSettings,
        CheckSettings,
        SegmentSettings,
        CompressSettings,
        ExportSettings,
    ],
)
def test_every_setting_says_what_it_means(cls):
    for group in groups_of(cls):
        assert group.__doc__, group
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            if not any(dataclasses.is_dataclass(kind) for kind in value_types(hints[field.name])):
                assert len(comments(group).get(field.name, "")) > 4, f"{group.__name__}.{field.name}"
    assert comments(EvaluateSettings)["levels"] == "of MATH, 1 to 5"


# Two values each, where the rule of `other` would not give a valid one; by the end of the key.
VALUES = {
    "schema": ("stepwise", "gsm8k"),
    "text.kind": ("chat", "plain"),
    "text.prompt_template": ("Q: {prompt}", "{prompt}"),
    "text.thinking": ("on", "off"),
    "form": ("marked", "plain"),
    "segmentation": ("random", "annotated"),
    "openai.extra_body": ('{"top_k": 50}', "{}"),
    "role": ("control", "part"),
    "compared_with": ("{'kd': 'why?'}",),
    "about": ("{'gsm8k': 'x'}",),
    "loss.layers": ("evenly:2", "1:2,2:4"),
    "only": ("('kd',)", "('rtd',)"),
    "adapter.matrices": ("('q', 'v')", "('o',)"),
    **{
        f"task_methods.{task}": ("('kd',)", "('rtd',)")
        for task in ("cups", "larger_student", "lift", "smaller_student", "ten", "fifteen")
    },
    "phases": ("({'updates': 7, 'max_depth': 6, 'batch_size': 4, 'row_length': 64, 'chains_per_row': 1},)",),
}
SIZES = ("layers", "width", "mlp_width", "heads", "kv_heads", "head_dim")
# Students by where they come from, each complete.
STUDENTS = {
    "pretrained": ("student.init=pretrained", "student.path=x", "student.layers=0"),
    "teacher_layers": ("student.init=teacher_layers", "student.path=", "student.layers=3"),
    "random": ("student.init=random", "student.path=", *(f"student.{size}=3" for size in SIZES)),
    "pruned": ("student.init=pruned", "student.path=", "student.layers=0", "student.share=0.5"),
}


def other(setting: Setting) -> str:
    """A valid value that the setting does not have, as text."""
    value, name = setting.value, setting.key.split(".")[-1]
    for end, choices in VALUES.items():
        if f".{setting.key}".endswith(f".{end}"):
            return next(choice for choice in choices if choice != str(value))
    hints = typing.get_type_hints(setting.group)
    hint = value_types(hints[name])[0] if name in hints else type(value)
    kind = typing.get_origin(hint) or hint
    if kind is typing.Literal:
        return next(choice for choice in typing.get_args(hint) if choice != value)
    if kind is tuple:
        item = next(iter(typing.get_args(hint)), str)
        choices = {int: ((1, 2), (1, 3)), float: ((0.5,), (0.25,)), str: (("elsewhere",), ())}[item]
        return str(next(choice for choice in choices if choice != value))
    if kind is int:
        return str(2 * value if value and value > 0 else 1)
    if kind is float:
        return str(value / 2 if value else 0.25)
    return str(not value) if kind is bool else "elsewhere"


def needed_with(setting: Setting, text: str, recipe: typing.Any) -> tuple[str, ...]:
    """Overrides without which this value of the setting would be refused."""
    group, _, name = setting.key.rpartition(".")
    if group == "student" and name in ("init", "path", "revision", "share", *SIZES):
        by_name = {"path": "pretrained", "revision": "pretrained", "share": "pruned"}
        return (*STUDENTS[text if name == "init" else by_name.get(name, "random")], "student.adapter.rank=0")
    if setting.key == "teacher.served_model" and recipe.teacher.cache:  # a server gives predictions alone
        of_states = ("loss.alignment_weight=0", "loss.coherence_weight=0", "curriculum.enabled=False")
        return (*of_states, "loss.temperature=1")
    if setting.key == "student.quantization":
        return ("student.adapter.rank=0",)
    if setting.key == "student.adapter.rank":
        return (*STUDENTS["pretrained"], "student.quantization=none")
    if group.startswith("methods.") and name in ("compress", "overrides"):  # a run is made smaller or trained
        others = [x for x in recipe.methods if f"methods.{x}" != group and not recipe.method(x).begins_with]
        begins = recipe.method(group.removeprefix("methods.")).begins_with or others[0]
        return (f"{group}.begins_with={begins}", f"{group}.{'overrides' if name == 'compress' else 'compress'}=()")
    if name == "levels":
        return (f"{group}.schema=math", f"{group}.location=x")
    if name == "schema":
        return (f"{group}.location=x",)
    if group and "schema" in typing.get_type_hints(setting.group) and found_in(recipe, group) is None:
        return (f"{group}.schema=gsm8k", f"{group}.location=x")  # the group is there with these
    if isinstance(recipe, Recipe) and recipe.on_policy.fraction:  # what it forbids is tried without it
        return ("on_policy.fraction=0", "reward.model=x")
    return ("reward.model=x",) if setting.key == "loss.reward_weight" else ()


def found_in(recipe: typing.Any, key: str) -> typing.Any:
    for part in key.split("."):
        recipe = recipe[part] if isinstance(recipe, dict) else getattr(recipe, part)
    return recipe


@pytest.mark.parametrize("name", CONFIGS)
def test_every_setting_can_be_overridden_on_the_command_line(name):
    cls = recipe_type(name)
    values = parsed(name)["config"].value
    recipe = build(cls, values.to_dict())
    settings = settings_of(cls, values)
    assert len(settings) > 20
    for setting in settings:
        if setting.key.split(".")[0] == "smaller_than":  # names two tasks: see the test below
            continue
        # A study of which no task has methods of its own: any of its tasks may.
        text = str({next(iter(recipe.tasks)): ("kd",)}) if setting.key == "task_methods" else other(setting)
        if setting.key.endswith(".begins_with"):  # a method that begins by itself
            own = setting.key.split(".")[1]
            free = [name for name in recipe.methods if not recipe.method(name).begins_with]
            text = next(name for name in free if name not in (own, setting.value))
        if setting.key == "baseline":
            text = next(name for name in recipe.methods if name != recipe.baseline)
        needed = [x for x in needed_with(setting, text, recipe) if not x.startswith(f"{setting.key}=")]
        if getattr(getattr(recipe, "teacher", None), "cache", "") and not setting.key.startswith("teacher."):
            needed.append("teacher.cache=")  # what a cache has not, such as the student's own chains, is refused
        changed = found_in(built(name, *needed, f"{setting.key}={text}"), setting.key)
        plain = dataclasses.asdict(changed[0]) if setting.key == "phases" else changed
        assert str((plain,) if setting.key == "phases" else plain) == text, setting.key
        assert changed != setting.value, setting.key


def test_groups_of_any_names_are_overridden_as_a_whole():
    assert built("study_tiny", "smaller_than={'few_problems': 'cups'}").smaller_than == {"few_problems": "cups"}
    assert built("study_tiny", "methods={'kd': ('seed=1',)}", "task_methods={}", "only=('kd',)").methods["kd"] == (
        "seed=1",
    )
    assert built("study_tiny", "methods.rtd.overrides=('seed=1',)").methods["rtd"].overrides == ("seed=1",)
    assert built("boundaries_tiny", "tests.synthetic.source.limit=7").tests["synthetic"].source.limit == 7


def test_numbers_and_switches_as_people_write_them():
    recipe = built("rtd_tiny", "loss.temperature=2", "loss.anchor_prompt=false", "optimizer.eps=1e-6")
    assert recipe.loss.temperature == 2.0
    assert isinstance(recipe.loss.temperature, float)
    assert not recipe.loss.anchor_prompt
    assert recipe.optimizer.eps == 1e-6
    values = flags.FlagValues()
    argv = ["test", f"--config={ROOT}/configs/rtd_tiny.py", "--noconfig.curriculum.enabled"]
    define_flags(COMMANDS["train"], argv, values)
    values(argv)
    assert not values["config"].value.curriculum.enabled


def test_a_group_that_may_be_missing():
    assert build(Recipe, defaults_of_8b().to_dict()).data.validation is None
    given = built("rtd_8b", "data.validation.schema=gsm8k", "data.validation.location=x", "data.validation.limit=5")
    assert given.data.validation.limit == 5
    message = r"config\.data\.validation\.limit is set, but not config\.data\.validation\.schema"
    with pytest.raises(ValueError, match=message):
        built("rtd_8b", "data.validation.limit=5")
    assert built("rtd_tiny", "data.validation.schema=").data.validation is None


def defaults_of_8b() -> ConfigDict:
    return importlib.import_module("configs.rtd_8b").get_config()


def test_a_config_written_in_full_without_the_defaults_has_all_keys_too(tmp_path):
    """Configs of before, and those of people who like to list things."""
    listed = {key: value for key, value in tiny().items() if key not in ("optimizer", "seed")}
    path = tmp_path / "listed.py"
    path.write_text(f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({listed!r})\n")
    values, argv = flags.FlagValues(), ["test", f"--config={path}", "--config.optimizer.eps=1e-6", "--config.seed=4"]
    define_flags(COMMANDS["train"], argv, values)
    values(argv)
    recipe = build(Recipe, values["config"].value.to_dict())
    assert (recipe.optimizer.eps, recipe.seed, recipe.total_updates) == (1e-6, 4, 600)


def test_a_misspelt_key_in_a_config_file_is_an_error_where_it_is_written(tmp_path):
    config = defaults(Recipe)
    with pytest.raises(AttributeError, match="coherence_weight"):
        config.loss.coherence_wieght = 1.0
    with pytest.raises(TypeError, match="alpha"):
        config.loss.alpha = "much"
    path = tmp_path / "wrong.py"
    for line in ("c.loss.coherence_wieght = 1.0", "c['loss'] = {'coherence_wieght': 1.0}"):
        path.write_text(
            "from rtd_jax.base.settings import defaults\nfrom rtd_jax.train.recipe import Recipe\n"
            f"def get_config():\n    c = defaults(Recipe)\n    {line}\n    return c\n"
        )
        values = flags.FlagValues()
        define_flags(COMMANDS["train"], ["test", f"--config={path}"], values)
        with pytest.raises(flags.Error, match=r'wrong\.py: .*[Dd]id you mean "?(config\.loss\.)?coherence_weight'):
            values(["test", f"--config={path}"])


def help_of(name: str) -> str:
    values = flags.FlagValues()
    defined = define_flags(COMMANDS[name], ["test"], values)
    return help_text(COMMANDS[name], f"launch/{name}.py", [values[flag] for flag in defined])


def test_the_table_of_commands_names_what_is_there():
    assert sorted(COMMANDS) == sorted(path.stem for path in (ROOT / "launch").glob("*.py") if path.stem != "entry")
    for command in COMMANDS.values():
        for place in filter(None, (command.main, command.recipe, command.flags)):
            module, name = place.split(":")
            assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_flags_and_how_settings_are_overridden(name):
    text, command = help_of(name), COMMANDS[name]
    assert text.startswith(command.about)
    assert f"example: launch/{name}.py --" in text
    wanted = ("--config ", "--workdir", "--distributed", "--coordinator", "--print_config", "--config.loss.alpha=0.5")
    assert all((words in text) == bool(command.recipe) for words in wanted)
    assert {"plan": "--target", "evaluate": "--few_shot", "segment": "--classifier"}.get(name, "--") in text
    assert (ROOT / "launch" / f"{name}.py").is_file()


def test_every_key_is_printed_with_value_origin_and_meaning():
    lines = config_text(Recipe, parsed("rtd_tiny", "optimizer.eps=1e-6", "curriculum.depths=(1,2)")).splitlines()
    assert lines[0].split() == ["key", "value", "origin", "meaning"]
    rows = {line.split()[0]: line for line in lines[1:]}
    assert list(rows) == [setting.key for setting in settings_of(Recipe, defaults(Recipe))]
    for key, value, origin, meaning in (
        ("loss.temperature", "4.0", "default", "T of the soft loss"),
        ("total_updates", "600", "recipe", "over all stages"),
        ("optimizer.eps", "1e-06", "command line", "added to the root"),
        ("curriculum.depths", "(1, 2)", "command line", "reasoning steps"),
    ):
        rest = rows[key].removeprefix(key).strip()
        assert rest.startswith(value)
        assert rest.removeprefix(value).strip().startswith(origin)
        assert meaning in rest


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["loss.intermediate_layers=2"], ["loss.intermediate_layers=2 is not read: loss.intermediate_weight is 0"]),
        (["loss.intermediate_layers=2", "loss.intermediate_weight=1"], []),
        (["reward.samples=2", "seed=3"], ["reward.samples=2 is not read: loss.reward_weight is 0"]),
        (["loss.reward_weight=1", "reward.model=x", "reward.samples=2"], []),
        (["cache.top_k=3"], ["cache.top_k=3 is not read: teacher.cache is empty"]),
        (["cache.top_k=3", "teacher.cache=x", "evaluation.teacher=False"], []),
        (["curriculum.enabled=False", "curriculum.replay=0.5"], ["curriculum.replay=0.5 is not read"]),
        (["curriculum.enabled=False", "curriculum.validate_every=5"], []),
        (["curriculum.ends_by=solved", "curriculum.solved_share=0.5", "curriculum.validate_every=5"], []),
        (
            ["curriculum.ends_by=solved", "curriculum.threshold_factor=2"],
            ["curriculum.threshold_factor=2.0 is not read: curriculum.ends_by is 'solved'"],
        ),
        (
            ["curriculum.ends_by=share", "curriculum.min_updates=5", "curriculum.spend_budget=False"],
            [
                "curriculum.min_updates=5 is not read: curriculum.ends_by is 'share'",
                "curriculum.spend_budget=False is not read: curriculum.ends_by is 'share'",
            ],
        ),
        (
            ["curriculum.teacher_solves=1"],
            ["curriculum.teacher_solves=1.0 is not read: curriculum.ends_by is"],
        ),
        (
            ["curriculum.mixture=equal", "curriculum.replay=0.5"],
            ["curriculum.replay=0.5 is not read: curriculum.mixture is 'equal'"],
        ),
        (["curriculum.enabled=False", "curriculum.mixture=equal"], ["curriculum.mixture=equal is not read"]),
        (
            ["curriculum.enabled=False", "curriculum.ends_by=solved", "curriculum.validate_every=5"],
            ["curriculum.validate_every=5 is not read: curriculum.enabled is False"],
        ),
        (  # chains are solved whatever the loss has of the teacher
            [
                *("loss.alpha=0", "loss.alignment_weight=0", "loss.coherence_weight=0"),
                *("curriculum.ends_by=solved", "curriculum.validate_every=5"),
            ],
            [],
        ),
        (["evaluation.curve_problems=5"], ["evaluation.curve_problems=5 is not read: evaluation.every is 0"]),
        (
            ["data.steps_cache=x"],
            ["data.steps_cache=x is not read: data.segmentation is 'annotated', which needs no teacher"],
        ),
        (["data.train.location=x"], ["data.train.location=x is not read: schema is 'synthetic'"]),
        (["data.validation_fraction=0.5"], ["data.validation_fraction=0.5 is not read: data.validation is given"]),
        (["loss.coherence_weight=0", "loss.distance=squared"], []),  # validation reads it
        (["loss.beta=0.1"], ["loss.beta=0.1 is not read: loss.divergence is 'forward_kl'"]),
        (["loss.beta=0.1", "loss.divergence=jsd"], []),
        (
            [
                *("loss.alpha=0", "loss.alignment_weight=0", "loss.coherence_weight=0", "curriculum.enabled=False"),
                *("loss.temperature=2", "curriculum.validate_every=5", "loss.chunk_length=8"),
                *("loss.divergence=jsd", "loss.beta=0.1"),
            ],
            [
                "loss.temperature=2.0 is not read: the loss has nothing of the teacher in it",
                "curriculum.validate_every=5 is not read: the loss has nothing of the teacher in it",
                "loss.divergence=jsd is not read: the loss has nothing of the teacher in it",
                "loss.beta=0.1 is not read: the loss has nothing of the teacher in it",
            ],
        ),
    ],
)
def test_an_override_that_is_not_read_is_named(overrides, warned):
    values = parsed("rtd_tiny", *overrides)
    recipe = build(Recipe, values["config"].value.to_dict())
    lines = unread_overrides(recipe, values["config"].override_values)
    assert len(lines) == len(warned)
    for line, start in zip(lines, warned, strict=True):
        assert line.startswith(f"--config.{start}")


@pytest.mark.parametrize(
    ("given", "depths"),
    [
        (["(1,2)", "(5,)"], (5,)),
        (["(5,)", "(1,2)"], (1, 2)),
        (["(1,2)", "(1,2)", "1"], (1,)),
        (["(1,2)", "()"], ()),
        (["()", "(3)"], (3,)),
        (["[1, 2]", "[4]"], (4,)),
    ],
)
def test_of_a_tuple_that_is_given_twice_the_last_one_holds(given, depths):
    values = parsed("rtd_tiny", *(f"curriculum.depths={text}" for text in given))
    assert values["config"].value.curriculum.depths == depths
    assert values["config"].override_values["curriculum.depths"] == depths


def test_of_texts_and_of_numbers_that_are_given_twice_the_last_one_holds():
    values = parsed("rtd_tiny", "seed=1", "data.train.split=a", "seed=2", "data.train.split=b", "loss.alpha=0.1")
    config = values["config"].value
    assert (config.seed, config.data.train.split, config.loss.alpha) == (2, "b", 0.1)
    values = parsed("traces_tiny", "sampling.stop=('a',)", "sampling.stop=('b','c')")
    assert values["config"].value.sampling.stop == ("b", "c")
    values = parsed("study_tiny", "only=('kd','rtd')", "only=kd", "seeds=(1,2)", "seeds=(3,)")
    assert (values["config"].value.only, values["config"].value.seeds) == (("kd",), (3,))


def test_flags_that_are_lists_or_numbers_hold_the_last_one_too():
    values = flags.FlagValues()
    define_flags(COMMANDS["evaluate"], ["test"], values)
    values(["test", "--model=a,b", "--model=c", "--limit=1", "--limit=2"])
    assert (values["model"].value, values["limit"].value) == (["c"], 2)


def test_two_configs_are_refused():
    """The overrides between them would be those of the first one."""
    path = ROOT / "configs" / "rtd_tiny.py"
    argv = ["test", f"--config={path}", "--config.seed=1", f"--config={path}"]
    values = flags.FlagValues()
    define_flags(COMMANDS["train"], argv, values)
    with pytest.raises(flags.Error, match=r"--config is given twice, .*rtd_tiny.py and .*; give one of them"):
        values(argv)


def test_a_backend_that_is_not_chosen_is_not_read():
    values = parsed("traces_tiny", "openai.retries=3", "jax.batch_size=5")
    recipe = build(TracesRecipe, values["config"].value.to_dict())
    lines = unread_overrides(recipe, values["config"].override_values)
    assert lines == ["--config.openai.retries=3 is not read: backend is 'jax'"]


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
        ("loss", "alpha", 1.5, r"config\.loss\.alpha is 1\.5; expected 0 to 1"),
        ("loss", "temperature", 0.0, r"config\.loss\.temperature is 0\.0; expected 0\.001 to"),
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
        (["--config=configs/rtd_tiny.py", "--config.loss.alpha=much"], "alpha"),
        ([], "--config is missing"),
        (["--config=configs/nothing.py"], "nothing.py"),
        (["--cofnig=configs/rtd_tiny.py"], "Did you mean: config"),
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
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_the_commands_of_the_package(tmp_path):
    """As from an installed wheel: without launch/, from another folder."""

    def run(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "rtd_jax", *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)

    light = "import sys, rtd_jax.apps.command.run; assert not {'jax', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", light], cwd=ROOT, check=True)
    listed = run()
    assert listed.returncode == 0
    assert all(f"\n  {name} " in listed.stdout for name in COMMANDS)
    helped = run("train", "--help")
    assert helped.returncode == 0
    assert "--config.loss.alpha" in helped.stdout
    unknown = run("trian")
    assert unknown.returncode == 2
    assert "there is no command 'trian'" in unknown.stderr
    shown = run("train", f"--config={ROOT}/configs/rtd_tiny.py", "--config.optimizer.eps=1e-6", "--print_config")
    assert shown.returncode == 0, shown.stderr
    assert "command line" in shown.stdout
    warned = run("train", f"--config={ROOT}/configs/rtd_tiny.py", "--config.cache.top_k=2", "--config.teacher.path=no")
    assert "warning: --config.cache.top_k=2 is not read: teacher.cache is empty" in warned.stderr
    assert warned.returncode == 2


def test_a_refusal_may_have_bytes_that_are_no_text(tmp_path):
    """A path on the command line may have any bytes; Python holds them as halves of surrogate pairs."""
    code = "import sys; from rtd_jax.apps.command.parse import refuse; refuse(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, b"caf\xe9"], capture_output=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (2, b"error: caf\\udce9")
