"""The picture of `depth.py`: the loss of every stack, step by step."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(rows: dict[str, dict], entropy: float, window: int, path: Path) -> None:
    """Draw the loss curves as running means, one panel for each depth.

    Args:
        rows: what `depth.py` keeps of each run; a loss that is None leaves a gap.
        entropy: the loss in nats that a stack has to get below.
        window: of how many steps `last_loss` and every point of a curve are the mean.
        path: the picture.
    """
    depths = sorted({row["layers"] for row in rows.values()})
    figure, axes = pyplot.subplots(1, len(depths), figsize=(7 * len(depths), 5), squeeze=False)
    colors = pyplot.colormaps["turbo"]
    for axis, depth in zip(axes[0], depths, strict=True):
        shown = ranked([row for row in rows.values() if row["layers"] == depth])
        for place, row in enumerate(shown):
            losses = smooth(row["losses"], window)
            style, color = "-" if row["learns"] else "--", colors((place + 0.5) / len(shown))
            steps = range(window, window + len(losses))
            axis.plot(steps, losses, style, color=color, linewidth=1.2, label=label(row))
        axis.axhline(entropy, color="black", linewidth=0.8, linestyle=":", label="unigram entropy")
        top = 1.1 * max(row["first_loss"] for row in shown)  # a spike would flatten all the rest
        axis.set(title=f"{depth} layers of width 64", xlabel="step", ylabel="training loss (nats)")
        axis.set_ylim(top=top, bottom=min(row["last_loss"] or top for row in shown) - 0.3)
        words = {"title": f"mean of the last {window} steps", "title_fontsize": 7, "fontsize": 7}
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), **words)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def smooth(losses: list[float | None], window: int) -> list[float]:
    """The mean of each `window` steps in a row, nan where one of them is None."""
    values = [math.nan if loss is None else loss for loss in losses]
    ends = range(window, len(values) + 1)
    return [sum(values[end - window : end]) / window for end in ends]


def ranked(rows: list[dict]) -> list[dict]:
    """The lowest last loss first, those without one at the end."""
    return sorted(rows, key=lambda row: math.inf if row["last_loss"] is None else row["last_loss"])


def label(row: dict) -> str:
    """The words of the legend."""
    last = "diverged" if row["last_loss"] is None else f"{row['last_loss']:.2f}"
    return f"{last}  {row['placement']}"
