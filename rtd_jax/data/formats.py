"""Makes one text of a prompt and a completion: as plain text, or by the tokenizer's chat template.

Either way the text is prompt + completion + closing. The closing ends the turn: it is the end-of-sequence token of a
plain text, or what the chat template writes after an assistant's message. Special tokens are written into the text,
which is then tokenised with `add_special_tokens=False`, so that the beginning-of-sequence token cannot stand there
twice.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

_SENTINEL = "@@completion@@"
# Llama-3.1's template writes today's date unless it is given one, and the data would differ from day to day.
_DATE = "26 Jul 2024"


@dataclass(frozen=True)
class TextFormat:
    """The form of a text.

    Attributes:
      kind: 'plain' or 'chat'.
      prompt_template: has {prompt} in it, once; of a chat it is the user's message. "" takes the default of the kind.
      completion_prefix: stands between prompt and completion of a plain text and is predicted with the completion. With
        byte-pair tokenizers the separating space belongs here, because it is one token with the word that follows.
      context: stands before the prompt as it is: an instruction, or solved examples.
    """

    kind: str = "plain"  # or "chat": the tokenizer's own chat template
    prompt_template: str = ""  # holds {prompt}; "" is the kind's own
    completion_prefix: str = " "  # between prompt and completion; "plain" only
    context: str = ""  # in front of every prompt, as it is

    def __post_init__(self) -> None:
        if self.kind not in ("plain", "chat"):
            raise ValueError(f"text format {self.kind!r} is unknown; use 'plain' or 'chat'")
        if self.prompt_template and self.prompt_template.count("{prompt}") != 1:
            raise ValueError(f"prompt_template is {self.prompt_template!r}; expected {{prompt}} in it exactly once")

    def unread_settings(self) -> dict[str, str]:
        return {"completion_prefix": "the text's kind is 'chat'"} if self.kind == "chat" else {}

    @property
    def template(self) -> str:
        """The prompt template in use: the given one, or the default of the kind."""
        return self.prompt_template or {"plain": "Question: {prompt}\nAnswer:", "chat": "{prompt}"}[self.kind]

    @property
    def identity(self) -> str:
        """A text that is equal for two formats if they make the same texts."""
        prefix = self.completion_prefix if self.kind == "plain" else ""
        return repr((self.kind, self.context, self.template, prefix))

    def fill(self, prompt: str) -> str:
        """Context and prompt as one text. Braces inside the prompt are left alone."""
        return self.context + self.template.replace("{prompt}", prompt)


class Rendered(NamedTuple):
    """The three pieces of a text. The model is trained on `completion` and `closing`."""

    prompt: str
    completion: str
    closing: str
    completion_offset: int  # characters of `completion` before the trace's own completion begins

    @property
    def text(self) -> str:
        return self.prompt + self.completion + self.closing


def render(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    completion: str,
    text_format: TextFormat,
    turns: Sequence[tuple[str, str]] = (),
) -> Rendered:
    """The whole text of a chain.

    Args:
      turns: of a chat, pairs of a user's and an assistant's message that come first: solved examples.

    Raises:
      ValueError: the tokenizer has no chat template, or an assistant's message does not continue its generation prompt.
    """
    if text_format.kind == "plain":
        prefix = text_format.completion_prefix
        eos = str(tokenizer.eos_token or "")
        return Rendered(_bos(tokenizer) + text_format.fill(prompt), prefix + completion, eos, len(prefix))
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use format kind 'plain', "
            "or an instruct model's tokenizer"
        )
    said = [text for turn in (*turns, (text_format.fill(prompt), _SENTINEL)) for text in turn]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    apply = functools.partial(tokenizer.apply_chat_template, tokenize=False, date_string=_DATE)
    opening = str(apply(messages[:-1], add_generation_prompt=True))
    whole = str(apply(messages))
    before, sentinel, closing = whole.rpartition(_SENTINEL)
    if not sentinel or before != opening:
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} does not continue its generation prompt: it ends with "
            f"{opening[-40:]!r}, but an assistant's message begins after {before[-40:]!r}; use format kind 'plain'"
        )
    # White space after the end-of-turn token is never generated, because decoding stops at that token.
    return Rendered(opening, completion, closing.rstrip(), 0)


def solved_examples(text_format: TextFormat, examples: Iterable[tuple[str, str]]) -> str:
    """Pairs of prompt and completion as one text that stands before a prompt: the `context` of few-shot prompting."""
    joined = text_format.completion_prefix if text_format.kind == "plain" else "\n"
    return "".join(f"{text_format.fill(prompt)}{joined}{completion}\n\n" for prompt, completion in examples)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, text_format: TextFormat) -> tuple[int, ...]:
    """The token ids that end a generation: the first token of the closing, and the end-of-sequence token."""
    closing = render(tokenizer, "x", "x", text_format).closing
    ids = [*tokenizer(closing, add_special_tokens=False)["input_ids"][:1], tokenizer.eos_token_id]
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def _bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning-of-sequence token as text if the tokenizer itself would put it there, else ""."""
    starts = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if starts else ""
