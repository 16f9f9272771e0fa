"""Chains from a teacher in this process, by cached decoding over its devices."""

from collections.abc import Sequence, Set
from typing import Any

import jax

from rtd_jax.apps.traces.requests import JaxSettings, Record, Reply, Request, SamplingSettings, before_stop
from rtd_jax.base.sharding import make_mesh, row_sharding, row_ways
from rtd_jax.data.by_length import round_up
from rtd_jax.data.formats import TextFormat, render, stop_token_ids
from rtd_jax.eval.decoding import GenerateSettings, Sampling, generate
from rtd_jax.models.open import ModelSettings, open_model


class JaxBackend:
    """A teacher that decodes batches of prompts of similar length.

    A batch always consists of the same requests, so that an interrupted one is written again with the same bits.

    Raises:
      ValueError: there is no such model, or several processes were started.
    """

    def __init__(self, settings: JaxSettings, text: TextFormat, sampling: SamplingSettings) -> None:
        if not settings.path:
            raise ValueError("jax.path is empty; give the teacher's Hugging Face folder or hub name")
        if jax.process_count() > 1:
            raise ValueError(
                f"{jax.process_count()} processes were started, but one writes traces; use one host's devices, or a "
                "server with --config.backend=openai"
            )
        self._settings, self._text, self._sampling = settings, text, sampling
        runtime = ModelSettings(settings.path, settings.param_dtype, settings.compute_dtype, sharding=settings.sharding)
        self._teacher = open_model(runtime, make_mesh(settings.mesh))

    def identity(self) -> dict[str, Any]:
        teacher = self._teacher
        return {"backend": "jax", "model": teacher.fingerprint, "dtypes": teacher.settings.precision}

    def complete(self, requests: Sequence[Request], missing: Set[str], record: Record) -> None:
        teacher, sampling = self._teacher, self._sampling
        tokenizer = teacher.tokenizer
        texts = [render(tokenizer, request.problem.prompt, "x", self._text).prompt for request in requests]
        prompts = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        batch_size = round_up(self._settings.batch_size, row_ways(teacher.mesh))

        def decoded(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        def stopped(ids: list[int]) -> bool:
            return before_stop(decoded(ids), sampling.stop)[1]

        by_length = sorted(range(len(requests)), key=lambda i: (len(prompts[i]), requests[i].id))
        for start in range(0, len(by_length), batch_size):
            rows = by_length[start : start + batch_size]
            if not any(requests[i].id in missing for i in rows):
                continue
            written = generate(
                teacher.model,
                teacher.params,
                [prompts[i] for i in rows],
                GenerateSettings(
                    max_new_tokens=sampling.max_tokens,
                    eos_ids=stop_token_ids(tokenizer, self._text),
                    vocab_size=len(tokenizer),
                    batch_size=batch_size,
                    pad_id=tokenizer.pad_token_id or 0,
                    sampling=Sampling(sampling.temperature, sampling.top_p) if sampling.temperature else None,
                ),
                streams=[requests[i].seed for i in rows],
                stopped=stopped if sampling.stop else None,
                batch_sharding=row_sharding(teacher.mesh),
            )
            replies = []
            for ids in written:
                text, at_stop = before_stop(decoded(ids), sampling.stop)
                replies.append(Reply(text, "stop" if at_stop or len(ids) < sampling.max_tokens else "length"))
            pairs = zip((requests[i] for i in rows), replies, strict=True)
            record([(request, reply) for request, reply in pairs if request.id in missing])
