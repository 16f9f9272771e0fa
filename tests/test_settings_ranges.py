"""Numbers that make no sense are refused where a setting is made, by the setting's name and with what is expected."""

import dataclasses
import functools
import importlib
import math
import re
import typing
from dataclasses import dataclass

import pytest
from absl import flags
from test_settings import CONFIGS, built, groups_of, recipe_type, tiny

from rtd_jax.apps.check.check import CheckSettings
from rtd_jax.apps.command.parse import define_flags, read_flags
from rtd_jax.apps.command.table import COMMANDS, RunFlags
from rtd_jax.apps.diagnose.diagnose import DiagnoseSettings
from rtd_jax.apps.evaluate import EvaluateSettings
from rtd_jax.apps.judge import JudgeSettings
from rtd_jax.apps.plan.plan import PlanSettings
from rtd_jax.apps.segment import SegmentSettings
from rtd_jax.base.settings import SettingError, build, check_ranges, value_types
from rtd_jax.data.labelled import LabelledSettings
from rtd_jax.data.sources import SourceSettings
from rtd_jax.steps.fit import FitSettings
from rtd_jax.teacher.identity import CacheSettings
from rtd_jax.train.curriculum import CurriculumSettings
from rtd_jax.train.optimizer import OptimizerSettings
from rtd_jax.train.recipe import Recipe

NONSENSE = {int: (-(10**9), -1, 0, 10**12), float: (-1e9, -1.0, 0.0, 1e12, math.nan, math.inf)}
# What of this is legal after all, by value and dataclass; everything else is refused.
LEGAL = {
    0: {
        "AdapterSettings": "rank",  # none
        "BoundaryRecipe": "layers examples",
        "CacheSettings": "layers",
        # 0 switches a threshold, a context of examples, a wait or a rule off.
        "CurriculumSettings": "replay threshold_factor calibration_shots solved_share teacher_solves min_updates "
        "plateau_patience plateau_tolerance",
        "DataSettings": "max_dropped_fraction",
        "DiagnoseSettings": "limit teacher_layer student_layer seed",
        # All problems; none; greedy; the first problem; no limit; none.
        "EvaluateSettings": "limit few_shot few_shot_seed temperature seed show judge_requests_per_minute "
        "judge_retries",
        "EvaluationSettings": "every curve_problems drift_problems",  # the second is read where the first is not 0
        "FitSettings": "weight_decay thresholds seed",
        "HeadSettings": "dropout",
        "JudgeSettings": "limit judge_requests_per_minute judge_retries",  # all rows; no limit; none
        "LabelledSettings": "seed",  # and limit, of rows in files
        "LossSettings": "reward_weight intermediate_weight token_alignment_weight coherence_weight alignment_weight "
        "look_ahead_weight alpha beta hidden_layer student_hidden_layer",
        "Method": "alignment coherence place",
        "OnPolicySettings": "fraction",  # none
        "OpenAISettings": "requests_per_minute retries",  # no limit; none
        "OptimizerSettings": "warmup_updates final_fraction b1 b2 weight_decay",
        "CheckSettings": "chains",  # none are shown
        "PlanSettings": "dollars_per_device_hour",
        "PretrainRecipe": "shot_fraction seed",
        "Recipe": "seed",
        "RewardModelRecipe": "layers hidden max_dropped_fraction weight_decay seed",  # a linear head
        "RunFlags": "process",
        "SamplingSettings": "seed",  # and temperature, for one sample
        "SelectionSettings": "per_problem",  # all
        "SourceSettings": "limit seed",  # all rows of files; generated problems need a number
        "ServingSettings": "retries",  # none
        "StudentSettings": "group_size share width mlp_width heads kv_heads head_dim",  # not given
        "StudyRecipe": "seeds parallel ensemble solved_share",  # only the report; a process each; not asked
    },
    -1: {
        **dict.fromkeys(("BoundaryRecipe", "CacheSettings", "RewardModelRecipe"), "layers"),  # the last layer
        "DiagnoseSettings": "teacher_layer student_layer",
        "EvaluateSettings": "few_shot",  # the task's own
        "LossSettings": "hidden_layer student_hidden_layer",
        "MeshSettings": "fsdp",  # the devices that are left; here the other two are given
        "Method": "place",
    },
    1e12: {"OptimizerSettings": "clip_norm", "SizeSettings": "rope_theta"},
}


@functools.cache
def examples() -> dict[type, typing.Any]:
    """A valid value of every settings dataclass: what is in the configs, and the flags of commands."""
    found: dict[type, typing.Any] = {}

    def collect(value: typing.Any) -> None:
        if dataclasses.is_dataclass(value):
            found.setdefault(type(value), value)
            value = tuple(vars(value).values())
        for entry in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ():
            collect(entry)

    for name in CONFIGS:
        collect(build(recipe_type(name), importlib.import_module(f"configs.{name}").get_config().to_dict()))
    for settings in (EvaluateSettings(("x",)), DiagnoseSettings("x", "y"), SegmentSettings("x", "y", "z")):
        collect(settings)
    collect((JudgeSettings("x"), PlanSettings(), CheckSettings(), RunFlags()))
    return found


def numbers_of(cls: type) -> list[tuple[str, type, bool]]:
    """The dataclass' numbers and tuples of numbers: (name, type, whether it is a tuple)."""
    hints, found = typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        for option in value_types(hints[field.name]):
            is_tuple = typing.get_origin(option) is tuple
            kind = typing.get_args(option)[0] if is_tuple else option
            if kind in NONSENSE:
                found.append((field.name, kind, is_tuple))
    return found


def refused(settings: typing.Any, name: str, value: typing.Any) -> str:
    """The words with which a value is refused; "" where it is accepted."""
    try:
        dataclasses.replace(settings, **{name: value})
    except ValueError as error:
        return str(error)
    return ""


def test_nonsense_is_refused_by_name_in_every_number_of_every_dataclass():
    """Far below, -1, 0, far above, NaN and infinity: each is refused, or it is among those that are legal."""
    accepted: dict[float, dict[str, list[str]]] = {value: {} for value in LEGAL}
    for cls, settings in examples().items():
        for name, kind, is_tuple in numbers_of(cls):
            for value in NONSENSE[kind]:
                refusal = refused(settings, name, (value,) if is_tuple else value)
                if not refusal:
                    accepted.setdefault(value, {}).setdefault(cls.__name__, []).append(name)
                else:
                    assert name in refusal, f"{cls.__name__}: {refusal}"
                    assert f"{value:g}" in refusal or str(value) in refusal, f"{cls.__name__}: {refusal}"
    for value, groups in accepted.items():
        legal = {name: set(names.split()) for name, names in LEGAL.get(value, {}).items()}
        assert {name: set(names) for name, names in groups.items()} == legal, value


def test_every_settings_dataclass_is_tried():
    recipes = {recipe_type(name) for name in CONFIGS}
    flag_groups = {EvaluateSettings, DiagnoseSettings, JudgeSettings, PlanSettings, CheckSettings, SegmentSettings}
    tried = set(examples())
    for cls in recipes | flag_groups:
        missing = {group for group in groups_of(cls) if numbers_of(group)} - tried
        assert not missing


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.learning_rate=-1",
            "learning_rate is -1.0; expected above 0 and at most 10 (per update, at the peak)",
        ),
        ("optimizer.clip_norm=0", "clip_norm is 0.0; expected above 0 (global norm of the gradient)"),
        ("optimizer.b2=1", "b2 is 1.0; expected at least 0 and below 1 (decay of the second moment, per update)"),
        ("optimizer.eps=nan", "eps is nan; expected a finite number"),
        ("loss.temperature=inf", "temperature is inf; expected a finite number"),
        ("loss.alpha=1.5", "alpha is 1.5; expected 0 to 1 ("),
        ("loss.beta=-0.5", "beta is -0.5; expected 0 to 1 ("),
        ("data.row_length=1000000000000", "row_length is 1000000000000; expected 2 to 10,000,000 (tokens)"),
        ("data.train.limit=1000000000000", "limit is 1000000000000; expected 0 to 10,000,000 (chains;"),
        ("curriculum.validation_chains=1000000000000", "validation_chains is 1000000000000; expected 1 to 10,000,000"),
        ("curriculum.calibration_shots=-1", "calibration_shots is -1; expected 0 to 100 (solved problems"),
        ("curriculum.threshold_factor=-1", "threshold_factor is -1.0; expected 0 to 1,000,000 ("),
        ("curriculum.depths=(1, 0)", "depths[1] is 0; expected 1 to 1,000"),
        ("evaluation.problems_per_depth=0", "problems_per_depth is 0; expected 1 to 1,000,000 (test problems)"),
        ("mesh.tensor=0", "tensor is 0; expected 1 to 1,000,000 devices, or -1: what is left"),
        ("loss.chunk_length=-1", "chunk_length is -1; expected 1 to 10,000,000 (positions of each row"),
        ("seed=-1", "seed is -1; expected 0 to 2,147,483,647 (of params and data order)"),
    ],
)
def test_a_recipe_names_the_whole_key_its_range_and_its_unit(override, message):
    key = override.partition("=")[0].rpartition(".")[0]
    with pytest.raises(ValueError, match="^" + re.escape(f"config.{key}.{message}" if key else f"config.{message}")):
        built("rtd_tiny", override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train.schema=nonsense", "config.data.train.schema 'nonsense' is unknown"),
        ("data.train.limit=0", "config.data.train.limit is 0; the synthetic source is endless"),
        ("curriculum.depths=(3, 1)", "config.curriculum.depths is (3, 1); give increasing step counts"),
        ("data.text.kind=instruct", "config.data.text.kind is 'instruct'; expected 'plain' or 'chat'"),
        ("loss.reward_weight=0.5", "config.loss.reward_weight is not 0, but reward.model is empty"),
    ],
)
def test_settings_that_do_not_go_together_are_named_by_their_whole_keys(override, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        built("rtd_tiny", override)


def test_an_update_of_more_tokens_than_any_memory_has_is_refused():
    message = r"config\.batch_size is 1000000 with data\.row_length 10000000; expected at most 1,000,000,000 tokens"
    with pytest.raises(ValueError, match=message):
        built("rtd_tiny", "batch_size=1000000", "data.row_length=10000000")


def test_groups_inside_tuples_and_of_any_names_are_named_too():
    phases = "({'updates': 0, 'max_depth': 6, 'batch_size': 4, 'row_length': 64, 'chains_per_row': 1},)"
    with pytest.raises(ValueError, match=r"config\.phases\[0\]\.updates is 0; expected 1 to"):
        built("pretrain_tiny", f"phases={phases}")
    with pytest.raises(ValueError, match=r"config\.tests\.synthetic\.chains is -2; expected 1 to"):
        built("boundaries_tiny", "tests.synthetic.chains=-2")


def test_flags_are_named_as_flags():
    values = flags.FlagValues()
    argv = ["test", "--teacher=x", "--student=y", "--batch_size=-4"]
    define_flags(COMMANDS["diagnose"], argv, values)
    values(argv)
    with pytest.raises(ValueError, match=r"^--batch_size is -4; expected 1 to 1,000,000 "):
        read_flags(DiagnoseSettings, values)


def test_numbers_too_large_for_a_float_are_refused():
    values = tiny()
    values["optimizer"]["learning_rate"] = 10**400
    with pytest.raises(ValueError, match=r"config\.optimizer\.learning_rate is 10+; expected a finite number"):
        build(Recipe, values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SourceSettings("synthetic", limit=1, depths=(2, 2)), r"depths is \(2, 2\); expected each value once"),
        (lambda: SourceSettings("gsm8k", "x", split=""), "split is empty; expected a value .of the data set"),
        (lambda: SourceSettings("math", "x", levels=(6,)), r"levels\[0\] is 6; expected 1 to 5"),
        (lambda: LabelledSettings("synthetic", limit=1, depths=(1, 1)), r"depths is \(1, 1\)"),
        (lambda: CacheSettings(layers=(1, 1)), r"layers is \(1, 1\); expected each value once"),
        (lambda: CurriculumSettings(depths=(2, 1)), r"depths is \(2, 1\)"),
        (lambda: FitSettings(thresholds=()), "thresholds is empty; expected a value .tried on the validation texts"),
        (lambda: FitSettings(thresholds=(0.5, math.nan)), r"thresholds\[1\] is nan; expected 0 to 1"),
        (lambda: EvaluateSettings(("x",), out=""), "out is empty; expected a value .folder for the report"),
        (lambda: EvaluateSettings(("x",), tasks=("math", "math")), "tasks is"),
        (lambda: DiagnoseSettings("", "y"), "teacher is empty; expected a value .Hugging Face folder"),
        (lambda: built("study_tiny", "seeds=(1, 1)"), r"config\.seeds is \(1, 1\); expected each value once"),
        (
            lambda: built("rtd_tiny", "teacher.path="),
            r"config\.teacher\.path is empty; expected a value .Hugging Face folder",
        ),
        (
            lambda: built("boundaries_tiny", "layers=()"),
            r"config\.layers is empty; expected a value .whose states are read",
        ),
    ],
)
def test_empty_and_repeated_values_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@dataclass(frozen=True)
class _Sizes:
    """Settings of this test."""

    share: float = 0.5  # of all rows
    sizes: tuple[int, ...] = ()  # rows
    limit: int | None = None  # rows


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "words"),
    [
        ("[0, 1]", (0, 0.5, 1), (-1e-9, 1.001), "expected 0 to 1 (of all rows)"),
        ("(0, 1]", (1e-300, 1), (0, 1.5), "expected above 0 and at most 1 (of all rows)"),
        ("[0, 1)", (0, 0.999), (1, -1), "expected at least 0 and below 1 (of all rows)"),
        ("(0, inf)", (1e300,), (0, math.inf, math.nan, -1), "expected above 0 (of all rows)"),
        ("[-2, inf)", (-2, 1e300), (math.inf, math.nan, -3), "expected at least -2 (of all rows)"),
    ],
)
def test_intervals(interval, inside, outside, words):
    for value in inside:
        check_ranges(_Sizes(share=value), share=interval)
    for value in outside:
        with pytest.raises(SettingError) as error:
            check_ranges(_Sizes(share=value), share=interval)
        assert str(error.value) == f"share is {value}; {words}"
    check_ranges(_Sizes(sizes=(), limit=None), sizes=interval, limit=interval)


def test_the_optimizer_takes_what_is_usual():
    OptimizerSettings(learning_rate=3e-3, b1=0.0, b2=0.999, weight_decay=0.1, clip_norm=1e9, warmup_updates=0)
