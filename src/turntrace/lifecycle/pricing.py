"""What a call of a model costs, by the price list of genai-prices."""

import logging
from functools import lru_cache

from turntrace.records import Usage

logger = logging.getLogger("turntrace")


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
    # genai-prices takes a quarter of a second to import: only who calls models waits for it, in the writer's thread.
    import genai_prices

    known_provider = _known_provider(model, provider)
    if known_provider is None:
        return None
    price = genai_prices.calc_price(
        genai_prices.Usage(
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cache_read_tokens=min(usage.cache_read_tokens, usage.input_tokens),
            cache_write_tokens=min(usage.cache_creation_tokens, usage.input_tokens),
        ),
        model_ref=model,
        provider_id=known_provider or None,
    )
    return float(price.total_price)


@lru_cache(maxsize=512)
def _known_provider(model: str, provider: str | None) -> str | None:
    """Return the provider under which the model has a price, "" for whichever has it, None when none has."""
    import genai_prices

    for candidate in (provider, None) if provider else (None,):
        try:
            genai_prices.calc_price(genai_prices.Usage(input_tokens=1), model_ref=model, provider_id=candidate)
        except LookupError:
            continue
        return candidate or ""
    logger.info(
        "turntrace: genai-prices knows no price for the model %r; its calls are counted as calls without a price.", model
    )
    return None
