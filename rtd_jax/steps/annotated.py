"""Steps as the data set's authors cut them.

A segmenter maps a trace to one (start, end) character span a step, in `trace.completion`: end is exclusive, spans are
in order and do not overlap, and neither end is white space. The final answer line is no step. `AnnotatedSegmenter`
reads the spans off the trace; a learned boundary classifier can take its place behind the same protocol.
"""

from typing import Protocol, runtime_checkable

from rtd_jax.data.trace import Trace

Span = tuple[int, int]


@runtime_checkable
class Segmenter(Protocol):
    """Anything that can say where the steps of a completion lie."""

    def spans(self, trace: Trace) -> tuple[Span, ...]:
        """Character spans of the steps in `trace.completion`."""
        ...


class AnnotatedSegmenter:
    """One span for each of `trace.steps`: the annotation itself, without the white space around it."""

    def spans(self, trace: Trace) -> tuple[Span, ...]:
        """Spans in order, one a step. Raises ValueError where the completion does not hold the steps in order."""
        found: list[Span] = []
        cursor = 0
        for index, step in enumerate(trace.steps):
            text = step.strip()
            start = trace.completion.find(text, cursor)
            # Only white space may lie between steps, or a repeated phrase could be taken for the step itself.
            if start < 0 or trace.completion[cursor:start].strip():
                raise ValueError(
                    f"{trace.source or 'trace'}: step {index + 1} does not follow its predecessor: {text!r}"
                )
            cursor = start + len(text)
            found.append((start, cursor))
        return tuple(found)


def check_spans(spans: tuple[Span, ...], text: str, source: str = "trace") -> None:
    """Hold a segmenter to the protocol. Raises ValueError naming the first span that breaks it."""
    if not spans:
        raise ValueError(f"{source}: the segmenter found no steps; expected at least one span")
    previous = 0
    for index, (start, end) in enumerate(spans):
        if not previous <= start < end <= len(text):
            raise ValueError(
                f"{source}: span {index + 1} is ({start}, {end}); expected {previous} <= start < end <= {len(text)}"
            )
        if text[start].isspace() or text[end - 1].isspace():
            raise ValueError(f"{source}: span {index + 1} begins or ends with white space: {text[start:end]!r}")
        previous = end
