"""Uploads an exported folder to the Hugging Face hub, and says what to do where the hub does not take it."""

from collections.abc import Callable
from pathlib import Path

_OF_THE_HUB = {".gitattributes"}  # which a new repository has from the start


def check_name(name: str) -> None:
    """Raises ValueError where a repository cannot be named so."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub is {name!r}: {error}") from error


def push(folder: Path, name: str, record: str, *, private: bool, note: Callable[[str], None] = print) -> str:
    """Makes the repository `name` hold what is in `folder`, and nothing else. Returns its address.

    Args:
      name: "org/name"; made if it does not exist.
      record: file that marks a repository, and the folder, as an export of ours.
      private: whether only its owners may see it.

    Raises:
      ValueError: the repository has other content, or is public although a private one is asked for; there is no token
        or it has no right to write; or there is no connection. Says what to do.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        if api.repo_exists(name):
            _check_ours(api.list_repo_files(name), name, record)
            if private and not api.repo_info(name).private:
                raise ForeignRepository(
                    f"{name} exists and is public, so --private would not hide what is pushed; make it private on "
                    f"https://huggingface.co/{name}/settings, or give another name"
                )
        else:
            api.create_repo(name, private=private, exist_ok=True)
        note(f"uploading {folder} to {name}")
        # What the repository has of an earlier export, such as a weight file that there is no longer, is removed.
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Export of an rtd_jax run", delete_patterns="*"
        )
    except ForeignRepository:
        raise
    except Exception as error:  # the hub's client raises its own, the HTTP library's and the system's errors
        raise ValueError(_refusal(error, folder, name)) from error
    return f"https://huggingface.co/{name}"


class ForeignRepository(ValueError):
    """A repository that an upload would spoil."""


def _check_ours(files: list[str], name: str, record: str) -> None:
    """Raises ForeignRepository where a repository has files and is no earlier export."""
    others = sorted(set(files) - _OF_THE_HUB)
    if others and record not in others:
        raise ForeignRepository(
            f"{name} holds {others[0]} and no {record}, so it is no earlier export, and its files would be replaced; "
            "give another name, or delete that repository"
        )


def _refusal(error: Exception, folder: Path, name: str) -> str:
    """What to do about an upload that failed."""
    from huggingface_hub import constants, errors

    said = next(iter(str(error).strip().splitlines()), "no reason given")[:300]
    status = getattr(getattr(error, "response", None), "status_code", None)
    later = f"{folder} is whole; run the same command again, or `hf upload {name} {folder} .`"
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return (
            f"{name}: the hub does not know who you are ({said}). Log in with `hf auth login`, or set HF_TOKEN to a "
            f"token with the right to write. {later}"
        )
    if status == 403:
        return (
            f"{name}: your token may not write there ({said}). Take a token with the right to write, or have "
            f"{name.partition('/')[0]} give you that right, or push to a name of your own. {later}"
        )
    if constants.HF_HUB_OFFLINE:
        return f"{name}: nothing was uploaded, because HF_HUB_OFFLINE is set; unset it. {later}"
    return f"{name}: the upload failed ({type(error).__name__}: {said}). {later}"
