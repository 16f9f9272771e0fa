"""Rewards of drawn steps by the deterministic judge (`rtd_jax.eval.judge`): no model is read for them."""

from collections.abc import Sequence

from rtd_jax.data.trace import Trace
from rtd_jax.eval.chains import comparable
from rtd_jax.eval.judge.judge import judge_steps
from rtd_jax.train.curriculum import Stage


def check_judged(traces: Sequence[Trace], plan: Sequence[Stage]) -> None:
    """Refuses training chains that the judge cannot be a reference for: their answer is no number on a `####` line.

    Raises:
      ValueError: names the first chain of any stage that has none.
    """
    for trace in traces:
        is_judged = comparable(trace) and bool(trace.answer)  # as the evaluation decides it
        if not is_judged and any(stage.holds(trace.depth) for stage in plan):
            raise ValueError(
                f"{trace.source or 'a training chain'}: its answer is {trace.answer!r}"
                f"{'' if trace.final else ' without a line of its own'}, but reward.model='judge' rewards steps of "
                "problems whose answer is a number on a last line (`#### 72`); leave such rows out of data.train, or "
                "train a reward model with launch/reward_model.py and give <its workdir>/model"
            )


def judged_rewards(
    trace: Trace, steps: Sequence[str], states_answer: bool, has_ended: bool
) -> tuple[list[float], bool]:
    """(the reward of each step, 0 or 1, whether the judge calls the whole chain right).

    Before the first wrong step all steps have 1, also those that conclude nothing. The first wrong step has 0. Behind
    it only a step that the judge calls right has 1. The answer line is as right as the answer, wherever it stands.

    Args:
      trace: the reference.
      steps: texts of the steps in order, the answer line included.
      states_answer: whether the last step is, or ends in, the answer line.
      has_ended: whether the chain came to its own end. One that was cut off before its answer line has a wrong answer.
    """
    judgement = judge_steps(trace.prompt, steps, trace, is_whole=has_ended)
    first = judgement.first_error if judgement.first_error >= 0 else len(steps)
    right = [verdict.right or (verdict.right is None and i < first) for i, verdict in enumerate(judgement.steps)]
    if states_answer:
        right[-1] = bool(judgement.answer_right) and judgement.steps[-1].right is not False
    return [float(x) for x in right], judgement.first_error < 0
