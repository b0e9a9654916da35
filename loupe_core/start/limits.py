"""What a value of a recipe may be, and how that is said."""

import math
from numbers import Integral, Real
from typing import Any


def allowed(value: object, kind: type, limits: dict[str, Any]) -> bool:
    """Whether a value is of a kind and within its limits: `choices`; or `least`, `above`, `most`, `below`."""
    if kind in (str, bool):
        return isinstance(value, kind) and value in limits.get("choices", (value,))
    if not isinstance(value, Integral if kind is int else Real) or isinstance(value, bool):
        return False
    try:
        return (math.isfinite(value) and limits.get("least", -math.inf) <= value <= limits.get("most", math.inf)
                and limits.get("above", -math.inf) < value < limits.get("below", math.inf))
    except OverflowError:  # a whole number that is no float
        return False


def expected(kind: type, limits: dict[str, Any]) -> str:
    """The same in words, such as "a finite number above 0"."""
    if "choices" in limits:
        return f"one of {', '.join(limits['choices'])}"
    if kind is bool:
        return "True or False"
    words = dict(least="of {} or more", above="above {}", most="of at most {}", below="below {}")
    said = " and ".join(text.format(limits[name]) for name, text in words.items() if name in limits)
    return f"a {'whole' if kind is int else 'finite'} number {said}"
