"""Reads traces from where they are: a generator, a local folder or file, or the Hugging Face hub."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtd_jax.base.files import reading
from rtd_jax.base.hub import HubName, check_local, hub_name, is_commit, prepared_commit, refusal
from rtd_jax.base.settings import SEED, check_distinct, check_filled, check_ranges
from rtd_jax.data.generators import GENERATORS
from rtd_jax.data.generators.streams import DEPTHS, Wording
from rtd_jax.data.rows import ROWS_AT_ONCE, SUFFIXES, read_file, table_rows
from rtd_jax.data.schemas import SCHEMAS
from rtd_jax.data.schemas.schema import Row
from rtd_jax.data.split_files import split_files
from rtd_jax.data.trace import Problem, Trace

_GENERATED = (*GENERATORS, "synthetic+cups")  # schemas without files; the last takes problems from both in turn
_WITH_TRACES = {name: schema for name, schema in SCHEMAS.items() if schema.trace is not None}
PLACE = ("location", "subset", "revision")  # settings that generated problems do not read


@dataclass(frozen=True)
class RowSource:
    """Where rows are.

    `location` is a local folder holding `<split>.jsonl`, `.json` or `.parquet` (or shards `<split>-*.parquet` or
    `<split>-*.jsonl`, also under `<subset>/` or `data/`), a single file of these kinds, or a hub name, which may end in
    its revision (NAME@REVISION). Values are read as they were written (see `data/rows.py`).
    """

    schema: str  # the form of the rows
    location: str = ""  # folder, file or hub name; generated problems need none
    split: str = "train"  # of the data set; those of generated problems are disjoint
    subset: str = ""  # the hub's configuration name ("main" of openai/gsm8k)
    revision: str = ""  # the hub's commit, tag or branch; "" is the newest. What is local has none
    limit: int = 0  # chains; 0 takes all (generated problems need a number)

    def check_source(self, generated: Sequence[str], published: Iterable[str]) -> None:
        """Raises ValueError for an unknown schema, or one without the location or the limit that it needs."""
        known = (*generated, *published)
        if self.schema not in known:
            raise ValueError(f"schema {self.schema!r} is unknown; use one of {', '.join(known)}")
        check_filled(self, "split")
        check_ranges(
            self, limit="[0, 1e7]" if self.schema in generated else "[0, 1e9]"
        )  # generated ones fill the memory
        if self.schema in generated and not self.limit:
            raise ValueError(
                f"limit is 0; the {self.schema} source is endless and needs the number of problems to make"
            )
        if self.schema not in generated and not self.location:
            raise ValueError(f"schema {self.schema!r} needs a location: a local folder or file, or a hub name")


@dataclass(frozen=True)
class SourceSettings(RowSource):
    """Where traces come from: a generator, or rows (see `RowSource`)."""

    schema: str  # synthetic, cups, lift, synthetic+cups (generated), gsm8k, math, strategyqa, arc, stepwise or prose
    keep_marks: bool = True  # keep the <<48/2=24>> of gsm8k and synthetic
    reasoning_field: str = "reasoning"  # of arc
    facts_only: bool = False  # of strategyqa: the steps are the facts, without the sub-questions
    depths: tuple[int, ...] = ()  # keep only chains of these depths; () keeps all (generated: 1 to 6)
    levels: tuple[int, ...] = ()  # of math: keep only problems of these levels, 1 to 5; () keeps all
    seed: int = 0  # of generated problems
    wording: Wording = "terse"  # of synthetic: a few words a fact, for tiny models; natural: whole sentences

    def __post_init__(self) -> None:
        self.check_source(_GENERATED, _WITH_TRACES)
        check_ranges(self, depths="[1, 1000]", levels="[1, 5]", seed=SEED)
        check_distinct(self, "depths", "levels")
        graded = [name for name, schema in _WITH_TRACES.items() if schema.has_levels]
        if self.levels and not (self.schema in graded and set(self.levels) <= {1, 2, 3, 4, 5}):
            raise ValueError(
                f"levels are {self.levels} of schema {self.schema!r}; {', '.join(graded)} has the levels 1 to 5"
            )

    def unread_settings(self) -> dict[str, str]:
        generated = self.schema in _GENERATED
        kinds = [GENERATORS[name] for name in self.schema.split("+")] if generated else [_WITH_TRACES[self.schema]]
        read = {name for kind in kinds for name in kind.options} | ({"seed"} if generated else set(PLACE))
        options = (*PLACE, "keep_marks", "reasoning_field", "facts_only", "seed", "wording")
        return {name: f"schema is {self.schema!r}" for name in options if name not in read}

    def options(self, names: Iterable[str]) -> dict[str, Any]:
        """The fields that a schema or a generator reads, as keyword arguments."""
        return {name: getattr(self, name) for name in names}


def load_traces(settings: SourceSettings) -> list[Trace]:
    """All traces of a split, in order.

    Raises:
      ValueError: a row is damaged or cannot be a trace (the error names its file and number), a file is missing (it
        lists the files that are there), or the hub cannot be reached (it says how to name a folder instead).
    """
    if settings.schema in _GENERATED:
        return _generate(settings)
    schema = _WITH_TRACES[settings.schema]
    assert schema.trace is not None
    options = settings.options(schema.options)
    traces: list[Trace] = []
    count = 0
    for count, (place, row) in enumerate(read_rows(settings), start=1):  # noqa: B007
        trace = schema.trace(row, place, **options)
        if settings.depths and trace.depth not in settings.depths:
            continue
        if settings.levels and trace.level not in settings.levels:
            continue
        traces.append(trace)
        if len(traces) == settings.limit:
            break
    if not traces:
        asked = {"depth": settings.depths, "level": settings.levels}
        unmet = " and ".join(f"a {name} among {values}" for name, values in asked.items() if values)
        raise ValueError(f"{settings.location} ({settings.split}): none of its {count} rows has {unmet}")
    return traces


def closed_words(schema: str) -> list[str]:
    """Every word that a generated source can write, sorted."""
    return sorted({word for part in schema.split("+") for word in GENERATORS[part].words})


def _generate(settings: SourceSettings) -> list[Trace]:
    generators = [GENERATORS[name] for name in settings.schema.split("+")]
    stream = math.ceil(settings.limit / len(generators)), settings.depths or DEPTHS, settings.split, settings.seed
    parts = [generator.generate(*stream, **settings.options(generator.options)) for generator in generators]
    in_turn = itertools.chain.from_iterable(zip(*parts, strict=True))
    return list(itertools.islice(in_turn, settings.limit))


def load_rows(settings: SourceSettings) -> list[tuple[str, Row]]:
    """The first `limit` rows of a split as they are published, each with its place ("test.jsonl:17").

    Raises:
      ValueError: as `load_traces`, except that rows are not parsed.
    """
    return list(itertools.islice(read_rows(settings), settings.limit or None))


def load_problems(settings: SourceSettings) -> list[Problem]:
    """Prompts and answers of a split, in order, each prompt once. Rows of ARC need no reasoning for this.

    Raises:
      ValueError: as `load_traces`, or a row has no answer.
    """
    schema = SCHEMAS.get(settings.schema)
    if schema is not None and schema.problem is not None:
        if settings.depths:
            raise ValueError(
                f"depths are given, but the problems of {settings.schema} have no chains to count the steps of; leave "
                "depths out"
            )
        problems = [schema.problem(row, place) for place, row in load_rows(settings)]
    else:
        traces = load_traces(settings)
        problems = [Problem(trace.prompt, trace.answer, trace.depth, trace.source) for trace in traces]
    unanswered = next((problem for problem in problems if not problem.answer.strip()), None)
    if unanswered is not None or not problems:
        place = unanswered.source if unanswered else f"{settings.location} ({settings.split})"
        raise ValueError(f"{place}: {'no answer' if unanswered else 'no row'}; a chain is kept if its answer is right")
    return list({problem.prompt: problem for problem in reversed(problems)}.values())[::-1]


def is_local(location: str) -> bool:
    """Whether a location is a folder or file, which need not be there, and no hub name."""
    path = Path(location).expanduser()
    with reading(path):
        return path.exists() or path.is_symlink() or path.suffix in SUFFIXES


def read_rows(settings: RowSource) -> Iterator[tuple[str, Row]]:
    """(place, row) pairs, not parsed. A place is "file:number", counted from 1: of lines where a file has lines.

    The place of a row of the hub has the commit in it that was read: "openai/gsm8k@<commit>/main/train:7".

    Raises:
      ValueError: as `load_rows`, or there is no row, or a revision is given of what is local.
    """
    path = Path(settings.location).expanduser()
    with reading(path):
        is_folder = path.is_dir()
    rows: Iterator[tuple[str, Row]]
    if is_local(settings.location):
        check_local(path, settings.revision)
        files = split_files(path, settings.split, settings.subset) if is_folder else [path]
        place = ", ".join(map(str, files))
        rows = itertools.chain.from_iterable(map(read_file, files))
    elif (asked := hub_name(settings.location, settings.revision)) is not None:
        place = "/".join(filter(None, (settings.location, settings.subset, settings.split)))
        rows = _read_hub(settings, asked)
    else:
        raise ValueError(f"{settings.location}: no such folder or file, and not a hub name (name or owner/name)")
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{place}: there is no row in it; expected at least one")
    yield first
    yield from rows


def _read_hub(settings: RowSource, asked: HubName) -> Iterator[tuple[str, Row]]:
    """Rows of the hub. Where its files are JSON, `datasets` has inferred the types of whole columns."""
    import datasets  # slow to import, and local files do not need it

    elsewhere = (
        f"put {settings.split}.jsonl or {settings.split}.parquet with the hub's field names into a folder and set the "
        "source's location to that folder"
    )
    try:
        tables = datasets.load_dataset(
            asked.name, settings.subset or None, split=settings.split, revision=asked.revision or None
        )
    except Exception as error:
        raise ValueError(refusal("dataset", asked, error, elsewhere)) from error
    commit = next(iter({prepared_commit(file["filename"]) for file in tables.cache_files}), "")
    if is_commit(asked.revision) and commit not in ("", asked.revision):
        # Where the hub cannot be reached, `datasets` takes what its cache has, whatever the revision.
        raise ValueError(
            f"{asked.name}: revision {asked.revision} was asked for, but the hub could not be reached, and the cache "
            f"has commit {commit}. Run again with a connection, set the revision to that commit, or {elsewhere}"
        )
    name = f"{asked.name}@{commit}" if commit else asked.name
    place = "/".join(filter(None, (name, settings.subset, settings.split)))
    yield from table_rows(tables.with_format("arrow").iter(batch_size=ROWS_AT_ONCE), place)
