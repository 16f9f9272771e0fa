"""Boundary positions, loss weights and lengths, whatever the tokenizer merges. Expected by decoding, not by offsets."""

import dataclasses
import json

import numpy as np
import pytest
from llama3_like import llama3_like
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rtd_jax.data.encoding import EncodedChain, chains_fingerprint, encode_traces
from rtd_jax.data.formats import TextFormat, render, stop_token_ids
from rtd_jax.data.generators.word_problems import generate
from rtd_jax.data.schemas.gsm8k import from_gsm8k
from rtd_jax.data.schemas.prose import from_prose
from rtd_jax.data.tiny_tokenizer import TINY_FORMAT, tiny_tokenizer
from rtd_jax.data.trace import Trace

PLAIN, CHAT = TextFormat(), TextFormat("chat")
LINE_PROMPT = TextFormat(prompt_template="Question: {prompt}\nAnswer:\n", completion_prefix="")
# Hand-made difficulties: no full stop, an emoji of several tokens at a step's end, a repeated step, a ".\n" merge.
AWKWARD = Trace.of_steps(
    "What is π plus {x}?", ("Take π.", "Add it 🙂", "Take π.", "So it is <<3+4=7>>7"), "7", "#### 7", "awkward:1"
)


def encode_trace(tokenizer, trace, text_format) -> EncodedChain:
    return encode_traces(tokenizer, [trace], text_format, row_length=2**31 - 1)[0][0]


@pytest.fixture(scope="module")
def bpe():
    return llama3_like()


@pytest.fixture(scope="module")
def tiny():
    return tiny_tokenizer()


def texts_up_to_boundaries(tokenizer, chain) -> list[str]:
    """The completion up to the end of each step."""
    return [tokenizer.decode(chain.tokens[chain.prompt_length : boundary + 1]) for boundary in chain.boundaries[1:]]


def assert_boundaries(tokenizer, trace, chain):
    """The tokens up to boundary i are the first to hold all of step i, and nothing visible after it."""
    completion = tokenizer.decode(chain.tokens[chain.prompt_length :])
    assert trace.completion in completion
    written = ""
    for boundary, step in zip(chain.boundaries[1:], trace.steps, strict=True):
        written = f"{written}\n{step}" if written else step
        until = tokenizer.decode(chain.tokens[chain.prompt_length : boundary + 1]).strip()
        before = tokenizer.decode(chain.tokens[chain.prompt_length : boundary]).strip()
        assert until == written
        assert before != written
        assert written.startswith(before.rstrip("\ufffd"))


def test_the_fixture_merges_a_full_stop_with_the_line_end(bpe):
    # Otherwise the tests below would not exercise what Llama-3 does.
    ids = bpe("apples.\nMia", add_special_tokens=False)["input_ids"]
    assert ".\n" in [bpe.decode([i]) for i in ids]


@pytest.mark.parametrize("text_format", [PLAIN, CHAT, LINE_PROMPT], ids=["plain", "chat", "line"])
@pytest.mark.parametrize("trim_offsets", [True, False])
def test_boundaries_with_byte_pairs(text_format, trim_offsets):
    tokenizer = llama3_like(trim_offsets=trim_offsets)
    for trace in [AWKWARD, *generate(60, (1, 3, 8), "test")]:
        chain = encode_trace(tokenizer, trace, text_format=text_format)
        assert_boundaries(tokenizer, trace, chain)


def test_boundaries_with_the_tiny_tokenizer(tiny):
    for trace in generate(80, (1, 2, 7, 8), "validation"):
        assert_boundaries(tiny, trace, encode_trace(tiny, trace, text_format=TINY_FORMAT))


@pytest.mark.parametrize(
    "steps",
    [
        ("So it is 4.", "So it is 4.", "So it is 4."),  # the same step again
        ("Then 2 and 2 are 4.", "2 and 2 are 4.", "4.", "are 4.", "4."),  # parts of earlier ones
        ("4.", "24. 4. 4.", "4.", "4. 4."),  # an earlier one within it
    ],
)
def test_steps_that_repeat_have_boundaries_in_their_own_places(bpe, steps):
    trace = Trace.of_steps("What is it?", steps, "4", "#### 4")
    expected = ["\n".join(steps[: i + 1]) for i in range(len(steps))]
    assert trace.steps == steps
    for text_format in (PLAIN, CHAT):
        found = texts_up_to_boundaries(bpe, encode_trace(bpe, trace, text_format))
        assert [text.strip() for text in found] == expected


def test_repeated_sentences_of_prose_have_boundaries_in_their_own_places(bpe):
    text = "4 is even. So 4 is even. 4 is even.  4 is even. So"
    trace = from_prose({"prompt": "Is it?", "text": f"{text}\n#### yes"})
    assert trace.steps == (text,)
    # Cut behind the second, third and last sentence: "4 is even." as a step stands twice in the step before it.
    cut = dataclasses.replace(trace, spans=((0, 24), (25, 35), (37, 50)))
    assert cut.steps == ("4 is even. So 4 is even.", "4 is even.", "4 is even. So")
    assert cut.completion == trace.completion
    for text_format in (PLAIN, CHAT):
        found = texts_up_to_boundaries(bpe, encode_trace(bpe, cut, text_format))
        assert [text.strip() for text in found] == [text[:24], text[:35], text]


def test_boundaries_of_published_problems(shared_data, bpe):
    rows = [json.loads(line) for line in (shared_data / "gsm8k" / "train.jsonl").open()][::25]
    traces = [from_gsm8k(row, f"train:{i}") for i, row in enumerate(rows)]
    chains, report = encode_traces(bpe, traces, CHAT, row_length=4096)
    assert len(chains) == len(traces) == report.total
    for trace, chain in zip(traces, chains, strict=True):
        assert chain.depth == trace.depth
        assert_boundaries(bpe, trace, chain)


def test_plain_chain_by_hand(tiny):
    trace = from_gsm8k({"question": "Mia has 9 apples.", "answer": "Mia buys 4: <<9+4=13>>13 apples.\n#### 13"})
    chain = encode_trace(tiny, trace, text_format=LINE_PROMPT)
    assert [tiny.decode([i]) for i in chain.tokens] == [
        *("<bos>", "Question", ": ", "Mia", " has ", "9", " apples", ".\n", "Answer", ":\n"),
        *("Mia", " buys ", "4", ": ", "<<", "9", "+", "4", "=", "13", ">>", "13", " apples", ".\n"),
        *("#### ", "13", "<eos>"),
    ]
    assert chain.prompt_length == 10
    assert chain.boundaries.tolist() == [9, 23]
    assert chain.loss_weights.tolist() == [0.0] * 10 + [1.0] * 17
    assert (chain.tokens.dtype, chain.boundaries.dtype, chain.loss_weights.dtype) == (np.int32, np.int32, np.float32)


def test_chat_is_what_the_template_renders_with_one_bos(bpe):
    trace = generate(1, (2,))[0]
    chain = encode_trace(bpe, trace, text_format=CHAT)
    messages = [{"role": "user", "content": trace.prompt}, {"role": "assistant", "content": trace.completion}]
    whole = bpe.apply_chat_template(messages, tokenize=False)
    assert bpe.decode(chain.tokens) == whole
    assert chain.tokens.tolist().count(bpe.bos_token_id) == 1
    opening = bpe.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert bpe.decode(chain.tokens[: chain.prompt_length]) == opening
    assert bpe.decode(chain.tokens[-1:]) == "<|eot_id|>"
    assert chain.loss_weights[-1] == 1.0  # the model must learn to end its turn
    assert stop_token_ids(bpe, CHAT) == (bpe.convert_tokens_to_ids("<|eot_id|>"),)


def test_plain_text_starts_with_bos_only_where_the_tokenizer_itself_would_put_it(bpe):
    trace = generate(1)[0]
    assert encode_trace(bpe, trace, text_format=PLAIN).tokens[:2].tolist().count(bpe.bos_token_id) == 1
    silent = llama3_like()
    silent.backend_tokenizer.post_processor = None
    assert bpe.bos_token_id not in encode_trace(silent, trace, text_format=PLAIN).tokens


def test_context_moves_the_boundaries_and_nothing_else(bpe):
    trace = generate(1, (4,))[0]
    for text_format in (PLAIN, CHAT):
        plain = encode_trace(bpe, trace, text_format=text_format)
        context = TextFormat(text_format.kind, context="Q: One and one?\nA: #### 2\n\n")
        moved = encode_trace(bpe, trace, text_format=context)
        shift = len(moved.tokens) - len(plain.tokens)
        assert shift > 0
        assert (moved.boundaries - plain.boundaries).tolist() == [shift] * 5
        assert moved.tokens[moved.prompt_length :].tolist() == plain.tokens[plain.prompt_length :].tolist()
        assert moved.loss_weights[: moved.prompt_length].sum() == 0
        assert_boundaries(bpe, trace, moved)


def test_generation_starts_from_the_prompt_that_training_saw(bpe):
    for text_format in (PLAIN, CHAT):
        for trace in generate(20):
            chain = encode_trace(bpe, trace, text_format=text_format)
            prompt = render(bpe, trace.prompt, trace.completion, text_format).prompt
            ids = bpe(prompt, add_special_tokens=False)["input_ids"]
            assert ids == chain.tokens[: chain.prompt_length].tolist()


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize(
    ("template", "prefix"), [("Question: {prompt}\nAnswer: ", ""), ("Question: {prompt}\nAnswer:", "\n")]
)
def test_a_token_across_prompt_and_completion_is_refused(template, prefix, trim_offsets):
    tokenizer = llama3_like(trim_offsets=trim_offsets)
    trace = generate(1)[0]
    with pytest.raises(ValueError, match=r"synthetic-train:1: .* share a token"):
        encode_trace(tokenizer, trace, text_format=TextFormat("plain", template, prefix))


def test_overflow_is_counted_and_never_cut(tiny):
    traces = generate(60, (1, 2, 6))
    lengths = [len(encode_trace(tiny, trace, text_format=TINY_FORMAT).tokens) for trace in traces]
    longest = max(lengths)
    chains, report = encode_traces(tiny, traces, TINY_FORMAT, row_length=longest)
    assert ([len(chain) for chain in chains], report.dropped, report.longest) == (lengths, (), longest)

    limit = 120
    over = tuple(i for i, length in enumerate(lengths) if length > limit)
    assert 0 < len(over) < 60
    message = (
        rf"{len(over)} of 60 chains do not fit \({traces[over[0]].source} has {lengths[over[0]]} tokens, row_length is "
        rf"120\).* row_length of {longest} "
    )
    with pytest.raises(ValueError, match=message):
        encode_traces(tiny, traces, TINY_FORMAT, row_length=limit)
    chains, report = encode_traces(tiny, traces, TINY_FORMAT, row_length=limit, max_dropped_fraction=0.5)
    assert report.dropped == over
    assert [len(chain) for chain in chains] == [length for length in lengths if length <= limit]
    assert f"first dropped: {traces[over[0]].source} has" in str(report)


def test_text_of_another_language_is_refused_by_the_tiny_tokenizer(tiny):
    with pytest.raises(ValueError, match=r"awkward:1: \d+ of \d+ tokens are unknown .* 'What'"):
        encode_trace(tiny, AWKWARD, text_format=TINY_FORMAT)


def test_formats_that_cannot_work(bpe, tiny):
    with pytest.raises(ValueError, match="text format 'instruct' is unknown"):
        TextFormat("instruct")
    with pytest.raises(ValueError, match=r"expected \{prompt\} in it exactly once"):
        TextFormat(prompt_template="Question:")
    with pytest.raises(ValueError, match="has no chat template"):
        encode_trace(tiny, generate(1)[0], text_format=CHAT)
    closed = llama3_like()
    closed.chat_template = bpe.chat_template.replace("assistant<|end_header_id|>\n\n'", "assistant<|end_header_id|>'")
    with pytest.raises(ValueError, match="does not continue its generation prompt"):
        encode_trace(closed, generate(1)[0], text_format=CHAT)


def test_a_template_that_writes_the_date_gives_the_same_text_every_day():
    tokenizer = llama3_like()
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        + "Today: {{ date_string }}\n"
        + tokenizer.chat_template
    )
    assert render(tokenizer, "p", "c", CHAT).text.startswith("Today: 26 Jul 2024\n")


def test_steps_that_share_a_token_are_refused():
    # One token per pair of characters: steps "a" and "b" end inside the same one.
    core = Tokenizer(models.WordLevel({"p ": 0, "a\nb": 1, "<unk>": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("p ", behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    with pytest.raises(ValueError, match="expected each step to end on a token of its own"):
        encode_trace(tokenizer, Trace.of_steps("p", ("a", "b"), "b"), text_format=TextFormat("plain", "{prompt} ", ""))


def test_fingerprint_follows_content(tiny):
    traces = generate(6)
    chains, _ = encode_traces(tiny, traces, TINY_FORMAT, row_length=300)
    again, _ = encode_traces(tiny, traces, TINY_FORMAT, row_length=200)
    assert chains_fingerprint(chains) == chains_fingerprint(again)
    assert chains_fingerprint(chains[::-1]) != chains_fingerprint(chains)
    q_and_a = TextFormat(prompt_template="Q: {prompt}\nA:\n", completion_prefix="")
    other, _ = encode_traces(tiny, traces, q_and_a, row_length=300)
    assert chains_fingerprint(other) != chains_fingerprint(chains)
