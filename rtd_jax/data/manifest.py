"""The manifest beside generated shards: what they are, and the hash of each, so that a changed file is noticed."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rtd_jax.base.files import file_digest, read_record, reading, write_record

NAME = "traces_manifest.json"
LOG = "responses.jsonl"  # beside it: the replies from which the shards can be written again
KIND, FORMAT = "rtd_jax traces", 2  # format 1 has no digest
_SHARD = re.compile(r"(?P<split>[^/\\.\0][^/\\\0]*)-\d{5,}-of-\d{5,}\.(?:jsonl|parquet)")
_REMEDY = "run launch/traces.py again, which writes the shards anew from its log and asks for nothing twice"
_MOVE = f"move {NAME} and the shards away, and {_REMEDY}"


def shard_names(split: str, count: int, suffix: str) -> list[str]:
    """The names of `count` shards: "train-00000-of-00003.jsonl" and so on."""
    names = [f"{split}-{i:05d}-of-{count:05d}.{suffix}" for i in range(count)]
    if not all(map(_SHARD.fullmatch, names)):
        raise ValueError(f"split is {split!r}; it begins the names of files: expected a name without / and \\")
    return names


def check_folder(folder: Path, split: str) -> dict[str, str]:
    """SHA-256 by name of the shards that the manifest of a folder lists; {} where there is none.

    Raises:
      ValueError: the manifest is damaged or of something else, or a shard of `split` is there that no manifest lists.
    """
    listed = _listed(_read(folder)) if (folder / NAME).exists() else {}
    for path in sorted(folder.iterdir()):
        match = _SHARD.fullmatch(path.name)
        if match and match["split"] == split and path.name not in listed:
            raise ValueError(f"{path} is in the way of the shards: no {NAME} lists it; move it away and run again")
    return listed


def begin_manifest(folder: Path, names: Sequence[str]) -> None:
    """Notes that shards of these names are being written. Until `finish_manifest` is called they are refused.

    Shards that an earlier manifest lists under other names are removed. Nothing else is: a file that no manifest lists,
    or that is no longer what was written, is refused by name before anything is changed.

    Raises:
      ValueError: the folder has a manifest of something else, or files in the place of shards.
    """
    match = _SHARD.fullmatch(names[0]) if names else None
    listed = check_folder(folder, match["split"] if match else "")
    old = [folder / name for name in listed if name not in names and (folder / name).exists()]
    for path in (*old, *(folder / name for name in names if (folder / name).exists())):
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path} is in the way of the shards: it is no plain file; move it away and run again")
    for path in old:
        if listed[path.name] and _digest(path) != listed[path.name]:
            raise ValueError(
                f"{path} was changed after it was written, and would be removed now; move it away and run again"
            )
    for path in old:
        path.unlink()
    _write(folder, False, {}, [{"name": name, "sha256": ""} for name in names])


def finish_manifest(folder: Path, shards: Sequence[tuple[Path, int]], about: dict[str, Any]) -> Path:
    """Lists the shards, given as (path, rows), with size and SHA-256, and adds `about`: what they are."""
    listed = [
        {"name": path.name, "rows": rows, "bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path, rows in shards
    ]
    return _write(folder, True, about, listed)


def _write(folder: Path, is_complete: bool, about: dict[str, Any], shards: list[dict[str, Any]]) -> Path:
    write_record(folder / NAME, FORMAT, {"kind": KIND, "complete": is_complete, **about, "shards": shards})
    return folder / NAME


def _read(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, of the right kind and shape; every name in it is that of a shard."""
    path = folder / NAME
    manifest = read_record(path, FORMAT, _MOVE, undigested=(1,))
    if manifest.get("kind") != KIND:
        raise ValueError(f"{path} is no manifest that launch/traces.py wrote; {_MOVE}")
    shards = manifest.get("shards")
    if not isinstance(manifest.get("complete"), bool) or not isinstance(shards, list):
        raise ValueError(f"{path}: its list of shards is damaged; {_MOVE}")
    for shard in shards:
        texts = [shard.get(key) for key in ("name", "sha256")] if isinstance(shard, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}: its list of shards is damaged: {str(shard)[:80]}; {_MOVE}")
        if not _SHARD.fullmatch(shard["name"]):
            raise ValueError(f"{path} lists {shard['name']!r}, which is no name of a shard; {_MOVE}")
    return manifest


def _listed(manifest: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of each shard by its name; "" where it was still to be written."""
    return {shard["name"]: shard["sha256"] for shard in manifest["shards"]}


def _digest(path: Path) -> str:
    with reading(path, _REMEDY):
        return file_digest(path)


def check_shards(folder: Path, shards: Sequence[Path]) -> None:
    """Compares the shards of a folder with its manifest. A folder without one was made elsewhere and is not checked.

    Raises:
      ValueError: the shards are not complete, or one is missing, not listed, or was changed, or the manifest is missing
        beside the log of replies; the error names the file.
    """
    if not (folder / NAME).exists():
        if (folder / LOG).exists():
            raise ValueError(
                f"{folder / NAME} is missing, without which its shards cannot be trusted to be whole; move them away, "
                f"and {_REMEDY}"
            )
        return
    manifest = _read(folder)
    if manifest["complete"] is not True:
        raise ValueError(f"{folder / NAME}: the shards beside it are not complete; {_REMEDY}")
    listed = _listed(manifest)
    names = {path.name for path in shards}
    if names != listed.keys():
        name = min(names ^ listed.keys())
        seen = "is missing" if name in listed else f"is not listed in {NAME}"
        raise ValueError(f"{folder / name} {seen}; {_REMEDY}")
    for path in shards:
        digest = _digest(path)
        if digest != listed[path.name]:
            raise ValueError(
                f"{path} has SHA-256 {digest[:12]}, {NAME} says {listed[path.name][:12]}: it was changed or damaged; "
                f"{_REMEDY}"
            )
