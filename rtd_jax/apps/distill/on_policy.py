"""On-policy distillation: the student's own chains, packed into rows as the data's are, for the teacher to read."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from rtd_jax.apps.distill.own_chains import (
    Drawn,
    Sampler,
    Writer,
    draw_problems,
    drawn_chain,
    prompt_of,
    rng_of,
    span_ends,
    step_ends,
    texts_of,
)
from rtd_jax.apps.distill.prepare import Experiment
from rtd_jax.base.sharding import host_share, put_batch
from rtd_jax.data.encoding import EncodedChain
from rtd_jax.data.packing import host_rows, one_batch, packed_rows, token_features
from rtd_jax.data.prose import prose_steps
from rtd_jax.data.trace import Trace, is_answer_line
from rtd_jax.eval.decoding import Sampling
from rtd_jax.steps.select import stride_of, window_ends
from rtd_jax.train.curriculum import Stage
from rtd_jax.train.state import TrainState

SAMPLE = 512  # chains that are packed to find how many go into a row

# (problems, the text of each written id, whether the student ended it) of every chain -> the ids at which steps end
StepFinder = Callable[[Sequence[Trace], Sequence[Sequence[str]], Sequence[bool]], list[list[int]]]


def make_on_policy_sampler(experiment: Experiment) -> Sampler:
    """Builds the function that draws chains from the current student for updates until new ones are due.

    Problems are drawn as the data's chains are, from the depths of `curriculum.mixture`. Each update gets as many
    chains as the data would put into its rows. What does not fit, because the student wrote more than the data do, is
    left out and counted.
    """
    recipe, mesh = experiment.recipe, experiment.mesh
    settings, data = recipe.on_policy, recipe.data
    slots = 2 * experiment.max_boundaries  # what a student that runs on writes has more steps than the data's
    sampling = Sampling(settings.temperature, settings.top_p)
    writer = Writer.of(experiment, settings.max_new_tokens, settings.batch_size, sampling)
    texts, _ = texts_of(experiment.tokenizer)
    find = step_finder(experiment)
    # Which of several ids ended a text is not read by any loss: that one of them came next there is what is learned.
    end = writer.settings.eos_ids[:1]

    def draw(state: TrainState, stage: Stage) -> Drawn:
        rng = rng_of(state)
        groups = experiment.train.mixture(stage, recipe.curriculum)
        of_stage, _ = groups[0]
        wanted = round(recipe.own_rows * chains_a_row(of_stage.encoded, data.row_length, data.chains_per_row))
        count = settings.updates_per_refresh * wanted
        chosen = draw_problems(groups, count, rng)
        chosen = [chosen[i] for i in rng.permutation(count)]
        prompts = [prompt_of(chain) for chain, _ in chosen]
        written = writer.write(state, prompts, rng)
        ended = [writer.has_ended(ids) for ids in written]
        pieces = [texts(ids) for ids in written]
        ends = find([trace for _, trace in chosen], pieces, ended)
        chains = [
            drawn_chain(
                prompt,
                (*ids, *(end if is_whole else ())),
                of_steps,
                data.row_length,
                slots - 1,
                whole=True,
                texts=of_ids,
            )
            for prompt, ids, is_whole, of_steps, of_ids in zip(prompts, written, ended, ends, pieces, strict=True)
        ]
        batches, left_out = [], 0
        for start in range(0, count, wanted):
            own = chains[start : start + wanted]
            batch, fitting = one_batch(own, recipe.own_rows, data.row_length, data.chains_per_row, slots)
            batches.append(batch)
            left_out += len(own) - fitting
        means = {
            "own/tokens_per_chain": float(np.mean([len(ids) for ids in written])),
            "own/steps_per_chain": float(np.mean([chain.depth for chain in chains])),
            "own/ended": float(np.mean(ended)),
            "own/left_out": left_out / count,
        }
        placed = [put_batch(host_rows(batch, host_share(mesh)), mesh) for batch in batches]
        counted = [(batch.chain_ids_BL, batch.loss_weights_BL) for batch in batches]
        tokens = [(int(np.count_nonzero(ids)), int(np.count_nonzero(weights))) for ids, weights in counted]
        return Drawn(placed, tokens, means)

    return draw


def chains_a_row(chains: Sequence[EncodedChain], row_length: int, most: int) -> float:
    """How many chains of the data are in one of their rows, on average; from a sample of the chains."""
    items = [token_features(chain) for chain in chains[:SAMPLE]]
    return len(items) / len(packed_rows(items, row_length, open_rows=len(items), chains_per_row=most))


def step_finder(experiment: Experiment) -> StepFinder:
    """How the steps of the student's own text are found: `on_policy.steps`."""

    def by_lines(traces: Sequence[Trace], texts: Sequence[Sequence[str]], ended: Sequence[bool]) -> list[list[int]]:
        return [step_ends(of_ids, has_ended)[0] for of_ids, has_ended in zip(texts, ended, strict=True)]

    def by_rules(traces: Sequence[Trace], texts: Sequence[Sequence[str]], ended: Sequence[bool]) -> list[list[int]]:
        return [
            span_ends(of_ids, prose_steps("".join(of_ids)), has_ended)
            for of_ids, has_ended in zip(texts, ended, strict=True)
        ]

    def by_classifier(
        traces: Sequence[Trace], texts: Sequence[Sequence[str]], ended: Sequence[bool]
    ) -> list[list[int]]:
        assert experiment.detector is not None, "on_policy.steps=classifier goes with data.segmentation=classifier:.."
        # Nothing is kept on disk: the texts are new each time.
        detector = replace(experiment.detector, folder=None, note=lambda _: None)
        bodies = [before_answer("".join(of_ids)) for of_ids in texts]
        own = [i for i, body in enumerate(bodies) if body.strip()]
        spans = dict(
            zip(own, detector.find([(traces[i].prompt, bodies[i], "a drawn chain") for i in own]), strict=True)
        )
        return [
            span_ends(of_ids, spans.get(i, ()), has_ended or len(bodies[i]) < len("".join(of_ids)))
            for i, (of_ids, has_ended) in enumerate(zip(texts, ended, strict=True))
        ]

    def by_stride(traces: Sequence[Trace], texts: Sequence[Sequence[str]], ended: Sequence[bool]) -> list[list[int]]:
        return [window_ends(0, len(of_ids), stride)[1:].tolist() for of_ids in texts]

    stride = stride_of(experiment.recipe.data.segmentation)
    if stride:
        return by_stride
    return {"lines": by_lines, "prose": by_rules, "classifier": by_classifier}[experiment.recipe.on_policy.steps]


def before_answer(text: str) -> str:
    """The text up to the line that states the answer."""
    start = 0
    for line in text.splitlines(keepends=True):
        if is_answer_line(line.strip()):
            return text[:start]
        start += len(line)
    return text
