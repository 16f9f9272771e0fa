"""Makes one text of a prompt and a completion: as plain text, or by the tokenizer's chat template.

Either way the text is prompt + completion + closing. The closing ends the turn: it is the end-of-sequence token of a
plain text, or what the chat template writes after an assistant's message. Special tokens are written into the text,
which is then tokenised with `add_special_tokens=False`, so that the beginning-of-sequence token cannot stand there
twice. Only the format writes them: a prompt or a chain that has "<eos>" in it, which would be read as a real end, is
refused.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rtd_jax.base.settings import SettingError
from rtd_jax.data.chat import apply_template

_SENTINEL = "@@completion@@"
_BEGUN = "<think>"
_NO_THOUGHTS = re.compile(r"<think>\s*</think>\s*")


@dataclass(frozen=True)
class TextFormat:
    """The form of a text.

    Attributes:
      kind: 'plain' or 'chat'.
      prompt_template: has {prompt} in it, once; of a chat it is the user's message. "" takes the default of the kind.
        It may have special tokens in it, which nothing else of a text may.
      completion_prefix: stands between prompt and completion of a plain text and is predicted with the completion. With
        byte-pair tokenizers the separating space belongs here, because it is one token with the word that follows.
      context: stands before the prompt as it is: an instruction, or solved examples.
      thinking: what a chat's template is told that asks whether the model thinks before it answers: "off", and the
        thoughts stay empty; "on", and a completion begins with what the model thinks; "" leaves it to the template.
    """

    kind: str = "plain"  # or "chat": the tokenizer's own chat template
    prompt_template: str = ""  # holds {prompt}; "" is the kind's own
    completion_prefix: str = " "  # between prompt and completion; "plain" only
    context: str = ""  # in front of every prompt, as it is
    thinking: str = ""  # "on" or "off", for chat templates that ask for it, like Qwen3's; "" is the template's own

    def __post_init__(self) -> None:
        if self.kind not in ("plain", "chat"):
            raise SettingError(f"kind is {self.kind!r}; expected 'plain' or 'chat'")
        if self.thinking not in ("", "on", "off"):
            raise SettingError(f"thinking is {self.thinking!r}; expected 'on', 'off', or '' for the template's own")
        for name in ("prompt_template", "completion_prefix", "context"):
            try:
                getattr(self, name).encode()
            except UnicodeEncodeError:  # a command line may have any bytes
                raise SettingError(f"{name} is {getattr(self, name)!r}, which is not UTF-8; expected text") from None
        if self.prompt_template and self.prompt_template.count("{prompt}") != 1:
            raise SettingError(f"prompt_template is {self.prompt_template!r}; expected {{prompt}} in it exactly once")

    def unread_settings(self) -> dict[str, str]:
        if self.kind == "chat":
            return {"completion_prefix": "the text's kind is 'chat'"}
        return {"thinking": "the text's kind is 'plain'"}

    @property
    def template(self) -> str:
        """The prompt template in use: the given one, or the default of the kind."""
        return self.prompt_template or {"plain": "Question: {prompt}\nAnswer:", "chat": "{prompt}"}[self.kind]

    @property
    def identity(self) -> str:
        """A text that is equal for two formats if they make the same texts."""
        prefix = self.completion_prefix if self.kind == "plain" else ""
        thinking = (f"thinking {self.thinking}",) if self.kind == "chat" and self.thinking else ()
        return repr((self.kind, self.context, self.template, prefix, *thinking))

    def fill(self, prompt: str) -> str:
        """Context and prompt as one text. Braces inside the prompt are left alone."""
        return self.context + self.template.replace("{prompt}", prompt)


def asked_format(
    trained_on: TextFormat | None, *, chat: bool, prompt_template: str, thinking: str
) -> TextFormat | None:
    """The form of text that the flags of a command ask for; None where they leave it open.

    What is written follows a plain template after a space, or on its new line.

    Args:
      trained_on: the form that the model was trained on, where it is known: it decides about thinking if nothing else
        does.

    Raises:
      ValueError: a template without {prompt}, an unknown word for thinking, or thinking without a chat.
    """
    if thinking and not chat:
        raise ValueError(f"thinking is {thinking!r}, which only a chat template reads; give --chat too")
    if chat:
        return TextFormat("chat", prompt_template, thinking=thinking or (trained_on.thinking if trained_on else ""))
    if prompt_template:
        return TextFormat("plain", prompt_template, "" if prompt_template.endswith("\n") else " ")
    return None


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
    source: str = "",
) -> Rendered:
    """The whole text of a chain.

    Args:
      turns: of a chat, pairs of a user's and an assistant's message that come first: solved examples.
      source: where the chain came from, for errors.

    Raises:
      ValueError: the tokenizer has no chat template, the template fails, an assistant's message does not continue its
        generation prompt, or a special token stands in the text of the chain, of the context or of an example.
    """
    examples = "\n".join(text for turn in turns for text in turn)
    pieces = {
        "the prompt": prompt,
        "the completion": completion,
        "the context": text_format.context,
        "a solved example": examples,
    }
    pattern = _special_pattern(special_texts(tokenizer))
    for name, text in pieces.items():
        if pattern is not None and (found := pattern.search(text)):
            raise ValueError(
                f"{source or 'text'}: {name} has {found[0]!r} in it, a special token of the tokenizer "
                f"{tokenizer.name_or_path!r} ({text[max(0, found.start() - 20) : found.end() + 20]!r}); it would be "
                "read as one, not as text: leave the row out, or write it in another way "
                "(only prompt_template may have it)"
            )
    if text_format.kind == "plain":
        prefix = text_format.completion_prefix
        eos = str(tokenizer.eos_token or "")
        return Rendered(_bos(tokenizer) + text_format.fill(prompt), prefix + completion, eos, len(prefix))
    said = [text for turn in (*turns, (text_format.fill(prompt), _SENTINEL)) for text in turn]
    messages = [(("user", "assistant")[i % 2], text) for i, text in enumerate(said)]
    thinking = text_format.thinking
    opening = apply_template(tokenizer, messages[:-1], is_prompt=True, thinking=thinking)
    whole = apply_template(tokenizer, messages, is_prompt=False, thinking=thinking)
    before, sentinel, closing = whole.rpartition(_SENTINEL)
    # Llama-2 and Mistral begin an answer with a space, which the model writes.
    space = before[len(opening) :] if before.startswith(opening) else ""
    fits = before == opening or space.isspace() or (thinking == "on" and _is_open_to_thoughts(opening, before))
    if not sentinel or not fits:
        choices = "'off', or to 'on'" if not _begins_thoughts(opening) else "'on'"
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} does not continue its generation prompt: it ends with "
            f"{opening[-40:]!r}, but an assistant's message begins after {before[-40:]!r}; "
            + (f"set thinking to {choices} for completions with thoughts, or " if _BEGUN in opening + before else "")
            + "use format kind 'plain'"
        )
    # White space after the end-of-turn token is never generated, because decoding stops at that token.
    prefix = space if space.isspace() else ""
    return Rendered(opening, prefix + completion, closing.rstrip(), len(prefix))


def _is_open_to_thoughts(opening: str, before: str) -> bool:
    """Whether a generation prompt and what a template writes before an assistant's message differ by thoughts alone.

    A template that is given a message without thoughts puts empty ones before it (Qwen3), or drops the beginning of
    thoughts that its generation prompt has (DeepSeek-R1). A completion that has thoughts follows the prompt.
    """
    if before.startswith(opening):
        begun = _BEGUN if _begins_thoughts(opening) else ""  # Qwen3-Thinking-2507 begins them, and then ends them
        return _NO_THOUGHTS.fullmatch(begun + before[len(opening) :]) is not None
    return opening.startswith(before) and opening[len(before) :].strip() == _BEGUN


def _begins_thoughts(opening: str) -> bool:
    return opening.rstrip().endswith(_BEGUN)


def solved_examples(text_format: TextFormat, examples: Iterable[tuple[str, str]]) -> str:
    """Pairs of prompt and completion as one text that stands before a prompt: the `context` of few-shot prompting."""
    joined = text_format.completion_prefix if text_format.kind == "plain" else "\n"
    return "".join(f"{text_format.fill(prompt)}{joined}{completion}\n\n" for prompt, completion in examples)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, text_format: TextFormat) -> tuple[int, ...]:
    """The token ids that end a generation: the closing's first special token, and the end-of-sequence token.

    A closing without a special token ends at its first token.
    """
    closing = tokenizer(render(tokenizer, "x", "x", text_format).closing, add_special_tokens=False)["input_ids"]
    # Llama-2 writes a space before its end, and the token of a space is no end.
    special = [i for i in closing if i in special_ids(tokenizer)]
    ids = [*(special or closing)[:1], tokenizer.eos_token_id]
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def check_end(tokenizer: PreTrainedTokenizerBase, text_format: TextFormat) -> None:
    """Raises ValueError where texts of this form have no end, so that a model that learns from them never stops."""
    if render(tokenizer, "x", "x", text_format).closing.strip():
        return
    if text_format.kind == "plain":
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so a plain text has no end and "
            "the student would never learn to stop; set eos_token in its tokenizer_config.json"
        )
    raise ValueError(
        f"the chat template of {tokenizer.name_or_path!r} writes no end of turn after an assistant's message, so the "
        "student would never learn to stop; let the template write eos_token there, or use format kind 'plain'"
    )


def special_texts(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The special tokens that are markup, like "<eos>" or "[INST]", and the end of sequence, whatever it is.

    A word or a mark that is only the padding ("!") is ordinary text.
    """
    return _special_texts(tokenizer, len(tokenizer), tuple(map(str, tokenizer.all_special_tokens)))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of `special_texts`."""
    found = tokenizer.convert_tokens_to_ids(sorted(special_texts(tokenizer)))
    return [found] if isinstance(found, int) else found


@functools.lru_cache(maxsize=8)
def _special_texts(tokenizer: PreTrainedTokenizerBase, size: int, named: tuple[str, ...]) -> frozenset[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    markup = {token for token in (*named, *added) if re.search(r"[<\[{|]", token)}
    return frozenset(markup | ({str(tokenizer.eos_token)} if tokenizer.eos_token else set()))


@functools.lru_cache(maxsize=8)
def _special_pattern(texts: frozenset[str]) -> re.Pattern[str] | None:
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first))) if texts else None


def _bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning-of-sequence token as text if the tokenizer itself would put it there, else ""."""
    starts = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if starts else ""
