"""Colours that are told apart with every common colour blindness, on light and on dark ground."""

from typing import Final

__all__ = ["COLOURS", "DASHES", "SEVERITIES", "of_run", "with_opacity"]

COLOURS: Final = {
    "blue": "#3b82c4",
    "orange": "#e08214",
    "green": "#1b9e77",
    "purple": "#9467bd",
    "grey": "#8a8f98",
    "red": "#d6604d",
}
"""Of quantities; lines that share a figure also differ in their dashes."""

DASHES: Final = ("solid", "dash", "dot", "dashdot")

SEVERITIES: Final = {
    "info": (COLOURS["grey"], "circle-open"),
    "warning": (COLOURS["orange"], "triangle-up"),
    "error": (COLOURS["red"], "x"),
}
"""Colour and symbol, for colour alone says nothing."""

_RUNS: Final = ("#3b82c4", "#e08214", "#1b9e77", "#c44fa5", "#8f7f0c", "#56b4e9", "#d6604d")


def of_run(number: int) -> tuple[str, str]:
    """Colour and dash of the run that was started as the ``number``-th of its folder.

    Args:
        number: From 0.

    Returns:
        Colour and dash; 28 runs differ.

    Example:
        >>> of_run(0), of_run(7)
        (('#3b82c4', 'solid'), ('#3b82c4', 'dash'))
    """
    return _RUNS[number % len(_RUNS)], DASHES[number // len(_RUNS) % len(DASHES)]


def with_opacity(colour: str, opacity: float) -> str:
    """``colour``, let through.

    Example:
        >>> with_opacity("#ff8000", 0.5)
        'rgba(255,128,0,0.5)'
    """
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
