"""The word problems in sentences that people write, for models that know English.

    How many pens does Mia have? Mia starts with 9. March 4 sold. Meanwhile Ben buys 7 balls.
    March 4 sold: <<9-4=5>>5.

becomes, for example,

    At first, Mia had 9 pens. Mia sold 4 pens in March. Meanwhile, Ben bought 7 balls. How many pens does Mia have now?
    In March, Mia sold 4 pens, so Mia had 9 - 4 = <<9-4=5>>5 pens.

Numbers, operations, their order and what does not count are those of the problem. Its own text chooses the phrasings,
so a problem has one form in sentences, from which it can be read back: two problems never become one, and the splits
stay disjoint. A chain keeps to one way of writing its steps.
"""

import random
import re
from collections.abc import Mapping, Sequence

_STEP = re.compile(r"(?P<said>.*): (?P<mark><<(?P<value>\d+)(?P<sign>[-+*/])(?P<operand>\d+)=\d+>>)(?P<result>\d+)\.")
_LEDGER = re.compile(r"How many (?P<thing>\w+) does (?P<hero>\w+) have\?")
_SHELVES = re.compile(r"How many (?P<thing>\w+) are on shelf (?P<shelf>\w+)\?")
_START = re.compile(r"(?:(?P<hero>\w+) starts with|Shelf (?P<shelf>\w+) holds) (?P<n>\d+)\.")
_MONTH = re.compile(r"(?P<month>\w+) (?:(?P<n>\d+) (?P<verb>\w+)|(?P<all>all doubled|half lost))\.")
_SHELF = re.compile(r"Shelf (?P<shelf>\w+) (?P<change>\d+ more|\d+ fewer|twice as many|half as many)\.")
_OTHER = re.compile(r"(?:Meanwhile )?(?P<person>\w+) (?P<verb>has|buys|finds|sells|loses) (?P<n>\d+) (?P<thing>\w+)\.")
_PAST = {"buys": "bought", "finds": "found", "sells": "sold", "loses": "lost"}
_SHELVES_IN_ORDER = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_BEFORE = dict(zip(_SHELVES_IN_ORDER[1:], _SHELVES_IN_ORDER, strict=False))

# Phrasings: one is drawn for each sentence of a problem, and one for all steps of a chain.
_ASKED = {
    "ledger": (
        "How many {thing} does {hero} have now?",
        "How many {thing} does {hero} have in the end?",
        "How many {thing} did {hero} end up with?",
    ),
    "shelves": ("How many {thing} are on shelf {shelf}?", "How many {thing} does shelf {shelf} hold?"),
}
_STARTED = {
    "ledger": (
        "At first, {hero} had {n} {thing}.",
        "{hero} started with {n} {thing}.",
        "{hero} had {n} {thing} in the beginning.",
    ),
    "shelves": ("Shelf {shelf} holds {n} {thing}.", "There are {n} {thing} on shelf {shelf}."),
}
_DONE = ("In {month}, {hero} {did}.", "{hero} {did} in {month}.", "Then {hero} {did} in {month}.")
_HELD = (
    "Shelf {shelf} holds {change} {thing} {than} shelf {before}.",
    "There are {change} {thing} on shelf {shelf} {than} on shelf {before}.",
)
_HAS = ("{person} has {n} {thing}.", "{person} owns {n} {thing}.")
_DID_TOO = ("Meanwhile, {person} {verb} {n} {thing}.", "{person}, on the other hand, {verb} {n} {thing}.")
_DID_FIRST = ("{person} {verb} {n} {thing}.",)  # nothing comes before that it could be beside
_LEDGER_STEPS = (
    "In {month}, {hero} {did}, so {hero} had {sum}.",
    "{hero} {did} in {month}, which makes {sum}.",
    "After {month}, {hero} had {sum}.",
)
_SHELF_STEPS = (
    "Shelf {shelf} holds {sum}.",
    "There are {sum} on shelf {shelf}.",
    "Shelf {shelf} holds {change} {thing} {than} shelf {before}, which makes {sum}.",
)


def in_sentences(row: Mapping[str, str]) -> dict[str, str]:
    """A row of the word problems (`question`, `answer`), with its question and its steps in whole sentences."""
    rng = random.Random(row["question"])
    asked, *facts = re.split(r"(?<=[.?]) ", row["question"])
    *steps, answer = row["answer"].splitlines()
    kind, found = ("ledger", _LEDGER.fullmatch(asked)) if " does " in asked else ("shelves", _SHELVES.fullmatch(asked))
    assert found is not None, asked
    about = found.groupdict()
    told = [_told(fact, kind, about, _DID_TOO if i else _DID_FIRST, rng) for i, fact in enumerate(facts)]
    question = " ".join([*told, rng.choice(_ASKED[kind]).format(**about)])
    form = rng.choice(_LEDGER_STEPS if kind == "ledger" else _SHELF_STEPS)
    return {"question": question, "answer": "\n".join([*(_step(step, form, about) for step in steps), answer])}


def _told(fact: str, kind: str, about: Mapping[str, str], did: Sequence[str], rng: random.Random) -> str:
    """A fact of a problem as a sentence; `did` are the phrasings for what another person did."""
    if other := _OTHER.fullmatch(fact):
        forms = _HAS if other["verb"] == "has" else did
        return rng.choice(forms).format(**other.groupdict() | {"verb": _PAST.get(other["verb"], "")})
    if start := _START.fullmatch(fact):
        return rng.choice(_STARTED[kind]).format(**{**about, "n": start["n"], "shelf": start["shelf"]})
    return rng.choice(_DONE if kind == "ledger" else _HELD).format(**{**about, **_change(fact, about["thing"])})


def _step(step: str, form: str, about: Mapping[str, str]) -> str:
    """A step of a chain as a sentence whose last number is what comes out of it."""
    found = _STEP.fullmatch(step)
    assert found is not None, step
    is_one = found["result"] == "1"
    things = about["thing"].removesuffix("s") if is_one else about["thing"]
    total = "{value} {sign} {operand} = {mark}{result} {things}".format(**found.groupdict(), things=things)
    form = form.replace("There are", "There is") if is_one else form
    return form.format(**{**about, **_change(f"{found['said']}.", about["thing"]), "sum": total})


def _change(fact: str, thing: str) -> dict[str, str]:
    """What a month or a shelf changes, by the names that the phrasings have for it."""
    if shelf := _SHELF.fullmatch(fact):
        than = "as" if shelf["change"].endswith("many") else "than"
        return shelf.groupdict() | {"before": _BEFORE[shelf["shelf"]], "than": than}
    month = _MONTH.fullmatch(fact)
    assert month is not None, fact
    if month["n"]:
        did = f"{month['verb']} {month['n']} {thing}"
    else:
        did = {"all doubled": "doubled the number of", "half lost": "lost half of the"}[month["all"]] + f" {thing}"
    return {"month": month["month"], "did": did}
