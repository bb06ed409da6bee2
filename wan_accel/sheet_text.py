"""Text and colours of contact sheets. Torch-free."""

from typing import Any

from PIL import ImageFont

INK, PALE, PAPER = (24, 26, 30), (110, 115, 125), (250, 250, 248)


def font(size: int) -> Any:
    return ImageFont.load_default(size)


def shortened(text: str, width: int, size: int) -> str:
    """Cut a line off where the sheet ends."""
    drawn = font(size)
    if drawn.getlength(text) <= width:
        return text
    while text and drawn.getlength(text + " …") > width:
        text = text[:-1]
    return text.rstrip() + " …"
