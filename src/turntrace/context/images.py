"""How many tokens an image is, by OpenAI's published rule.

Source: https://platform.openai.com/docs/guides/images-vision#calculating-costs. Most models see an image in tiles:
a base, plus a price for each square of 512 pixels that it covers once it is scaled into 2,048 by 2,048 pixels and then
to at most 768 pixels on its shorter side. With ``detail: low`` it is the base alone. The small models see patches of 32
pixels, at most 1,536 of them, times a factor.

Models of other vendors have rules of their own; for them the rule of gpt-4o is the estimate.
"""

import base64
import io
import math
from collections.abc import Mapping
from typing import Any, Final

from turntrace.context.encodings import names_of

IMAGE_TYPES: Final = ("image", "image_url", "input_image")

UNKNOWN_SIZE: Final = (1024, 1024)
"""Width and height in pixels that are assumed of an image behind a URL, which is not fetched."""

_TILE, _SQUARE, _SHORTER = 512, 2048, 768
_PATCH, _MOST_PATCHES = 32, 1536

# The longest matching beginning of a model's name counts.
_TILES: Final[Mapping[str, tuple[int, int]]] = {
    "": (85, 170),
    "gpt-4o-mini": (2833, 5667),
    "gpt-5": (70, 140),
    "o1": (75, 150),
    "o3": (75, 150),
    "computer-use-preview": (65, 129),
}
_PATCHES: Final[Mapping[str, float]] = {
    "gpt-4.1-mini": 1.62,
    "gpt-4.1-nano": 2.46,
    "gpt-5-mini": 1.62,
    "gpt-5-nano": 2.46,
    "o4-mini": 1.72,
}


def image_tokens(model: str, size: tuple[int, int], detail: str = "auto") -> int:
    """Return how many tokens an image is.

    Args:
        model: Name of the model.
        size: Width and height in pixels.
        detail: ``low``, ``high``, or ``auto``, which is counted as ``high``.
    """
    width, height = max(1, size[0]), max(1, size[1])
    names = names_of(model)
    factor = next((factor for start, factor in _PATCHES.items() if _any_starts(names, start)), None)
    if factor is not None:
        return math.ceil(round(_patches(width, height) * factor, 6))
    base, tile = _TILES[max((start for start in _TILES if _any_starts(names, start)), key=len)]
    return base if detail == "low" else base + tile * _tiles(width, height)


def _any_starts(names: tuple[str, ...], start: str) -> bool:
    return any(name.startswith(start) for name in names)


def _tiles(width: float, height: float) -> int:
    shrink = min(1.0, _SQUARE / max(width, height))
    shrink *= min(1.0, _SHORTER / (min(width, height) * shrink))
    across, down = (max(1, math.ceil(round(side * shrink / _TILE, 6))) for side in (width, height))
    return across * down


def _patches(width: int, height: int) -> int:
    count = math.ceil(width / _PATCH) * math.ceil(height / _PATCH)
    if count <= _MOST_PATCHES:
        return count
    # Shrunk to as many patches as there may be, and then until the one side is whole. In whole numbers, since what a
    # float is off by would make one row more or less.
    across, down = math.isqrt(_MOST_PATCHES * width // height), math.isqrt(_MOST_PATCHES * height // width)
    if not across or not down:
        return _MOST_PATCHES
    if across * height <= down * width:
        return across * -(-across * height // width)
    return down * -(-down * width // height)


def read_image(block: Mapping[str, Any]) -> tuple[tuple[int, int], str]:
    """Return the size in pixels and the detail of an image block in any form that LangChain takes.

    The size is read from the image's own header where the block holds its bytes (base64 or a data URL), else it is
    `UNKNOWN_SIZE`: nothing is fetched.
    """
    detail = block.get("detail")
    data: Any = block.get("base64") or block.get("data")
    url: Any = block.get("image_url") or block.get("url")
    if isinstance(url, Mapping):
        detail, url = url.get("detail", detail), url.get("url")
    source = block.get("source")
    if isinstance(source, Mapping):
        data, url = source.get("data", data), source.get("url", url)
    if data is None and isinstance(url, str) and url.startswith("data:"):
        data = url.partition(",")[2]
    return _size_of(data), detail if isinstance(detail, str) else "auto"


def _size_of(data: Any) -> tuple[int, int]:
    import imagesize

    try:
        width, height = imagesize.get(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data))
    except Exception:  # whatever a broken header makes of the parser: an image is counted all the same
        return UNKNOWN_SIZE
    return (int(width), int(height)) if width > 0 and height > 0 else UNKNOWN_SIZE
