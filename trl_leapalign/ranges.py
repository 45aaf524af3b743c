"""Ranges of numeric settings."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class Range:
    """Finite numbers between two bounds; True, "3" and None are no numbers.

    Args:
        low (float): the smallest number.
        high (float): the largest number.
        whole (bool): whether they are whole numbers.
        excluded (bool): whether the bounds are left out.
        high_excluded (bool): whether the upper bound alone is left out.
    """

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    excluded: bool = False
    high_excluded: bool = False

    def __contains__(self, value: Any) -> bool:
        kind = Integral if self.whole else Real
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
            return False
        if value == self.high < math.inf and self.high_excluded:
            return False
        return self.low < value < self.high if self.excluded else self.low <= value <= self.high

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a finite number"
        if self.high_excluded:
            return f"{kind} of at least {self.low:g} and below {self.high:g}"
        if self.high < math.inf:
            return f"{kind} between {self.low:g} and {self.high:g}{', which are excluded' if self.excluded else ''}"
        bound = f" {'above' if self.excluded else 'of at least'} {self.low:g}" if self.low > -math.inf else ""
        return kind + bound

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError unless a setting's value lies in the range."""
        if value not in self:
            raise ValueError(f"{name}={value!r} must be {self}.")


def check_bool(name: str, value: Any) -> None:
    """Raise ValueError unless a setting is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False.")
