"""The student's own chains: drawn, scored step by step, and made ready for the policy term.

What is drawn depends on the run's key, the update and the student alone. So it is not in a checkpoint: a resumed run
draws it again, where new chains are due.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from rtd_jax.apps.distill.judged_rewards import judged_rewards
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
    decoding = GenerateSettings(
        max_new_tokens=settings.max_new_tokens,
        eos_ids=stop_token_ids(experiment.tokenizer, data.text),
        vocab_size=experiment.vocab_size,
        batch_size=round_up(settings.batch_size, row_ways(mesh)),
        pad_id=experiment.tokenizer.pad_token_id or 0,
        sampling=Sampling(settings.temperature),
    )
    score = make_scorer(experiment)

    def decode(ids: Sequence[int]) -> str:
        return str(experiment.tokenizer.decode(list(ids), skip_special_tokens=True))

    text_of = cache(lambda token: decode([token]))

    def draw(state: TrainState, stage: Stage) -> tuple[list[Rollouts], dict[str, float]]:
        words = np.asarray(to_host(state.rng)).ravel().tolist()
        rng = np.random.default_rng([*words, int(state.step)])
        pool, student_params = experiment.train.of_stage(stage), state.params["student"]
        chosen = rng.choice(len(pool.encoded), settings.prompts, replace=len(pool.encoded) < settings.prompts)
        problems = [i for i in chosen for _ in range(settings.samples)]
        prompts = [pool.encoded[i].tokens[: pool.encoded[i].prompt_length].tolist() for i in problems]
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
        cuts = [
            step_ends(list(map(text_of, ids)), has_ended, with_answer=settings.by_judge)
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
                judged_rewards(pool.traces[problem], texts, states_answer, has_ended)
                for problem, texts, (_, states_answer), has_ended in zip(problems, steps, cuts, ended, strict=True)
            ]
            judged = at_boundaries([rewards for rewards, _ in found], chains, slots, settings.rows, share)
            means["reward/chain_right"] = float(np.mean([is_right for _, is_right in found]))
        drawn, sums = [], np.zeros(2)
        for i, batch in enumerate(fixed_batches(chains, settings.rows, data.row_length, 1, slots, share=share)):
            judged_BCK = None if judged is None else put_batch(judged[i], mesh)
            rollouts, added = score(student_params, teacher_params, head, put_batch(batch, mesh), judged_BCK)
            drawn.append(rollouts)
            sums += jax.device_get(added)
        return drawn, means | {
            "reward/step_reward": float(sums[0] / max(sums[1], 1.0)),
            "reward/steps_per_chain": float(np.mean([chain.depth for chain in chains])),
            "reward/ended": float(np.mean(ended)),
        }

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


def step_ends(texts: Sequence[str], has_ended: bool, *, with_answer: bool = False) -> tuple[list[int], bool]:
    """(the token at which each finished step ends, whether the last step is the answer line or ends in it).

    A step is a line that is not blank. The line of the answer ("####") ends the chain, and is a step only
    `with_answer`. The last line is finished where the student ended the text there. Two lines that end in one token are
    one step: a boundary has a token of its own.

    Args:
      texts: the text of each written id.
      has_ended: whether the student ended the text, or the limit on its length did.
    """
    place_of = [place for place, text in enumerate(texts) for _ in text]  # the token of each character
    lines = "".join(texts).split("\n")
    ends, start, is_answer = [], 0, False
    for line in lines if has_ended else lines[:-1]:
        is_answer = line.strip().startswith("####")
        if line.strip() and (with_answer or not is_answer):
            ends.append(place_of[start + len(line.rstrip()) - 1])
        if is_answer:
            break
        start += len(line) + 1
    return list(dict.fromkeys(ends)), is_answer and with_answer


def step_texts(written: Sequence[int], ends: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text of each step: of its own tokens together, as a character may take several of them."""
    return [decode(written[start:end]).strip() for start, end in pairwise([0, *(end + 1 for end in ends)])]


def drawn_chain(
    prompt: Sequence[int], written: Sequence[int], ends: Sequence[int], row_length: int, max_steps: int
) -> EncodedChain:
    """What the student wrote, as a chain: its own ids, and a boundary at the end of each finished step.

    Loss weights are 1 on the tokens of steps, 0 elsewhere.

    Args:
      prompt, written: token ids; the text is not tokenised again, which might give others than the student chose.
      ends: the written tokens at which steps end, `step_ends`.
      row_length: tokens of a row; what is beyond is left out, and a step that ends there too.
      max_steps: later steps are left out.
    """
    steps = [len(prompt) + end for end in ends if len(prompt) + end < row_length][:max_steps]
    tokens = np.asarray([*prompt, *written], np.int32)[:row_length]
    weights = np.zeros(len(tokens), np.float32)
    if steps:
        weights[len(prompt) : steps[-1] + 1] = 1.0
    return EncodedChain(tokens, len(prompt), np.array([len(prompt) - 1, *steps], np.int32), weights, "drawn")
