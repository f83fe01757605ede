"""A drawing shows what the specs hold, all of it and nothing else."""

import contextlib
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from llmnorm import build_config, list_placements
from llmnorm.drawing import JOINTS, draw, layer_groups, layer_words
from llmnorm.modeling.residual import (
    ATTENTION_SLOTS,
    MLP_SLOTS,
    RESIDUAL_SLOTS,
    RESIDUALS,
    NormSpec,
    Residual,
    ResidualSpec,
    constant,
)
from llmnorm.placements import PLACEMENTS
from llmnorm.recipes.facts import choice

pytestmark = pytest.mark.fast

SVG = "{http://www.w3.org/2000/svg}"
NORM = NormSpec(op="rmsnorm", options={})


def words(svg: str) -> Counter[str]:
    """The texts of a drawing but its title, counted."""
    texts = ET.fromstring(svg).iter(f"{SVG}text")
    return Counter(text.text for text in texts if text.get("class") != "title")


def hand_made(attn: ResidualSpec, mlp: ResidualSpec, depth: int = 1, **fields) -> str:
    """A drawing of residuals without a placement."""
    config = build_config("debug", num_hidden_layers=depth)
    config.residuals = [{"attn": attn.to_dict(), "mlp": mlp.to_dict()}] * depth
    config.placement, config.norm, config.final_norm = None, None, None
    for name, value in fields.items():
        setattr(config, name, value)
    return draw(config)


def shown(spec: NormSpec) -> str:
    """The word of a slot's box."""
    value = spec.options.get("value", 0)
    return f"\u00d7 {value:.4g}" if spec.op == "constant" else spec.op.replace("_", " ")


@pytest.mark.parametrize("name", list_placements())
def test_every_operation_of_the_layers_drawn_is_in_the_drawing_as_often_as_in_the_specs(name):
    config = choice(name).config
    pairs = [config.residual_specs()[group[-1]] for group in layer_groups(config.residual_specs())]
    held = [slot for pair in pairs for spec in pair for slot in spec.slots().values()]
    held += [config.final_norm_spec(), config.embedding_spec().norm, config.logits_spec()]
    if streams := config.streams_spec():
        held += [streams.first, streams.second]
    wanted = Counter(shown(spec) for spec in held if spec is not None and spec.op != "none")
    drawn = words(draw(config))
    for pair in pairs:
        for spec in pair:
            if spec.module in ("lerp", "bhyt"):  # written into another box
                drawn[shown(spec.first)] += 1
                assert any(shown(spec.first) in word for word in drawn if " " in word)
    assert {word: drawn[word] for word in wanted} == dict(wanted)


def test_the_order_upward_is_the_order_of_the_computation():
    svg = hand_made(
        ResidualSpec(
            entry=NormSpec(op="layernorm", options={}),
            pre=NORM,
            inner=NormSpec(op="head_gain", options={"heads": 4}),
            post=NormSpec(op="dyt", options={}),
            skip=constant(3.0),
            out=NormSpec(op="derf", options={}),
        ),
        ResidualSpec(),
    )
    heights = {text.text: float(text.get("y")) for text in ET.fromstring(svg).iter(f"{SVG}text")}
    upward = ["layernorm", "rmsnorm", "head gain", "dyt", "derf", "mlp"]
    assert sorted(upward, key=lambda word: -heights[word]) == upward
    assert heights["rmsnorm"] > heights["\u00d7 3"] > heights["derf"]


def test_slots_inside_a_sublayer_stand_at_their_projections_and_open_it():
    per_head = replace(NORM, per_head=True)
    svg = hand_made(
        ResidualSpec(q=per_head, k=per_head, q_rotated=NORM),
        ResidualSpec(gate=NORM, up=NORM),
    )
    drawn = words(svg)
    assert drawn["per head"] == 2
    assert drawn["rmsnorm"] == 5
    assert drawn["RoPE"] == 2
    assert all(drawn[f"W {name}"] == 1 for name in ("q", "k", "v", "o", "gate", "up", "down"))
    plain = words(hand_made(ResidualSpec(pre=NORM), ResidualSpec(pre=NORM)))
    assert plain["attention"] == plain["mlp"] == 1
    assert plain["W q"] == plain["RoPE"] == 0


def test_learned_positions_are_added_before_the_embeddings_treatment():
    svg = draw(build_config("debug", norm="dyt", position="learned"))
    heights = {text.text: float(text.get("y")) for text in ET.fromstring(svg).iter(f"{SVG}text")}
    assert heights["embedding"] > heights["+ positions"] > heights["learned scale"]
    assert words(draw(build_config("debug", norm="dyt")))["+ positions"] == 0


def test_a_shared_module_is_dashed_and_said_to_be_attentions():
    svg = hand_made(ResidualSpec(pre=NORM), ResidualSpec(pre=replace(NORM, shared=True)))
    assert svg.count('class="norm shared"') == 1
    assert words(svg)["attention's"] == 1


@pytest.mark.parametrize("field", ["reads", "skips"])
def test_a_sublayer_that_takes_the_blocks_input_gets_a_line_from_there(field):
    usual = hand_made(ResidualSpec(pre=NORM), ResidualSpec(pre=NORM))
    other = hand_made(ResidualSpec(pre=NORM), ResidualSpec(pre=NORM, **{field: "block"}))
    lines = [set(re.findall(r'<path class="line" d="([^"]*)"', svg)) for svg in (usual, other)]
    assert any(path.startswith("M0 -8L") and path.count("L") == 3 for path in lines[1] - lines[0])


@pytest.fixture
def outside():
    """Residual modules that have no drawing of their own."""

    class Outside(Residual):
        pass

    class TwoOutside(Outside):
        streams = 2

    RESIDUALS.update(from_outside=Outside, two_from_outside=TwoOutside)
    yield
    RESIDUALS.pop("from_outside")
    RESIDUALS.pop("two_from_outside")


def accepted(kind: str, module: str) -> Iterator[dict]:
    """What one may add to a sublayer of this residual module: an operation in a slot, or a word."""
    own = ATTENTION_SLOTS if kind == "attn" else MLP_SLOTS
    slots = (*own, "inner", *RESIDUAL_SLOTS, "first", "second")
    operations = (NORM, constant(1.2345), NormSpec(op="gain", options={"value": 0.5}))
    asked = [{slot: held} for slot in dict.fromkeys(slots) for held in operations]
    asked += [{"reads": "block"}, {"skips": "block"}, {"reads": "block", "skips": "block"}]
    for added in asked:
        with contextlib.suppress(ValueError):
            yield {**added, "module": ResidualSpec(module=module, **added).module}


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize("kind", ["attn", "mlp"])
@pytest.mark.parametrize("module", [*JOINTS, "from_outside", "two_from_outside"])
def test_all_that_a_residual_module_accepts_can_be_told_from_its_drawing(module, kind):
    streams = {"scale": 1.0} if RESIDUALS[module].streams > 1 else None
    usual = {"attn": ResidualSpec(module=module), "mlp": ResidualSpec(module=module)}
    seen = {hand_made(**usual, streams=streams): "nothing"}
    for added in accepted(kind, module):
        svg = hand_made(**{**usual, kind: ResidualSpec(**added)}, streams=streams)
        assert svg not in seen, f"{added} is drawn as {seen[svg]}"
        seen[svg] = str(added)
    assert len(seen) > 20


def test_layers_are_grouped_by_what_stands_where_and_not_by_numbers():
    mix = build_config("debug", placement="mix_ln", num_hidden_layers=8)
    assert layer_groups(mix.residual_specs()) == [[0, 1], [2, 3, 4, 5, 6, 7]]
    lns = build_config("debug", placement="lns", num_hidden_layers=8)
    assert layer_groups(lns.residual_specs()) == [list(range(8))]
    drawn = words(draw(lns))
    assert drawn["layers 1\u20138 (numbers of layer 8)"] == 1
    assert drawn[f"\u00d7 {8**-0.5:.4g}"] == 2


@pytest.mark.parametrize(
    ("layers", "text"),
    [([0], "layer 1"), ([0, 1, 2], "layers 1\u20133"), ([0, 2, 4, 5], "layers 1, 3, 5\u20136")],
)
def test_layers_are_named_from_one(layers, text):
    assert layer_words(layers) == text


def test_every_residual_module_has_its_drawing():
    ours = {name for name, cls in RESIDUALS.items() if cls.__module__.startswith("llmnorm.")}
    assert set(JOINTS) == ours


@pytest.mark.parametrize("name", list_placements())
def test_a_drawing_is_one_file_the_same_each_time_with_a_dark_side(name):
    held = choice(name)
    svg = draw(held.config)
    assert svg == draw(held.config)
    ET.fromstring(svg)
    assert not re.search(r"href|url\(|@import|<script|<image", svg)
    assert "prefers-color-scheme:dark" in svg
    classes = set(" ".join(re.findall(r'class="([^"]*)"', svg)).split())
    assert all(re.search(rf"\.{name}[,{{]", svg) for name in classes)


@pytest.mark.parametrize("name", sorted(PLACEMENTS))
def test_everything_stands_within_the_page(name):
    held = choice(name)
    root = ET.fromstring(draw(held.config))
    left, top, width, height = map(float, root.get("viewBox").split())
    moved = {id(child): 0.0 for child in root}
    for group in root.iter(f"{SVG}g"):
        shift = float(re.match(r"translate\(([-\d.]+) 0\)", group.get("transform")).group(1))
        moved.update({id(child): shift for child in group})
    for element in root.iter():
        x = moved.get(id(element), 0.0)
        if element.tag == f"{SVG}rect":
            start, y = x + float(element.get("x")), float(element.get("y"))
            assert start >= left
            assert start + float(element.get("width")) <= left + width
            assert top <= y <= y + float(element.get("height")) <= top + height
        elif element.tag == f"{SVG}path":
            points = re.findall(r"(-?[\d.]+) (-?[\d.]+)", element.get("d"))
            assert all(left <= x + float(a) <= left + width for a, _ in points)
            assert all(top <= float(b) <= top + height for _, b in points)
