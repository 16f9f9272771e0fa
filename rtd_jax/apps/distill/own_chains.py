"""The student's own chains, drawn, scored step by step, and made ready for the policy term.

What is drawn depends on the run's key, the update and the student: it is not in a checkpoint, and is drawn again by a
run that is resumed where new chains are due.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

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

# (state, stage) -> one Rollouts for each update until they come round again, and what was drawn in numbers
Sampler = Callable[[TrainState, Stage], tuple[list[Rollouts], dict[str, float]]]


def make_sampler(experiment: Experiment) -> Sampler:
    """Builds the function that draws from the current student and has the reward model score what it wrote."""
    settings, row_length = experiment.recipe.reward, experiment.recipe.data.row_length
    assert experiment.reward is not None, "the recipe has no reward model"
    head = jax.tree.map(np.asarray, experiment.reward.head)  # on the host: the same for every process
    # A chain that runs on beyond the longest of the data is to be told so, not to be cut to its good part.
    slots = 2 * experiment.max_boundaries
    stop_ids = stop_token_ids(experiment.tokenizer, experiment.recipe.data.text)
    pieces: dict[int, str] = {}
    score = make_scorer(experiment)
    ways = row_ways(experiment.mesh)

    def draw(state: TrainState, stage: Stage) -> tuple[list[Rollouts], dict[str, float]]:
        words = np.asarray(to_host(state.rng)).ravel().tolist()
        rng = np.random.default_rng([*words, int(state.step)])
        pool = experiment.train.of_stage(stage)
        chosen = rng.choice(pool, settings.prompts, replace=len(pool) < settings.prompts)
        problems = [experiment.train.encoded[i] for i in chosen for _ in range(settings.samples)]
        first = int(rng.integers(2**30))  # of the draws' streams; the seed stays, because it is compiled in
        prompts = [chain.tokens[: chain.prompt_length].tolist() for chain in problems]
        written = generate(
            experiment.student,
            state.params["student"],
            prompts,
            GenerateSettings(
                max_new_tokens=settings.max_new_tokens,
                eos_ids=stop_ids,
                vocab_size=experiment.vocab_size,
                batch_size=round_up(settings.batch_size, ways),
                pad_id=experiment.tokenizer.pad_token_id or 0,
                sampling=Sampling(settings.temperature),
            ),
            streams=[first + i for i in range(len(prompts))],
            batch_sharding=row_sharding(experiment.mesh),
        )
        chains = [
            drawn_chain(
                experiment.tokenizer,
                prompt,
                ids,
                ended=len(ids) < settings.max_new_tokens,
                row_length=row_length,
                max_steps=slots - 1,
                pieces=pieces,
            )
            for prompt, ids in zip(prompts, written, strict=True)
        ]
        share = host_share(experiment.mesh)
        batches = fixed_batches(chains, settings.rows, row_length, 1, slots, share=share)
        drawn, sums = [], np.zeros(2)
        for batch in batches:
            rollouts, total = score(
                state.params["student"], experiment.teacher_params, head, put_batch(batch, experiment.mesh)
            )
            drawn.append(rollouts)
            sums += jax.device_get(total)
        return drawn, {
            "reward/step_reward": float(sums[0] / max(sums[1], 1.0)),
            "reward/steps_per_chain": float(np.mean([chain.depth for chain in chains])),
            "reward/ended": float(np.mean([len(ids) < settings.max_new_tokens for ids in written])),
        }

    return draw


def make_scorer(experiment: Experiment) -> Callable[[Params, Params, Params, Batch], tuple[Rollouts, Array]]:
    """Builds (student, teacher, head, drawn chains) -> (Rollouts, (sum of step rewards, steps)).

    Chains of one problem are neighbours. Rows go through the models in micro-batches, as in an update.
    """
    recipe, mesh = experiment.recipe, experiment.mesh
    assert experiment.reward is not None
    assert experiment.teacher is not None
    student, identity, parts = experiment.student, experiment.reward.identity, recipe.micro_batches
    chunk_length = recipe.loss.chunk_length
    read = make_step_reader(experiment.teacher, identity.layers, identity.surprise, experiment.vocab_size, chunk_length)

    def of_rows(student_params: Params, teacher_params: Params, head: Params, batch: Batch) -> tuple[Array, Array]:
        hidden_BLS = student.hidden(student_params, batch.tokens_BL, batch.positions_BL, batch.chain_ids_BL)
        made_BL = token_log_probs(
            hidden_BLS,
            student.head(student_params),
            *shifted_labels(batch),
            temperature=recipe.reward.temperature,
            vocab_size=experiment.vocab_size,
            chunk_length=chunk_length,
        )
        old_BL = jnp.pad(made_BL[:, :-1], ((0, 0), (1, 0)))  # from where a prediction is made to the token itself
        return jax.nn.sigmoid(step_logits(head, read(teacher_params, batch))), old_BL

    @jax.jit
    def score(student_params: Params, teacher_params: Params, head: Params, batch: Batch) -> tuple[Rollouts, Array]:
        found = jax.lax.map(partial(of_rows, student_params, teacher_params, head), split_rows(batch, parts, mesh))
        # Part p has rows p, p + parts, ..: put back in order.
        rewards_BCK, old_BL = (jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]) for x in found)
        mask_BCK = step_boundaries(batch.boundary_mask_BCK)
        group = (recipe.reward.prompts_per_update, recipe.reward.samples, mask_BCK.shape[-1])
        advantages_GNK = step_advantages(rewards_BCK.reshape(group), mask_BCK.reshape(group))
        advantages_BL = of_tokens(advantages_GNK.reshape(mask_BCK.shape), batch)
        sums = jnp.stack([jnp.sum(jnp.where(mask_BCK, rewards_BCK, 0.0)), jnp.sum(mask_BCK).astype(jnp.float32)])
        rollouts = jax.lax.with_sharding_constraint(Rollouts(batch, old_BL, advantages_BL), row_sharding(mesh))
        return rollouts, sums

    return score


def drawn_chain(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    written: Sequence[int],
    *,
    ended: bool,
    row_length: int,
    max_steps: int,
    pieces: dict[int, str],
) -> EncodedChain:
    """What the student wrote, as a chain: its very ids, and a boundary at the end of each finished step.

    A step is a line that is not blank, up to the line of the answer ("####"), which is none. The last line is finished
    where the text ended there. Loss weights are 1 on the tokens of steps, 0 elsewhere.

    Args:
      prompt, written: token ids; the text is not tokenised again, which might give others than the student chose.
      ended: whether the student ended the text, or the limit on its length did.
      row_length: tokens of a row; what is beyond is left out, and a step that reaches there too.
      max_steps: steps beyond are left out.
      pieces: the text of each id, filled as they are met.
    """
    ends: list[int] = []
    line, last = "", -1
    for place, token in enumerate(written):
        if token not in pieces:
            pieces[token] = str(tokenizer.decode([token], skip_special_tokens=True))
        for character in pieces[token]:
            if character != "\n":
                line += character
                last = last if character.isspace() else place
                continue
            if line.strip().startswith("####"):
                break
            if line.strip():
                ends.append(last)
            line = ""
        else:
            continue
        break
    if ended and line.strip() and not line.strip().startswith("####"):
        ends.append(last)
    # Two lines that end in one token are one step: a boundary has a token of its own.
    found = np.unique(np.asarray(ends, np.int32)) + len(prompt)
    found = found[found < row_length][:max_steps]
    tokens = np.asarray([*prompt, *written], np.int32)[:row_length]
    weights = np.zeros(len(tokens), np.float32)
    if len(found):
        weights[len(prompt) : found[-1] + 1] = 1.0
    boundaries = np.array([len(prompt) - 1, *found], np.int32)
    return EncodedChain(tokens, len(prompt), boundaries, weights, "drawn")
