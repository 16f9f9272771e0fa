"""Names on the Hugging Face hub, their revisions, and what to do where the hub does not give what is asked for.

The hub's client is imported in the functions that need it: the import is slow, and most models and data are local.
"""

import re
from pathlib import Path
from typing import Literal, NamedTuple

_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
_COMMIT = r"(?P<commit>[0-9a-f]{40})"
_SNAPSHOT = re.compile(rf".*/models--(?P<name>[^/]+)/snapshots/{_COMMIT}")  # in the client's cache
_PREPARED = re.compile(rf".*/{_COMMIT}/[^/]+\.arrow")  # in the cache of `datasets`
_OF_PLACE = re.compile(rf"[\w.-]+(/[\w.-]+)?@{_COMMIT}(?![0-9a-f])")

Kind = Literal["model", "dataset"]


class HubName(NamedTuple):
    """What the hub is asked for."""

    name: str  # "openai/gsm8k"
    revision: str  # commit, tag or branch; "" is the newest


def hub_name(text: str, revision: str) -> HubName | None:
    """The hub name in a setting, which may end in its revision, NAME@REVISION; None where it cannot be one.

    Raises:
      ValueError: the setting has a revision, and another one is given beside it.
    """
    found = _NAME.fullmatch(text)
    if found is None or text.startswith("."):
        return None
    if revision and found["revision"]:
        raise ValueError(
            f"{text} ends in the revision {found['revision']!r}, but revision is {revision!r} too; give one of them"
        )
    return HubName(found["name"], revision or found["revision"] or "")


def is_commit(revision: str) -> bool:
    """Whether a revision is a whole commit, which never changes, and no tag or branch."""
    return re.fullmatch("[0-9a-f]{40}", revision) is not None


def check_local(path: Path, revision: str) -> None:
    """Raises ValueError where a revision is given of a local folder or file, where it would silently do nothing."""
    if revision:
        raise ValueError(
            f"{path} is local, and has no revisions, but revision is {revision!r}; leave it out, or give the hub's name"
        )


def snapshot_commit(directory: Path) -> str:
    """The commit that a model's directory in the client's cache is a snapshot of; "" for any other directory."""
    found = _SNAPSHOT.fullmatch(directory.as_posix())
    return found["commit"] if found else ""


def model_name(directory: Path) -> str:
    """A model's name for reports: its folder's, or of a hub snapshot its own and the commit, "org/name@0123abc".

    The folder of a snapshot is named by the commit alone.
    """
    found = _SNAPSHOT.fullmatch(directory.as_posix())
    return f"{found['name'].replace('--', '/')}@{found['commit'][:7]}" if found else directory.name


def prepared_commit(file: str) -> str:
    """The commit of the data set that `datasets` prepared as this file of its cache; "" where its path has none."""
    found = _PREPARED.fullmatch(Path(file).as_posix())
    return found["commit"] if found else ""


def place_commit(place: str) -> str:
    """The commit in a row's place, "openai/gsm8k@<commit>/main/train:7"; "" where it has none."""
    found = _OF_PLACE.match(place)
    return found["commit"] if found else ""


def refusal(kind: Kind, asked: HubName, error: BaseException, elsewhere: str) -> str:
    """What a download failed with, and what to do about it.

    Args:
      elsewhere: how to do without a connection, as an imperative.
    """
    from huggingface_hub import constants, errors

    name, revision = asked
    chain = _chain(error)
    kinds = [type(link) for link in chain]
    said = next(iter(str(error).strip().splitlines()), "no reason given")[:300]
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    what = "model" if kind == "model" else "data set"
    at = f"{name}@{revision}" if revision else name

    def is_(cls: type, *words: str) -> bool:
        # `datasets` raises its own error in the place of the client's, and may cut the chain to it.
        return any(issubclass(one, cls) for one in kinds) or any(word in said for word in words)

    if is_(errors.GatedRepoError, "gated dataset"):
        return (
            f"{name}: a gated {what}, which the hub does not give to you. Ask for access on {page}; when it was "
            "granted, log in with `hf auth login` or set HF_TOKEN"
        )
    if is_(errors.RevisionNotFoundError, "Revision '"):
        return (
            f"{name}: the hub has no revision {revision!r} of this {what}. Give a commit, a tag or a branch that "
            f"{page}/commits/main lists, or no revision for the newest"
        )
    if is_(errors.RepositoryNotFoundError, "doesn't exist on the Hub"):
        return (
            f"{name}: neither a local directory nor a {what} of the hub that it would give to you ({said}). See that "
            "the name is right, its owner included (ORG/NAME); if it is private, log in with `hf auth login` or set "
            "HF_TOKEN"
        )
    if constants.HF_HUB_OFFLINE:
        return (
            f"{at}: neither a local directory nor a {what} that is whole in the cache, and HF_HUB_OFFLINE is set. "
            f"Unset it, or {elsewhere}"
        )
    if is_(errors.LocalEntryNotFoundError) or is_(ConnectionError):
        return (
            f"{at}: neither a local directory nor a {what} that is whole in the cache, and the hub cannot be reached "
            f"({said}). Run again with a connection, or {elsewhere}"
        )
    return (
        f"{at}: neither a local directory nor a {what} the hub would give ({type(error).__name__}: {said}). Run again, "
        f"or {elsewhere}"
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and those that it was raised from."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__
    return found
