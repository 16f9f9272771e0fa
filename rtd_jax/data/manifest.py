"""The manifest beside generated shards: what they are, and the hash of each, so that a changed file is noticed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rtd_jax.base.files import file_digest, read_json, write_json

NAME = "traces_manifest.json"
KIND, FORMAT = "rtd_jax traces", 1
_REMEDY = "run launch/traces.py again, which writes the shards anew from its log and asks for nothing twice"


def begin_manifest(folder: Path, names: Sequence[str]) -> None:
    """Notes that shards of these names are being written. Until `finish_manifest` is called they are refused.

    Shards that an earlier manifest lists under other names are removed.

    Raises:
      ValueError: the folder has a manifest of something else.
    """
    if (folder / NAME).exists():
        for shard in _read(folder)["shards"]:
            if shard["name"] not in names:
                (folder / shard["name"]).unlink(missing_ok=True)
    listed = [{"name": name, "sha256": ""} for name in names]
    write_json(folder / NAME, {"kind": KIND, "format": FORMAT, "complete": False, "shards": listed})


def finish_manifest(folder: Path, shards: Sequence[tuple[Path, int]], about: dict[str, Any]) -> Path:
    """Lists the shards, given as (path, rows), with size and SHA-256, and adds `about`: what they are."""
    listed = [
        {"name": path.name, "rows": rows, "bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path, rows in shards
    ]
    write_json(folder / NAME, {"kind": KIND, "format": FORMAT, "complete": True, **about, "shards": listed})
    return folder / NAME


def _read(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    manifest = read_json(path)
    if not isinstance(manifest, dict) or (manifest.get("kind"), manifest.get("format")) != (KIND, FORMAT):
        raise ValueError(
            f"{path} is no manifest of format {FORMAT} that launch/traces.py wrote; move it away, and {_REMEDY}"
        )
    shards = manifest.get("shards")
    is_whole = isinstance(shards, list) and all(isinstance(x, dict) and {"name", "sha256"} <= x.keys() for x in shards)
    if not is_whole or any("/" in str(shard["name"]) for shard in shards or ()):
        raise ValueError(f"{path}: its list of shards is damaged; move it away, and {_REMEDY}")
    return manifest


def check_shards(folder: Path, shards: Sequence[Path]) -> None:
    """Compares the shards of a folder with its manifest. A folder without one was made elsewhere and is not checked.

    Raises:
      ValueError: the shards are not complete, or one is missing, not listed, or was changed; the error names the file.
    """
    if not (folder / NAME).exists():
        return
    manifest = _read(folder)
    if manifest.get("complete") is not True:
        raise ValueError(f"{folder / NAME}: the shards beside it are not complete; {_REMEDY}")
    listed = {shard["name"]: shard["sha256"] for shard in manifest["shards"]}
    names = {path.name for path in shards}
    if names != listed.keys():
        name = min(names ^ listed.keys())
        seen = "is missing" if name in listed else f"is not listed in {NAME}"
        raise ValueError(f"{folder / name} {seen}; {_REMEDY}")
    for path in shards:
        digest = file_digest(path)
        if digest != listed[path.name]:
            raise ValueError(
                f"{path} has SHA-256 {digest[:12]}, {NAME} says {str(listed[path.name])[:12]}: it was changed or "
                f"damaged; {_REMEDY}"
            )
