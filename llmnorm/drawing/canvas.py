"""The pieces of a drawing: boxes, lines, dots and sums on a page that reads on light and dark."""

import html
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmnorm.modeling.operations import list_norms, operation
from llmnorm.modeling.residual import NormSpec

STYLE = """
text{font:13px system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif;\
fill:#1f2328;text-anchor:middle}
.small{font-size:11px}
.title{font-size:15px;font-weight:600;text-anchor:start}
.note{font-size:12px;fill:#59636e}
.axis{font-size:12px;fill:#59636e;text-anchor:start}
.page{fill:#fff;stroke:#d1d9e0}
.panel{fill:#f6f8fa;stroke:#d1d9e0}
.norm{fill:#d2f1e4;stroke:#1a7f5a}
.gain{fill:#fdeec8;stroke:#9a6700}
.core{fill:#dfe6ff;stroke:#4355b9}
.part{fill:#fff;stroke:#8c959f}
.frame{fill:#eef1ff;stroke:#a6b1e8;}
.shared{stroke-dasharray:5 3}
.line{fill:none;stroke:#59636e;stroke-width:1.5}
.tip{fill:#59636e}
@media (prefers-color-scheme:dark){
text{fill:#f0f6fc}
.note,.axis{fill:#9198a1}
.page{fill:#0d1117;stroke:#3d444d}
.panel{fill:#151b23;stroke:#3d444d}
.norm{fill:#12402f;stroke:#3fb98a}
.gain{fill:#4a3608;stroke:#d9a72e}
.core{fill:#232f63;stroke:#8b9cf5}
.part{fill:#0d1117;stroke:#6e7681}
.frame{fill:#1a2140;stroke:#4d5aa8}
.line{stroke:#9198a1}
.tip{fill:#9198a1}
}
"""

NARROW = 64  # width of a box that shares its row
GAP = 14  # length of the line between two boxes


Point = tuple[float, float]


@dataclass
class Canvas:
    """SVG elements in order; y grows downward, so up is negative."""

    elements: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, css: str) -> None:
        """A rectangle whose middle is x and whose top is y."""
        self.elements.append(
            f'<rect class="{css}" x="{x - width / 2:g}" y="{y:g}" width="{width:g}" '
            f'height="{height:g}" rx="6"/>'
        )

    def text(self, x: float, y: float, words: str, css: str = "") -> None:
        """A line of text whose middle is (x, y)."""
        kind = f' class="{css}"' if css else ""
        self.elements.append(
            f'<text{kind} x="{x:g}" y="{y:g}" dy=".35em">{html.escape(words)}</text>'
        )

    def line(self, *points: Point, arrow: bool = False) -> None:
        """A line through points; with `arrow` a tip at its end."""
        path = "L".join(f"{x:g} {y:g}" for x, y in points)
        self.elements.append(f'<path class="line" d="M{path}"/>')
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
            left = f"{x - 7 * dx - 4 * dy:g} {y - 7 * dy + 4 * dx:g}"
            right = f"{x - 7 * dx + 4 * dy:g} {y - 7 * dy - 4 * dx:g}"
            self.elements.append(f'<path class="tip" d="M{x:g} {y:g}L{left}L{right}Z"/>')

    def dot(self, x: float, y: float) -> None:
        """Where a line parts."""
        self.elements.append(f'<circle class="tip" cx="{x:g}" cy="{y:g}" r="3"/>')

    def plus(self, x: float, y: float) -> None:
        """The sum of what the lines bring."""
        self.elements.append(f'<circle class="part" cx="{x:g}" cy="{y:g}" r="10"/>')
        self.line((x - 5, y), (x + 5, y))
        self.line((x, y - 5), (x, y + 5))

    def group(self, x: float, other: "Canvas") -> None:
        """Another canvas, moved to the right."""
        self.elements += [f'<g transform="translate({x:g} 0)">', *other.elements, "</g>"]

    def through(self, cell: "Cell | None", start: Point, end: Point, width: float) -> None:
        """An arrow from start to end, level or upright, with a box in its middle."""
        if cell is None:
            self.line(start, end, arrow=True)
            return
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        upright, rightward = start[0] == end[0], end[0] > start[0]
        dx = 0 if upright else width / 2 * (1 if rightward else -1)
        dy = -cell.height / 2 if upright else 0
        self.line(start, (x - dx, y - dy), arrow=True)
        self.cell(x, y - cell.height / 2, cell, width)
        self.line((x + dx, y + dy), end, arrow=True)

    def cell(self, x: float, top: float, cell: "Cell", width: float, extra: float = 0) -> None:
        """A box with its words; `extra` makes it taller."""
        self.box(x, top, width, cell.height + extra, cell.css)
        small = "small" if width < 7.5 * len(cell.words) + 8 else ""
        if cell.small:
            self.text(x, top + 13, cell.words, small)
            self.text(x, top + 28, cell.small, "small")
        else:
            self.text(x, top + (cell.height + extra) / 2, cell.words, small)

    def upward(
        self, x: float, y: float, rows: "Sequence[Row]", width: float, extra: float = 0
    ) -> float:
        """Stack rows of boxes on a line that comes up at (x, y); returns the top of the last row.

        A row of several boxes after one box parts the line; one box after several joins them. A
        row without boxes is left out.
        """
        lines = [x]
        for row in filter(any, rows):
            middles = [x + (i - (len(row) - 1) / 2) * (NARROW + 6) for i in range(len(row))]
            if len(row) > len(lines):
                self.line((x, y), (x, y - 6))
                self.line((middles[0], y - 6), (middles[-1], y - 6))
                lines, y = middles, y - 6
            bottom = y - GAP
            height = max(cell.height for cell in row if cell) + extra
            for i, middle in enumerate(lines):
                wire = len(row) == len(lines) and row[i] is None
                self.line((middle, y), (middle, bottom - height * wire), arrow=not wire)
            for middle, cell in zip(middles, row, strict=True):
                if cell:
                    self.cell(
                        middle, bottom - height, cell, NARROW if len(row) > 1 else width, extra
                    )
            lines, y = middles, bottom - height
        return y


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One box: words, smaller words below them, and its kind."""

    words: str
    small: str = ""
    css: str = "part"

    @property
    def height(self) -> float:
        """In pixels, by its lines of words."""
        return 40 if self.small else 27


Row = Sequence[Cell | None]  # None lets the line through


def slot_cell(spec: NormSpec | None) -> Cell | None:
    """What a slot holds as a box: its name, and its numbers where they are not the usual."""
    if spec is None or spec.op == "none":
        return None
    if spec.op == "constant":
        return Cell(words=f"\u00d7 {spec.options['value']:.4g}", css="gain")
    notes = ["per head"] if spec.per_head else []
    notes += ["attention's"] if spec.shared else []
    scale = spec.options.get("scale", 1.0)
    notes += [f"\u00d7 {scale:.4g}"] if scale != 1 else []
    notes += _start(spec)
    css = "norm" if spec.op in list_norms() else "gain"
    css += " shared" if spec.shared else ""
    return Cell(words=spec.op.replace("_", " "), small=", ".join(notes), css=css)


def _start(spec: NormSpec) -> list[str]:
    """Where a learned gain starts, if elsewhere than its operation does by default."""
    known = inspect.signature(operation(spec.op)).parameters
    given = {key: spec.options.get(key) for key in ("value", "weight_init") if key in known}
    return [
        f"from {value:.4g}"
        for key, value in given.items()
        if value is not None and value != known[key].default
    ]
