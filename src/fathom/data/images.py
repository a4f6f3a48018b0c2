"""Digit images as tokens: no learned codec, each grey level is an id of its own.

An image is ``BEGIN, 64 grey levels row by row, END``. Its ids stand after the text vocabulary, so
"which expert does an image use" is read straight from the ids.
"""

from collections.abc import Sequence

BEGIN, END = "<|image|>", "<|/image|>"
LEVELS, WIDTH = 17, 8
GREYS = tuple(f"<|grey-{level}|>" for level in range(LEVELS))
IMAGE_TOKENS = (BEGIN, END, *GREYS)
DIGITS = "0123456789abcdefg"  # one character a pixel, as the bundled corpus stores images
SHADES = " .:-=+*#%@"  # dark to bright, for showing an image in a terminal


def pixels_to_ids(pixels: str, begin_id: int) -> list[int]:
    """``pixels``, one base-17 character each, as ids; the image tokens start at ``begin_id``."""
    return [begin_id, *(begin_id + 2 + DIGITS.index(pixel) for pixel in pixels), begin_id + 1]


def show_image(levels: Sequence[int]) -> str:
    """Grey levels 0 to 16, row by row, as lines of characters."""
    shades = [SHADES[level * (len(SHADES) - 1) // (LEVELS - 1)] for level in levels]
    rows = ["".join(shades[at : at + WIDTH]) for at in range(0, len(shades), WIDTH)]
    return "\n".join(rows)
