"""A small byte-level BPE tokenizer with Qwen's special tokens and a chat template that asks for thoughts as Qwen3's.

Also a random Qwen3 of two layers with it, as a Hugging Face folder.
"""

from pathlib import Path

from models_tiny import hf_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rtd_jax.data.generators.word_problems import generate

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# What matters of Qwen3's: thoughts are empty where they are switched off, and where a message has none; only the last
# message keeps them.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- set content = message.content %}{%- set thoughts = '' %}"
    "{%- if '</think>' in content %}{%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.last %}{{- '<think>\n' + thoughts + '\n</think>\n\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)


def qwen3_like(vocabulary: int = 400) -> PreTrainedTokenizerFast:
    """No token begins a text; <think> and </think> are tokens, but no special ones, as in Qwen3."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = [f"{trace.prompt}\n{trace.completion}\n" for trace in generate(200, (2, 4), seed=0)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    )
    core.add_special_tokens([END_OF_TEXT, START, END])
    core.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_qwen3(folder: Path, variant: str = "qwen3", **changes) -> Path:
    """A random model of a family that asks for thoughts, with rows of the embedding to spare, as Qwen's have."""
    tokenizer = qwen3_like()
    sizes = {"vocab_size": len(tokenizer) + 11, "num_hidden_layers": 2, "initializer_range": 0.05}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    hf_model(variant, **{"head_dim": 16, **sizes, **ends, "max_position_embeddings": 1024, **changes}).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder
