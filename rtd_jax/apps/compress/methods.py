"""What `--scheme` may say: rounding to the nearest, GPTQ, or pruning; and which text they are calibrated on."""

from dataclasses import dataclass
from typing import get_args

from rtd_jax.models.schemes import QType, Scheme

GPTQ: dict[str, QType] = {"w8a16_gptq": "int8", "w4a16_gptq": "int4", "w3a16_gptq": "int3", "w2a16_gptq": "int2"}
PRUNE = "prune:"
USUAL_GROUPS = {"nf4": 64, "fp8": 0}  # inputs that share a scale, where a scheme's usual number is not 128
_KNOWN = f"{', '.join((*get_args(QType), *GPTQ))} or {PRUNE}<share of the parameters>"


@dataclass(frozen=True)
class Method:
    """How a student is made smaller."""

    name: str
    scheme: Scheme | None = None  # None for pruning
    is_gptq: bool = False
    share: float = 1.0  # of the parameters that pruning keeps

    @property
    def reads_text(self) -> bool:
        """Whether it is calibrated on text."""
        return self.is_gptq or self.scheme is None


def parse_method(text: str, group_size: int = -1, symmetric: bool = True, head: bool = False) -> Method:
    """The method that a `--scheme` names.

    Args:
      group_size: inputs that share a scale; 0 all of an output's, -1 the scheme's usual number.

    Raises:
      ValueError: there is no such scheme, it has no zero points, or the share is not between 0 and 1.
    """
    if text.startswith(PRUNE):
        try:
            share = float(text.removeprefix(PRUNE))
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise ValueError(
                f"scheme is {text!r}; expected {PRUNE}<share>, with the share of the parameters that stay between 0 "
                f"and 1, such as {PRUNE}0.75"
            )
        if group_size >= 0 or not symmetric or head:
            raise ValueError(f"scheme is {text!r}, which rounds nothing; leave out group_size, symmetric and head")
        return Method(text, share=share)
    qtype = next((known for known in get_args(QType) if known == text), GPTQ.get(text))
    if qtype is None:
        raise ValueError(f"scheme is {text!r}; use {_KNOWN}")
    size = USUAL_GROUPS.get(qtype, 128) if group_size < 0 else group_size
    return Method(text, Scheme(qtype, size, symmetric, head), is_gptq=text in GPTQ)
