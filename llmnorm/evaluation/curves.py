"""Draw the losses of runs: training, smoothed lightly, and the validation points.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; markers and line styles
differ too, so that a print in grey stays readable.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmnorm.errors import EnvironmentProblem
from llmnorm.evaluation.runs import Curve, Run

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_STYLES = ("-", "--", "-.", ":")
_EARLY = 0.05
"""Share of the run whose steep fall is cut off, so that the rest can be told apart."""


def draw_losses(runs: Sequence[Run], file: Path, *, title: str = "") -> Path:
    """Write a picture of the runs' losses over tokens; the format follows the file's ending."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    unit, unit_name = _unit(max(run.tokens for run in runs))
    for index, run in enumerate(runs):
        color = _COLORS[index % len(_COLORS)]
        line: dict[str, Any] = {
            "color": color,
            "linestyle": _STYLES[index % len(_STYLES)],
            "linewidth": 1.3,
        }
        point: dict[str, Any] = {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 6,
                 "markeredgecolor": "white", "markeredgewidth": 0.6}  # fmt: skip
        axes.plot(*_scaled(smoothed(run.train_curve), unit), **line, alpha=0.85)
        axes.plot(*_scaled(run.validation_curve, unit), color=color, linestyle="none", **point)
        axes.plot([], [], **line, **point, label=_label(run, runs))
    axes.set_ylim(*_limits(runs))
    axes.set_xlim(left=0)
    axes.set_xlabel(f"training tokens ({unit_name})")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="line: training (smoothed), point: validation")
    if title:
        axes.set_title(title, fontsize=10)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
    except OSError as error:
        raise EnvironmentProblem(f"the picture cannot be written: {error}") from error
    return file


def smoothed(curve: Curve, share: float = 0.02) -> Curve:
    """Moving average over a centred window of `share` of the points; nan stays out of the means.

    At both ends the window is what there is of it.
    """
    half = int(len(curve) * share / 2)
    result = []
    for index, (tokens, _) in enumerate(curve):
        near = [loss for _, loss in curve[max(0, index - half) : index + half + 1]]
        finite = [loss for loss in near if math.isfinite(loss)]
        result.append((tokens, math.fsum(finite) / len(finite) if finite else math.nan))
    return result


def _scaled(curve: Curve, unit: float) -> tuple[list[float], list[float]]:
    return [tokens / unit for tokens, _ in curve], [loss for _, loss in curve]


def _label(run: Run, runs: Sequence[Run]) -> str:
    """The scheme, the folder where schemes repeat, and the last validation loss."""
    alone = [other.scheme for other in runs].count(run.scheme) == 1
    name = run.scheme if alone else f"{run.scheme} ({run.path.name})"
    return name if run.validation_loss is None else f"{name}: {run.validation_loss:.3f}"


def _limits(runs: Sequence[Run]) -> tuple[float, float]:
    """Loss limits that leave out the first steep fall."""
    seen = []
    for run in runs:
        train = smoothed(run.train_curve)
        late = train[int(len(train) * _EARLY) :] or train
        seen += [loss for _, loss in [*late, *run.validation_curve] if math.isfinite(loss)]
    low, high = (min(seen), max(seen)) if seen else (0.0, 1.0)
    margin = 0.04 * (high - low) or 0.1
    return low - margin, high + margin


def _unit(tokens: int) -> tuple[float, str]:
    for size, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if tokens >= size:
            return size, name
    return 1.0, "count"
