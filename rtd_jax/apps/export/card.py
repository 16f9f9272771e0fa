"""The model card of an exported student, made from what its run wrote."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtd_jax.apps.export.licence import OTHER, Licence, combined
from rtd_jax.apps.report.sections import Section, markdown_of
from rtd_jax.apps.report.tables import number, percent
from rtd_jax.base.settings import defaults, settings_of, unread_settings
from rtd_jax.data.formats import TextFormat
from rtd_jax.data.generators import GENERATORS
from rtd_jax.data.sources import SourceSettings
from rtd_jax.eval.tasks import TASKS
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.schemes import Scheme
from rtd_jax.models.weights import parameter_count
from rtd_jax.train.recipe import Recipe

NOT_FOUND = "the licence of the {role} could not be found: ask before you share"
# Settings that name places of the machine, or how it was used: they say nothing to a reader, and may be private.
_PLACES = ("path", "revision", "location", "cache", "steps_cache", "model", "server", "resume_from")
_IN_THE_TABLE = ("schema", "split", "subset", "limit", "depths")  # of data
_OF_THE_MACHINE = ("teacher.serving.", "mesh.", "log_every", "checkpoint_every", "keep_checkpoints")
_ENGLISH = ("gsm8k", "math", "strategyqa", "arc")  # published data sets; so are all generated problems
_BEGAN = {
    "pretrained": "the weights of {start}",
    "teacher_layers": "the teacher's embeddings and {layers} of its layers, at equal distances",
    "pruned": "the teacher's weights, pruned",
    "random": "random weights",
}


@dataclass(frozen=True)
class Parent:
    """A model that the student learned from, or began as."""

    role: str  # "teacher"
    path: str  # as the recipe names it
    is_local: bool
    revision: str  # that was asked for; "" was the newest
    commit: str  # that was read; "" where that is not known
    licence: Licence

    @property
    def hub_name(self) -> str:
        """Its name on the hub; "" for a local folder."""
        return "" if self.is_local else self.path.partition("@")[0]

    @property
    def title(self) -> str:
        """What the card calls it: of a local folder the name alone."""
        if self.is_local:
            return f"`{Path(self.path).name}` (a local folder)"
        link = f"[{self.hub_name}](https://huggingface.co/{self.hub_name})"
        if self.commit:
            return f"{link} at commit `{self.commit}`"
        return f"{link} at revision `{self.revision}`" if self.revision else f"{link} (its commit was not recorded)"


@dataclass(frozen=True)
class Subject:
    """What a card is about."""

    name: str  # heading
    address: str  # what a reader loads it by: hub name, or the name of the folder
    recipe: Recipe
    report: Mapping[str, Any]  # of the run
    config: DecoderConfig
    text: TextFormat
    scheme: Scheme | None  # by which its weights are rounded
    is_evaluated: bool  # whether the report's numbers are of these weights, and not of their rounded form
    parents: Sequence[Parent]  # the teacher first
    problem: str  # an example

    @property
    def licence(self) -> Licence:
        return combined([parent.licence for parent in self.parents])


def make_card(subject: Subject) -> str:
    """The text of README.md: front matter for the hub, and what a reader has to know."""
    from huggingface_hub import ModelCard, ModelCardData  # slow to import

    licence, recipe = subject.licence, subject.recipe
    # No model-index: the accuracies are of a sample of problems chosen by depth, and would be read as a benchmark's.
    data = ModelCardData(
        license=licence.id,
        license_name=licence.name or None,
        license_link=licence.link or None,
        language="en" if all(source.schema in _english() for source in sources(recipe).values()) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["distillation", "reasoning", "rtd_jax"],
        datasets=sorted({name for split in sources(recipe) if (name := _data_name(subject, split))}) or None,
        **_base_model(subject),
    )
    lines = [f"# {subject.name}", "", *_about(subject)]
    for section in (_origin(subject), _data(subject), _accuracy(subject)):
        lines += markdown_of(section)
    lines += [*_recipe(subject), *_commands(subject), *_limits(subject)]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)))


def sources(recipe: Recipe) -> dict[str, SourceSettings]:
    """Where the problems of each split are from; validation may be a part of the training split."""
    splits = {split: getattr(recipe.data, split) for split in ("train", "validation", "test")}
    return {split: source for split, source in splits.items() if source is not None}


def is_generated(source: SourceSettings) -> bool:
    return all(part in GENERATORS for part in source.schema.split("+"))


def _english() -> tuple[str, ...]:
    return (*GENERATORS, "synthetic+cups", *_ENGLISH)


def _base_model(subject: Subject) -> dict[str, Any]:
    """The models whose weights it has, where the hub has them: what it began as."""
    if subject.recipe.student.init == "random":
        return {}
    start = subject.parents[-1]
    if not start.hub_name:
        return {}
    return {"base_model": start.hub_name, "base_model_relation": "finetune"}


def _about(subject: Subject) -> list[str]:
    recipe, config = subject.recipe, subject.config
    teacher, start = subject.parents[0], subject.parents[-1]
    began = _BEGAN[recipe.student.init].format(start=start.title, layers=config.layers)
    size = parameter_count(config) / 1e6
    millions = f"{size:,.{2 if size < 10 else 0}f}"
    weights = {
        key: value for key, value in dataclasses.asdict(recipe.loss).items() if key.endswith("_weight") and value
    }
    if recipe.loss.alpha:
        weights = {"alpha": recipe.loss.alpha} | weights
    loss = ", ".join(f"`loss.{key}` {value:g}" for key, value in weights.items())
    lines = [
        f"A `{config.family}` model of {config.layers} layers, width {config.width} and {millions} "
        f"million parameters, distilled from {teacher.title} with rtd_jax (Reasoning Trace Distillation). It began as "
        f"{began}, and was trained for {subject.report['updates']:,} updates"
        + (f" (weights of the loss: {loss})." if loss else " by cross-entropy on texts alone."),
        "",
    ]
    if subject.scheme is not None:
        lines += [
            f"Its matrices are rounded ({subject.scheme.name}), as they were in training; transformers loads it with "
            f"the package {'bitsandbytes' if subject.scheme.qtype == 'nf4' else 'compressed-tensors'}.",
            "",
        ]
    return lines


def _origin(subject: Subject) -> Section:
    text = []
    for parent in subject.parents:
        licence = parent.licence
        if licence.id:
            who = f"its {licence.said_in}" if licence.said_in else "whoever exported this"
            said = f"its licence is **{licence}**, as {who} says"
            link = licence.link if licence.link.startswith("http") else ""
            said += f" ({link})" if link else ""
        else:
            said = NOT_FOUND.format(role=parent.role)
        text.append(f"The {parent.role} is {parent.title}; {said}.")
    if any(parent.licence.id for parent in subject.parents):
        text.append(
            "What such a licence asks of models that are made from its model, or learn from its outputs, it asks of "
            "this one."
        )
    return Section("Models and licence", 2, text)


def _data_name(subject: Subject, split: str) -> str:
    """The data set of a split on the hub, without its revision; "" where it has none there."""
    source = sources(subject.recipe)[split]
    if is_generated(source) or _origins(subject, split).get("is_local", True):
        return ""
    return source.location.partition("@")[0]


def _origins(subject: Subject, split: str) -> Mapping[str, Any]:
    return subject.report.get("origins", {}).get("data", {}).get(split, {})


def _data(subject: Subject) -> Section:
    rows = []
    for split, source in sources(subject.recipe).items():
        name, place = _data_name(subject, split), ""
        if is_generated(source):
            place = "generated by rtd_jax"
        elif name:
            origin = _origins(subject, split)
            version = origin.get("commit") or origin.get("revision")
            place = f"[{name}](https://huggingface.co/datasets/{name})" + (f" at `{version}`" if version else "")
        else:
            place = "a local folder or file"
        depths = ", ".join(map(str, source.depths)) or "all"
        part = "/".join(filter(None, (source.subset, source.split)))
        chains = f"{source.limit:,}" if source.limit else "all"
        rows.append([split, place, f"`{source.schema}`", part, chains, depths])
    recipe, tokens = subject.recipe, subject.report.get("tokens", {})
    text = []
    if recipe.data.validation is None:
        text.append(
            f"Validation chains are {recipe.data.validation_fraction:.0%} of the training chains, chosen by hash."
        )
    if tokens.get("data"):
        own = f", and on {tokens['own']:,} of chains that it drew itself" if tokens.get("own") else ""
        text.append(f"It was trained on {tokens['data']:,} predicted tokens of the training chains{own}.")
    if recipe.data.segmentation != "annotated":
        text.append(f"Steps end where `data.segmentation` {_public(recipe.data.segmentation)!r} says.")
    return Section("Data", 2, text, ["used for", "from", "schema", "split", "chains", "depths"], rows)


def _accuracy(subject: Subject) -> Section:
    report = subject.report
    models = {name: report[name] for name in ("student", "teacher") if name in report}
    heads = {"chain_accuracy": "chain %", "answer": "answer %"}
    shown = [(name, key) for key in heads for name in models if models[name].get(key)]
    rows = [
        [depth, str(chains["n"]), *(percent(models[name][key].get(depth)) for name, key in shown)]
        for depth, chains in report["student"]["chain_accuracy"].items()
    ]
    text = [
        "Test problems by the steps of their own solution. *Chain*: the answer is right and no step of what the model "
        "wrote is false; *answer*: the answer is right. In percent, with one standard error; decoding: "
        f"{report['student'].get('decoding', 'greedy')}."
    ]
    if not subject.is_evaluated:
        text.append(
            "**These numbers are of the rounded student of the same run, not of the float weights that lie here**, "
            "which were not evaluated."
        )
    if "teacher" not in models:
        text.append("The teacher itself was not evaluated in this run.")
    else:
        told = ", ".join(
            f"{name} {number(models[name]['perplexity'])}" for name in models if "perplexity" in models[name]
        )
        text.append(f"Perplexity on the reference solutions: {told}.")
    return Section(
        "Accuracy by depth", 2, text, ["steps", "problems", *(f"{name}, {heads[key]}" for name, key in shown)], rows
    )


def _recipe(subject: Subject) -> list[str]:
    """The settings that differ from the defaults, as a config file has them."""
    unread = unread_settings(subject.recipe)
    rows = []
    for setting in settings_of(Recipe, defaults(Recipe, dataclasses.asdict(subject.recipe))):
        key, last = setting.key, setting.key.rpartition(".")[2]
        is_unread = any(f"{key}.".startswith(f"{prefix}.") for prefix in unread)
        is_shown = key.startswith("data.") and last in _IN_THE_TABLE
        if setting.value == setting.default or is_unread or is_shown or last in _PLACES:
            continue
        if not key.startswith(_OF_THE_MACHINE):
            value = _public(setting.value) if key == "data.segmentation" else setting.value
            rows.append((f"c.{key} = {value!r}", setting.meaning))
    width = max(len(line) for line, _ in rows)
    return [
        "## Recipe",
        "",
        "The settings of `launch/train.py` that differ from the defaults, without the data above, and places on the "
        "machine and its use:",
        "",
        "```python",
        *(f"{line:<{width}}  # {meaning}" for line, meaning in rows),
        "```",
        "",
    ]


def _public(value: str) -> str:
    """A setting "classifier:<folder>" with the folder's name alone."""
    kind, colon, folder = value.partition(":")
    return f"{kind}{colon}{Path(folder).name}"


def _commands(subject: Subject) -> list[str]:
    text, tokens = subject.text, subject.recipe.evaluation.max_new_tokens
    if text.kind == "chat":
        ask = [
            f"messages = [{{'role': 'user', 'content': {text.fill(subject.problem)!r}}}]",
            "inputs = tokenizer.apply_chat_template(",
            "    messages, add_generation_prompt=True, return_tensors='pt', return_dict=True",
            ")",
        ]
    else:
        ask = [f"inputs = tokenizer({text.fill(subject.problem)!r}, return_tensors='pt')"]
    return [
        "## Use",
        "",
        "It was trained on one form of text, and answers worse in another:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({subject.address!r})",
        f"model = AutoModelForCausalLM.from_pretrained({subject.address!r})",
        *ask,
        f"outputs = model.generate(**inputs, max_new_tokens={tokens}, do_sample=False)",
        "print(tokenizer.decode(outputs[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True))",
        "```",
        "",
        "To measure it by depth, from a clone of rtd_jax:",
        "",
        "```bash",
        _evaluate(subject),
        "```",
        "",
    ]


def _evaluate(subject: Subject) -> str:
    schema, text = subject.recipe.data.test.schema, subject.text
    task = next((name for name, task in TASKS.items() if task.schema == schema and not task.is_choice), "synthetic")
    flags = [f"--model={shlex.quote(subject.address)}", f"--tasks={task}"]
    if task == "synthetic":
        flags.append(f"--limit={subject.report['student'].get('problems', 600)}")
    else:
        flags.append("--few_shot=0")
        if text.kind == "chat":
            flags.append("--chat")
        if text.template != (TASKS[task].prompt if text.kind == "plain" else "{prompt}"):
            flags.append(f"--prompt_template={shlex.quote(text.template)}")
    flags.append(f"--max_new_tokens={subject.recipe.evaluation.max_new_tokens}")
    return f"python launch/evaluate.py {' '.join(flags)}"


def _limits(subject: Subject) -> list[str]:
    recipe, problems = subject.recipe, subject.report["student"].get("problems")
    kind = (
        "generated problems" if is_generated(recipe.data.test) else f"problems of the form `{recipe.data.test.schema}`"
    )
    counted = f"{problems:,} {kind}" if problems else kind
    return [
        "## Limits",
        "",
        f"Nothing was measured but {counted} in the form of text above: what it does with other questions, languages "
        "or forms is not known, and no safety evaluation was made. The numbers are of one run with one seed "
        f"(`seed` {recipe.seed}), so another seed may differ by more than the standard errors, which are over problems "
        "alone.",
        "",
    ]


def licence_warnings(parents: Sequence[Parent], licence: Licence) -> list[str]:
    """What whoever shares the model must know of its licence."""
    warnings = [f"{NOT_FOUND.format(role=parent.role)} ({parent.path})" for parent in parents if not parent.licence.id]
    if not warnings and licence.id == OTHER and len({str(parent.licence) for parent in parents}) > 1:
        both = " and ".join(f"{parent.licence} (of the {parent.role})" for parent in parents)
        warnings.append(f"two licences hold at once, {both}: see that both allow what you want to do")
    return warnings
