"""Numbers of tokens as people write them: `300k`, `1.5M`, `2B`, or a plain integer."""

import re
from decimal import Decimal
from typing import Annotated, Any, Final

from pydantic import BeforeValidator

__all__ = ["TokenCount", "parse_tokens"]

_WRITTEN: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMbB]?)")
_FACTOR: Final = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_tokens(value: Any) -> int:
    """`"1.5M"` -> 1500000.

    Raises:
        ValueError: not a positive whole number of tokens.
    """
    if isinstance(value, str) and (match := _WRITTEN.fullmatch(value.strip())):
        number = Decimal(match[1]) * _FACTOR[match[2].lower()]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        number = Decimal(str(value))
    else:
        raise ValueError(f"{value!r} is no number of tokens; write 300k, 1.5M or 2000000")
    if not number.is_finite() or number != int(number) or number < 1:
        raise ValueError(f"{value!r} is not a positive whole number of tokens")
    return int(number)


TokenCount = Annotated[int, BeforeValidator(parse_tokens, json_schema_input_type=int | str)]
"""A positive whole number of tokens; recipes may write `300k` or `1.5M`."""
