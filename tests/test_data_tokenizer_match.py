"""Tokenizers compared by content: what is refused, what is tolerated, and that the reason is given."""

import json

import pytest
from llama3_like import RESERVED, llama3_like
from transformers import AutoTokenizer

from rtd_jax.data.tiny_tokenizer import tiny_tokenizer
from rtd_jax.data.tokenizer_match import compare_special_tokens, compare_tokenizers, tokenizer_fingerprint

LLAMA31 = ["<|finetune_right_pad_id|>", *RESERVED[:2], "<|eom_id|>"]  # the same ids, given names or shifted


@pytest.fixture(scope="module")
def bpe():
    return llama3_like()


def test_the_same_tokenizer_saved_and_loaded_elsewhere(tmp_path, bpe):
    bpe.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert compare_tokenizers(bpe, again) == []
    assert tokenizer_fingerprint(bpe) == tokenizer_fingerprint(again)


def test_template_padding_and_truncation_are_irrelevant(bpe):
    other = llama3_like()
    other.chat_template = "{{ messages }}"
    other.add_special_tokens({"pad_token": "<|reserved_special_token_0|>"})
    other.padding_side = "left"
    other(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert compare_tokenizers(bpe, other) == []
    assert tokenizer_fingerprint(bpe) == tokenizer_fingerprint(other)


def test_reserved_slots_with_other_names_are_noted(bpe):
    other = llama3_like(reserved=LLAMA31)
    assert bpe.get_vocab() != other.get_vocab()
    for pair in ((bpe, other), (other, bpe)):
        (note,) = compare_tokenizers(*pair, "big", "small")
        assert note.startswith("4 reserved slots are named differently in big and small: id 5: ")
    assert tokenizer_fingerprint(bpe) != tokenizer_fingerprint(other)


def test_another_end_of_sequence_choice_is_noted(bpe):
    other = llama3_like()
    other.eos_token = "<|end_of_text|>"
    assert compare_tokenizers(bpe, other) == ["eos_token is '<|eot_id|>' in teacher, '<|end_of_text|>' in student"]
    assert tokenizer_fingerprint(bpe) != tokenizer_fingerprint(other)


def test_two_exchanged_words_are_refused_by_id(bpe):
    words = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    (first, low), (second, high) = words[300], words[301]
    other = llama3_like()
    text = other.backend_tokenizer.to_str()
    swapped = _exchange(text, first, second)
    other._tokenizer = type(other.backend_tokenizer).from_str(swapped)
    message = rf"70B \({len(bpe)} tokens\) and 8B .* 2 ids differ, first id {low}: .*; id {high}: "
    with pytest.raises(ValueError, match=message):
        compare_tokenizers(bpe, other, "70B", "8B")


def _exchange(text, first, second):
    whole = json.loads(text)
    vocabulary = whole["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    return json.dumps(whole)


def test_a_real_word_in_a_reserved_slot_is_refused(bpe):
    # Reserved on one side only helps where the other side's token is special too.
    smaller = llama3_like(reserved=RESERVED[:3])
    with pytest.raises(ValueError, match=r"ids differ, first id 8: '<\|reserved_special_token_3\|>' / '!'"):
        compare_tokenizers(bpe, smaller)


def test_other_merges_normalizer_or_pre_tokenizer_are_refused(bpe):
    other = llama3_like()
    text = json.loads(other.backend_tokenizer.to_str())
    for change, message in (
        (lambda t: t["model"]["merges"].reverse(), r"the merges differ \(\d+ / \d+\), first at merge 0: "),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), 'the normalizer differs: null / {"type": "Lowercase"}'),
        (lambda t: t["pre_tokenizer"]["pretokenizers"].pop(0), "the pre_tokenizer differs"),
        (lambda t: t["model"].update(ignore_merges=False), "the model differs"),
    ):
        changed = json.loads(json.dumps(text))
        change(changed)
        other._tokenizer = type(other.backend_tokenizer).from_str(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            compare_tokenizers(bpe, other)
        assert tokenizer_fingerprint(other) != tokenizer_fingerprint(bpe)


def test_another_kind_of_tokenizer_says_so(bpe):
    with pytest.raises(ValueError, match="choose a student of the teacher's family"):
        compare_tokenizers(bpe, tiny_tokenizer())


def test_special_tokens_are_compared_by_what_they_do(bpe):
    other = llama3_like()
    assert compare_special_tokens(bpe, other) == []
    other.pad_token, other.unk_token = "<|end_of_text|>", "<|eot_id|>"
    assert compare_special_tokens(bpe, other, "big", "small") == [
        "pad_token is None in big, '<|end_of_text|>' in small",
        "unk_token is None in big, '<|eot_id|>' in small",
    ]
    other = llama3_like()
    word = next(token for token in other.get_vocab() if token.isalpha() and len(token) > 3)
    other.add_special_tokens({"additional_special_tokens": [word]})
    assert compare_special_tokens(bpe, other) == [f"1 tokens are special in student, but not in teacher: {word!r}"]
    assert compare_special_tokens(other, bpe) == [f"1 tokens are special in teacher, but not in student: {word!r}"]
