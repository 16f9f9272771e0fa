"""Which files of a folder are a split: one file, or the shards of one writing. Where two could be, neither is read."""

import re
from pathlib import Path

from rtd_jax.base.files import reading
from rtd_jax.data.manifest import check_shards
from rtd_jax.data.rows import SUFFIXES

_SHARD_SUFFIXES = (".parquet", ".jsonl")
_NUMBERED = re.compile(r"-(\d+)-of-(\d+)(?:-\w+)?")  # "-00000-of-00002", and the hash that the hub once added


class NoSplitError(ValueError):
    """A folder has no file of a split."""


def split_files(folder: Path, split: str, subset: str = "") -> list[Path]:
    """The files that hold a split, in order of their names.

    `<split>.jsonl`, `.json` or `.parquet`, or shards `<split>-*.parquet` or `<split>-*.jsonl`; under `<subset>/` if the
    split is there, else in the folder or under `data/`. Shards that launch/traces.py wrote are compared with their
    manifest.

    Raises:
      NoSplitError: there is none; lists the files that are there.
      ValueError: several files could be meant, or a shard is missing.
    """
    found = {}
    for place in dict.fromkeys((folder / subset, folder / "data", folder)):
        if files := _files_of(place, split):
            found[place] = files
            if subset and place == folder / subset:
                break
    if not found:
        with reading(folder):
            there = sorted(
                str(path.relative_to(folder)) for path in folder.rglob("*") if set(path.suffixes) & {*SUFFIXES}
            )
        raise NoSplitError(
            f"{folder}: no file of the split {split!r} (looked for {_looked_for(split)}); the folder has "
            f"{', '.join(there[:20]) or 'no data files'}"
        )
    if len(found) > 1:
        _refuse(split, [files[0] for files in found.values()])
    [(place, files)] = found.items()
    kinds = {(file.stem == split, file.suffix): file for file in reversed(files)}
    if len(kinds) > 1:
        _refuse(split, sorted(kinds.values()))
    if files[0].stem != split:
        with reading(place):
            check_shards(place, files)
        _check_numbers(files, split)
    return files


def _files_of(place: Path, split: str) -> list[Path]:
    with reading(place):
        names = list(place.iterdir()) if place.is_dir() else []
    return sorted(
        path
        for path in names
        if (path.stem == split and path.suffix in SUFFIXES)
        or (path.name.startswith(f"{split}-") and path.suffix in _SHARD_SUFFIXES)
    )


def _looked_for(split: str) -> str:
    whole = [f"{split}{suffix}" for suffix in SUFFIXES]
    return ", ".join([*whole, *(f"{split}-*{suffix}" for suffix in _SHARD_SUFFIXES)])


def _refuse(split: str, files: list[Path]) -> None:
    raise ValueError(
        f"{' and '.join(map(str, files))} could each be the split {split!r}; move what is old away, or give the file "
        "itself as the location"
    )


def _check_numbers(files: list[Path], split: str) -> None:
    """Shards named -00000-of-00003 have to be one writing: all of three, each once."""
    numbers: dict[tuple[int, int], Path] = {}
    unnumbered = []
    for file in files:
        match = _NUMBERED.fullmatch(file.stem.removeprefix(split))
        if match is None:
            unnumbered.append(file)
        elif numbers.setdefault((int(match[2]), int(match[1])), file) is not file:
            _refuse(split, [numbers[int(match[2]), int(match[1])], file])
    totals = sorted({total for total, _ in numbers})
    if len(totals) + bool(unnumbered) > 1:
        _refuse(
            split, [*unnumbered[:1], *(numbers[min(key for key in numbers if key[0] == total)] for total in totals)]
        )
    for total in totals:
        first = 0 if (total, total) not in numbers else 1  # most count from 0
        missing = [i for i in range(first, first + total) if (total, i) not in numbers]
        if missing:
            raise ValueError(
                f"{files[0].parent}: shard {missing[0]} of {total} of the split {split!r} is missing, counted from "
                f"{first}; get it, or give one of the {len(files)} files that are there as the location"
            )
