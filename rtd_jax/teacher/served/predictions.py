"""A teacher's predictions from a server that returns the log-probabilities of a prompt's tokens: vLLM, SGLang.

A chain is sent as token ids. The server's i-th entry has the most probable tokens in the place of token i:

    vLLM     POST /v1/completions {prompt, max_tokens: 1, prompt_logprobs: k} -> choices[0].prompt_logprobs, for each
             token {id: {logprob, rank, decoded_token}}, null for the first. The chain's own token is always there, so
             an entry has k or k + 1 tokens. -inf comes as -9999, and max_tokens has to be at least 1. Fields as in
             versions 0.8 to 0.14 (`vllm.entrypoints.openai.protocol`, `vllm.logprobs` in its docs).
    SGLang   POST /generate {input_ids, sampling_params: {max_new_tokens: 0}, return_logprob: true,
             logprob_start_len: 0, top_logprobs_num: k} -> meta_info.input_top_logprobs, for each token
             [[logprob, id, text], ...], null for the first; and meta_info.input_token_logprobs, [logprob, id, text] of
             the chain's own tokens. Fields as in "Sampling Parameters" of its docs and in
             `srt/managers/tokenizer_manager.py` of commit 001067f (2026).

Both give log-probabilities at temperature 1, whatever `temperature` says: vLLM by its default `--logprobs-mode
raw_logprobs` (the "processed" modes leave prompts as they are, pull request 47680), SGLang because its temperature is
that of the tokens it writes (pull requests 36213 and 37082 of the two would add another for prompts). So the bucket's
mass is known at temperature 1 only. At T it is W / (W + sum_top p^(1/T)) with W = sum_others p^(1/T), and what is
known of the n others, their sum t and that none is above the last of the k, leaves W between t m^(1/T - 1) and
n (t / n)^(1/T) for T > 1, with m that last one's probability. Where 20 tokens are kept of 128,256, one of 0.9 and 19 of
0.09 together, the mass of the others at T = 4 lies between 0.09 and 0.997. So temperature 1 is all that can be taught.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rtd_jax.base.settings import check_filled, check_ranges
from rtd_jax.base.types import TopK
from rtd_jax.data.encoding import EncodedChain
from rtd_jax.teacher.served.client import Client, NoReply, Unusable, WaysOut, said
from rtd_jax.teacher.served.requests import OpenAISettings

# How far from 1 a sum of probabilities may be. Rounding log-probabilities to bfloat16 changes it by at most their mean
# (the entropy, in nats) x 2^-9.
ROUNDING = 0.02
LOWEST = -9999.0  # nats, in the place of -inf; vLLM has the same
GROUP = "--config.teacher."

# (log-probability, id) of the most probable tokens in a place, in any order, as a server gave them
Entries = list[tuple[Any, Any]]


@dataclass(frozen=True)
class ServingSettings:
    """How the server of `teacher.server` is asked for the teacher's predictions."""

    api: Literal["vllm", "sglang"] = "vllm"  # of the server
    api_key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key; unset where none is needed
    concurrency: int = 32  # requests sent side by side
    timeout: float = 600.0  # seconds for one reply
    retries: int = 8  # of a request with a temporary failure, 0.5 to 8 s apart or as the server says

    def __post_init__(self) -> None:
        check_filled(self, "api_key_variable")
        check_ranges(self, concurrency="[1, 1e4]", timeout="(0, 1e6]", retries="[0, 1e6]")


def ask_for_predictions(
    server: str,
    model: str,
    serving: ServingSettings,
    chains: Mapping[str, EncodedChain],
    k: int,
    vocab_size: int,
    progress: Callable[[int], None],
) -> dict[str, TopK]:
    """The served model's predictions of the tokens of each chain whose loss counts, by the chain's key.

    Each has [P, k] ids and log-probabilities, most probable first, and the mass of the other tokens, [P], in both of
    its places: it is the mass at temperature 1, the only one at which it is known.

    Args:
      server: its URL, with or without /v1.
      model: its name there.
      chains: by a key, under which the server's log has the request.
      k: tokens kept.
      vocab_size: ids are below it.
      progress: called with the number of chains that have arrived.

    Raises:
      ValueError: the server cannot be reached or refuses, or its predictions are not those of these chains and of a
        model with this vocabulary; the message names the chain.
    """
    client = _Predictions(server, model, serving, k, vocab_size)
    found: dict[str, TopK] = {}

    def record(request: tuple[str, EncodedChain], top: TopK) -> None:
        found[request[0]] = top
        progress(1)

    client.ask(list(chains.items()), record)
    return found


def check_served(server: str, model: str, serving: ServingSettings) -> None:
    """Raises ValueError where the server cannot be reached, or does not list the model among those that it serves."""
    _Models(*_connection(server, model, serving)).ask([model], lambda *_: None)


def _connection(server: str, model: str, serving: ServingSettings) -> tuple[OpenAISettings, WaysOut]:
    again = "run the command again to go on; the shards that are written are kept"
    ways_out = WaysOut(
        address=f"see that {GROUP}server is the address of a server of {GROUP}serving.api={serving.api}",
        refused=f"mend {GROUP}served_model, {GROUP}server, {GROUP}serving.api, the key, or the server's flags "
        "(docs/teacher-cache.md)",
        again=again,
    )
    settings = OpenAISettings(
        base_url=server.rstrip("/").removesuffix("/v1"),
        model=model,
        api_key_variable=serving.api_key_variable,
        concurrency=serving.concurrency,
        timeout=serving.timeout,
        retries=serving.retries,
    )
    return settings, ways_out


class _Models(Client[str, None]):
    """Asks whether a model is served: SGLang answers whatever model is asked for."""

    def named(self, request: str) -> tuple[str, str]:
        return request, "the models that it serves"

    async def send(self, client: Any, request: str) -> Any:
        return await client.get("/v1/models", cast_to=object)

    def read(self, request: str, answer: Any) -> None:
        models = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
            raise NoReply(f"what is no list of models: {said(answer)}", is_foreign=True)
        names = [str(model.get("id")) for model in models]
        if request not in names:
            raise Unusable(
                f"{', '.join(names) or 'none'}, and no {request!r}; set {GROUP}served_model to that of the teacher"
            )


class _Predictions(Client[tuple[str, EncodedChain], TopK]):
    """Asks for the predictions on chains, each with its key."""

    def __init__(self, server: str, model: str, serving: ServingSettings, k: int, vocab_size: int) -> None:
        super().__init__(*_connection(server, model, serving))
        self._k, self._vocab_size = k, vocab_size
        self._is_vllm = serving.api == "vllm"

    def named(self, request: tuple[str, EncodedChain]) -> tuple[str, str]:
        key, chain = request
        return key[:32], chain.source or key[:32]

    async def send(self, client: Any, request: tuple[str, EncodedChain]) -> Any:
        tokens = request[1].tokens.tolist()
        if self._is_vllm:
            path = "/v1/completions"
            body: dict[str, Any] = {
                "model": self._settings.model,
                "prompt": tokens,
                "max_tokens": 1,
                "prompt_logprobs": self._k,
                # Servers take other defaults from the model's generation_config.json, and some versions apply them.
                **{"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
            }
        else:
            path = "/generate"
            body = {
                "input_ids": tokens,
                "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
                "return_logprob": True,
                "logprob_start_len": 0,
                "top_logprobs_num": self._k,
            }
        headers = {"X-Request-Id": self.named(request)[0]}  # to find the chain in the server's own log
        return await client.post(path, cast_to=object, body=body, options={"headers": headers})

    def read(self, request: tuple[str, EncodedChain], answer: Any) -> TopK:
        chain = request[1]
        tokens = chain.tokens.tolist()
        listed = (_vllm_entries if self._is_vllm else _sglang_entries)(answer, tokens)
        kept = []
        for place in np.flatnonzero(chain.loss_weights > 0):
            if place:  # nothing predicts the first token
                try:
                    kept.append(_most_probable(listed[place], self._k, self._vocab_size))
                except ValueError as error:
                    raise Unusable(f"predictions of token {place} that cannot be used: {error}") from error
        ids_PM, log_probs_PM = (np.array([row[i] for row in kept]).reshape(-1, self._k) for i in (0, 1))
        beyond_P = np.maximum(1.0 - np.sum(np.exp(log_probs_PM), axis=-1), 0.0)
        tail_P = np.zeros(len(kept), np.float32) if self._k == self._vocab_size else beyond_P.astype(np.float32)
        return TopK(ids_PM.astype(np.int32), log_probs_PM.astype(np.float32), tail_P, tail_P)


def _vllm_entries(answer: Any, tokens: list[int]) -> list[Entries]:
    """The entries of each token of a chain, from an answer of vLLM."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise NoReply(f"what is no completion: {said(answer)}", is_foreign=True)
    if len(choices) != 1:
        raise NoReply(f"{len(choices)} choices in place of one: {said(answer)}")
    rows = choices[0].get("prompt_logprobs")
    if not isinstance(rows, list):
        raise Unusable(
            f"no prompt_logprobs ({said(rows)}): it is no vLLM, or one that was started without them; give the address "
            f"of one that has them, or {GROUP}serving.api=sglang"
        )
    _check_length(len(rows), tokens)
    listed: list[Entries] = []
    for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        if place == 0:
            listed.append([])
            continue
        if not isinstance(row, dict) or not all(isinstance(entry, dict) for entry in row.values()):
            raise Unusable(f"prompt_logprobs of token {place} that are {said(row)}; {_OTHER_API}")
        if str(token) not in row:
            raise _other_token(place, token)
        listed.append([(entry.get("logprob"), int(id) if id.isdecimal() else -1) for id, entry in row.items()])
    return listed


def _sglang_entries(answer: Any, tokens: list[int]) -> list[Entries]:
    """The entries of each token of a chain, from an answer of SGLang."""
    about = answer.get("meta_info") if isinstance(answer, dict) else None
    if not isinstance(about, dict):
        raise NoReply(f"what is no answer of /generate: {said(answer)}", is_foreign=True)
    finish = about.get("finish_reason")
    if isinstance(finish, dict) and finish.get("type") == "abort":
        raise NoReply(f"an aborted request: {said(finish)}")
    rows, own = about.get("input_top_logprobs"), about.get("input_token_logprobs")
    if not isinstance(rows, list) or not isinstance(own, list):
        raise Unusable(
            f"no input_top_logprobs and input_token_logprobs ({said(rows)}, {said(own)}); give the address of an "
            "SGLang server that has them"
        )
    _check_length(len(rows), tokens)
    _check_length(len(own), tokens)
    listed: list[Entries] = []
    for place, (row, of_own, token) in enumerate(zip(rows, own, tokens, strict=True)):
        if place == 0:
            listed.append([])
            continue
        entries = [of_own, *row] if isinstance(row, list) else [None]
        if not all(isinstance(entry, list) and len(entry) >= 2 for entry in entries):
            raise Unusable(f"input_top_logprobs of token {place} that are {said(row)}; {_OTHER_API}")
        if of_own[1] != token:
            raise _other_token(place, token)
        listed.append([(entry[0], entry[1]) for entry in row])
    return listed


_OTHER_API = "this version of its API is not known here (rtd_jax/teacher/served/predictions.py)"


def _check_length(count: int, tokens: list[int]) -> None:
    if count != len(tokens):
        raise Unusable(
            f"the log-probabilities of {count} tokens, where {len(tokens)} were sent; start the server without "
            "truncation of prompts, and with a context that holds the longest chain and one token more"
        )


def _other_token(place: int, token: int) -> Unusable:
    return Unusable(
        f"the log-probabilities of another prompt: token {place} is not the {token} that was sent; the server must "
        f"take token ids as they are, of the tokenizer in {GROUP}path"
    )


def _most_probable(entries: Entries, k: int, vocab_size: int) -> tuple[list[int], list[float]]:
    """The k most probable ids of a place, and their log-probabilities; of equal ones the lower id comes first.

    Raises:
      ValueError: there are fewer, an id is not of the vocabulary, a value is no log-probability, or the values are not
        those of one distribution, most probable first.
    """
    for value, id in entries:
        if type(id) is not int or not 0 <= id < vocab_size:
            raise ValueError(
                f"it names the token id {id!r}, but the tokenizer in {GROUP}path has {vocab_size}; the served model is "
                "not of this tokenizer"
            )
        if type(value) not in (int, float) or math.isnan(value) or value > ROUNDING:
            raise ValueError(
                f"the log-probability of token id {id} is {value!r}; expected a number up to 0 (vLLM gives logits with "
                "--logprobs-mode raw_logits: start it without)"
            )
    kept = sorted((-max(min(value, 0.0), LOWEST), id) for value, id in entries)[:k]
    ids, log_probs = [id for _, id in kept], [-value for value, _ in kept]
    if len(kept) < k or len(set(ids)) < k:
        raise ValueError(
            f"there are {len(set(ids))} different tokens, not the {k} that were asked for; set "
            f"--config.cache.top_k={max(1, len(set(ids)))}, or start the server with a higher limit (vLLM: "
            f"--max-logprobs {k})"
        )
    total = sum(map(math.exp, log_probs))
    most = total + (vocab_size - k) * math.exp(log_probs[-1])  # none of the others is above the last
    if total > 1 + ROUNDING or most < 1 - ROUNDING:
        raise ValueError(
            f"the probabilities of the {k} tokens add up to {total:.4f}, and with the others to at most {most:.4f}; "
            "expected 1: the server gives something else than log-probabilities of the whole vocabulary (for vLLM, "
            "leave out --logprobs-mode)"
        )
    return ids, log_probs
