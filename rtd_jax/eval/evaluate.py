"""One model on one set of problems: free-running chains, teacher-forced steps, perplexity, in one report."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh, NamedSharding
from transformers import PreTrainedTokenizerBase

from rtd_jax.base.sharding import row_sharding, row_ways
from rtd_jax.base.types import Params
from rtd_jax.data.by_length import round_up
from rtd_jax.data.formats import Rendered, TextFormat, render, stop_token_ids
from rtd_jax.data.tokenizer_match import vocab_size
from rtd_jax.data.trace import Trace
from rtd_jax.eval.chains import check_reference, score_texts
from rtd_jax.eval.decoding import GenerateSettings, Sampling, generate
from rtd_jax.eval.metrics import make_report
from rtd_jax.eval.reference import score_references
from rtd_jax.eval.scored import Record
from rtd_jax.eval.scoring import ScoringSettings
from rtd_jax.models.model import DecoderModel

Progress = Callable[[int, int], None]  # called with (how many are done, how many there are)


@dataclasses.dataclass(frozen=True)
class DecodingSettings:
    """How solutions are written; see `decoding.generate`."""

    max_new_tokens: int  # most tokens of a solution
    batch_size: int = 128  # solutions decoded together, rounded up to the devices
    sampling: Sampling | None = None  # None takes the most probable token
    samples: int = 1  # solutions of each problem
    stop_texts: tuple[str, ...] = ()  # strings that end a solution, themselves not part of it


@dataclasses.dataclass(frozen=True, eq=False)
class ChainEvaluator:
    """Evaluates models on problems that are solved in steps: built once, called with each model.

    Attributes:
      tokenizer: a fast one; ids beyond its highest are padding of the vocabulary.
      text: the form of text, as in training.
      decoding: how solutions are written.
      scoring: how reference chains are read.
      mesh: over whose devices rows are spread; None leaves it to the compiler.
      open_from: first depth of the open bucket "5+"; None gives every depth its own bucket.
      text_label: what the report calls the form of text; "" takes its kind.
    """

    tokenizer: PreTrainedTokenizerBase
    text: TextFormat
    decoding: DecodingSettings
    scoring: ScoringSettings = ScoringSettings()
    mesh: Mesh | None = None
    open_from: int | None = None
    text_label: str = ""

    def __call__(
        self,
        model: DecoderModel,
        params: Params,
        problems: Sequence[Trace],
        texts: Sequence[Rendered] | None = None,
        *,
        progress: Progress | None = None,
        scoring_progress: Progress | None = None,
    ) -> tuple[dict[str, Any], list[Record]]:
        """Evaluates one model; neither changes nor donates its params.

        Chain and answer accuracy are measured on text that the model writes freely; step accuracy and perplexity on the
        reference text, each token given the right prefix.

        Args:
          model: static under jit.
          params: its parameters, on whatever devices and shardings they live.
          problems: with their reference chains; a completion is the steps and the final line, one a line.
          texts: each problem's prompt and whole text; None renders them in the evaluator's form of text.
          progress: called after each batch with (solutions written, solutions in all).
          scoring_progress: called after each batch with (reference chains scored, chains in all).

        Returns:
          The report (see `metrics.make_report`), and one record per solution as in `chains.score_texts`, with
          `metrics.MODEL_KEYS`.

        Raises:
          ValueError: there are no problems, one cannot be judged, or a text does not fit its tokenizer.
        """
        if texts is None:
            texts = self._texts(problems)
        model, params = model.deployed(params)
        records = self.solutions(model, params, problems, texts, progress=progress)
        references = score_references(
            model,
            params,
            self.tokenizer,
            problems,
            texts,
            dataclasses.replace(self.scoring, batch_size=self._rows(self.scoring.batch_size)),
            batch_sharding=self._sharding,
            progress=scoring_progress,
        )
        how = {
            "max_new_tokens": self.decoding.max_new_tokens,
            "text_format": self.text_label or self.text.kind,
            "decoding": "greedy" if self.decoding.sampling is None else str(self.decoding.sampling),
        }
        for record in records:
            record |= references[record["problem"]] | how
        return make_report(records, self.open_from), records

    def solutions(
        self,
        model: DecoderModel,
        params: Params,
        problems: Sequence[Trace],
        texts: Sequence[Rendered] | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[Record]:
        """What one model writes freely, scored; reference texts are not read by it. Arguments and errors as above.

        Returns:
          One record per solution as in `chains.score_texts`.
        """
        for trace in problems:  # before minutes of decoding
            check_reference(trace)
        texts = self._texts(problems) if texts is None else texts
        return score_texts(problems, *self._solutions(model, params, texts, progress))

    def _texts(self, problems: Sequence[Trace]) -> list[Rendered]:
        return [render(self.tokenizer, trace.prompt, trace.completion, self.text) for trace in problems]

    @property
    def _sharding(self) -> NamedSharding | None:
        return None if self.mesh is None else row_sharding(self.mesh)

    def _rows(self, batch_size: int) -> int:
        return batch_size if self.mesh is None else round_up(batch_size, row_ways(self.mesh))

    def _solutions(
        self, model: DecoderModel, params: Params, texts: Sequence[Rendered], progress: Progress | None
    ) -> tuple[list[list[str]], list[list[bool]]]:
        """For each problem what the model writes, and whether each solution came to its own end."""
        decoding, tokenizer = self.decoding, self.tokenizer
        if not texts:
            return [], []
        prompts = tokenizer([text.prompt for text in texts], add_special_tokens=False, verbose=False)["input_ids"]

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        def is_stopped(ids: list[int]) -> bool:
            return any(stop in decode(ids) for stop in decoding.stop_texts)

        written = generate(
            model,
            params,
            [prompt for prompt in prompts for _ in range(decoding.samples)],
            GenerateSettings(
                max_new_tokens=decoding.max_new_tokens,
                eos_ids=stop_token_ids(tokenizer, self.text),
                vocab_size=vocab_size(tokenizer),
                batch_size=self._rows(decoding.batch_size),
                pad_id=tokenizer.pad_token_id or 0,
                sampling=decoding.sampling,
            ),
            stopped=is_stopped if decoding.stop_texts else None,
            batch_sharding=self._sharding,
            progress=progress,
        )
        full = [decode(ids) for ids in written]
        cut = [_before(text, decoding.stop_texts) for text in full]
        finished = [len(ids) < decoding.max_new_tokens or a != b for ids, a, b in zip(written, full, cut, strict=True)]
        samples = [slice(start, start + decoding.samples) for start in range(0, len(written), decoding.samples)]
        return [cut[part] for part in samples], [finished[part] for part in samples]


def decoding_notes(note: Callable[[str], None], name: str) -> Progress:
    """A line of progress for each batch of problems that the model called `name` has solved."""
    return lambda done, total: note(f"{name}: {done} of {total} problems decoded")


def first_of_each_depth(problems: Sequence[Trace], count: int) -> list[Trace]:
    """The first `count` problems of each depth, shallow first."""
    chosen: dict[int, list[Trace]] = {}
    for problem in problems:
        group = chosen.setdefault(problem.depth, [])
        if len(group) < count:
            group.append(problem)
    return [problem for depth in sorted(chosen) for problem in chosen[depth]]


def _before(text: str, stop_texts: Sequence[str]) -> str:
    """`text` up to the first of the stop texts."""
    return text[: min((text.index(stop) for stop in stop_texts if stop in text), default=len(text))]
