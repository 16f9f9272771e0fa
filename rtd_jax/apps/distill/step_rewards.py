"""Rewards of the student's own chains, step by step, made ready for the policy term."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rtd_jax.apps.distill.judged_rewards import judged_rewards
from rtd_jax.apps.distill.own_chains import (
    Drawn,
    Sampler,
    Writer,
    draw_problems,
    drawn_chain,
    prompt_of,
    rng_of,
    step_ends,
    step_texts,
    texts_of,
)
from rtd_jax.apps.distill.prepare import Experiment
from rtd_jax.base.boundaries import shifted_labels, step_boundaries
from rtd_jax.base.sharding import host_share, put_batch, row_sharding
from rtd_jax.base.types import Array, Batch, Params
from rtd_jax.data.encoding import EncodedChain
from rtd_jax.data.packing import fixed_batches
from rtd_jax.eval.decoding import Sampling
from rtd_jax.losses.policy import Rollouts, of_tokens, step_advantages, token_log_probs
from rtd_jax.teacher.reward_head import make_step_reader, step_logits
from rtd_jax.train.curriculum import Stage
from rtd_jax.train.state import TrainState
from rtd_jax.train.update import split_rows


def make_reward_sampler(experiment: Experiment) -> Sampler:
    """Builds the function that draws chains from the current student and has their steps rewarded.

    A reward model scores them on the devices, or the judge by rules on the host: every process judges all chains, which
    it has whole, and so needs no word from the others.
    """
    settings, data, mesh = experiment.recipe.reward, experiment.recipe.data, experiment.mesh
    teacher_params, head = {}, {}
    if experiment.reward is not None:
        teacher_params = experiment.teacher_params
        head = jax.tree.map(np.asarray, experiment.reward.head)  # on the host: the same for every process
    slots = 2 * experiment.max_boundaries  # a chain that runs on is to be scored as such, not cut to its good part
    writer = Writer.of(experiment, settings.max_new_tokens, settings.batch_size, Sampling(settings.temperature))
    score = make_scorer(experiment)
    texts, decode = texts_of(experiment.tokenizer)

    def draw(state: TrainState, stage: Stage) -> Drawn:
        rng, curriculum = rng_of(state), experiment.recipe.curriculum
        # Of the stage's own depths, or of all that an equal mixture has; nothing is replayed.
        groups = experiment.train.mixture(stage, replace(curriculum, replay=0.0))
        chosen = draw_problems(groups, settings.prompts, rng)
        if len(groups) > 1:  # group after group otherwise
            chosen = [chosen[i] for i in rng.permutation(len(chosen))]
        problems = [problem for problem in chosen for _ in range(settings.samples)]
        prompts = [prompt_of(chain) for chain, _ in problems]
        written = writer.write(state, prompts, rng)
        ended = [writer.has_ended(ids) for ids in written]
        cuts = [
            step_ends(texts(ids), has_ended, with_answer=settings.by_judge)
            for ids, has_ended in zip(written, ended, strict=True)
        ]
        chains = [
            drawn_chain(prompt, ids, ends, data.row_length, slots - 1)
            for prompt, ids, (ends, _) in zip(prompts, written, cuts, strict=True)
        ]
        judged, means, share = None, {}, host_share(mesh)
        if settings.by_judge:
            steps = [step_texts(ids, ends, decode) for ids, (ends, _) in zip(written, cuts, strict=True)]
            found = [
                judged_rewards(trace, texts, states_answer, has_ended)
                for (_, trace), texts, (_, states_answer), has_ended in zip(problems, steps, cuts, ended, strict=True)
            ]
            judged = at_boundaries([rewards for rewards, _ in found], chains, slots, settings.rows, share)
            means["reward/chain_right"] = float(np.mean([is_right for _, is_right in found]))
        drawn, sums = [], np.zeros(2)
        for i, batch in enumerate(fixed_batches(chains, settings.rows, data.row_length, 1, slots, share=share)):
            judged_BCK = None if judged is None else put_batch(judged[i], mesh)
            student_params = state.params["student"]
            rollouts, added = score(student_params, teacher_params, head, put_batch(batch, mesh), judged_BCK)
            drawn.append(rollouts)
            sums += jax.device_get(added)
        means |= {
            "reward/step_reward": float(sums[0] / max(sums[1], 1.0)),
            "reward/steps_per_chain": float(np.mean([chain.depth for chain in chains])),
            "reward/ended": float(np.mean(ended)),
        }
        return Drawn(drawn, [(0, 0)] * len(drawn), means)

    return draw


def make_scorer(
    experiment: Experiment,
) -> Callable[[Params, Params, Params, Batch, Array | None], tuple[Rollouts, Array]]:
    """Builds (student, teacher, head, drawn chains, judge's rewards) -> (Rollouts, (sum of step rewards, steps)).

    The rewards of the judge, [B, C, K] at the boundaries, are None where a reward model makes them: a head on what the
    teacher makes of the chains. Chains of one problem are neighbours. Rows go through the models in micro-batches, as
    in an update.
    """
    recipe, mesh, student = experiment.recipe, experiment.mesh, experiment.student
    sizes, read = (experiment.vocab_size, recipe.loss.chunk_length), None
    if experiment.reward is not None:
        assert experiment.teacher is not None
        identity = experiment.reward.identity
        read = make_step_reader(experiment.teacher, identity.layers, identity.surprise, *sizes)

    def score_rows(
        student_params: Params, teacher_params: Params, head: Params, batch: Batch
    ) -> tuple[Array | None, Array]:
        hidden_BLS = student.hidden(student_params, batch.tokens_BL, batch.positions_BL, batch.attention_ids_BL)
        made_BL = token_log_probs(
            hidden_BLS,
            student.head(student_params),
            *shifted_labels(batch),
            temperature=recipe.reward.temperature,
            vocab_size=sizes[0],
            chunk_length=sizes[1],
        )
        old_BL = jnp.pad(made_BL[:, :-1], ((0, 0), (1, 0)))  # from where a prediction is made to the token itself
        rewards_BCK = None if read is None else jax.nn.sigmoid(step_logits(head, read(teacher_params, batch)))
        return rewards_BCK, old_BL

    @jax.jit
    def score(
        student_params: Params, teacher_params: Params, head: Params, batch: Batch, judged_BCK: Array | None
    ) -> tuple[Rollouts, Array]:
        parts = split_rows(batch, recipe.micro_batches, mesh)
        scored = jax.lax.map(partial(score_rows, student_params, teacher_params, head), parts)
        # Part p has rows p, p + parts, ..: put back in order.
        rewards_BCK, old_BL = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), scored)
        if judged_BCK is not None:
            rewards_BCK = judged_BCK
        mask_BCK = step_boundaries(batch.boundary_mask_BCK)
        group = (recipe.reward.prompts_per_update, recipe.reward.samples, mask_BCK.shape[-1])
        advantages_GNK = step_advantages(rewards_BCK.reshape(group), mask_BCK.reshape(group))
        advantages_BL = of_tokens(advantages_GNK.reshape(mask_BCK.shape), batch)
        sums = jnp.stack([jnp.sum(jnp.where(mask_BCK, rewards_BCK, 0.0)), jnp.sum(mask_BCK).astype(jnp.float32)])
        rollouts = jax.lax.with_sharding_constraint(Rollouts(batch, old_BL, advantages_BL), row_sharding(mesh))
        return rollouts, sums

    return score


def at_boundaries(
    rewards: Sequence[Sequence[float]], chains: Sequence[EncodedChain], slots: int, rows: int, share: tuple[int, int]
) -> list[np.ndarray]:
    """The rewards of each chain's steps at its boundaries, [B, 1, K] for each batch: chain x is row x of them all.

    Steps that a chain had no room for were judged with the others, but have no boundaries. Each process gets its
    `share` of a batch's rows, as of the batch itself.
    """
    values_X1K = np.zeros((len(chains), 1, slots), np.float32)
    for row, (chain, values) in enumerate(zip(chains, rewards, strict=True)):
        values_X1K[row, 0, 1 : 1 + chain.depth] = values[: chain.depth]
    index, count = share
    return [np.split(batch, count)[index] for batch in np.split(values_X1K, len(chains) // rows)]
