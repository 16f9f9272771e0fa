"""What a study is: its methods, tasks, seeds and preparations, as settings; the runs that follow from them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Literal

from rtd_jax.apps.study.jobs import Job, Preparation
from rtd_jax.base.settings import SEED, check_distinct, check_filled, check_ranges
from rtd_jax.train.recipe import SIZES
from rtd_jax.train.student import FLOAT_FOLDER, FOLDER

Overrides = tuple[str, ...]  # of a config, as on the command line but without "--config.": "loss.alpha=0.7"
Role = Literal[
    "baseline",  # no alignment, no coherence loss, no curriculum: what the whole method has to beat
    "whole",  # the method that the study is about, with all three components
    "ablation",  # the whole method without one component
    "part",  # the baseline with one component
    "rival",  # another method of the literature
    "control",  # what the whole method could owe its gain to
    "condition",  # a part or both hidden-state losses, with one thing about them changed
    "grid point",  # the whole method with other weights
    "longer",  # another method with more updates
    "self-distillation",  # the teacher's own architecture as student
]


@dataclass(frozen=True)
class Method:
    """One method of a study: the overrides that make it, and what the report needs to know about it.

    The report takes the difference in deep chain accuracy between this method and each of `compared_with`; where the
    text beside a name is not empty, the difference is listed as the answer to that question. Methods that have no
    finished runs are left out. Differences that follow from roles need not be named here: the whole method is compared
    with the baseline, the rivals and its ablations, and self-distillation with the teacher.
    """

    overrides: Overrides  # of the study's base config
    role: Role = "control"  # what it is to the others
    compared_with: dict[str, str] = field(default_factory=dict)  # {other method: question}
    alignment: float = 0.0  # weight of the boundary alignment
    coherence: float = 0.0  # weight of the coherence loss
    curriculum: bool = False
    begins_with: str = ""  # another method: every run begins with that one's student of the same task and seed
    compress: Overrides = ()  # "scheme=int4": flags of `compress`, by which that student is made smaller, not trained
    caption: str = ""  # in words: of a baseline or rival what it does, of a condition what it changes
    pictured: bool = False  # whether the report's pictures have a line for it
    place: int = 0  # order of claims, questions and lines in pictures; a ConfigDict does not keep the order of its keys

    def __post_init__(self) -> None:
        check_ranges(self, alignment="[0, 1e6]", coherence="[0, 1e6]", place="[-1e6, 1e6]")
        if self.compress and not self.begins_with:
            raise ValueError("compress needs begins_with, the method whose students are made smaller")
        if self.compress and self.overrides:
            raise ValueError("compress and overrides are both given; a run is compressed or trained")

    @property
    def components(self) -> tuple[bool, bool, bool]:
        """Whether it has (alignment, coherence, curriculum)."""
        return bool(self.alignment), bool(self.coherence), self.curriculum


@dataclass(frozen=True)
class StudyRecipe:
    """Which runs are made. Methods and tasks are overrides of one base config.

    `prepare` names what is made once, before the runs, and shared by them: a command of `python -m rtd_jax` and its
    flags. Where overrides or other preparations have `{name}`, the folder of that preparation is put in its place; only
    preparations that are asked for in this way are made. Relative paths, in `base` as in overrides and flags, are
    relative to the current working directory.
    """

    base: str  # config file of every run
    tasks: dict[str, Overrides]  # overrides of the base config that make each task
    methods: dict[
        str, Method | Overrides
    ]  # overrides of the base config alone make a method that is reported and not compared
    seeds: tuple[int, ...]  # of params and data order; the same for every method
    baseline: str = "kd"  # what differences are taken to
    parallel: int = 1  # processes side by side on equal shares of the cores; 0: only the report of finished runs
    ensemble: int = 0  # runs of one method, with different seeds, that one process trains as one program; 0: one run
    deep: int = 4  # steps from which a problem counts as deep in the summary
    solved_share: float = 0.0  # of deep validation chains right: how many updates runs need to get there; 0: not asked
    report: str = ""  # where the report is written besides <workdir>/study.md; "" nowhere
    prepare: dict[str, Overrides] = field(default_factory=dict)  # {"cache": ("cache_teacher", "--config=..", ..)}
    only: tuple[str, ...] = ()  # methods that are run; () runs all
    task_methods: dict[str, Overrides] = field(default_factory=dict)  # methods of a task that does not have all of them
    about: dict[str, str] = field(default_factory=dict)  # what a task is, in words, for the report
    smaller_than: dict[str, str] = field(default_factory=dict)  # {task of a smaller student: task of the larger one}

    def __post_init__(self) -> None:
        check_filled(self, "base")
        check_ranges(self, seeds=SEED, parallel="[0, 1e4]", ensemble="[0, 1e4]", deep="[1, 1000]")
        check_ranges(self, solved_share="[0, 1]")
        check_distinct(self, "seeds", "only")
        if self.baseline not in self.methods:
            raise ValueError(f"baseline is {self.baseline!r}; it must be one of the methods {', '.join(self.methods)}")
        for name in ("tasks", "methods", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one")
        for key in ("tasks", "methods", "prepare"):
            for name in getattr(self, key):
                if not re.fullmatch(r"[^/\\\0.][^/\\\0]*", name):
                    raise ValueError(
                        f"{key} has the name {name!r}, which names a folder too; expected one without / and \\, and "
                        "without a dot at its beginning"
                    )
        whole = [name for name in self.methods if self.method(name).role == "whole"]
        if len(whole) > 1:
            raise ValueError(f"methods {' and '.join(whole)} have the role 'whole'; a study is about one of them")
        _check_names("only", self.only, "method", self.methods)
        for name in self.methods:
            if other := self.method(name).begins_with:
                _check_names(f"methods.{name}.begins_with", (other,), "method", self.methods)
        self._check_circles()
        for task, names in self.task_methods.items():
            _check_names(f"task_methods.{task}", names, "method", self.methods)
        _check_names("task_methods", self.task_methods, "task", self.tasks)
        _check_names("about", self.about, "task", self.tasks)
        _check_names("smaller_than", (*self.smaller_than, *self.smaller_than.values()), "task", self.tasks)
        for name, command in self.prepare.items():
            if not command:
                raise ValueError(f"prepare.{name} is empty; give a command of `python -m rtd_jax` and its flags")

    def method(self, name: str) -> Method:
        """The method of that name."""
        method = self.methods[name]
        return method if isinstance(method, Method) else Method(method)

    def jobs(self, workdir: Path) -> list[Job]:
        """All runs, seed by seed, so that an unfinished study compares all methods on the seeds that it has."""
        return [
            self._job(task, method, seed, workdir) for seed in self.seeds for task, method in self._tasks_and_methods()
        ]

    def _job(self, task: str, name: str, seed: int, workdir: Path) -> Job:
        def folder(method: str) -> Path:
            return workdir.absolute() / "runs" / task / method / f"seed_{seed}"

        method, overrides = self.method(name), self._filled((*self._overrides(task, name), f"seed={seed}"), workdir)
        if not method.begins_with:
            return Job(task, name, seed, overrides, folder(name))
        first = folder(method.begins_with)
        if method.compress:
            return Job(task, name, seed, (*method.compress, f"student={first}"), folder(name), first, "compress")
        sizes = tuple(f"student.{size}=0" for size in SIZES)  # the student's own
        is_rounded = any(x.startswith("student.quantization=") for x in self.method(method.begins_with).overrides)
        student = first / (FLOAT_FOLDER if is_rounded else FOLDER)
        begin = (*sizes, "student.share=0.0", "student.init=pretrained", f"student.path={student}")
        return Job(task, name, seed, (*overrides, *begin), folder(name), first)

    def _check_circles(self) -> None:
        """Raises ValueError where methods begin with one another's students."""
        begins = {name: {self.method(name).begins_with} - {""} for name in self.methods}
        try:
            list(TopologicalSorter(begins).static_order())
        except CycleError as error:
            raise ValueError(f"the methods {', '.join(sorted(set(error.args[1])))} begin with one another") from error

    def preparations(self, workdir: Path) -> list[Preparation]:
        """What the runs ask for, each after what it asks for itself.

        Raises:
          ValueError: preparations ask for one another in a circle.
        """
        dependencies = {name: self._preparations_in(command) - {name} for name, command in self.prepare.items()}
        needed = self._preparations_in(text for pair in self._tasks_and_methods() for text in self._overrides(*pair))
        while more := set().union(*(dependencies[name] for name in needed)) - needed:
            needed |= more
        try:
            ordered = list(TopologicalSorter({x: dependencies[x] for x in dependencies if x in needed}).static_order())
        except CycleError as error:
            raise ValueError(f"the preparations {', '.join(sorted(set(error.args[1])))} ask for one another") from error
        return [
            Preparation(name, self._filled(self.prepare[name], workdir), prepared_folder(workdir) / name)
            for name in ordered
        ]

    def _tasks_and_methods(self) -> list[tuple[str, str]]:
        """(task, method) of the runs; tasks that have every method come first: the others are compared with them."""
        tasks = sorted(self.tasks, key=lambda task: task in self.task_methods)
        return [
            (task, method)
            for task in tasks
            for method in self.task_methods.get(task, tuple(self.methods))
            if not self.only or method in self.only
        ]

    def _overrides(self, task: str, method: str) -> Overrides:
        return (*self.tasks[task], *self.method(method).overrides)

    def _preparations_in(self, texts: Iterable[str]) -> set[str]:
        """The preparations whose `{name}` is in one of the texts."""
        joined = "\n".join(texts)
        return {name for name in self.prepare if f"{{{name}}}" in joined}

    def _filled(self, texts: Overrides, workdir: Path) -> Overrides:
        """The texts with folders of preparations in place of their names."""
        for name in self.prepare:
            texts = tuple(text.replace(f"{{{name}}}", str(prepared_folder(workdir) / name)) for text in texts)
        return texts


def prepared_folder(workdir: Path) -> Path:
    """The folder of a study's preparations."""
    return workdir.absolute() / "prepared"


def _check_names(key: str, names: Iterable[str], kind: str, known: Iterable[str]) -> None:
    """Raises ValueError where one of the names that `key` has is not known."""
    for name in names:
        if name not in known:
            raise ValueError(f"{key} names the {kind} {name!r}; the {kind}s are {', '.join(known)}")
