"""How prompts are continued."""

import dataclasses

PROMPT_MULTIPLE = 64  # tokens; the longest prompt is padded to a multiple of this, and each length compiles a program


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Draws from softmax(logits / temperature), cut to the most probable ids that together reach `top_p`.

    A draw depends on (seed, place of the prompt in the list or its stream, token), not on the batch it was made in.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be positive (for 0 use greedy decoding)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1], and 1 keeps everything")

    def __str__(self) -> str:
        return f"temperature {self.temperature:g}, top-p {self.top_p:g}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class GenerateSettings:
    """How prompts are continued; static under jit."""

    max_new_tokens: int  # most tokens added to a prompt, the ending id included
    eos_ids: tuple[int, ...]  # ids that end a row
    vocab_size: int  # ids from here on are padding of the vocabulary and are never chosen
    batch_size: int = 128  # rows decoded together: one that has ended makes room for the next prompt
    pad_id: int = 0  # fills prompts on the right
    sampling: Sampling | None = None  # None takes the most probable token; for several samples, repeat the prompt

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens} and batch_size {self.batch_size}; both must be at least 1"
            )
