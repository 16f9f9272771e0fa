"""What is asked of a model: a request for each problem and sample, with an id made of all that decides its reply."""

import hashlib
import json
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from rtd_jax.base.settings import SEED, check_filled, check_ranges
from rtd_jax.data.trace import Problem

Finish = Literal["stop", "length", "refused"]  # ended by itself or at a stop text; cut at max_tokens; not answered


@dataclass(frozen=True)
class SamplingSettings:
    """How chains are sampled."""

    samples: int = 4  # chains for each problem
    temperature: float = 0.7  # 0 is greedy
    top_p: float = 0.95  # smallest set of ids that reaches this probability; 1 keeps all
    max_tokens: int = 512  # of a chain; a chain that reaches it is unfinished
    stop: tuple[str, ...] = ()  # texts that end a chain and are not part of it
    seed: int = 0  # each request has its own seed, made from this one and the request's id

    def __post_init__(self) -> None:
        check_ranges(self, samples="[1, 1e5]", max_tokens="[1, 1e6]", temperature="[0, 100]", top_p="(0, 1]", seed=SEED)
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples is {self.samples} but temperature 0 writes the same chain each time; raise it")
        if "" in self.stop:
            raise ValueError("stop has an empty text, which would end every chain at once; leave it out")


@dataclass(frozen=True)
class OpenAISettings:
    """A server with OpenAI's completions API (vLLM, SGLang, `transformers serve`); for backend "openai"."""

    base_url: str = "http://localhost:8000/v1"  # of the server
    model: str = ""  # as the server names it
    api_key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key; unset where none is needed
    concurrency: int = 32  # requests sent side by side; an interrupted run loses at most so many
    requests_per_minute: int = 0  # at most so many are started; 0 is no limit
    timeout: float = 600.0  # seconds for one reply
    retries: int = 8  # of a request with a temporary failure, 0.5 to 8 s apart or as the server says
    extra_body: str = ""  # further fields of a request as a JSON object, such as '{"top_k": 50}'
    skip_refused: bool = False  # count a request that the server refuses (400, 413, 422) instead of stopping

    def __post_init__(self) -> None:
        check_filled(self, "base_url")
        check_ranges(
            self, concurrency="[1, 1e4]", requests_per_minute="[0, 1e9]", timeout="(0, 1e6]", retries="[0, 1e6]"
        )
        self.extra()

    def extra(self) -> dict[str, Any]:
        """`extra_body` read; raises ValueError where it is not a JSON object."""
        try:
            fields = json.loads(self.extra_body or "{}")
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise ValueError(f"extra_body is {self.extra_body!r}; expected a JSON object, such as '{{\"top_k\": 50}}'")
        return fields


class Request(NamedTuple):
    """One chain that the teacher is asked for."""

    id: str  # 32 hex digits
    problem: Problem
    sample: int
    seed: int  # 31 bits, of this request alone


class Reply(NamedTuple):
    """What the teacher wrote, cut before the first stop text."""

    text: str
    finish: Finish


Record = Callable[[Sequence[tuple[Request, Reply]]], None]


class Backend(Protocol):
    """A teacher that writes chains."""

    def identity(self) -> dict[str, Any]:
        """What decides the replies, as JSON: equal for two backends whose replies are interchangeable."""

    def complete(self, requests: Sequence[Request], missing: Set[str], record: Record) -> None:
        """Calls `record` with each request whose id is in `missing`, once and in any order, as its reply arrives.

        Raises:
          ValueError: the teacher cannot be reached, or refuses; what was recorded before stays.
        """


def make_requests(problems: Sequence[Problem], samples: int, seed: int, identity: dict[str, Any]) -> list[Request]:
    """All requests, with the samples of a problem together. More samples or problems do not change the other ids."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    requests = []
    for problem in problems:
        for sample in range(samples):
            named = hashlib.sha256(json.dumps([digest, problem.prompt, sample]).encode()).digest()
            own = hashlib.sha256(named + str(seed).encode()).digest()
            requests.append(Request(named.hex()[:32], problem, sample, int.from_bytes(own[:4]) >> 1))
    return requests


def before_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the first of the stop texts, and whether there is one."""
    places = [text.index(word) for word in stop if word in text]
    return (text[: min(places)], True) if places else (text, False)
