"""How many tokens models can be given, by the list that comes with genai-prices."""

from functools import lru_cache

from turntrace.context.encodings import names_of
from turntrace.forking import importing


@lru_cache(maxsize=512)
def window_of(model: str, provider: str | None = None) -> int | None:
    """Return the size of a model's context window in tokens, or None when it is not known.

    Args:
        model: Name of the model, as its provider, a router (``openai/gpt-4o``) or LangChain (``openai:gpt-4o``)
            writes it.
        provider: Name of the vendor; None to find it by the model.
    """
    # It takes a quarter of a second to import: only who asks for a model's window waits for it.
    with importing():
        from genai_prices.data_snapshot import get_snapshot

        snapshot = get_snapshot()
    for name in names_of(model):
        for vendor in dict.fromkeys((provider, None)):  # LangChain's name of a vendor is not always that of the list
            try:
                found = snapshot.find_provider_model(name, None, vendor, None)[1].context_window
            except LookupError:
                continue
            if found:
                return found
    return None
