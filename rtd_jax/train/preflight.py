"""What can be told of a recipe's models and chains before any weight is read, as named checks.

`launch/check.py` prints them all. A run makes the same ones in its first seconds: it stops where one fails, and prints
the warnings.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rtd_jax.data.formats import check_end, render, stop_token_ids
from rtd_jax.data.tokenizer_match import compare_special_tokens, compare_tokenizers
from rtd_jax.data.trace import problem_key
from rtd_jax.models.config import DecoderConfig, as_ids
from rtd_jax.models.from_hf import check_params
from rtd_jax.models.open import OpenModel, check_rows_of_ids, generation_ids, load_tokenizer
from rtd_jax.models.text_record import read_text_format
from rtd_jax.models.weights import parameter_count
from rtd_jax.train.curriculum import Stage, few_problems
from rtd_jax.train.recipe import Recipe
from rtd_jax.train.splits import Chains
from rtd_jax.train.student import check_weights, start_folder

Status = Literal["ok", "warn", "fail"]
# Of a conversation, in the spelling of common templates. Where the tokenizer has them as special tokens, they are
# refused in texts; where it has not, they would be learned letter by letter.
_MARKUP = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>", "[INST]", "<start_of_turn>", "<|user|>")


@dataclass(frozen=True)
class Check:
    """What was checked, and what was found, in one line. A warning or a failure says the way out."""

    name: str
    status: Status
    line: str


Finding = tuple[str, Sequence[str]]  # a line for the case that all is well, and the warnings


def outcome(name: str, find: Callable[[], Finding]) -> list[Check]:
    """The checks of a name: a failure where `find` raises ValueError, else its warnings, else that all is well."""
    try:
        well, warnings = find()
    except ValueError as error:
        return [Check(name, "fail", " ".join(str(error).split()))]
    return [Check(name, "warn", line) for line in warnings] or [Check(name, "ok", well)]


def settle(checks: Sequence[Check], note: Callable[[str], None]) -> None:
    """What a run does with checks: stops at failures, and notes the warnings.

    Raises:
      ValueError: with the lines of all that fail.
    """
    failed = [check.line for check in checks if check.status == "fail"]
    if failed:
        raise ValueError(failed[0] if len(failed) == 1 else f"{len(failed)} checks fail: {' | '.join(failed)}")
    for check in checks:
        if check.status == "warn":
            note(f"warning: {check.name}: {check.line}")


@dataclass(frozen=True, eq=False)
class _Models:
    """Teacher and student of a recipe, by their files."""

    recipe: Recipe
    teacher: OpenModel
    student: DecoderConfig
    has_teacher_weights: bool

    @functools.cached_property
    def folder(self) -> Path | None:
        """Of a student that begins with a checkpoint; None where it is made from the teacher, or from nothing."""
        return start_folder(self.recipe.student) if self.recipe.student.init == "pretrained" else None

    @functools.cached_property
    def student_tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the student's folder."""
        assert self.folder is not None
        return load_tokenizer(self.folder)

    @functools.cached_property
    def end(self) -> int:
        """The token with which a chain ends, and at which a generation has to stop."""
        return stop_token_ids(self.teacher.tokenizer, self.recipe.data.text)[0]

    def named(self, ids: Sequence[int]) -> str:
        """Ids with their tokens: "'<eos>' (2)"."""
        tokens = self.teacher.tokenizer.convert_ids_to_tokens(list(ids))
        return ", ".join(f"{token!r} ({i})" for i, token in zip(ids, tokens, strict=True)) or "none"


def model_checks(
    recipe: Recipe, teacher: OpenModel, student: DecoderConfig, *, has_teacher_weights: bool = True
) -> list[Check]:
    """Checks that weights, tokenizers, templates and ids of teacher and student agree, by the headers of the weights.

    Args:
      student: the student's sizes.
      has_teacher_weights: whether the teacher's weights are here to be looked at.
    """
    models = _Models(recipe, teacher, student, has_teacher_weights)
    checks = [
        *outcome("teacher weights", lambda: _teacher_weights(models)),
        *outcome("student weights", lambda: _student_weights(models)),
        *(readable := outcome("tokenizer", lambda: _tokenizer(models))),
    ]
    if readable[0].status == "fail":  # all that follows needs it
        return checks
    checks += outcome("vocabulary rows", lambda: _vocabulary_rows(models))
    if models.folder is not None:
        same = outcome("same tokenizer", lambda: _same_tokenizer(models))
        if same[0].status == "fail":
            return checks + same
        checks += same + outcome("special tokens", lambda: _special_tokens(models))
    form = outcome("chat template", lambda: _template(models))
    checks += form
    checks += outcome("form of text", lambda: _form_of_text(models))
    has_end = form[0].status != "fail"
    checks += outcome("token ids", lambda: _token_ids(models, models.end if has_end else None))
    return checks + (outcome("end of a chain", lambda: _end_of_chain(models)) if has_end else [])


def _teacher_weights(models: _Models) -> Finding:
    recipe, teacher = models.recipe, models.teacher
    if recipe.teacher.cache and recipe.student.init not in ("teacher_layers", "pruned"):
        return f"not read: the teacher's outputs come from teacher.cache {recipe.teacher.cache}", ()
    if not models.has_teacher_weights:
        return "", (f"the weights of {recipe.teacher.path} are not here yet; a run downloads them when it starts",)
    if recipe.student.init == "pruned":
        check_weights(recipe.student, teacher)  # says what for
    check_params(teacher.directory, teacher.config)
    return f"{parameter_count(teacher.config):,} numbers, named and shaped as config.json says", ()


def _student_weights(models: _Models) -> Finding:
    count = f"{parameter_count(models.student):,} numbers"
    if models.folder is None:
        return f"{count}, from no checkpoint of its own (student.init is {models.recipe.student.init!r})", ()
    check_weights(models.recipe.student, models.teacher)
    check_params(models.folder, models.student)
    return f"{count}, named and shaped as config.json says", ()


def _tokenizer(models: _Models) -> Finding:
    teacher = models.teacher
    return f"{len(teacher.tokenizer):,} tokens, ids up to {teacher.vocab_size - 1:,} ({teacher.directory})", ()


def _vocabulary_rows(models: _Models) -> Finding:
    teacher, student = models.teacher, models.student
    check_rows_of_ids(student, teacher.vocab_size, "the student", teacher.directory)
    rows = ", ".join(
        f"{config.vocab_size:,} of the {name} ({config.vocab_size - teacher.vocab_size:,} padding)"
        for name, config in (("teacher", teacher.config), ("student", student))
    )
    return f"{teacher.vocab_size:,} ids; rows: {rows}; padding gets no probability", ()


def _same_tokenizer(models: _Models) -> Finding:
    notes = compare_tokenizers(
        models.teacher.tokenizer, models.student_tokenizer, str(models.teacher.directory), str(models.folder)
    )
    way_out = "the student is saved with the teacher's tokenizer: use that one for it from now on"
    warnings = [f"{note}; {way_out}" for note in notes]
    return f"that of {models.folder} has the same tokens, merges and rules", warnings


def _special_tokens(models: _Models) -> Finding:
    notes = compare_special_tokens(models.teacher.tokenizer, models.student_tokenizer)
    way_out = "the student is saved with the teacher's tokenizer: use that one for it from now on"
    return "the same on both sides", [f"{note}; {way_out}" for note in notes]


def _template(models: _Models) -> Finding:
    tokenizer, text = models.teacher.tokenizer, models.recipe.data.text
    check_end(tokenizer, text)
    if text.kind == "plain":
        unused = ", and the chat template is not used" if tokenizer.chat_template else ""
        return f"not needed: data.text.kind is 'plain'{unused}", ()
    well = "writes every chain as a conversation"
    if models.folder is None:
        return well, ()
    student = models.student_tokenizer
    if not student.chat_template:
        return f"{well}; the student has none and is saved with the teacher's", ()
    sample = "How many is 1 + 1?", "It is 2."
    try:
        differs = render(tokenizer, *sample, text) != render(student, *sample, text)
    except ValueError as error:
        return "", (f"the student's own does not work ({error}); it is saved with the teacher's",)
    warning = (
        "teacher and student write the same conversation in two ways; the student learns the teacher's and is saved "
        "with it: ask it in that form, or give both folders the same chat_template"
    )
    return f"{well}, and the student's writes the same", (warning,) if differs else ()


def _form_of_text(models: _Models) -> Finding:
    text = models.recipe.data.text
    record = read_text_format(models.teacher.directory)
    if record is None:
        return f"{text.kind}; the teacher's folder does not say which one it was trained on", ()
    warning = (
        f"the teacher was trained on another form of text ({_described(record)}) than data.text ({_described(text)}), "
        "in which it knows less; set the keys of data.text to the teacher's, unless you mean it"
    )
    differs = record.identity != text.identity
    return f"{text.kind}, the one that the teacher was trained on", (warning,) if differs else ()


def _described(text: Any) -> str:
    prefix = f", completion_prefix={text.completion_prefix!r}" if text.kind == "plain" else ""
    context = f", context={text.context[:40]!r}" if text.context else ""
    return f"kind={text.kind!r}, prompt_template={text.template!r}{prefix}{context}"


def _stops(directory: Path, config: DecoderConfig) -> tuple[int, ...]:
    """The ids at which transformers and serving engines stop a generation of the model in a folder."""
    generation = as_ids(generation_ids(directory, config).get("eos_token_id"))
    return tuple(dict.fromkeys((*as_ids(config.eos_token_id), *generation)))


def _token_ids(models: _Models, end: int | None) -> Finding:
    """Compares the ids that each folder's files give to the beginning, the end and the padding of texts.

    Args:
      end: the token that ends a chain, of which `_end_of_chain` says more; None where there is none.
    """
    folders = [(models.teacher.directory, models.teacher.config, models.teacher.tokenizer)]
    if models.folder is not None:
        folders.append((models.folder, models.student, models.student_tokenizer))
    warnings = []
    for directory, config, tokenizer in folders:
        generation = generation_ids(directory, config)
        for role in ("bos", "pad"):
            key = f"{role}_token_id"
            given = {
                "config.json": getattr(config, key),
                "generation_config.json": generation.get(key),
                "the tokenizer": getattr(tokenizer, key),
            }
            known = {place: value for place, value in given.items() if value is not None}
            if len(set(known.values())) > 1:
                listed = ", ".join(f"{value} in {place}" for place, value in known.items())
                warnings.append(
                    f"{directory}: {key} is {listed}; texts here are written by the tokenizer, so set the others to "
                    "its id where other programs read them"
                )
        stops, eos = _stops(directory, config), tokenizer.eos_token_id
        is_the_end = directory == models.teacher.directory and eos == end
        if stops and eos is not None and eos not in stops and not is_the_end:
            warnings.append(
                f"{directory}: by config.json and generation_config.json generations stop at {models.named(stops)}, "
                f"but the tokenizer's eos_token is {models.named([eos])}; add it to eos_token_id, or set eos_token"
            )
    return "where config.json, generation_config.json and the tokenizer name bos, eos and pad, they agree", warnings


def _end_of_chain(models: _Models) -> Finding:
    """Whether the token that ends a chain is one at which generations of both models stop.

    Raises:
      ValueError: it is the tokenizer's end of sequence, and config.json of the same folder names others only. One of
        the two is wrong, and all chains would teach it.
    """
    teacher, end, shown = models.teacher, models.end, models.named([models.end])
    stops = _stops(teacher.directory, teacher.config)
    warnings = []
    if stops and end not in stops:
        problem = (
            f"{teacher.directory}: chains end with {shown}, but by config.json and generation_config.json generations "
            f"stop at {models.named(stops)}"
        )
        if end == teacher.tokenizer.eos_token_id:
            raise ValueError(
                f"{problem}; one of the two is wrong: set eos_token_id in config.json to {end}, or eos_token in "
                "tokenizer_config.json to the token that the teacher ends with"
            )
        warnings.append(f"{problem}, so a server would let the teacher write on; add {end} to its eos_token_id")
    saved = as_ids(models.student.eos_token_id)
    if models.folder is not None and end not in _stops(models.folder, models.student):
        warnings.append(
            f"chains end with {shown}, but generations of {models.folder} stop at {models.named(saved)}: the student "
            f"is saved with {end} beside these in its eos_token_id; nothing is to be done for it"
        )
    if not stops:
        warnings.append(
            f"{teacher.directory}: config.json has no eos_token_id, and chains end with {shown}: other programs would "
            f"let the teacher write on; add eos_token_id {end}"
        )
    return f"{shown}, at which generations stop", warnings


def chain_checks(
    recipe: Recipe,
    plan: Sequence[Stage],
    splits: Mapping[str, Chains],
    models: Mapping[str, DecoderConfig],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Check]:
    """Checks encoded chains against the row, the curriculum and the models' positions.

    Args:
      splits: "training" and "validation".
      models: teacher and student by name.
    """
    return [
        *outcome("longest chain", lambda: _longest_chain(recipe, splits)),
        *outcome("positions", lambda: _positions(splits, models)),
        *outcome("curriculum", lambda: _curriculum(recipe, plan, splits)),
        *outcome("markup", lambda: _markup(splits, tokenizer)),
    ]


def _longest_chain(recipe: Recipe, splits: Mapping[str, Chains]) -> Finding:
    row_length = recipe.data.row_length
    warnings = [
        f"{name}: {chains.too_long} chains longer than a row of {row_length} tokens were left out, none is cut; "
        f"data.row_length={chains.longest} would hold all"
        for name, chains in splits.items()
        if chains.too_long
    ]
    listed = ", ".join(f"{chains.longest} in {name} ({len(chains.encoded):,})" for name, chains in splits.items())
    return f"tokens of the longest: {listed}; a row holds {row_length}", warnings


def _positions(splits: Mapping[str, Chains], models: Mapping[str, DecoderConfig]) -> Finding:
    longest = max((len(chain) for chains in splits.values() for chain in chains.encoded), default=0)
    warnings = [
        f"chains have up to {longest} tokens, but the {name} was made for {config.max_positions} "
        "(max_position_embeddings), and knows little of what lies beyond; lower data.row_length and allow "
        "data.max_dropped_fraction"
        for name, config in models.items()
        if longest > config.max_positions
    ]
    most = ", ".join(f"the {name} {config.max_positions:,}" for name, config in models.items())
    return f"chains have up to {longest} tokens, and {most} positions", warnings


def _curriculum(recipe: Recipe, plan: Sequence[Stage], splits: Mapping[str, Chains]) -> Finding:
    """Raises ValueError where a stage has no chain."""
    for split, chains in splits.items():
        for stage in plan:
            if not any(stage.holds(trace.depth) for trace in chains.traces):
                depths = sorted({trace.depth for trace in chains.traces})
                raise ValueError(
                    f"curriculum stage {stage.name} has no {split} chain: the chains have {depths} steps. Set "
                    f"curriculum.depths to depths that exist, e.g. {tuple(depths[:5])}, or add data"
                )
    traces = splits["training"].traces
    problems = {
        stage.name: len({problem_key(trace.prompt) for trace in traces if stage.holds(trace.depth)}) for stage in plan
    }
    warning = few_problems(problems, recipe.curriculum)
    of_depth = Counter(trace.depth for trace in traces)
    counts = ", ".join(f"{of_depth[depth]:,} of {depth}" for depth in sorted(of_depth))
    return f"stages {', '.join(stage.name for stage in plan)}; training chains by steps: {counts}", (
        [warning] if warning else []
    )


def _markup(splits: Mapping[str, Chains], tokenizer: PreTrainedTokenizerBase) -> Finding:
    """Finds marks of a conversation that are plain letters to the tokenizer."""
    found = Counter(
        mark for chains in splits.values() for trace in chains.traces for mark in _MARKUP if mark in _written(trace)
    )
    warnings = [
        f"{count} chains have {mark!r} in them, which is ordinary text to the tokenizer {tokenizer.name_or_path!r}: "
        "rows that are whole conversations already; give prompt and completion as plain text, and set "
        "data.text.kind='chat' for a template"
        for mark, count in found.items()
    ]
    return "no mark of a chat template stands in the chains as text", warnings


def _written(trace: Any) -> str:
    return f"{trace.prompt}\n{trace.completion}"
