"""Chat templates that ask whether the model thinks: what stands before a completion, and that the date stands still."""

import pytest
from qwen3_like import qwen3_like

from rtd_jax.apps.compress.compress import CompressSettings
from rtd_jax.apps.diagnose.diagnose import DiagnoseSettings
from rtd_jax.apps.evaluate import EvaluateSettings
from rtd_jax.base.settings import SettingError
from rtd_jax.data.encoding import encode_traces
from rtd_jax.data.formats import TextFormat, asked_format, render, stop_token_ids
from rtd_jax.data.trace import Trace
from rtd_jax.teacher.served.requests import OpenAISettings, SamplingSettings
from rtd_jax.teacher.served.server import OpenAIBackend

USER = "<|im_start|>user\n2 and 3?<|im_end|>\n<|im_start|>assistant\n"


def test_thoughts_that_are_off_are_empty_and_part_of_the_prompt():
    rendered = render(qwen3_like(), "2 and 3?", "2 + 3 = 5", TextFormat("chat", thinking="off"))
    assert rendered.prompt == USER + "<think>\n\n</think>\n\n"
    assert rendered.completion == "2 + 3 = 5"
    assert rendered.closing == "<|im_end|>"


def test_thoughts_that_are_on_are_the_completions_own():
    said = "<think>\n2 + 3 = 5\n</think>\n\nIt is 5."
    rendered = render(qwen3_like(), "2 and 3?", said, TextFormat("chat", thinking="on"))
    assert rendered.text == f"{USER}{said}<|im_end|>"
    assert rendered.prompt == USER


def test_a_generation_prompt_that_begins_thoughts_is_continued():
    """As DeepSeek-R1's: <think> stands in the generation prompt, and is left out of a finished message."""
    tokenizer = qwen3_like()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    rendered = render(tokenizer, "2?", "So.\n</think>\n2", TextFormat("chat", thinking="on"))
    assert rendered.text == "<|im_start|>user\n2?<|im_end|><|im_start|>assistant\n<think>\nSo.\n</think>\n2<|im_end|>"


def test_a_generation_prompt_that_begins_thoughts_which_a_message_ends_is_continued():
    """As Qwen3-Thinking-2507's: both the generation prompt and a message without thoughts begin them."""
    tokenizer = qwen3_like()
    begins = (
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    )
    assert begins in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(begins, "{{- '<think>\n' }}")
    rendered = render(tokenizer, "2 and 3?", "So.\n</think>\n\n5", TextFormat("chat", thinking="on"))
    assert rendered.text == USER + "<think>\nSo.\n</think>\n\n5<|im_end|>"
    with pytest.raises(ValueError, match="set thinking to 'on' for completions with thoughts, or use"):
        render(tokenizer, "2 and 3?", "5", TextFormat("chat", thinking="off"))


@pytest.mark.parametrize("thinking", ["", "off"])
def test_a_template_whose_thoughts_are_not_chosen_says_how_to(thinking):
    tokenizer = qwen3_like()
    if thinking:  # a template that writes thoughts whatever it is told
        tokenizer.chat_template = tokenizer.chat_template.replace("enable_thinking is false", "false")
    with pytest.raises(
        ValueError, match=r"does not continue its generation prompt: .*set thinking to 'off', or to 'on'"
    ):
        render(tokenizer, "2?", "2", TextFormat("chat", thinking=thinking))


def test_thinking_on_forgives_nothing_but_thoughts():
    tokenizer = qwen3_like()
    tokenizer.chat_template = tokenizer.chat_template.replace("'<think>\n' + thoughts", "'Well. <think>\n' + thoughts")
    with pytest.raises(ValueError, match="does not continue its generation prompt"):
        render(tokenizer, "2?", "2", TextFormat("chat", thinking="on"))


def test_another_word_for_thinking_is_refused():
    with pytest.raises(SettingError, match="thinking is 'yes'; expected 'on', 'off', or ''"):
        TextFormat("chat", thinking="yes")
    assert "thinking" in TextFormat(thinking="on").unread_settings()


def test_only_a_choice_changes_what_a_text_is_called():
    plain, chosen = TextFormat("chat"), TextFormat("chat", thinking="off")
    assert plain.identity != chosen.identity != TextFormat("chat", thinking="on").identity
    assert "thinking" not in plain.identity  # of records that were made before there was a choice


@pytest.mark.parametrize(
    ("trained_on", "asked", "form"),
    [
        (None, {}, None),
        (TextFormat("chat", thinking="off"), {}, None),
        (None, {"prompt_template": "{prompt}\n"}, TextFormat("plain", "{prompt}\n", "")),
        (None, {"chat": True, "thinking": "off"}, TextFormat("chat", thinking="off")),
        (TextFormat("chat", thinking="off"), {"chat": True}, TextFormat("chat", thinking="off")),
        (TextFormat("chat", thinking="off"), {"chat": True, "thinking": "on"}, TextFormat("chat", thinking="on")),
    ],
)
def test_flags_ask_for_a_form_of_text(trained_on, asked, form):
    nothing = {"chat": False, "prompt_template": "", "thinking": ""}
    assert asked_format(trained_on, **(nothing | asked)) == form


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        (EvaluateSettings, {"model": ("x",)}),
        (DiagnoseSettings, {"teacher": "x", "student": "y"}),
        (CompressSettings, {"student": "x", "scheme": "int4"}),
    ],
)
def test_thinking_without_a_chat_is_refused(settings, needed):
    with pytest.raises(ValueError, match="thinking is 'off', which only a chat template reads; give --chat too"):
        settings(**needed, thinking="off")


def test_a_chain_without_thoughts_is_encoded_and_ends_at_the_end_of_the_turn():
    tokenizer, text = qwen3_like(), TextFormat("chat", thinking="off")
    trace = Trace.of_steps("2 and 3?", ["2 + 3 = 5", "5 + 1 = 6"], "6", "The answer is 6.")
    (chain,), _ = encode_traces(tokenizer, [trace], text, row_length=200)
    assert tokenizer.decode(chain.tokens[: chain.prompt_length]).endswith("<think>\n\n</think>\n\n")
    assert chain.tokens[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chain.loss_weights.sum() == len(chain) - chain.prompt_length
    assert stop_token_ids(tokenizer, text) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


@pytest.mark.parametrize("space", [" ", "\n", ""])
def test_a_space_before_an_answer_is_part_of_it(space):
    """As Llama-2's and Mistral's templates have it: the model writes it, after the end of the user's turn."""
    tokenizer, text = qwen3_like(), TextFormat("chat")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}"
        "{% else %}{{ '" + space.replace("\n", "\\n") + "' + m.content + ' <|endoftext|>' }}{% endif %}{% endfor %}"
    )
    rendered = render(tokenizer, "2?", "1 + 1 = 2", text)
    assert rendered.prompt == "<|im_start|>2?<|im_end|>"
    assert rendered.completion == space + "1 + 1 = 2"
    assert rendered.completion_offset == len(space)
    trace = Trace.of_steps("2?", ["1 + 1 = 2", "2 + 0 = 2"], "2", "The answer is 2.")
    (chain,), _ = encode_traces(tokenizer, [trace], text, row_length=200)
    decoded = tokenizer.decode(chain.tokens[: chain.boundaries[1] + 1])
    assert decoded.endswith(f"<|im_end|>{space}1 + 1 = 2")
    assert chain.loss_weights[chain.prompt_length] == 1


def test_todays_date_is_not_in_a_text():
    """SmolLM3's and Mistral Small's templates write it by a function of their environment."""
    tokenizer = qwen3_like()
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y, %H:%M') + date_string }}" + tokenizer.chat_template
    rendered = render(tokenizer, "2?", "2", TextFormat("chat", thinking="off"))
    assert rendered.prompt.startswith("26 July 2024, 00:0026 Jul 2024<|im_start|>")


@pytest.mark.parametrize(
    ("text", "given", "sent"),
    [
        (TextFormat("chat"), "", {}),
        (TextFormat("chat", thinking="off"), "", {"chat_template_kwargs": {"enable_thinking": False}}),
        (
            TextFormat("chat", thinking="on"),
            '{"top_k": 5, "chat_template_kwargs": {"tools": 1}}',
            {"top_k": 5, "chat_template_kwargs": {"enable_thinking": True, "tools": 1}},
        ),
        (TextFormat(), "", {}),
    ],
)
def test_a_server_is_told_of_thoughts(text, given, sent):
    backend = OpenAIBackend(OpenAISettings(model="m", extra_body=given), text, SamplingSettings())
    assert backend.identity()["extra_body"] == sent
