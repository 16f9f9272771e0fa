"""The student's own chains: drawn, scored step by step, and made ready for the policy term.

What is drawn depends on the run's key, the update and the student alone. So it is not in a checkpoint: a resumed run
draws it again, where new chains are due.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from rtd_jax.apps.distill.prepare import Experiment
from rtd_jax.base.boundaries import shifted_labels, step_boundaries
from rtd_jax.base.sharding import host_share, put_batch, row_sharding, row_ways, to_host
from rtd_jax.base.types import Array, Batch, Params
from rtd_jax.data.by_length import round_up
from rtd_jax.data.encoding import EncodedChain
from rtd_jax.data.formats import stop_token_ids
from rtd_jax.data.packing import fixed_batches
from rtd_jax.eval.decoding import GenerateSettings, Sampling, generate
from rtd_jax.losses.policy import Rollouts, of_tokens, step_advantages, token_log_probs
from rtd_jax.teacher.reward_head import make_step_reader, step_logits
from rtd_jax.train.curriculum import Stage
from rtd_jax.train.state import TrainState
from rtd_jax.train.update import split_rows

# (state, stage) -> the chains of each update until new ones are due, and what was drawn in numbers
Sampler = Callable[[TrainState, Stage], tuple[list[Rollouts], dict[str, float]]]


def make_sampler(experiment: Experiment) -> Sampler:
    """Builds the function that draws chains from the current student and has the reward model score their steps."""
    settings, data, mesh = experiment.recipe.reward, experiment.recipe.data, experiment.mesh
    assert experiment.reward is not None, "the recipe has no reward model"
    head = jax.tree.map(np.asarray, experiment.reward.head)  # on the host: the same for every process
    slots = 2 * experiment.max_boundaries  # a chain that runs on is to be scored as such, not cut to its good part
    decoding = GenerateSettings(
        max_new_tokens=settings.max_new_tokens,
        eos_ids=stop_token_ids(experiment.tokenizer, data.text),
        vocab_size=experiment.vocab_size,
        batch_size=round_up(settings.batch_size, row_ways(mesh)),
        pad_id=experiment.tokenizer.pad_token_id or 0,
        sampling=Sampling(settings.temperature),
    )
    score = make_scorer(experiment)
    text_of = cache(lambda token: str(experiment.tokenizer.decode([token], skip_special_tokens=True)))

    def draw(state: TrainState, stage: Stage) -> tuple[list[Rollouts], dict[str, float]]:
        words = np.asarray(to_host(state.rng)).ravel().tolist()
        rng = np.random.default_rng([*words, int(state.step)])
        pool, student_params = experiment.train.of_stage(stage).encoded, state.params["student"]
        chosen = rng.choice(len(pool), settings.prompts, replace=len(pool) < settings.prompts)
        problems = [pool[i] for i in chosen for _ in range(settings.samples)]
        prompts = [chain.tokens[: chain.prompt_length].tolist() for chain in problems]
        first = int(rng.integers(2**30))  # of the draws' streams; the seed stays, because it is compiled in
        written = generate(
            experiment.student,
            student_params,
            prompts,
            decoding,
            streams=[first + i for i in range(len(prompts))],
            batch_sharding=row_sharding(mesh),
        )
        ended = [len(ids) < settings.max_new_tokens for ids in written]
        chains = [
            drawn_chain(prompt, ids, list(map(text_of, ids)), has_ended, data.row_length, slots - 1)
            for prompt, ids, has_ended in zip(prompts, written, ended, strict=True)
        ]
        drawn, sums = [], np.zeros(2)
        for batch in fixed_batches(chains, settings.rows, data.row_length, 1, slots, share=host_share(mesh)):
            rollouts, added = score(student_params, experiment.teacher_params, head, put_batch(batch, mesh))
            drawn.append(rollouts)
            sums += jax.device_get(added)
        return drawn, {
            "reward/step_reward": float(sums[0] / max(sums[1], 1.0)),
            "reward/steps_per_chain": float(np.mean([chain.depth for chain in chains])),
            "reward/ended": float(np.mean(ended)),
        }

    return draw


def make_scorer(experiment: Experiment) -> Callable[[Params, Params, Params, Batch], tuple[Rollouts, Array]]:
    """Builds (student, teacher, head, drawn chains) -> (Rollouts, (sum of step rewards, steps)).

    Chains of one problem are neighbours. Rows go through the models in micro-batches, as in an update.
    """
    recipe, mesh, student = experiment.recipe, experiment.mesh, experiment.student
    assert experiment.reward is not None
    assert experiment.teacher is not None
    identity, sizes = experiment.reward.identity, (experiment.vocab_size, recipe.loss.chunk_length)
    read = make_step_reader(experiment.teacher, identity.layers, identity.surprise, *sizes)

    def score_rows(student_params: Params, teacher_params: Params, head: Params, batch: Batch) -> tuple[Array, Array]:
        hidden_BLS = student.hidden(student_params, batch.tokens_BL, batch.positions_BL, batch.chain_ids_BL)
        made_BL = token_log_probs(
            hidden_BLS,
            student.head(student_params),
            *shifted_labels(batch),
            temperature=recipe.reward.temperature,
            vocab_size=sizes[0],
            chunk_length=sizes[1],
        )
        old_BL = jnp.pad(made_BL[:, :-1], ((0, 0), (1, 0)))  # from where a prediction is made to the token itself
        return jax.nn.sigmoid(step_logits(head, read(teacher_params, batch))), old_BL

    @jax.jit
    def score(student_params: Params, teacher_params: Params, head: Params, batch: Batch) -> tuple[Rollouts, Array]:
        parts = split_rows(batch, recipe.micro_batches, mesh)
        scored = jax.lax.map(partial(score_rows, student_params, teacher_params, head), parts)
        # Part p has rows p, p + parts, ..: put back in order.
        rewards_BCK, old_BL = (jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]) for x in scored)
        mask_BCK = step_boundaries(batch.boundary_mask_BCK)
        group = (recipe.reward.prompts_per_update, recipe.reward.samples, mask_BCK.shape[-1])
        advantages_GNK = step_advantages(rewards_BCK.reshape(group), mask_BCK.reshape(group))
        advantages_BL = of_tokens(advantages_GNK.reshape(mask_BCK.shape), batch)
        sums = jnp.stack([jnp.sum(jnp.where(mask_BCK, rewards_BCK, 0.0)), jnp.sum(mask_BCK).astype(jnp.float32)])
        rollouts = jax.lax.with_sharding_constraint(Rollouts(batch, old_BL, advantages_BL), row_sharding(mesh))
        return rollouts, sums

    return score


def drawn_chain(
    prompt: Sequence[int],
    written: Sequence[int],
    texts: Sequence[str],
    has_ended: bool,
    row_length: int,
    max_steps: int,
) -> EncodedChain:
    """What the student wrote, as a chain: its own ids, and a boundary at the end of each finished step.

    A step is a line that is not blank. The line of the answer ("####") ends the chain and is no step. The last line is
    finished where the student ended the text there. Loss weights are 1 on the tokens of steps, 0 elsewhere.

    Args:
      prompt, written: token ids; the text is not tokenised again, which might give others than the student chose.
      texts: the text of each written id.
      has_ended: whether the student ended the text, or the limit on its length did.
      row_length: tokens of a row; what is beyond is left out, and a step that ends there too.
      max_steps: later steps are left out.
    """
    place_of = [place for place, text in enumerate(texts) for _ in text]  # the token of each character
    lines = "".join(texts).split("\n")
    ends, start = [], 0
    for line in lines if has_ended else lines[:-1]:
        if line.strip().startswith("####"):
            break
        if line.strip():
            ends.append(len(prompt) + place_of[start + len(line.rstrip()) - 1])
        start += len(line) + 1
    # Two lines that end in one token are one step: a boundary has a token of its own.
    steps = [end for end in dict.fromkeys(ends) if end < row_length][:max_steps]
    tokens = np.asarray([*prompt, *written], np.int32)[:row_length]
    weights = np.zeros(len(tokens), np.float32)
    if steps:
        weights[len(prompt) : steps[-1] + 1] = 1.0
    return EncodedChain(tokens, len(prompt), np.array([len(prompt) - 1, *steps], np.int32), weights, "drawn")
