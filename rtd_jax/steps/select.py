"""The segmenter that a recipe names, and the control that puts boundaries where no step ends."""

import hashlib
import random
import re
from pathlib import Path

from rtd_jax.data.trace import Trace
from rtd_jax.steps.annotated import AnnotatedSegmenter, Segmenter, Span


class RandomSegmenter:
    """As many steps as annotated, ending behind random words: is it the *steps* that help, or any boundaries?

    No boundary is right by chance, except where the steps have too few words for that. The same trace gives the same
    places in every run and on every machine.
    """

    def spans(self, trace: Trace) -> tuple[Span, ...]:
        """Spans in order, one a step. Raises ValueError where the completion has fewer words than steps."""
        annotated = AnnotatedSegmenter().spans(trace)
        right = {end for _, end in annotated}
        ends = [match.end() for match in re.finditer(r"\S+", trace.completion[: annotated[-1][1]])]
        wrong = [end for end in ends if end not in right]
        if len(wrong) < len(annotated):  # short steps: some places have to be right
            wrong = ends
        if len(wrong) < len(annotated):
            raise ValueError(
                f"{trace.source or 'trace'}: {len(annotated)} random boundaries need as many words, the steps have "
                f"{len(wrong)}; leave this trace out"
            )
        digest = hashlib.sha256(f"{trace.prompt}\0{trace.completion}".encode()).digest()
        chosen = sorted(random.Random(int.from_bytes(digest)).sample(wrong, len(annotated)))
        starts = [0, *chosen[:-1]]
        return tuple((_skip_space(trace.completion, start), end) for start, end in zip(starts, chosen, strict=True))


CLASSIFIER = "classifier:"


def classifier_folder(name: str) -> Path | None:
    """The folder of the boundary classifier that a segmentation names; None for one that needs no teacher.

    Raises:
      ValueError: the folder's name is missing.
    """
    if not name.startswith(CLASSIFIER):
        return None
    folder = name.removeprefix(CLASSIFIER)
    if not folder:
        raise ValueError(
            f"segmentation is {name!r}; say which classifier, e.g. 'classifier:rtd_jax/bundled/tiny_boundaries'"
        )
    return Path(folder).expanduser()


def make_segmenter(name: str) -> Segmenter:
    """The segmenter called `name`. Raises ValueError for one that does not exist.

    Of 'classifier:<folder>' it is the annotated one: a classifier needs the teacher, so it cuts whole data sets
    beforehand (steps/detector.py), and its traces carry the steps it found.
    """
    match name:
        case "annotated":
            return AnnotatedSegmenter()
        case "random":
            return RandomSegmenter()
    if classifier_folder(name) is not None:
        return AnnotatedSegmenter()
    raise ValueError(f"data.segmentation is {name!r}; use 'annotated', 'random' or 'classifier:<folder>'")


def _skip_space(text: str, start: int) -> int:
    return start + len(text[start:]) - len(text[start:].lstrip())
