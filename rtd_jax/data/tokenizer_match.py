"""Compares two tokenizers by their content.

Distillation compares the distributions of two models token by token, so an id must stand for the same text in both.
Equal names prove nothing, so the comparison reads what a fast tokenizer would write to tokenizer.json.
"""

import hashlib
import itertools
import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

_RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>|<unused_?\d+>|\[unused\d+\]")
_SHOWN = 5  # differing ids that an error lists at most
# What maps text to ids. Padding, truncation and chat template do not; the post-processor only adds special tokens,
# which rtd_jax writes itself.
_TEXT_PARTS = ("normalizer", "pre_tokenizer", "decoder")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what maps text to ids and back: vocabulary, merges, (pre-)processing, special tokens."""
    content = _content(tokenizer)
    content["bos"], content["eos"] = tokenizer.bos_token, tokenizer.eos_token
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Highest token id + 1: ids from here on are padding of a model's vocabulary.

    `len(tokenizer)` is the number of tokens, which is less where some ids below the highest belong to no token.
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def compare_tokenizers(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    teacher_name: str = "teacher",
    student_name: str = "student",
) -> list[str]:
    """Notes on tolerated differences; empty where there are none.

    Tolerated are reserved slots that one side has since given a name (Llama-3 and Llama-3.1/3.2), and different
    begin-of-sequence or end-of-sequence choices among the same tokens.

    Raises:
      ValueError: the tokenizers differ otherwise; the error says where.
    """
    ours, theirs = _content(teacher), _content(student)
    notes: list[str] = []
    problems: list[str] = []
    reserved, real = _id_differences(ours, theirs)
    if real:
        problems.append(f"{len(real)} ids differ, first {_listed(real)}")
    if reserved:
        names = f"{teacher_name} and {student_name}"
        notes.append(f"{len(reserved)} reserved slots are named differently in {names}: {_listed(reserved)}")
    problems += _merge_differences(ours["merges"], theirs["merges"])
    problems += [
        f"the {part} differs: {json.dumps(ours[part])[:120]} / {json.dumps(theirs[part])[:120]}"
        for part in ("model", *_TEXT_PARTS)
        if ours[part] != theirs[part]
    ]
    if problems:
        raise ValueError(
            f"the tokenizers of {teacher_name} ({len(ours['ids'])} tokens) and {student_name} ({len(theirs['ids'])} "
            f"tokens) differ: {' | '.join(problems)}. Distillation compares the models token by token: choose a "
            "student of the teacher's family, or save the student with the teacher's tokenizer if it was made for it"
        )
    for role in ("bos_token", "eos_token"):
        if getattr(teacher, role) != getattr(student, role):
            notes.append(
                f"{role} is {getattr(teacher, role)!r} in {teacher_name}, {getattr(student, role)!r} in {student_name}"
            )
    return notes


def compare_special_tokens(
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    teacher_name: str = "teacher",
    student_name: str = "student",
) -> list[str]:
    """Notes on special tokens that two tokenizers of the same ids use differently; empty where there are none.

    Compared are the tokens of padding and of what is unknown, and which tokens are special at all: these are left out
    of decoded text. `compare_tokenizers` compares how sequences begin and end.
    """
    notes: list[str] = []
    for role in ("pad_token", "unk_token"):
        ours, theirs = getattr(teacher, role), getattr(student, role)
        if ours != theirs:
            notes.append(f"{role} is {ours!r} in {teacher_name}, {theirs!r} in {student_name}")
    sides = (teacher_name, teacher), (student_name, student)
    special = {
        name: {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        for name, tokenizer in sides
    }
    for name, without in ((teacher_name, student_name), (student_name, teacher_name)):
        only = sorted(token for token in special[name] - special[without] if not _RESERVED.fullmatch(token))
        if only:
            listed = ", ".join(map(repr, only[:_SHOWN])) + (", ..." if len(only) > _SHOWN else "")
            notes.append(f"{len(only)} tokens are special in {name}, but not in {without}: {listed}")
    return notes


def _content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no fast form; save it with a tokenizer.json")
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    model = dict(whole["model"])
    vocabulary = model.pop("vocab")
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model.pop("merges", [])]
    if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of ids
        ids = {str(index): token for index, (token, _) in enumerate(vocabulary)}
        model["scores"] = [score for _, score in vocabulary]
    else:
        ids = {str(index): token for token, index in vocabulary.items()}
    added = {str(token["id"]): token for token in whole.get("added_tokens") or []}
    ids |= {index: token["content"] for index, token in added.items()}
    return {
        "ids": ids,
        "special": sorted(index for index, token in added.items() if token["special"]),
        "merges": merges,
        "model": model,
        **{part: whole.get(part) for part in _TEXT_PARTS},
    }


_Difference = tuple[int, str | None, str | None]


def _id_differences(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[list[_Difference], list[_Difference]]:
    """(tolerated, real) differences as (id, our token, their token), by id."""
    reserved: list[_Difference] = []
    real: list[_Difference] = []
    for index in sorted(ours["ids"].keys() | theirs["ids"].keys(), key=int):
        first, second = ours["ids"].get(index), theirs["ids"].get(index)
        if first == second:
            continue
        spare = [token is not None and _RESERVED.fullmatch(token) is not None for token in (first, second)]
        harmless = [
            is_spare or token is None or index in side["special"]
            for is_spare, token, side in zip(spare, (first, second), (ours, theirs), strict=True)
        ]
        (reserved if any(spare) and all(harmless) else real).append((int(index), first, second))
    return reserved, real


def _listed(differences: list[_Difference]) -> str:
    return "; ".join(f"id {i}: {first!r} / {second!r}" for i, first, second in differences[:_SHOWN])


def _merge_differences(ours: list[tuple[str, ...]], theirs: list[tuple[str, ...]]) -> list[str]:
    if ours == theirs:
        return []
    place, pair = next((i, pair) for i, pair in enumerate(itertools.zip_longest(ours, theirs)) if pair[0] != pair[1])
    first, second = (merge and " ".join(merge) for merge in pair)
    return [f"the merges differ ({len(ours)} / {len(theirs)}), first at merge {place}: {first!r} / {second!r}"]
