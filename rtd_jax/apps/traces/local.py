"""Chains from a teacher in this process, by cached decoding over its devices."""

from collections.abc import Sequence, Set
from typing import Any

import jax

from rtd_jax.apps.traces.local_settings import JaxSettings
from rtd_jax.base.sharding import make_mesh, row_sharding, row_ways
from rtd_jax.data.by_length import batches_by_length, round_up
from rtd_jax.data.formats import TextFormat, render, stop_token_ids
from rtd_jax.eval.decoding import GenerateSettings, Sampling, generate
from rtd_jax.models.open import ModelSettings, open_model
from rtd_jax.teacher.served.requests import Record, Reply, Request, SamplingSettings, before_stop


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
        self._text, self._sampling = text, sampling
        mesh = make_mesh(settings.mesh)
        self._batch_size = round_up(settings.batch_size, row_ways(mesh))
        runtime = ModelSettings(
            settings.path,
            settings.param_dtype,
            settings.compute_dtype,
            sharding=settings.sharding,
            revision=settings.revision,
        )
        self._teacher = open_model(runtime, mesh)

    def identity(self) -> dict[str, Any]:
        teacher = self._teacher
        return {"backend": "jax", "model": teacher.fingerprint, "dtypes": teacher.settings.precision}

    def complete(self, requests: Sequence[Request], missing: Set[str], record: Record) -> None:
        teacher, sampling = self._teacher, self._sampling
        tokenizer = teacher.tokenizer
        requests = sorted(requests, key=lambda request: request.id)
        texts = [render(tokenizer, request.problem.prompt, "x", self._text).prompt for request in requests]
        prompts = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        settings = GenerateSettings(
            max_new_tokens=sampling.max_tokens,
            eos_ids=stop_token_ids(tokenizer, self._text),
            vocab_size=teacher.vocab_size,
            batch_size=self._batch_size,
            pad_id=tokenizer.pad_token_id or 0,
            sampling=Sampling(sampling.temperature, sampling.top_p) if sampling.temperature else None,
        )

        def read(ids: list[int]) -> tuple[str, bool]:
            return before_stop(str(tokenizer.decode(ids, skip_special_tokens=True)), sampling.stop)

        for batch in batches_by_length(prompts, self._batch_size, 1):
            asked = [requests[i] for i in batch.indices]
            if not any(request.id in missing for request in asked):
                continue
            written = generate(
                teacher.model,
                teacher.params,
                [prompts[i] for i in batch.indices],
                settings,
                streams=[request.seed for request in asked],
                stopped=(lambda ids: read(ids)[1]) if sampling.stop else None,
                batch_sharding=row_sharding(teacher.mesh),
            )
            replies = []
            for request, ids in zip(asked, written, strict=True):
                text, at_stop = read(ids)
                if request.id in missing:
                    is_whole = at_stop or len(ids) < sampling.max_tokens
                    replies.append((request, Reply(text, "stop" if is_whole else "length")))
            record(replies)
