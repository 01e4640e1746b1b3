"""Pictures, curves and numbers as text that a page can hold. The same input gives the same text.

Curves are drawn by matplotlib through its object interface. Their colours become CSS variables of the page (`--soft`,
`--line`, `--quantized`, `--warm`), so that they follow its light or dark theme.
"""

from __future__ import annotations

import base64
import io
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from markupsafe import Markup
    from matplotlib.axes import Axes

_PICTURE_BUDGET_BYTES = 2_200_000  # of text in all, which leaves a page with its tables under 3 MB
_INK, _FAINT, _QUANTIZED, _GRID = "#010203", "#010204", "#010205", "#010206"  # placeholders, see _svg
_CSS = {_INK: "var(--soft)", _FAINT: "var(--line)", _QUANTIZED: "var(--quantized)", _GRID: "var(--warm)"}


def data_uris(pictures: np.ndarray) -> tuple[list[str], str]:
    """Pictures as data URIs, as faithfully as fits one page, and a phrase that says how faithfully that is.

    Args:
        pictures: The pictures, uint8 [n, h, w, 3].

    Raises:
        ValueError: if there are too many pictures even at an eighth of their size.
    """
    for divisor in (1, 2, 4, 8):
        for kind, options in (("png", {}), ("webp", {"quality": 90})):
            uris: list[str] = []
            spent_bytes = 0
            for picture in pictures:
                uris.append(_data_uri(picture, divisor, kind, options))
                spent_bytes += len(uris[-1])
                if spent_bytes > _PICTURE_BUDGET_BYTES:
                    break
            else:
                how = "stored without loss" if kind == "png" else "stored as WebP of quality 90"
                return (
                    uris,
                    how if divisor == 1 else f"reduced to 1/{divisor} of their width and height, then {how}",
                )
    got = f"{len(pictures)} of {pictures.shape[1]} by {pictures.shape[2]} pixels"
    raise ValueError(f"pictures must fit {_PICTURE_BUDGET_BYTES} bytes in all, got {got}; give fewer")


def _data_uri(picture: np.ndarray, divisor: int, kind: str, options: dict[str, Any]) -> str:
    from PIL import Image

    image = Image.fromarray(picture)
    if divisor > 1:
        image = image.reduce(divisor)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def histogram(edges: Sequence[float], counts: Sequence[float], grid: Sequence[float], salt: str) -> Markup:
    """A histogram on a square-root scale, with a line at each value of the grid.

    It shows the whole grid and the central 99.9 % of the values.

    Args:
        edges: The edges of the bins in real units, one more than there are counts.
        counts: How many values each bin has, in any unit.
        grid: The quantized values in real units.
        salt: A text that makes the element's ids differ from those of other figures of the page.
    """

    def draw(axes: Axes) -> None:
        axes.stairs(counts, edges, fill=True, color=_INK, alpha=0.45, linewidth=0)
        width = 1.1 if len(grid) <= 40 else 0.4
        axes.vlines(grid, 0, 1, transform=axes.get_xaxis_transform(), color=_GRID, linewidth=width)
        axes.set_yscale("function", functions=(np.sqrt, np.square))
        axes.set_xlim(*_visible(edges, counts, grid))
        axes.set_ylim(0, max(counts, default=0) * 1.08 or 1)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)

    return _svg(draw, (4.6, 1.9), salt)


def _visible(edges: Sequence[float], counts: Sequence[float], grid: Sequence[float]) -> tuple[float, float]:
    """The range that holds the grid and the central 99.9 % of the values. Single far values would squeeze the rest."""
    below = np.cumsum(counts)
    first, last = np.searchsorted(below, np.array([0.0005, 0.9995]) * (below[-1] if len(below) else 0))
    low, high = min([edges[first], *grid]), max([edges[min(last + 1, len(edges) - 1)], *grid])
    margin = 0.04 * (high - low) or 1.0
    return low - margin, high + margin


def trajectory(
    timesteps: Sequence[float], value: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> Markup:
    """A curve over the sampler's steps with a band around it. It is logarithmic where values span a factor of 30.

    Args:
        timesteps: The sampler's timesteps in its order. The other sequences have the same length.
        value: The values of the curve.
        low: The lower end of the band.
        high: The upper end of the band.
    """
    from matplotlib.ticker import LogLocator

    steps = list(range(1, len(timesteps) + 1))

    def draw(axes: Axes) -> None:
        axes.fill_between(steps, low, high, color=_QUANTIZED, alpha=0.2, linewidth=0)
        axes.plot(steps, value, color=_QUANTIZED, linewidth=1.8, marker="o", markersize=3)
        shown = steps[:: max(1, math.ceil(len(steps) / 12))]
        axes.set_xticks(shown, [f"{step}\n{timesteps[step - 1]:g}" for step in shown])
        axes.set_xlabel("sampler step, its timestep below")
        lowest, highest = min(low, default=0), max(high, default=0)
        if lowest > 0 and highest > 30 * lowest:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        else:
            axes.set_ylim(bottom=min(0, lowest))
        axes.grid(axis="y", color=_FAINT, linewidth=0.7)

    return _svg(draw, (12.4, 3.3), "trajectory")


def ranges(timesteps: Sequence[float], quantiles: Sequence[Sequence[float]], salt: str) -> Markup:
    """How the ranges of a layer's tokens lie along the trajectory: bands from all tokens to the middle 80 %, and the median.

    Args:
        timesteps: The timesteps in the sampler's order.
        quantiles: The smallest, 10 %, median, 90 % and largest range of a token, for each timestep.
        salt: A text that makes the element's ids differ from those of other figures of the page.
    """
    smallest, low, middle, high, largest = np.maximum(np.array(quantiles, dtype=float).T, 1e-12)
    steps = list(range(1, len(timesteps) + 1))

    def draw(axes: Axes) -> None:
        axes.fill_between(steps, smallest, largest, color=_INK, alpha=0.15, linewidth=0)
        axes.fill_between(steps, low, high, color=_QUANTIZED, alpha=0.3, linewidth=0)
        axes.plot(steps, middle, color=_QUANTIZED, linewidth=1.6)
        axes.axhline(float(largest.max()), color=_GRID, linewidth=1.2)
        axes.set_yscale("log")
        shown = steps[:: max(1, math.ceil(len(steps) / 5))]
        axes.set_xticks(shown, [f"{timesteps[step - 1]:g}" for step in shown])
        axes.set_xlabel("timestep")
        axes.minorticks_off()

    return _svg(draw, (4.6, 2.3), salt)


def adapters(timesteps: Sequence[float], table: Sequence[Sequence[int]], salt: str) -> Markup:
    """The adapter of every layer along the trajectory: a row per layer, coloured where it is not the first adapter.

    Args:
        timesteps: The timesteps in the sampler's order.
        table: The adapter of every layer, for each timestep.
        salt: A text that makes the element's ids differ from those of other figures of the page.
    """
    by_layer = np.array(table).T
    most = max(1, int(by_layer.max()))

    def draw(axes: Axes) -> None:
        for row, chosen in enumerate(by_layer):
            for adapter in range(1, most + 1):
                edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen == adapter, [0]])))
                runs = [(start + 0.5, end - start) for start, end in edges.reshape(-1, 2)]
                axes.broken_barh(runs, (row, 1), color=_QUANTIZED, alpha=adapter / most, linewidth=0)
        axes.set_xlim(0.5, len(timesteps) + 0.5)
        axes.set_ylim(len(by_layer), 0)
        shown = list(range(1, len(timesteps) + 1, max(1, math.ceil(len(timesteps) / 5))))
        axes.set_xticks(shown, [f"{timesteps[step - 1]:g}" for step in shown])
        axes.set_xlabel("timestep")
        axes.set_ylabel("layer, in order of execution")

    return _svg(draw, (4.6, 3.4), salt)


def _svg(draw: Callable[[Axes], None], size_inches: tuple[float, float], salt: str) -> Markup:
    """The SVG element, without title or description, of what a function draws on axes."""
    from markupsafe import Markup
    from matplotlib import rc_context, rcParamsDefault
    from matplotlib.figure import Figure

    style = {
        key: value
        for key, value in rcParamsDefault.items()
        if not key.startswith(("backend", "_", "interactive"))
    }
    style |= {"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": 9.0, "axes.edgecolor": _FAINT}
    style |= dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color", "text.color"), _INK)
    buffer = io.StringIO()
    with rc_context(style):  # a user's style must not change the page, nor the page the user's style
        figure = Figure(figsize=size_inches, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return Markup(_for_html(buffer.getvalue()))  # made of numbers alone, nothing to escape


def _for_html(svg: str) -> str:
    """The SVG element of a file, without what HTML does not need: prolog, metadata, namespaces, size, unused ids."""
    text = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text, count=1)
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda match: match.group(0) if match.group(1) in used else "", text)
    for colour, variable in _CSS.items():
        text = text.replace(colour, variable)
    return text


def bought(shares: Sequence[tuple[float, Sequence[tuple[float, float]]]], salt: str) -> Markup:
    """What bytes buy: of every layer the error over bits per weight as a faint curve, and a dot at the bits that it got.

    Args:
        shares: The bits of every layer, and its pairs of bits and error, ascending in bits.
        salt: Makes the element's ids differ from those of other figures of the page.
    """

    def draw(axes: Axes) -> None:
        for bits, errors in shares:
            known = [(b, e) for b, e in errors if e > 0]
            if len(known) < 2:
                continue
            x, y = zip(*known, strict=True)
            axes.plot(x, y, color=_FAINT, linewidth=0.8)
            axes.plot(bits, np.exp(np.interp(bits, x, np.log(y))), ".", color=_QUANTIZED, markersize=6)
        axes.set_yscale("log")
        axes.set_xlabel("bits per weight", color=_INK)
        axes.set_ylabel("squared error of the output", color=_INK)

    return _svg(draw, (7.2, 3.2), salt)
