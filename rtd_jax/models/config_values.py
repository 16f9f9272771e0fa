"""Readers of single values of a config.json. Each raises a ValueError that names the key."""

from collections.abc import Callable
from typing import Any

import numpy as np

_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_MOST = 2**31 - 1  # of any size: token ids and positions are int32


def whole(key: str, value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{key} is {shown(value)}; expected a whole number, as in the original config.json")
    if not 1 <= value <= _MOST:
        raise ValueError(f"{key} is {shown(value)}; it must be at least 1, and at most {_MOST:,}")
    return value


def positive(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not _SMALLEST <= value <= _LARGEST:
        raise ValueError(f"{key} is {shown(value)}; expected a positive finite number, as in the original config.json")
    return float(value)


def share(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError(f"{key} is {shown(value)}; expected a number from 0 to 1, as in the original config.json")
    return float(value)


def flag(key: str, value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{key} is {shown(value)}; expected true or false, as in the original config.json")
    return value


def token_ids(key: str, value: Any) -> int | tuple[int, ...] | None:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int for token in ids):
        raise ValueError(f"{key} is {shown(value)}; expected a token id, a list of them, or null")
    if key == "pad_token_id" and value == -1:
        return None  # how the first Llamas said that there is none
    return tuple(value) if isinstance(value, list) else value


def shown(value: Any) -> str:
    """A value, or the beginning of a long one."""
    return "null" if value is None else repr(value)[:80]


def agreed(places: dict[str, Any], read: Callable[[str, Any], Any]) -> Any:
    """The value that one or several places of a config.json give; None where all are null or absent.

    Raises:
      ValueError: two places give different values.
    """
    found = {place: read(place, value) for place, value in places.items() if value is not None}
    for place, value in found.items():
        first = next(iter(found))
        if value != found[first]:
            raise ValueError(
                f"{first} is {shown(places[first])} but {place} is {shown(places[place])}; remove the one that the "
                "model was not trained with"
            )
    return next(iter(found.values()), None)
