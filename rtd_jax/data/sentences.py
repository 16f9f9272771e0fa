"""Cuts a text into sentences without tearing a formula apart."""

import re

# A sentence ends at . ! or ? before white space and a character that can open the next one.
_SENTENCE_END = re.compile(r"(?<=[.!?])[ \t]+(?=[A-Z$\\(])")


def sentences(text: str) -> list[str]:
    r"""The sentences and lines of `text`, each written on one line.

    It is cut at line ends and between sentences, but never inside `$...$`, `$$...$$`, `\[...\]` or an environment.
    """
    pieces: list[str] = []
    start = 0
    cuts = [*re.finditer(r"\n+", text), *_SENTENCE_END.finditer(text)]
    for cut in sorted(cuts, key=re.Match.start):
        if cut.start() >= start and _is_closed(text[start : cut.start()]):
            pieces.append(text[start : cut.start()])
            start = cut.end()
    pieces.append(text[start:])
    # A formula over several lines becomes one line, because steps are told apart by their lines.
    return [" ".join(piece.split()) for piece in pieces if piece.strip()]


def _is_closed(text: str) -> bool:
    """Whether no formula, display or environment is still open at the end of `text`."""
    bare = text.replace(r"\$", "")
    return (
        bare.replace("$$", "").count("$") % 2 == 0
        and bare.count("$$") % 2 == 0
        and text.count(r"\[") == text.count(r"\]")
        and text.count(r"\begin{") == text.count(r"\end{")
    )
