"""StrategyQA (arXiv:2101.02235): yes/no questions that need several facts."""

from rtd_jax.data.schemas.schema import Row, Schema, shown, text_field, texts_field
from rtd_jax.data.sentences import sentences
from rtd_jax.data.trace import Trace, answer_line


def from_strategyqa(row: Row, source: str = "row", *, facts_only: bool = False) -> Trace:
    """`question`, `answer` (bool), `decomposition` (sub-questions written by people), `facts`.

    Where a row has as many facts as sub-questions, step i is sub-question i followed by fact i. Mostly the fact answers
    the sub-question, though the data set does not promise it. Otherwise each fact is a step and after them each
    sub-question. Copies of the data that have the facts as one text and no sub-questions have a step for each sentence
    of it. The steps that the article used are not published; this keeps every sentence that people wrote. With
    `facts_only` the steps are the facts.
    """
    answer = row.get("answer")
    if not isinstance(answer, bool):
        raise ValueError(f"{source}: field 'answer' is {shown(answer)}; expected true or false")
    as_text = isinstance(row.get("facts"), str)
    facts = sentences(row["facts"]) if as_text else texts_field(row, "facts", source)
    questions = [] if as_text and row.get("decomposition") is None else texts_field(row, "decomposition", source)
    if facts_only:
        steps = facts
    elif len(questions) == len(facts):
        steps = [f"{question} {fact}" for question, fact in zip(questions, facts, strict=True)]
    else:
        steps = [*facts, *questions]
    word = "yes" if answer else "no"
    return Trace.of_steps(text_field(row, "question", source).strip(), steps, word, answer_line(word), source)


SCHEMA = Schema("strategyqa", from_strategyqa, options=("facts_only",))
