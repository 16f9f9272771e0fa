"""Boundary positions, loss weights and lengths, whatever the tokenizer merges. Expected by decoding, not by offsets."""

import dataclasses
import json
import re
import unicodedata

import numpy as np
import pytest
from llama3_like import llama3_like
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
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
    assert trace.body == text
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
    assert np.flatnonzero(chain.conclusions).tolist() == [21]  # the last number of the step, 13
    assert chain.loss_weights.tolist() == [0.0] * 10 + [1.0] * 17
    assert (chain.tokens.dtype, chain.boundaries.dtype, chain.loss_weights.dtype) == (np.int32, np.int32, np.float32)


def test_the_conclusion_of_a_step_is_its_last_number_on_tokens_of_its_own(bpe):
    steps = ("3 + 4 = 7.", "7 + 20 = 27 pens", "So there are 1,234 pens", "That is all.")
    trace = Trace.of_steps("How many?", steps, "27", "#### 27")
    chain = encode_trace(bpe, trace, text_format=PLAIN)
    assert chain.conclusions.max() == len(steps)
    for number, said in enumerate(("7", "27", "1,234", "all"), start=1):
        own = np.flatnonzero(chain.conclusions == number)
        assert (np.diff(own) == 1).all()
        assert said in bpe.decode(chain.tokens[own])
        assert chain.boundaries[number - 1] < own[0] <= own[-1] <= chain.boundaries[number]


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
    for name in ("prompt_template", "completion_prefix", "context"):
        with pytest.raises(ValueError, match=f"{name} is 'caf.udce9', which is not UTF-8"):
            TextFormat(**{name: "caf\udce9"})
    with pytest.raises(ValueError, match="kind is 'instruct'; expected 'plain' or 'chat'"):
        TextFormat("instruct")
    with pytest.raises(ValueError, match=r"expected \{prompt\} in it exactly once"):
        TextFormat(prompt_template="Question:")
    with pytest.raises(ValueError, match="has no chat template"):
        encode_trace(tiny, generate(1)[0], text_format=CHAT)
    closed = llama3_like()
    closed.chat_template = bpe.chat_template.replace("assistant<|end_header_id|>\n\n'", "helper<|end_header_id|>\n\n'")
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


def test_texts_without_an_end_are_refused(bpe):
    """A student that never sees an end of a text never learns to stop."""
    trace = generate(1)[0]
    endless = llama3_like()
    endless.eos_token = None
    with pytest.raises(ValueError, match=r"no end-of-sequence token, .* never learn to stop; set eos_token"):
        encode_trace(endless, trace, PLAIN)
    endless.chat_template = bpe.chat_template.replace("+ '<|eot_id|>'", "")
    with pytest.raises(ValueError, match=r"writes no end of turn .* never learn to stop"):
        encode_trace(endless, trace, CHAT)
    endless.chat_template = bpe.chat_template.replace("<|eot_id|>", "\n\n")  # line ends are stripped, and end nothing
    with pytest.raises(ValueError, match="writes no end of turn"):
        encode_trace(endless, trace, CHAT)


def test_a_generation_stops_at_the_special_token_of_the_closing():
    spaced = llama3_like()
    spaced.eos_token = "<|end_of_text|>"
    spaced.chat_template = spaced.chat_template.replace("+ '<|eot_id|>'", "+ ' <|eot_id|>'")  # as Llama-2 has a space
    assert stop_token_ids(spaced, CHAT) == tuple(spaced.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"]))


@pytest.mark.parametrize("special", ["<|eot_id|>", "<|begin_of_text|>", "<|reserved_special_token_3|>"])
@pytest.mark.parametrize("text_format", [PLAIN, CHAT], ids=["plain", "chat"])
def test_special_tokens_in_the_text_of_a_row_are_refused(bpe, special, text_format):
    """Text is text: it would be read as a real end or beginning, in the middle of a chain or a second time."""
    trace = Trace.of_steps("What is 2?", ("One.", "Two."), "2", "#### 2", "rows:3")
    placed = [
        ("prompt", dataclasses.replace(trace, prompt=f"What is {special}?")),
        ("completion", Trace.of_steps("What?", ("One.", f"Two {special}"), "2", "#### 2", "rows:3")),
        ("completion", dataclasses.replace(trace, final=f"#### 2{special}")),
    ]
    for name, changed in placed:
        with pytest.raises(
            ValueError, match=rf"rows:3: the {name} has '{re.escape(special)}' in it, .*leave the row out"
        ):
            encode_trace(bpe, changed, text_format)
    with pytest.raises(ValueError, match="the context has"):
        encode_trace(bpe, trace, dataclasses.replace(text_format, context=f"Q: {special}\n"))
    with pytest.raises(ValueError, match="a solved example has"):
        render(bpe, "p", "c", CHAT, [("one?", f"one {special}")])
    # A template may write them, and text that only looks like one is text.
    encode_trace(bpe, trace, dataclasses.replace(text_format, prompt_template=f"{special}{{prompt}}\nA:"))
    looks = encode_trace(bpe, dataclasses.replace(trace, prompt="<eot_id> <s> [INST] | >"), text_format)
    usual, special_id = encode_trace(bpe, trace, text_format), bpe.convert_tokens_to_ids(special)
    assert looks.tokens.tolist().count(special_id) == usual.tokens.tolist().count(special_id)


def test_a_word_that_only_pads_is_text(bpe):
    padded = llama3_like()
    padded.pad_token = "."
    trace = generate(1)[0]
    assert "." in trace.prompt
    assert len(encode_trace(padded, trace, PLAIN)) >= len(encode_trace(bpe, trace, PLAIN))


def test_special_tokens_that_a_normaliser_makes_are_refused():
    tokenizer = normalising(normalizers.NFKC())
    tokenizer.add_special_tokens({"eos_token": AddedToken("<eos>", normalized=True)})
    trace = Trace.of_steps("p", ("One.", "Two ＜eos＞ more"), "2", "#### 2", "rows:3")
    with pytest.raises(ValueError, match=r"rows:3: '＜eos＞' is read as a special token"):
        encode_trace(tokenizer, trace, PLAIN)


def normalising(normalizer) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<eos>"],
        show_progress=False,
    )
    core.train_from_iterator(["café au lait. plain text"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


NORMALIZERS = {
    "NFC": normalizers.NFC(),
    "NFKC": normalizers.NFKC(),
    "NFD": normalizers.NFD(),
    "no accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "lower case": normalizers.Lowercase(),
    "white space": normalizers.Replace(Regex(r"\s+"), " "),
    "zero width": normalizers.Replace(Regex("[\u200b\u200d]"), ""),
}


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize(
    "step",
    ["At the café", "Add 한국", "see ﬁ", "１２", "İ", "👩\u200d🚀", "x\u200d", "x\u200b", "q\u0323\u0307", "A  B"],
)
def test_boundaries_under_normalisers(normalizer, step):
    """A step ends on the last token of its last character, also where the normaliser joins or drops characters."""
    tokenizer = normalising(NORMALIZERS[normalizer])
    for form in ("NFC", "NFD"):
        text = unicodedata.normalize(form, step)
        trace = Trace.of_steps(unicodedata.normalize(form, "Où é"), (text, "Home."), "7", "#### 7")
        chain = encode_trace(tokenizer, trace, LINE_PROMPT)
        until = [chain.tokens[chain.prompt_length : end + 1].tolist() for end in chain.boundaries[1:]]
        assert until[0] == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert until[1] == tokenizer(f"{text}\nHome.", add_special_tokens=False)["input_ids"]


def test_a_step_of_which_the_normaliser_leaves_nothing_is_named():
    tokenizer = normalising(NORMALIZERS["zero width"])
    trace = Trace.of_steps("Where?", ("Home.", "\u200b", "End."), "7", "#### 7", "rows:3")
    with pytest.raises(ValueError, match=r"rows:3: step 2, '\\u200b', has no token of its own at its end"):
        encode_trace(tokenizer, trace, LINE_PROMPT)


BAD_TEMPLATES = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "has not ended after 4 s",
    "{{ 'a' * 10**10 }}": "takes more than 512 MiB of memory",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x * 2 %}{% endfor %}": "takes more than 512",
    "{{ 'a' * 10**7 }}": "writes more than 1,000,000 characters",
    "{% for i in range(10**9) %}{% endfor %}": "fails .OverflowError: Range too big",
    "{{ raise_exception('no\nsystem') }}": "fails .TemplateError: no system",
    "{{ x.y.z }}": "fails .UndefinedError",
    "{{ 1 / 0 }}": "fails .ZeroDivisionError",
    "{{ messages[0] + 1 }}": "fails .TypeError",
    "{% if %}": "fails .TemplateSyntaxError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "fails .RecursionError",
    "{{ ''.__class__.__mro__ }}": "fails .SecurityError",
}


@pytest.mark.parametrize(("template", "message"), BAD_TEMPLATES.items())
def test_chat_templates_that_fail_or_do_not_end_are_named(template, message):
    tokenizer = llama3_like()
    tokenizer.chat_template, tokenizer.name_or_path = template, "some/tokenizer"
    with pytest.raises(ValueError, match=f"the chat template of 'some/tokenizer' {message}") as caught:
        render(tokenizer, "p", "c", CHAT)
    assert "\n" not in str(caught.value)


def test_the_trial_of_a_template_knows_what_templates_use():
    """What `transformers` gives to templates is there, so that no part of one goes untried because of an error."""
    tokenizer = llama3_like()
    tokenizer.chat_template = (
        "{% generation %}{{ strftime_now('%Y') }}{{ messages | tojson }}{% endgeneration %}"
        "{% set n = namespace(a=1) %}{% for i in [1] %}{% break %}{% endfor %}"
        "{% if tools is none and bos_token and date_string %}{{ 'a' * 10**10 }}{% endif %}"
    )
    with pytest.raises(ValueError, match="takes more than 512 MiB of memory"):
        render(tokenizer, "p", "c", CHAT)


def test_steps_that_share_a_token_are_refused():
    # One token per pair of characters: steps "a" and "b" end inside the same one.
    core = Tokenizer(models.WordLevel({"p ": 0, "a\nb": 1, "<unk>": 2, "<eos>": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("p ", behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")
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
