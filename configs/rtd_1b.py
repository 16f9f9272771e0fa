"""The article's small student: Llama-3-70B-Instruct -> a 1B Llama. Everything else as in rtd_8b.

    python launch/train.py --config=configs/rtd_1b.py --config.data.train.location=/data/traces

There is no Llama-3 of 1B; Llama-3.2-1B-Instruct has the same tokenizer but for reserved special tokens, which no text
uses. The start-up comparison lists them.
"""

from ml_collections import ConfigDict

from configs import rtd_8b


def get_config() -> ConfigDict:
    c = rtd_8b.get_config()
    c.student.path = "meta-llama/Llama-3.2-1B-Instruct"  # tied embeddings, llama3 rope scaling
    return c
