"""From problems to a teacher's own chains of thought: requested, judged and written as shards that `datasets` reads."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rtd_jax.apps.traces.local_settings import JaxSettings
from rtd_jax.apps.traces.select import OUTCOMES, Selected, SelectionSettings, select
from rtd_jax.base.console import print_table
from rtd_jax.base.files import check_writable, replacing, write_jsonl
from rtd_jax.base.settings import check_ranges
from rtd_jax.data.formats import TextFormat, solved_examples
from rtd_jax.data.manifest import LOG, begin_manifest, check_folder, finish_manifest, shard_names
from rtd_jax.data.sources import SourceSettings, load_problems, load_traces
from rtd_jax.data.trace import problem_key
from rtd_jax.eval.chains import check_reference
from rtd_jax.teacher.served.asking import ask_for_missing
from rtd_jax.teacher.served.log import ResponseLog, recorded_identity
from rtd_jax.teacher.served.requests import Backend, OpenAISettings, SamplingSettings, make_requests


@dataclass(frozen=True)
class OutputSettings:
    """The shards: `<split>-00000-of-00003.jsonl`, rows of the `stepwise` schema."""

    format: Literal["jsonl", "parquet"] = "jsonl"  # of the files
    split: str = "train"  # name of the split in the files' names
    rows_per_shard: int = 10_000  # chains of a file

    def __post_init__(self) -> None:
        check_ranges(self, rows_per_shard="[1, 1e9]")
        shard_names(self.split, 1, self.format)  # refuses what cannot begin a file's name


@dataclass(frozen=True)
class TracesRecipe:
    """Which problems a teacher solves, how it is asked, and which of its chains are kept."""

    problems: SourceSettings
    backend: Literal["jax", "openai"]  # a teacher in this process, or a server of OpenAI's completions API
    examples: SourceSettings | None = None  # solved examples put before every problem, in the form of the text
    text: TextFormat = TextFormat("chat")  # of the prompt; "chat" leaves the template to the server or tokenizer
    sampling: SamplingSettings = SamplingSettings()
    jax: JaxSettings = JaxSettings()
    openai: OpenAISettings = OpenAISettings()
    selection: SelectionSettings = SelectionSettings()
    output: OutputSettings = OutputSettings()

    def unread_settings(self) -> dict[str, str]:
        return {"openai" if self.backend == "jax" else "jax": f"backend is {self.backend!r}"}


def write_traces(recipe: TracesRecipe, workdir: Path) -> Path:
    """Requests the chains that the log in `workdir` lacks, then writes shards and a manifest from the log.

    Returns the manifest's path. The shards depend only on the log, the recipe and the problems: a run that was killed
    and continued, however often, writes the same bytes as one that was not, if the teacher's replies are the same.

    Raises:
      ValueError: problems, teacher, server, settings or files that cannot be used; the message has the way out. Replies
        that arrived before are in the log.
    """
    check_writable(workdir)
    check_folder(workdir, recipe.output.split)  # before minutes of asking
    known = _known(recipe.selection.tokenizer)
    problems = load_problems(recipe.problems)
    for problem in problems:
        check_reference(problem)
    examples = load_traces(recipe.examples) if recipe.examples else []
    asked = {problem_key(problem.prompt) for problem in problems}
    shared = next((trace for trace in examples if problem_key(trace.prompt) in asked), None)
    if shared is not None:
        raise ValueError(f"{shared.source} is a solved example and a problem too; take examples from another split")
    context = solved_examples(recipe.text, [(trace.prompt, trace.completion) for trace in examples])
    text = dataclasses.replace(recipe.text, context=recipe.text.context + context)
    backend = _backend(recipe, text)
    sampling = dataclasses.asdict(recipe.sampling)
    samples = sampling.pop("samples")  # not part of the identity: more samples are added to those in the log
    sampling["stop"] = list(sampling["stop"])
    asks = {"kind": text.kind, "prompt": text.fill("{prompt}")}
    identity = recorded_identity(workdir, {**backend.identity(), "sampling": sampling, "text": asks})
    requests = make_requests(problems, samples, recipe.sampling.seed, identity)
    with ResponseLog(workdir, identity) as log:
        number = f"{len(problems)} problems, {len(requests)} chains"
        replies = ask_for_missing(backend, requests, log, number, "chains")
        selected = select(requests, replies, recipe.selection, known)
        digest = hashlib.sha256()
        for request_id, reply in sorted(replies.items()):
            digest.update(json.dumps([request_id, *reply]).encode())
        about = {
            "teacher": identity,
            "samples": samples,
            "problems": {"source": dataclasses.asdict(recipe.problems), "number": len(problems)},
            "selection": dataclasses.asdict(recipe.selection),
            "replies_sha256": digest.hexdigest(),
            "counts": selected.counts,
            "kept_by_depth": selected.kept_by_depth,
        }
        manifest = _write_shards(recipe.output, workdir, selected, about)
    _print(selected, manifest)
    if not selected.rows:
        print(
            f"warning: no chain is right and whole, so no shard was written: look into {workdir / LOG}; then change "
            "text, sampling or selection",
            flush=True,
        )
    prompts = {request.problem.prompt for request in requests}
    texts = {(request.problem.prompt, replies[request.id].text) for request in requests}
    if samples > 1 and len(texts) == len(prompts):
        print(
            f"warning: the {samples} chains of every problem are alike, so the teacher seems to have decoded greedily. "
            "`transformers serve` does unless the model's generation_config.json has do_sample true",
            flush=True,
        )
    return manifest


def _known(path: str) -> Callable[[str], bool]:
    """A function that says whether the tokenizer at `path` knows all tokens of a text."""
    if not path:
        return lambda text: True
    from rtd_jax.models.from_hf import resolve
    from rtd_jax.models.open import load_tokenizer

    tokenizer = load_tokenizer(resolve(path))
    return lambda text: tokenizer.unk_token_id not in tokenizer(text, add_special_tokens=False)["input_ids"]


def _backend(recipe: TracesRecipe, text: TextFormat) -> Backend:
    # Each is slow to import, and a server as teacher needs no models here.
    if recipe.backend == "jax":
        from rtd_jax.apps.traces.local import JaxBackend

        return JaxBackend(recipe.jax, text, recipe.sampling)
    from rtd_jax.teacher.served.server import OpenAIBackend

    return OpenAIBackend(recipe.openai, text, recipe.sampling)


def _write_shards(output: OutputSettings, workdir: Path, selected: Selected, about: dict[str, Any]) -> Path:
    """Writes the kept chains, and the manifest, which says `about` them. Returns the manifest's path."""
    rows, size = selected.rows, output.rows_per_shard
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    names = shard_names(output.split, len(parts), output.format)
    begin_manifest(workdir, names)
    for name, part in zip(names, parts, strict=True):
        if output.format == "jsonl":
            write_jsonl(workdir / name, part)
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            with replacing(workdir / name) as temporary:
                pq.write_table(pa.Table.from_pylist(part), temporary)
    return finish_manifest(
        workdir, [(workdir / name, len(part)) for name, part in zip(names, parts, strict=True)], about
    )


def _print(selected: Selected, manifest: Path) -> None:
    rows = [(depth, *(found[outcome] for outcome in OUTCOMES)) for depth, found in selected.counts.items()]
    print_table("Chains by the depth of the problem's own solution", ("depth", *OUTCOMES), rows)
    kept = ", ".join(f"{depth}: {count}" for depth, count in selected.kept_by_depth.items())
    print(f"kept by their own number of steps: {kept}")
    print(f"manifest: {manifest}", flush=True)
