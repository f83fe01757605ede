"""Draw a scheme as an SVG: what stands in its slots, read from the specs of a config.

The picture is made from the same `ResidualSpec` pairs that the model is built from, so it cannot
show what the model does not do. It flows upward, as papers draw it: on the left the whole stack, on
the right one block for each kind of layer. `joints.py` draws how a branch joins the stream.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace

from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.parametrization import Parametrization
from llmnorm.modeling.residual import ResidualSpec, constant
from llmnorm.modeling.weights import WeightSpec

from .canvas import STYLE, Canvas, Cell, Row, slot_cell
from .joints import JOINTS, SECOND, joint

__all__ = ["JOINTS", "draw", "layer_groups", "layer_words"]

_LEFT = 70  # from a panel's edge to its stream
_STACK = 168  # width of the column of the whole stack


def draw(config: LlmNormConfig) -> str:
    """The SVG of a config's wiring, self-contained and byte for byte the same for the same config.

    Layers that differ in what stands where are drawn side by side; of layers that differ by numbers
    alone, the last is drawn.
    """
    specs = config.residual_specs()
    groups = layer_groups(specs)
    stack, blocks = Canvas(), [Canvas() for _ in groups]
    tops = [_stack(stack, config, groups)]
    for canvas, layers in zip(blocks, groups, strict=True):
        tops.append(_block(canvas, config, specs[layers[-1]]))
    top, panel = min(tops) - 16, 388.0 if config.streams is None else SECOND + _LEFT + 24.0
    width = _STACK + len(groups) * (panel + 12) + 8
    page, name = Canvas(), _name(config.placement)
    page.box(width / 2, top - 46, width - 1, 67 - top, "page")
    page.text(18, top - 24, name, "title")
    if axes := _axes(config):
        page.text(18, top - 4, axes, "axis")
    page.group(84, stack)
    for i, (canvas, layers) in enumerate(zip(blocks, groups, strict=True)):
        left = _STACK + i * (panel + 12)
        words = layer_words(layers)
        if any(specs[layer] != specs[layers[0]] for layer in layers):
            words += f" (numbers of layer {layers[-1] + 1})"
        page.box(left + panel / 2, top, panel, 12 - top, "panel")
        page.text(left + panel / 2, top - 14, words, "note")
        page.group(left + _LEFT, canvas)
    body = "\n".join(page.elements)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {top - 46.5:g} {width:g} '
        f'{68 - top:g}" width="{width:g}" height="{68 - top:g}" role="img">\n'
        f"<title>{html.escape(name)}</title>\n<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def layer_groups(specs: Sequence[tuple[ResidualSpec, ResidualSpec]]) -> list[list[int]]:
    """Indices of the layers that have the same operations in the same slots, numbers aside."""
    groups: dict[str, list[int]] = {}
    for layer_idx, pair in enumerate(specs):
        groups.setdefault(repr([_without_numbers(spec) for spec in pair]), []).append(layer_idx)
    return list(groups.values())


def layer_words(layers: Sequence[int]) -> str:
    """1-based numbers of layers in words: `layer 1`, `layers 2-12`, `layers 1, 3, 5-6`."""
    runs: list[list[int]] = []
    for layer_idx in layers:
        if runs and runs[-1][-1] == layer_idx:
            runs[-1].append(layer_idx + 1)
        else:
            runs.append([layer_idx + 1])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}\u2013{run[-1]}" for run in runs]
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join(parts)


def _without_numbers(spec: ResidualSpec) -> ResidualSpec:
    return spec.having(**{slot: replace(held, options={}) for slot, held in spec.slots().items()})


def _name(placement: object) -> str:
    return str(placement["name"] if isinstance(placement, Mapping) else placement or "hand-made")


def _axes(config: LlmNormConfig) -> str:
    """What the scheme asks beside its wiring, where that is not the usual."""
    weights = WeightSpec.parse(config.weights).kind
    parametrization = Parametrization.parse(config.parametrization).name
    asked = [f"weights: {weights}"] if weights != "plain" else []
    asked += [f"parametrization: {parametrization}"] if parametrization != "standard" else []
    return ", ".join(asked)


def _stack(canvas: Canvas, config: LlmNormConfig, groups: list[list[int]]) -> float:
    """The whole model, upward; returns how far up it reaches."""
    embedding, streams = config.embedding_spec(), config.streams_spec()
    final, logits = config.final_norm_spec(), config.logits_spec()
    scale = Cell(words="learned scale", css="gain") if embedding.treatment == "scale" else None
    learned = Cell(words="+ positions") if config.position == "learned" else None
    rows: list[Row] = [[Cell(words="embedding")], [learned], [scale], [slot_cell(embedding.norm)]]
    if streams and streams.scale != 1:
        rows.append([None, slot_cell(constant(streams.scale))])
    rows += [[Cell(words=layer_words(group), css="core")] for group in groups]
    if streams:
        rows += [[slot_cell(streams.first), slot_cell(streams.second)], [Cell(words="+")]]
    rows += [[slot_cell(final)], [Cell(words="head")], [slot_cell(logits)]]
    canvas.text(0, -4, "tokens", "note")
    return canvas.upward(0, -14, rows, _STACK - 38)


def _block(canvas: Canvas, config: LlmNormConfig, pair: Sequence[ResidualSpec]) -> float:
    """Attention, then mlp, on the stream at x = 0; returns how far up they reach."""
    block = y = -8.0
    for kind, spec in zip(("attn", "mlp"), pair, strict=True):
        y = joint(canvas, spec, _inside(config, kind, spec), y, block)
    for x in (0, SECOND) if config.streams else (0,):
        canvas.line((x, y), (x, y - 14), arrow=True)
    return y - 14


def _inside(config: LlmNormConfig, kind: str, spec: ResidualSpec) -> list[Row]:
    """Rows of a sublayer from its input up; one row where no slot inside is filled."""
    projections: tuple[str, ...] = ("q", "k", "v")
    if kind == "attn":
        name, core, output = "attention", "softmax(q k\u1d40) v", "o"
    elif config.mlp == "gated":
        projections, output = ("gate", "up"), "down"
        name, core = "mlp", f"{config.hidden_act}(gate) \u00d7 up"
    else:
        projections, name, core, output = ("up",), "mlp", config.hidden_act, "down"
    rotated: Row = [slot_cell(spec.q_rotated), slot_cell(spec.k_rotated), None]
    slots: Row = [slot_cell(getattr(spec, slot)) for slot in projections]
    inner = slot_cell(spec.inner)
    if not (any(slots) or any(rotated) or inner):
        return [[Cell(words=name, css="core")]]
    rope = Cell(words="RoPE") if kind == "attn" and config.position == "rope" else None
    return [
        [Cell(words=f"W {slot}") for slot in projections],
        slots,
        [rope, rope, None],
        rotated,
        [Cell(words=core, css="core")],
        [inner],
        [Cell(words=f"W {output}")],
    ]
