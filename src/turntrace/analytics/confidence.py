"""How certain a rate is: no more than its numbers are many."""

from dataclasses import dataclass
from math import sqrt
from typing import Final

_Z: Final = 1.959963984540054
"""Of a normal distribution, 95 % lie within so many standard deviations of its middle."""


def interval(times: int, n: int) -> tuple[float, float] | None:
    """Return the bounds between which a rate lies with 95 % confidence: Wilson's score interval.

    Unlike the textbook's it stays within 0 and 1, and holds for few cases and rates near 0 or 1 (E. B. Wilson,
    Probable inference, the law of succession, and statistical inference, 1927).

    Args:
        times: How many of the cases are such.
        n: How many cases there are.

    Returns:
        The lower and the upper bound, from 0 to 1; None without any case.
    """
    if n <= 0:
        return None
    rate, weight = times / n, _Z * _Z / n
    middle = rate + weight / 2
    reach = _Z * sqrt(rate * (1 - rate) / n + weight / (4 * n))
    low, high = (middle - reach) / (1 + weight), (middle + reach) / (1 + weight)
    # At the ends the formula gives exactly 0 and 1, and floating point nearly so.
    return (0.0 if times <= 0 else max(0.0, low)), (1.0 if times >= n else min(1.0, high))


@dataclass(frozen=True, slots=True)
class Rate:
    """How many of how many.

    Attributes:
        times: How many of the cases are such.
        n: How many cases there are.
    """

    times: int
    n: int

    @property
    def value(self) -> float | None:
        """The rate, from 0 to 1; None without any case."""
        return self.times / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Bounds between which it lies with 95 % confidence, from 0 to 1; None without any case."""
        return interval(self.times, self.n)
