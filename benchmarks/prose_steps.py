"""How well do rules, lines, sentences and a boundary classifier find the steps that ProcessBench has of a solution?

    python benchmarks/prose_steps.py --data=gsm8k.jsonl    # rules, lines and sentences: seconds
    python benchmarks/prose_steps.py --data=gsm8k.jsonl --classifier=FOLDER --teacher=MODEL    # minutes on two cores

ProcessBench has lists of steps, not the texts that they were cut from. Its steps are joined here by a blank line, by a
line end and by a space. A blank line gives every boundary away to whoever cuts at paragraphs. A space gives none away.
Two thirds of the solutions have line ends within steps, so a line end is no sure boundary. The classifier reads white
space of any kind as one space, and no list marks, so it is measured on the texts joined by a space only.
"""

import argparse
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from measure import ROOT, markdown_table, write_section

from rtd_jax.base.sharding import MeshSettings, make_mesh
from rtd_jax.data.prose import prose_steps
from rtd_jax.data.schemas.schema import Row, text_field
from rtd_jax.data.sentences import sentences
from rtd_jax.data.sources import RowSource, load_rows
from rtd_jax.eval.segmentation import boundary_scores
from rtd_jax.models.open import ModelSettings, open_model
from rtd_jax.steps.classifier import load_classifier
from rtd_jax.steps.detector import Detector

JOINS = {"a blank line": "\n\n", "a line end": "\n", "a space": " "}
Cut = Callable[[Sequence[str], Sequence[str]], list[list[str]]]  # (problems, solutions) -> steps of each


def rules(problems: Sequence[str], texts: Sequence[str]) -> list[list[str]]:
    return [[text[start:end] for start, end in prose_steps(text)] for text in texts]


def classifier(folder: str, teacher: str) -> Cut:
    """The steps that a boundary classifier finds.

    Raises:
      ValueError: it was fitted to another teacher, or one of the two cannot be read.
    """
    runtime = ModelSettings(teacher, "float32", "float32")
    opened = open_model(runtime, make_mesh(MeshSettings()), print)
    fitted = load_classifier(Path(folder))
    fitted.check_teacher(opened.fingerprint, opened.tokenizer_fingerprint, teacher)
    detector = Detector(fitted, opened.tokenizer, opened.mesh, lambda: (opened.model, opened.params))

    def cut(problems: Sequence[str], texts: Sequence[str]) -> list[list[str]]:
        found = detector.find([(problem, text, "ProcessBench") for problem, text in zip(problems, texts, strict=True)])
        return [[text[start:end] for start, end in spans] for text, spans in zip(texts, found, strict=True)]

    return cut


def places(steps: Sequence[str]) -> np.ndarray:
    """Where steps end, counted in characters that are no white space: the same however the steps are joined."""
    return np.array(list(accumulate(len("".join(step.split())) for step in steps)))


def row_of(name: str, found: list[np.ndarray], right: list[np.ndarray], resamples: int) -> list[str]:
    scores = boundary_scores(found, right, resamples=resamples)
    exact, inner = scores["all"]["exact"], scores["inner"]["exact"]
    f1 = [f"{100 * x['value']:.1f} ({100 * x['low']:.1f} to {100 * x['high']:.1f})" for x in (exact["f1"], inner["f1"])]
    precision, recall = (f"{100 * inner[key]['value']:.1f}" for key in ("precision", "recall"))
    return [name, f"{np.mean([len(x) for x in found]):.2f}", *f1, precision, recall]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL of ProcessBench's rows: problem, steps")
    parser.add_argument("--limit", type=int, default=200, help="rows")
    parser.add_argument("--classifier", default="", help="folder that launch/boundaries.py wrote")
    parser.add_argument("--teacher", default="", help="the model that it was fitted to")
    parser.add_argument("--resamples", type=int, default=1000, help="for intervals")
    parser.add_argument("--no-write", action="store_true", help="print the table, leave docs/segmentation.md as it is")
    arguments = parser.parse_args()

    rows: list[tuple[str, Row]] = load_rows(RowSource("processbench", arguments.data, limit=arguments.limit))
    problems = [text_field(row, "problem", place).strip() for place, row in rows]
    steps = [[step.strip() for step in row["steps"]] for _, row in rows]
    right = [places(x) for x in steps]
    cuts: dict[str, Cut] = {
        "rules (`prose`)": rules,
        "lines": lambda _, texts: [[line for line in text.splitlines() if line.strip()] for text in texts],
        "sentences": lambda _, texts: [sentences(text) for text in texts],
    }
    table = []
    for join, separator in JOINS.items():
        texts = [separator.join(x) for x in steps]
        if arguments.classifier and separator == " ":
            cuts["classifier"] = classifier(arguments.classifier, arguments.teacher)
        for name, cut in cuts.items():
            found = [places(x) for x in cut(problems, texts)]
            table.append([join, *row_of(name, found, right, arguments.resamples)])
    columns = ("steps joined by", "cut by", "steps", "F1", "F1, inner only", "precision, inner", "recall, inner")
    text = markdown_table(columns, table)
    count = sum(map(len, steps))
    text += f"\n\n{len(steps)} solutions of {count} steps, {count / len(steps):.2f} each; 95% intervals by bootstrap."
    print(text)
    if not arguments.no_write:
        write_section(ROOT / "docs" / "segmentation.md", "prose", text)


if __name__ == "__main__":
    main()
