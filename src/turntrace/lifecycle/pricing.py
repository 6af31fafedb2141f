"""What a call of a model costs, by the price list of genai-prices."""

import logging
import sys
import time
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from turntrace.forking import importing, lock_of
from turntrace.records import Usage

if TYPE_CHECKING:
    from genai_prices.types import ModelPrice, PriceCalculation

logger = logging.getLogger("turntrace")

_PRICES_HOLD_S: Final = 600.0
_PRICES_REMEMBERED: Final = 512
_MILLION: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class _Price:
    """US dollars for a million tokens of a model whose tokens all cost the same; or that it has no such price."""

    until: float
    known: bool
    input: float = 0.0
    output: float = 0.0
    cache_read: float = 0.0
    cache_creation: float = 0.0
    flat: bool = False


_prices: dict[tuple[str, str | None], _Price] = {}
_lock = lock_of(sys.modules[__name__])


def cost_usd(model: str | None, provider: str | None, usage: Usage) -> float | None:
    """Return what a call cost.

    Args:
        model: Name of the model, as its provider writes it.
        provider: Name of the vendor; None to find it by the model.
        usage: The tokens of the call.

    Returns:
        US dollars at today's prices; None when the price of the model is not known.
    """
    if model is None:
        return None
    price = _price_of(model, provider)
    if not price.known:
        return None
    if not price.flat:
        calculated = _calculate(model, provider, usage)
        return None if calculated is None else float(calculated.total_price)
    cached, created = _cached(usage)
    plain = usage.input_tokens - cached - created
    total = plain * price.input + cached * price.cache_read + created * price.cache_creation
    return (total + usage.output_tokens * price.output) / _MILLION


def _cached(usage: Usage) -> tuple[int, int]:
    """Return the tokens read from and written to a cache, at most as many as there are."""
    cached = min(usage.cache_read_tokens, usage.input_tokens)
    return cached, min(usage.cache_creation_tokens, usage.input_tokens - cached)


def _price_of(model: str, provider: str | None) -> _Price:
    """Look the price up; it holds for ten minutes, since some prices change with the time of the day."""
    now = time.monotonic()
    price = _prices.get((model, provider))
    if price is None or price.until < now:
        price = _look_up(model, provider, now + _PRICES_HOLD_S)
        with _lock:
            if len(_prices) >= _PRICES_REMEMBERED:
                _prices.clear()
            _prices[model, provider] = price
    return price


def _look_up(model: str, provider: str | None, until: float) -> _Price:
    calculated = _calculate(model, provider, Usage(input_tokens=1))
    if calculated is None:
        logger.info("turntrace: genai-prices knows no price for the model %r; its calls count as unpriced.", model)
        return _Price(until, known=False)
    rates = _flat_rates(calculated.model_price)
    return _Price(until, True, *rates, flat=True) if rates is not None else _Price(until, known=True)


def _flat_rates(price: "ModelPrice") -> tuple[float, float, float, float] | None:
    """Return the rates for input, output, cache reads and cache writes, or None where they differ by the amount."""
    rates: list[float | None] = []
    for rate in (price.input_mtok, price.output_mtok, price.cache_read_mtok, price.cache_write_mtok):
        if rate is not None and not isinstance(rate, Decimal):
            return None
        rates.append(None if rate is None else float(rate))
    plain, output, read, written = rates
    if plain is None or output is None or price.requests_kcount is not None:
        return None
    return plain, output, plain if read is None else read, plain if written is None else written


def _calculate(model: str, provider: str | None, usage: Usage) -> "PriceCalculation | None":
    # genai-prices takes a quarter of a second to import: only who calls models waits for it, in the writer's thread.
    with importing():
        return _calculated(model, provider, usage)


def _calculated(model: str, provider: str | None, usage: Usage) -> "PriceCalculation | None":
    import genai_prices

    cached, created = _cached(usage)
    tokens = genai_prices.Usage(
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        cache_read_tokens=cached,
        cache_write_tokens=created,
    )
    for vendor in dict.fromkeys((provider, None)):  # LangChain's name of a vendor is not always that of the price list
        try:
            return genai_prices.calc_price(tokens, model_ref=model, provider_id=vendor)
        except LookupError:
            continue
    return None
