"""Trains a tiny Llama from scratch on the generator's problems: how the bundled teacher was made."""

import contextlib
import dataclasses
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from rtd_jax.apps.report.tables import depth_table
from rtd_jax.base import signals
from rtd_jax.base.console import Display, print_table
from rtd_jax.base.files import finite_report, write_json
from rtd_jax.base.lock import one_writer
from rtd_jax.base.means import Metrics
from rtd_jax.base.settings import SEED, check_filled, check_ranges
from rtd_jax.base.sharding import MeshSettings, check_rows, host_share, make_mesh, put_batch, row_sharding
from rtd_jax.base.types import Batch
from rtd_jax.data.encoding import EncodedChain, encode_traces
from rtd_jax.data.formats import TextFormat, solved_examples
from rtd_jax.data.loader import BatchLoader
from rtd_jax.data.sources import SourceSettings, closed_words, load_traces
from rtd_jax.data.tiny_tokenizer import tiny_tokenizer
from rtd_jax.data.tokenizer_match import vocab_size
from rtd_jax.data.trace import Trace, problem_key
from rtd_jax.eval.evaluate import ChainEvaluator, DecodingSettings, decoding_notes, first_of_each_depth
from rtd_jax.eval.ready import check_evaluation
from rtd_jax.eval.scoring import ScoringSettings
from rtd_jax.methods.kd import Labels
from rtd_jax.methods.term import Objective
from rtd_jax.models.config import DecoderConfig
from rtd_jax.models.model import DecoderModel
from rtd_jax.models.rope import RopeConfig
from rtd_jax.models.to_hf import save_pretrained
from rtd_jax.train.checkpoints import Checkpoints, check_same_settings, read_meta, restore_state
from rtd_jax.train.loop import Loop, stopped_after
from rtd_jax.train.metrics import MetricsLog
from rtd_jax.train.optimizer import OptimizerSettings, make_optimizer
from rtd_jax.train.outputs import check_outputs, check_saves
from rtd_jax.train.state import TrainState, create_state, state_shardings
from rtd_jax.train.update import make_train_step


@dataclass(frozen=True)
class SizeSettings:
    """Shape of the network."""

    layers: int  # transformer blocks
    width: int  # hidden units
    mlp_width: int  # hidden units of the SwiGLU
    heads: int  # query heads
    kv_heads: int  # key/value heads, each shared by heads / kv_heads query heads
    head_dim: int  # units of one head
    rope_theta: float = 10_000.0  # base of the rotary angles
    max_positions: int = 1024  # tokens; written to config.json

    def __post_init__(self) -> None:
        sizes = ("layers", "width", "mlp_width", "heads", "kv_heads", "head_dim")
        check_ranges(self, **dict.fromkeys(sizes, "[1, 1e6]"), rope_theta="(1, 1e12]", max_positions="[1, 1e8]")


@dataclass(frozen=True)
class Phase:
    """A stretch of a pretraining: short problems first, because copying from the prompt is learned fastest there."""

    updates: int  # optimizer updates
    max_depth: int  # reasoning steps of the deepest problem
    batch_size: int  # rows per update
    row_length: int  # tokens
    chains_per_row: int  # at most

    def __post_init__(self) -> None:
        check_ranges(self, updates="[1, 1e9]", max_depth="[1, 1000]", batch_size="[1, 1e6]")
        check_ranges(self, row_length="[2, 1e7]", chains_per_row="[1, 1e5]")


@dataclass(frozen=True)
class PretrainRecipe:
    """A pretraining run: phases one after the other under one learning-rate schedule."""

    model: SizeSettings
    train: SourceSettings
    test: SourceSettings
    phases: tuple[Phase, ...]  # one after the other, each a dict with updates, max_depth, batch_size, row_length, ..
    optimizer: OptimizerSettings
    text: TextFormat = TextFormat()
    shot_fraction: float = 0.1  # of chains that come behind a solved example: the model can then read few-shot prompts
    mesh: MeshSettings = MeshSettings()
    problems_per_depth: int = 200  # of the final evaluation
    max_new_tokens: int = 128  # of a generated solution
    log_every: int = 20  # updates
    checkpoint_every: int = 250  # updates
    seed: int = 0  # of params, data order and few-shot choices

    def __post_init__(self) -> None:
        check_filled(self, "phases")
        check_ranges(self, shot_fraction="[0, 1]", problems_per_depth="[1, 1e6]", max_new_tokens="[1, 1e6]", seed=SEED)
        check_ranges(self, log_every="[1, 1e9]", checkpoint_every="[1, 1e9]")

    @property
    def total_updates(self) -> int:
        return sum(phase.updates for phase in self.phases)


@one_writer(lambda recipe, workdir: workdir)
def pretrain(recipe: PretrainRecipe, workdir: Path) -> Path:
    """Runs or resumes a pretraining. Returns the Hugging Face folder it writes, <workdir>/model.

    Raises:
      ValueError: bad settings, data, checkpoints or disk; the message has the place and the way out.
    """
    started = time.monotonic()
    if jax.process_index() == 0:
        check_outputs(workdir, "model")
    settings = dataclasses.asdict(recipe)
    checkpoints = Checkpoints(workdir, keep=2)
    latest = checkpoints.latest()
    if latest is not None:
        check_same_settings(latest, recipe)
    mesh = make_mesh(recipe.mesh)
    for phase in recipe.phases:
        check_rows(phase.batch_size, mesh)
    tokenizer = tiny_tokenizer(closed_words(recipe.train.schema))
    check_saves(tokenizer)
    model = DecoderModel(model_config(recipe.model, tokenizer), activation_sharding=row_sharding(mesh))
    traces = load_traces(recipe.train)
    loaders = [_loader(recipe, number, traces, tokenizer, mesh) for number in range(1, 1 + len(recipe.phases))]
    problems = first_of_each_depth(load_traces(recipe.test), recipe.problems_per_depth)
    scoring = ScoringSettings(recipe.phases[-1].row_length, recipe.phases[-1].batch_size)
    evaluator = ChainEvaluator(tokenizer, recipe.text, DecodingSettings(recipe.max_new_tokens), scoring, mesh)
    check_evaluation(evaluator, problems, {"model": model.config}, "")
    optimizer = make_optimizer(recipe.optimizer, recipe.total_updates)
    params_key, run_key = jax.random.split(jax.random.PRNGKey(recipe.seed))

    def fresh_state(key: jax.Array) -> TrainState:
        return create_state({"student": model.init(key)}, optimizer, run_key)

    shardings = state_shardings(jax.eval_shape(fresh_state, params_key), optimizer, mesh, {})
    state, position, line = jax.jit(fresh_state, out_shardings=shardings)(params_key), None, None
    if latest is not None:
        meta = read_meta(latest)
        state, position = restore_state(latest, state), json.loads(meta["iterator"])
        line = json.loads(meta.get("line", "null"))
    objective = Objective((Labels(1.0, vocab_size(tokenizer)),))
    update = make_train_step(model, None, optimizer, objective)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return update(state, {}, put_batch(batch, mesh), objective.coefficients())

    start = int(state.step)
    with (
        contextlib.closing(MetricsLog(workdir, start)) as log,
        Display(recipe.total_updates, start, silent=jax.process_index() != 0) as display,
    ):
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        display.note(f"pretraining {parameters:,} parameters on {len(traces)} problems from update {start}: {workdir}")
        log_periods = (recipe.log_every, recipe.checkpoint_every)

        def loop_of(number: int, state: TrainState, line: dict[str, Any] | None) -> Loop:
            where = ("phase", number)
            return Loop(state, loaders[number - 1], step, mesh, where, log, display, log_periods, _shown, line)

        # Several processes would have to stop at the same update, so a signal stops them where they are.
        with signals.finishing() if jax.process_count() == 1 else contextlib.nullcontext():
            state = _train_phases(recipe, checkpoints, loop_of, state, position, line)
        params = state.params["student"]
        save_pretrained(workdir / "model", model.config, params, tokenizer=tokenizer, text=recipe.text)
        notes = decoding_notes(display.note, "model")
        result, _ = evaluator(model, state.params["student"], problems, progress=notes)
    report = {
        "model": result,
        "updates": int(state.step),
        "wall_seconds": round(time.monotonic() - started, 1),
        "settings": settings,
    }
    report, not_finite = finite_report(report)
    if not_finite:
        report["not_finite"] = not_finite
    write_json(workdir / "report.json", report)
    print_table("Accuracy by reasoning depth (± one standard error)", *depth_table(report["model"]))
    print(
        f"next: distill it with `python launch/train.py --config=configs/rtd_tiny.py "
        f"--config.teacher.path={workdir / 'model'}`"
    )
    return workdir / "model"


def _shown(means: dict[str, float], speed: float) -> dict[str, str]:
    return {"loss": f"{means['loss']:.4f}", "tokens/s": f"{speed:,.0f}"}


def _train_phases(
    recipe: PretrainRecipe,
    checkpoints: Checkpoints,
    loop_of: Callable[[int, TrainState, dict[str, Any] | None], Loop],
    state: TrainState,
    position: dict[str, Any] | None,
    line: dict[str, Any] | None,
) -> TrainState:
    """Trains the phases that are not finished; `position` and `line` are those of the phase that is open."""
    start, last = int(state.step), 0  # the run's first update, and the one at which a phase ends
    for number, phase in enumerate(recipe.phases, start=1):
        last += phase.updates
        if start >= last:
            continue
        loop = loop_of(number, state, line)
        if position is not None:
            loop.loader.set_state(position)
        loop.run(partial(_save_or_end, recipe, checkpoints, last))
        state, position, line = loop.state, None, None
    return state


def _save_or_end(recipe: PretrainRecipe, checkpoints: Checkpoints, last: int, loop: Loop) -> bool:
    """Saves a rolling checkpoint where one is due, and at the phase's end, there without a position in its data.

    Raises:
      Stopped: a signal asked for it, inside `signals.finishing`; the state was saved.
    """
    is_end, is_asked = loop.update == last, signals.asked()
    if loop.update and (is_end or is_asked or loop.update % recipe.checkpoint_every == 0):
        loop.settle()
        position, line = (None, None) if is_end else (loop.loader.get_state(), loop.line)
        meta = {"iterator": json.dumps(position), "line": json.dumps(line), "settings": dataclasses.asdict(recipe)}
        checkpoints.save_rolling(loop.state, meta)
    if is_asked and not is_end:
        raise stopped_after(loop.update)
    return is_end


def model_config(sizes: SizeSettings, tokenizer: PreTrainedTokenizerBase) -> DecoderConfig:
    """A Llama of these sizes over this tokenizer, embeddings tied."""
    shape = dataclasses.asdict(sizes)
    config = DecoderConfig(
        vocab_size=vocab_size(tokenizer),
        norm_eps=1e-5,
        rope=RopeConfig(theta=shape.pop("rope_theta")),
        tied_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )
    config.check_readable()
    return config


def _loader(
    recipe: PretrainRecipe, number: int, traces: Sequence[Trace], tokenizer: PreTrainedTokenizerBase, mesh: Mesh
) -> BatchLoader:
    """The batches of phase `number`, counted from 1."""
    phase = recipe.phases[number - 1]
    chosen = [trace for trace in traces if trace.depth <= phase.max_depth]
    if not chosen:
        raise ValueError(f"phase {number} has no problem of depth {phase.max_depth} or less; raise its max_depth")
    return BatchLoader(
        [(encode_chains(chosen, recipe, phase, tokenizer), 1.0)],
        rows=phase.batch_size,
        row_length=phase.row_length,
        chains_per_row=phase.chains_per_row,
        max_boundaries=1 + phase.max_depth,
        seed=recipe.seed * 1000 + number,
        share=host_share(mesh),
    )


def encode_chains(
    traces: Sequence[Trace], recipe: PretrainRecipe, phase: Phase, tokenizer: PreTrainedTokenizerBase
) -> list[EncodedChain]:
    """The phase's chains; `shot_fraction` of them stand behind a solved example, where the row has room for both."""
    chains, _ = encode_traces(tokenizer, traces, recipe.text, row_length=phase.row_length)
    rng = random.Random(recipe.seed)
    shallow = [trace for trace in traces if trace.depth <= 2]
    for index in rng.sample(range(len(traces)), int(recipe.shot_fraction * len(traces))):
        shot = rng.choice(shallow)
        if problem_key(shot.prompt) == problem_key(traces[index].prompt):
            continue  # a problem's own solution would stand before it
        text = replace(recipe.text, context=solved_examples(recipe.text, [(shot.prompt, shot.completion)]))
        prefixed, _ = encode_traces(
            tokenizer, [traces[index]], text, row_length=phase.row_length, max_dropped_fraction=1.0
        )
        if prefixed:
            chains[index] = prefixed[0]
    return chains
