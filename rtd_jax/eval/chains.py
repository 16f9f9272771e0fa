"""Chain accuracy: is every step right, and the final answer too?

Perplexity and step accuracy hide compounding errors; this does not. It is measured on text that the model wrote freely,
so one wrong step spoils what follows, as in use. No model is needed, so a file of texts can be scored again. Where the
answer is a number, the step judge decides (`rtd_jax.eval.judge`); `chain_exact` stays beside it: every result of the
reference, place by place, for problems whose references are followed to the letter.
"""

from collections.abc import Sequence
from fractions import Fraction

from rtd_jax.data.prose import prose_steps
from rtd_jax.data.trace import Problem, Trace, is_answer_line
from rtd_jax.eval.answers import answer_matches, parse_number, states_right_answer, step_result
from rtd_jax.eval.judge.judge import judge_steps
from rtd_jax.eval.scored import Record

_MAX_PROSE = 40_000  # characters of a text that are cut into steps; more is a model stuck in a loop


def score_texts(
    traces: Sequence[Trace], texts: Sequence[Sequence[str]], finished: Sequence[Sequence[bool]] | None = None
) -> list[Record]:
    """Scores texts that somebody wrote for each problem, as many samples of each.

    Args:
      traces: problems with their reference chains.
      texts: for each problem its samples.
      finished: for each text whether it came to its own end; None takes all for finished.

    Returns:
      One record for each text: what `score_chain` says, and its problem and sample (indices).

    Raises:
      ValueError: there are no problems, or not as many texts for each of them.
    """
    if not traces:
        raise ValueError("there are no problems to evaluate; check the evaluation split and its depths")
    samples = len(texts[0]) if texts else 0
    if len(texts) != len(traces) or samples < 1 or any(len(row) != samples for row in texts):
        raise ValueError(
            f"{len(traces)} problems have {sorted({len(row) for row in texts})} texts each; expected the "
            "same number, at least one, for every problem"
        )
    return [
        score_chain(text, trace, finished is None or finished[problem][sample]) | {"problem": problem, "sample": sample}
        for problem, trace in enumerate(traces)
        for sample, text in enumerate(texts[problem])
    ]


def split_solution(text: str) -> tuple[list[str], str]:
    """(steps, answer line) of a solution, one line each, blank lines dropped; "" if no line starts with `####`.

    What follows the first answer line is not part of the solution.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for i, line in enumerate(lines):
        if is_answer_line(line):
            return lines[:i], line
    return lines, ""


def score_chain(text: str, trace: Trace, finished: bool = True) -> Record:
    """Scores one generated solution.

    Where the reference answer is a number on a `####` line, the judge says which steps are right and which is the first
    wrong one, and reads the answer; a text that was cut off has to state it. Where the reference answer is not a number
    (yes/no, a choice, an expression) or stands in a box (MATH), steps are prose that arithmetic does not decide, and
    the chain is as right as its answer in the strict reading. A reference without an answer of its own is followed to
    the letter.

    Returns:
      prompt, completions (steps of the text: its lines where it has an answer line, else those of `prose_steps`),
      final (its answer line), text, reference (steps), answer, depth, correct, chain_exact (None where steps cannot be
      compared), answer_right (as the judge reads it; where it does not judge, as answer_strict), answer_strict,
      answer_flexible, first_error, verdicts and reasons (of each step and of the answer line, where there is one;
      right, wrong, or None where it concludes nothing), steps_right (the verdicts of steps that are not None), finished
      (as given). Of MATH also subject, level, and math_verify (whether that library finds the answers equal). Where the
      reference is not one step a line, also reference_text.

      `first_error` is the index of the first wrong step; the answer line counts as the line after the last step. -1
      where the chain is correct. (ProcessBench's `label`.)

    Raises:
      ValueError: the reference's own text would be judged wrong; see `check_reference`.
    """
    check_reference(trace)
    lines, final = split_solution(text)
    # A base model may go on with a problem of its own; the harness stops it by stop words, we by the answer line.
    strict, flexible, verified = answer_matches(trace, "\n".join([*lines, final]) if final else text)
    exact, generated = _followed(lines, trace, strict)
    # An answer line says that the text is laid out as the references are, one step a line.
    is_judged = comparable(trace) and bool(trace.answer)
    steps = lines if final or not is_judged else [text[slice(*span)] for span in prose_steps(text[:_MAX_PROSE])]
    if is_judged:
        judgement = judge_steps(trace.prompt, [*steps, final] if final else steps, trace, is_whole=finished)
        correct, first_error = judgement.first_error < 0, judgement.first_error
        answer_right = bool(judgement.answer_right)
        verdicts = [verdict.right for verdict in judgement.steps]
        reasons = [verdict.reason for verdict in judgement.steps]
    else:
        correct, answer_right = strict if exact is None else exact, strict
        first_error = -1 if correct else generated.index(False) if False in generated else len(steps)
        verdicts, reasons = list(generated), [""] * len(generated)
    return {
        "prompt": trace.prompt,
        "completions": steps,
        "final": final,
        "text": text,
        "reference": list(trace.steps),
        # Where steps share lines, or have several, their list alone does not give the text again.
        **({} if trace.body == "\n".join(trace.steps) else {"reference_text": trace.body}),
        "answer": trace.answer,
        "depth": trace.depth,
        "correct": correct,
        "chain_exact": exact,
        "answer_right": answer_right,
        "answer_strict": strict,
        "answer_flexible": flexible,
        "first_error": first_error,
        "verdicts": verdicts,
        "reasons": reasons,
        "steps_right": [verdict for verdict in verdicts[: len(steps)] if verdict is not None],
        "finished": finished,
        **({"subject": trace.subject, "level": trace.level} if trace.subject or trace.level else {}),
        **({} if verified is None else {"math_verify": verified}),
    }


def _followed(steps: Sequence[str], trace: Trace, strict: bool) -> tuple[bool | None, list[bool | None]]:
    """Whether a text follows the reference to the letter, and each of its steps; (None, []) where that has no sense."""
    if not comparable(trace):
        return None, []
    # Lines against lines: a step that a classifier cut may be a part of a line, or several of them.
    expected = split_solution(trace.completion)[0]
    generated, reached = results_right(steps, expected)
    return strict and all(reached) and False not in generated, generated


def check_reference(trace: Trace | Problem) -> None:
    """Refuses a reference whose own text would be judged wrong, because its answer cannot be read back from it.

    Raises:
      ValueError: names the row, what was read, and the answer.
    """
    text = trace.final if isinstance(trace, Problem) else trace.completion
    lines, final = split_solution(text)
    if states_right_answer(trace, "\n".join([*lines, final]) if final else text):
        return
    seen = final or (lines[-1] if lines else "")
    raise ValueError(
        f"{trace.source or 'a reference'}: its answer is {trace.answer!r}, but its own text is read as {seen[:80]!r}, "
        "so a right reply could not be told from a wrong one; state the answer once, on a last line `#### answer`, or "
        "leave the row out"
    )


def results_right(steps: Sequence[str], reference: Sequence[str]) -> tuple[list[bool | None], list[bool]]:
    """Whether results agree, place by place: for every generated step, and for every reference step that has a result.

    The n-th result of one side is compared with the n-th of the other; steps that conclude no number are None, results
    beyond the reference's wrong, and reference results that were not reached wrong too.
    """
    written, expected = _results(steps), _results(reference)
    generated: list[bool | None] = [None] * len(steps)
    reached = [False] * len(expected)
    for place, (line, value) in enumerate(written):
        generated[line] = place < len(expected) and value == expected[place][1]
        if generated[line]:
            reached[place] = True
    return generated, reached


def comparable(trace: Trace) -> bool:
    """Whether the steps of a reference can be compared: it has no answer of its own, or a number on a `####` line.

    MATH's are prose, also where its answer is a number: two right solutions share no sequence of results.
    """
    return not trace.answer or (bool(trace.final) and parse_number(trace.answer) is not None)


def _results(steps: Sequence[str]) -> list[tuple[int, Fraction]]:
    """(index of the step, number that it concludes), for the steps that conclude one."""
    results = ((i, step_result(step)) for i, step in enumerate(steps))
    return [(i, result) for i, result in results if result is not None]
