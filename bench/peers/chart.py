"""Grouped bars as SVG, by hand."""

from collections.abc import Mapping
from html import escape

COLOURS = ["#1f6feb", "#8c959f", "#bc4c00", "#2da44e", "#8250df", "#bf8700"]
BAR, GAP, HEIGHT, LEFT, TOP = 14, 22, 180, 60, 50
"""Sizes in pixels."""


def bar_chart(panels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """One panel below the other: title to groups, a group to its bars' values by name."""
    names = list(dict.fromkeys(name for groups in panels.values() for bars in groups.values() for name in bars))
    colours = dict(zip(names, COLOURS * len(names), strict=False))
    width = LEFT + max(_width(groups) for groups in panels.values())
    parts = [_legend(colours)]
    for number, (title, groups) in enumerate(panels.items()):
        parts += _panel(title, groups, colours, TOP + number * (HEIGHT + 90))
    height = TOP + len(panels) * (HEIGHT + 90)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {max(width, 760)} {height}" '
        f'font-family="sans-serif" font-size="11">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _width(groups: Mapping[str, Mapping[str, float]]) -> int:
    return sum(len(bars) * BAR + GAP for bars in groups.values())


def _legend(colours: Mapping[str, str]) -> str:
    parts, x = [], LEFT
    for name, colour in colours.items():
        parts.append(f'<rect x="{x}" y="10" width="10" height="10" fill="{colour}"/>{_text(x + 14, 19, name, "start")}')
        x += 30 + 6 * len(name)
    return "\n".join(parts)


def _panel(title: str, groups: Mapping[str, Mapping[str, float]], colours: Mapping[str, str], top: int) -> list[str]:
    highest = max(value for bars in groups.values() for value in bars.values())
    base = top + 20 + HEIGHT
    parts = [_text(LEFT, top + 8, title, "start", bold=True)]
    x = LEFT
    for group, bars in groups.items():
        parts.append(_text(x + len(bars) * BAR / 2, base + 14, group))
        for name, value in bars.items():
            height = HEIGHT * value / highest
            parts.append(
                f'<rect x="{x}" y="{base - height:.1f}" width="{BAR - 2}" height="{height:.1f}" '
                f'fill="{colours[name]}"><title>{escape(name)}: {value:.0f}</title></rect>'
            )
            x += BAR
        x += GAP
    for part in (0, 0.5, 1):
        parts.append(_text(LEFT - 6, base - part * HEIGHT + 4, f"{highest * part:.0f}", "end"))
    return parts


def _text(x: float, y: float, words: str, anchor: str = "middle", *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'
