"""What the providers' own counts say about ours: a running factor for each model."""

import sys
from typing import Final

from turntrace.forking import lock_of

_WEIGHT: Final = 0.2
_LEAST: Final = 0.25
_MOST: Final = 4.0

_factors: dict[str, float] = {}
_lock = lock_of(sys.modules[__name__])


def factor_of(model: str) -> float:
    """Return by what our counts for a model are to be multiplied, 1.0 before the first call."""
    return _factors.get(model, 1.0)


def learn(model: str, counted: int, provided: int) -> None:
    """Set a count of ours against the provider's: a fifth of the way from the factor to what this call says.

    The first call sets the factor. It stays between a quarter and four, whatever a provider says.

    Args:
        model: Name of the model.
        counted: Our count, without a factor.
        provided: What the provider counted of the same.
    """
    if counted <= 0 or provided <= 0:
        return
    seen = min(_MOST, max(_LEAST, provided / counted))
    with _lock:
        before = _factors.get(model)
        _factors[model] = seen if before is None else before + _WEIGHT * (seen - before)


def forget() -> None:
    """Forget all factors, as for tests."""
    with _lock:
        _factors.clear()
