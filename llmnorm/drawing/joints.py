"""How a branch joins the stream, drawn: one function for each residual module."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from llmnorm.modeling.residual import RESIDUALS, NormSpec, ResidualSpec

from .canvas import GAP, Canvas, Cell, Row, slot_cell

BRANCH = 186  # distance of the branch from the stream
SECOND = 370  # distance of the second stream
# Widths of boxes on the stream, on the branch and on a level line, and of the frame of a sublayer.
STREAM_BOX, BRANCH_BOX, LEVEL_BOX, FRAME = 100, 208, 76, 230
_RAILS = (-58.0, BRANCH + FRAME / 2 + 10)  # where the block's input passes on the left and right


def joint(
    canvas: Canvas, spec: ResidualSpec, inside: Sequence[Row], y: float, block: float
) -> float:
    """Draw a sublayer from y upward, stream at x = 0; returns the top of the stream.

    Args:
        canvas: where to draw.
        spec: the slots.
        inside: rows of the sublayer itself, from its input up.
        y: where the stream comes in.
        block: where the block's input is.
    """
    return JOINTS.get(spec.module, _unknown)(canvas, spec, inside, y, block)


def _residual(
    canvas: Canvas, spec: ResidualSpec, inside: Sequence[Row], y: float, block: float
) -> float:
    """y = out(skip(.) + post(branch(pre(.)))) of the stream or the block's input."""
    fork, carried = _sources(canvas, spec, y, block)
    top = _branch(canvas, spec, inside, fork)
    return _join(canvas, spec, carried, top)


def _reuse(
    canvas: Canvas, spec: ResidualSpec, inside: Sequence[Row], y: float, block: float
) -> float:
    """y = out(skip(s) + post(branch(pre(s, m)))), m = mean(block^2) + first(|W_v W_o|^2)."""
    fork, carried = _sources(canvas, spec, y, block)
    right = _RAILS[1]
    canvas.dot(0, block)
    pre = slot_cell(spec.pre) or Cell(words="norm")
    estimate = f"block's + {_inline(spec.first)} |W_v W_o|\u00b2"
    pre = replace(pre, words=_listed(pre.words, pre.small), small=estimate)
    top = canvas.upward(BRANCH, fork, [[pre]], BRANCH_BOX)
    edge, middle = BRANCH + BRANCH_BOX / 2, top + pre.height / 2
    canvas.line((0, block), (right, block), (right, middle), (edge, middle), arrow=True)
    return _join(canvas, spec, carried, _sublayer(canvas, inside, top))


def _lerp(
    canvas: Canvas, spec: ResidualSpec, inside: Sequence[Row], y: float, block: float
) -> float:
    """y = out(c + first(post(branch(pre(.))) - c)), c = skip(.), of the stream or the block's
    input.
    """
    fork, carried = _sources(canvas, spec, y, block)
    top = _branch(canvas, spec, inside, fork)
    top = canvas.upward(BRANCH, top, [[slot_cell(spec.post)]], BRANCH_BOX)
    step = Cell(words="s + a (f \u2212 s)", small=f"a: {_inline(spec.first)}", css="gain")
    width = max(STREAM_BOX, 6.0 * len(step.small) + 12)
    middle = max(0.0, width / 2 - STREAM_BOX / 2)  # a long text makes it grow to the right
    join = top - 30
    canvas.line((BRANCH, top), (BRANCH, join), (middle + width / 2, join), arrow=True)
    end = (0, join + step.height / 2)
    canvas.through(slot_cell(spec.skip), (0, carried), end, STREAM_BOX)
    canvas.cell(middle, join - step.height / 2, step, width)
    return _on_stream(canvas, slot_cell(spec.out), join - step.height / 2)


def _dual(
    canvas: Canvas, spec: ResidualSpec, inside: Sequence[Row], y: float, block: float
) -> float:
    """x' = out(skip(s) + post(f)), y' = y + second(f), f = branch(pre(s)), s = entry(x)."""
    fork, carried = _sources(canvas, spec, y, block)
    top = _branch(canvas, spec, inside, fork)
    return _join_both(canvas, spec, y, carried, top)


def _siamese(
    canvas: Canvas, spec: ResidualSpec, inside: Sequence[Row], y: float, block: float
) -> float:
    """x' = out(skip(s) + post(f)), y' = y + f, f = branch(pre(first(s) + second(y)))."""
    below = y
    y = _on_stream(canvas, slot_cell(spec.entry), y)
    fork = y - 24
    canvas.line((0, y), (0, fork))
    canvas.line((SECOND, below), (SECOND, fork))
    canvas.dot(0, fork)
    canvas.dot(SECOND, fork)
    canvas.through(slot_cell(spec.first), (0, fork), (BRANCH - 11, fork), LEVEL_BOX)
    canvas.through(slot_cell(spec.second), (SECOND, fork), (BRANCH + 11, fork), LEVEL_BOX)
    canvas.plus(BRANCH, fork)
    top = _branch(canvas, spec, inside, fork - 10)
    return _join_both(canvas, spec, fork, fork, top, second=False)


def _unknown(
    canvas: Canvas, spec: ResidualSpec, inside: Sequence[Row], y: float, block: float
) -> float:
    """A module of which only the name is known, and what its slots hold."""
    words = {"reads": spec.reads, "skips": spec.skips}
    lines = [f"{name}: the block's input" for name, source in words.items() if source == "block"]
    lines += [f"{slot}: {_inline(held)}" for slot, held in spec.slots().items()]
    two = RESIDUALS[spec.module].streams > 1
    left, right = _RAILS[0], SECOND + 12 if two else _RAILS[1]
    height = 40 + 16 * len(lines)
    top = y - GAP - height
    for x in (0, SECOND) if two else (0,):
        canvas.line((x, y), (x, y - GAP), arrow=True)
    canvas.box((left + right) / 2, top, right - left, height, "part")
    canvas.text((left + right) / 2, top + 13, spec.module.replace("_", " "))
    for i, line in enumerate(["see its code", *lines]):
        canvas.text((left + right) / 2, top + 28 + 16 * i, line, "small")
    return top


JOINTS: dict[str, Callable[[Canvas, ResidualSpec, Sequence[Row], float, float], float]] = {
    "residual": _residual,
    "bhyt": _reuse,
    "lerp": _lerp,
    "residual_dual": _dual,
    "siamese": _siamese,
}


def _sources(canvas: Canvas, spec: ResidualSpec, y: float, block: float) -> tuple[float, float]:
    """The entry, then lines to what the branch and the skip take; returns where these go on."""
    y = _on_stream(canvas, slot_cell(spec.entry), y)
    fork = carried = y - 12
    canvas.line((0, y), (0, fork))
    if spec.reads == "block":
        right = _RAILS[1]
        canvas.dot(0, block)
        canvas.line((0, block), (right, block), (right, fork), (BRANCH, fork))
    else:
        canvas.dot(0, fork)
        canvas.line((0, fork), (BRANCH, fork))
    if spec.skips == "block":
        left, carried = _RAILS[0], fork - 14
        canvas.dot(0, block)
        canvas.line((0, block), (left, block), (left, carried), (0, carried))
    return fork, carried


def _inline(spec: NormSpec | None) -> str:
    """What a slot holds, for the text of a box."""
    cell = slot_cell(spec)
    return "1" if cell is None else _listed(cell.words, cell.small)


def _listed(*words: str) -> str:
    return ", ".join(filter(None, words))


def _branch(canvas: Canvas, spec: ResidualSpec, inside: Sequence[Row], y: float) -> float:
    """What the sublayer reads and the sublayer."""
    y = canvas.upward(BRANCH, y, [[slot_cell(spec.pre)]], BRANCH_BOX)
    return _sublayer(canvas, inside, y)


def _sublayer(canvas: Canvas, inside: Sequence[Row], y: float) -> float:
    """One box, or a frame around its rows."""
    if len(inside) == 1:
        return canvas.upward(BRANCH, y, inside, BRANCH_BOX, extra=10)
    rows = Canvas()
    top = rows.upward(BRANCH, y - 14, inside, BRANCH_BOX)
    canvas.box(BRANCH, top - 10, FRAME, y - 14 - top + 10, "frame")
    canvas.line((BRANCH, y), (BRANCH, y - 14))
    canvas.elements += rows.elements
    canvas.line((BRANCH, top), (BRANCH, top - 10))
    return top - 10


def _join(canvas: Canvas, spec: ResidualSpec, carried: float, top: float) -> float:
    """Bring a branch that ends at `top` to the stream, whose skip starts at `carried`."""
    top = canvas.upward(BRANCH, top, [[slot_cell(spec.post)]], BRANCH_BOX)
    join = top - 14
    canvas.line((BRANCH, top), (BRANCH, join), (11, join), arrow=True)
    canvas.through(slot_cell(spec.skip), (0, carried), (0, join + 11), STREAM_BOX)
    canvas.plus(0, join)
    return _on_stream(canvas, slot_cell(spec.out), join - 10)


def _on_stream(canvas: Canvas, cell: Cell | None, y: float) -> float:
    """A box on the stream above y, if there is one."""
    return canvas.upward(0, y, [[cell]], STREAM_BOX)


def _join_both(
    canvas: Canvas, spec: ResidualSpec, y: float, fork: float, top: float, second: bool = True
) -> float:
    """Bring a branch that ends at `top` to the first stream on its left and the second on its
    right."""
    join = top - 24
    canvas.line((BRANCH, top), (BRANCH, join))
    canvas.dot(BRANCH, join)
    canvas.through(slot_cell(spec.post), (BRANCH, join), (11, join), LEVEL_BOX)
    carried = spec.second if second else None
    canvas.through(slot_cell(carried), (BRANCH, join), (SECOND - 11, join), LEVEL_BOX)
    canvas.through(slot_cell(spec.skip), (0, fork), (0, join + 11), STREAM_BOX)
    canvas.line((SECOND, y), (SECOND, join + 11), arrow=True)
    canvas.plus(0, join)
    canvas.plus(SECOND, join)
    end = _on_stream(canvas, slot_cell(spec.out), join - 10)
    canvas.line((SECOND, join - 10), (SECOND, end))
    return end
