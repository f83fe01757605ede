"""What a parity certificate says of errors, in words. The errors are those of `certificate.py`."""

from collections.abc import Mapping
from typing import Any

from llmnorm.export.visiting import Visit

_LOSS_ROUNDING = 1e-5  # nats that a mean over float32 numbers may be off
_CAUSES = {
    "fold": "folding changes",
    "eps": "the class's one eps for all norms changes",
    "class": "the class is not wired as our model: before rounding it changes",
}


def about_loading(seen: Visit, exact: Visit | None) -> list[str]:
    """What went wrong when a folder was loaded; `exact` is the same with unrounded weights."""
    if "failure" in seen.facts:
        return [f"it cannot be loaded: {seen.facts['failure']}"]
    found = []
    places = {"missing": "its weights lack", "unexpected": "its class has no place for"}
    for key, words in places.items():
        if names := seen.facts.get(key, []):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            found.append(f"{words} {', '.join(names[:3])}{more}")
    if exact is not None and "failure" in exact.facts:
        found.append(f"with unrounded weights it cannot be loaded: {exact.facts['failure']}")
    return found


def about_errors(
    errors: Mapping[str, Mapping[str, float]], limits: Mapping[str, float], scale: float
) -> list[str]:
    """Which errors are beyond their limits; `scale` is the standard deviation of the logits."""
    found = []
    for name, error in errors.items():
        if not error["rel"] <= limits[name]:
            what = _CAUSES.get(name, f"loaded in {name} it changes")
            found.append(
                f"{what} the logits by {error['max_abs_logit']:.2g}, {error['rel']:.2g} of their "
                f"standard deviation; allowed is {limits[name]:.2g}"
            )
        # No logits within their limit can move a loss by more than twice as much.
        elif not error["loss_diff"] <= 2 * limits[name] * scale + _LOSS_ROUNDING:
            found.append(
                f"its loss in {name} is {error['loss_diff']:.2g} nats off, though its logits are "
                "right"
            )
    return found


def about_generation(generation: Mapping[str, Any]) -> list[str]:
    """Whether greedy continuations are other ones, and not by a tie."""
    found = []
    if not (generation["equal"] or generation["tie"]):
        step = generation["first_difference"] + 1
        found.append(f"greedy generation differs from the source's at token {step}")
    if not generation["cached_equal_uncached"]:
        found.append("greedy generation with a cache differs from that without")
    return found


def summary(parity: Mapping[str, Any]) -> list[str]:
    """What a person wants to know, in a few lines."""
    verdict = "passed" if parity["passed"] else "FAILED"
    made = f"{parity['class']}, " if parity["class"] else ""
    lines = [f"parity {verdict}: {parity['scheme']} as {made}{parity['dtype']}"]
    for name in dict.fromkeys(("class", "float32", parity["dtype"])):
        if error := parity["errors"].get(name):
            what = "before rounding" if name == "class" else name
            lines.append(
                f"  {what}: logits differ by {error['rel']:.1e} of their standard deviation "
                f"(allowed {parity['tolerances'][name]:.1e}), loss by {error['loss_diff']:.1e} nats"
            )
    if generation := parity["generation"]:
        other = ", other ones by a tie" if generation["tie"] else ", NOT the source's"
        same = ", the source's" if generation["equal"] else other
        lines.append(f"  generation: {generation['tokens']} greedy tokens{same}")
    lines += [f"  {failure}" for failure in parity["failures"]]
    if layer := parity["first_deviating_layer"]:
        lines.append(f"  the first to deviate: {layer}")
    return lines
