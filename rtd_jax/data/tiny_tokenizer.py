"""The word-level tokenizer of the bundled tiny teacher, built from all words that a generator can write."""

from collections.abc import Collection

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rtd_jax.data.formats import TextFormat
from rtd_jax.data.generators.word_problems import WORDS

UNKNOWN, BOS, EOS, PAD = "<unk>", "<bos>", "<eos>", "<pad>"
# The text form that fits this tokenizer: ": " is one token, so prompt and completion part at a line break.
TINY_FORMAT = TextFormat(prompt_template="Question: {prompt}\nAnswer:\n", completion_prefix="")
FRAME_WORDS = ("Question", "Answer", "Q", "A")

# White space always sits inside a token, so joining the tokens gives the text back to the character. Punctuation takes
# what follows it, a word the space before it, and the space after it when a number follows. So a number is one token,
# the same one wherever it stands, and a sentence begins with the same token in the prompt and at the start of a line:
# what a tiny model copies, it finds by the same token.
_PATTERN = r"[.:?](?:\n+| )| ?[A-Za-z]+(?: (?=[0-9]))?|[1-9][0-9]|[0-9]|#### ?| ?<<|>>|\n+| |[^\s]"
_PUNCTUATION = [
    *"+-*/=.:?,#<> ",
    *("<<", " <<", ">>", "####", "#### ", "\n", "\n\n"),
    *(mark + line for mark in ".:?" for line in ("\n", "\n\n", " ")),
]


def tiny_tokenizer(known_words: Collection[str] = WORDS) -> PreTrainedTokenizerFast:
    """A fast tokenizer whose `decode` gives the text back exactly. A word that it does not know becomes `<unk>`.

    It knows the words of the word problems, or the `known_words` of another generator.
    """
    words = [*FRAME_WORDS, *sorted(known_words)]
    forms = [before + word + after for word in words for before in ("", " ") for after in ("", " ")]
    tokens = [UNKNOWN, BOS, EOS, PAD, *map(str, range(100)), *_PUNCTUATION, *forms]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
