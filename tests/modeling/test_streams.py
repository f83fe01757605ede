"""Two residual streams: how they open, join and close, and that users see one hidden state."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from schemes import SHAPE, TOLERANCE, tokens
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM

from llmnorm import LlmNormConfig, LlmNormForCausalLM, build_config, build_model, self_test
from llmnorm.errors import SelfTestError
from llmnorm.modeling.gains import Constant
from llmnorm.modeling.residual import NormSpec, ResidualSpec, build_residual
from llmnorm.modeling.streams import StreamsSpec, build_streams

DIM = 6
IDS = tokens(2, 11)

# Joints that are more than slots: two streams, and nGPT's interpolation.
JOINTS: dict[str, dict[str, Any]] = {
    "residual_dual": {"placement": {"name": "residual_dual", "scale": 0.5}},
    "siamese_norm": {"placement": "siamese_norm"},
    "siamese_hybrid_star": {
        "placement": {"name": "siamese_norm", "variant": "hybrid", "star": True, "damping": 2.0}
    },
    "ngpt": {"placement": "ngpt", "norm": "l2norm"},
}
TWO = [name for name in JOINTS if name != "ngpt"]


def joint(name: str, **overrides: Any) -> LlmNormForCausalLM:
    return build_model(build_config(SHAPE, **JOINTS[name], **overrides), seed=1).eval()


def moved(name: str) -> LlmNormForCausalLM:
    """A float64 model away from its start, where streams are alike and logits near ties."""
    model = joint(name).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- the formulas -----------------------------------------------------------------------------


@pytest.mark.fast
def test_one_stream_opens_and_closes_as_it_is() -> None:
    streams, x = build_streams(None, DIM), features(2, 3, DIM)
    assert streams.open(x) is x
    assert streams.close(x) is x
    assert not list(streams.parameters())


@pytest.mark.fast
def test_two_streams_open_as_copies_and_close_as_a_sum() -> None:
    spec = StreamsSpec(
        first=NormSpec.parse({"op": "gain"}), second=NormSpec.parse("rmsnorm"), scale=0.25
    )
    streams = build_streams(spec, DIM).double()
    first, second = features(DIM, seed=1), features(DIM, seed=2)
    streams.first.weight.data, streams.second.weight.data = first, second
    x = features(2, 3, DIM).requires_grad_()
    p, r = streams.open(x)
    assert torch.equal(p, x)
    assert torch.equal(r, 0.25 * x)
    p, r = p + 1.0, r - 2.0

    def by_hand(x: torch.Tensor) -> torch.Tensor:
        r = 0.25 * x - 2.0
        rms = torch.sqrt(r.square().mean(-1, keepdim=True) + 1e-6)
        return first * (x + 1.0) + second * r / rms

    found, wanted = streams.close(torch.stack((p, r))), by_hand(x)
    torch.testing.assert_close(found, wanted, **TOLERANCE[torch.float64])
    weight = features(2, 3, DIM, seed=3)
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, wanted)]
    torch.testing.assert_close(*gradients, **TOLERANCE[torch.float64])


@pytest.mark.fast
@pytest.mark.parametrize("module", ["residual_dual", "siamese", "lerp"])
def test_gradients_of_a_joint_are_those_of_its_value(module: str) -> None:
    used = {"lerp": {"first"}, "residual_dual": {"second"}, "siamese": {"first", "second"}}
    slots = {"entry", "pre", "post", "skip", "out"} | used[module]
    spec = ResidualSpec(module=module, **dict.fromkeys(slots, NormSpec.parse("gain")))
    residual = build_residual(spec, DIM).double()
    gains = {f"{slot}.weight": features(DIM, seed=i) for i, slot in enumerate(sorted(slots))}
    shape = (1, 2, DIM) if module == "lerp" else (2, 1, 2, DIM)
    x = features(*shape, seed=20).requires_grad_()

    def run(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        state = dict(zip(gains, weights, strict=True))
        return torch.func.functional_call(residual, state, (x, x, torch.sin))

    leaves = [gain.requires_grad_() for gain in gains.values()]
    assert torch.autograd.gradcheck(run, (x, *leaves))


@pytest.mark.fast
def test_the_spec_survives_a_round_trip_through_json() -> None:
    for spec in (
        StreamsSpec(),
        StreamsSpec(second=NormSpec.parse({"op": "rmsnorm", "eps": 1e-7}), scale=0.1),
    ):
        assert StreamsSpec.parse(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.fast
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"third": "rmsnorm"}, "streams has no key 'third'; its keys: first, second, scale"),
        ({"second": "rmsnrom"}, "unknown norm 'rmsnrom'"),
        ({"scale": 0.0}, r"streams\.scale is 0\.0; expected a number above 0"),
        ({"scale": "half"}, r"streams\.scale is 'half'; expected a number above 0"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamsSpec.parse(given)


# --- the models -------------------------------------------------------------------------------


@pytest.mark.fast
@torch.no_grad()
@pytest.mark.parametrize("name", TWO)
def test_users_see_one_hidden_state_a_layer_closed_as_at_the_end(name: str) -> None:
    model, states = moved(name), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, given, state: states.append(state))
    outputs = model(IDS, output_hidden_states=True)
    assert [tuple(h.shape) for h in outputs.hidden_states] == [(2, 11, 32)] * 5
    assert [tuple(state.shape) for state in states] == [(2, 2, 11, 32)] * 4
    for state, hidden in zip(states[:-1], outputs.hidden_states[1:-1], strict=True):
        assert torch.equal(model.model.streams.close(state), hidden)
    end = model.model.norm(model.model.streams.close(states[-1]))
    assert torch.equal(end, outputs.hidden_states[-1])
    plain = model(IDS, output_hidden_states=True, return_dict=False)
    assert isinstance(plain, tuple)
    assert all(torch.equal(a, b) for a, b in zip(plain[-1], outputs.hidden_states, strict=True))


@pytest.mark.fast
@pytest.mark.parametrize("name", JOINTS)
def test_cached_generation_equals_generation_without_a_cache(name: str) -> None:
    model = moved(name).float()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(IDS, use_cache=False, **settings)
    assert torch.equal(model.generate(IDS, **settings), plain)
    assert torch.equal(model.generate(IDS, cache_implementation="static", **settings), plain)


@pytest.mark.fast
@pytest.mark.parametrize("name", JOINTS)
def test_activation_checkpointing_changes_no_bit(name: str) -> None:
    model, gradients = moved(name).train(), []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(gradient.any() for gradient in gradients[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("name", JOINTS)
def test_compiled_blocks_equal_eager_ones(name: str) -> None:
    model = moved(name)
    eager = model(IDS, labels=IDS, use_cache=False)
    eager.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.compile(backend=counter)
    compiled = model(IDS, labels=IDS, use_cache=False)
    compiled.loss.backward()
    torch.testing.assert_close(compiled.logits, eager.logits, **TOLERANCE[torch.float64])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **TOLERANCE[torch.float64])
    wirings = 2 if "star" in name else 1
    assert 1 <= counter.frame_count <= 2 * wirings


@pytest.mark.fast
@torch.no_grad()
@pytest.mark.parametrize("name", JOINTS)
def test_a_saved_model_loads_equal(name: str, tmp_path: Path) -> None:
    model = moved(name).float()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    self_test(loaded, fresh=False)


@pytest.mark.fast
@pytest.mark.parametrize("name", JOINTS)
def test_bfloat16_stays_finite_and_near_float32(name: str) -> None:
    model = moved(name).float()
    reference = model(IDS, labels=IDS).loss
    loss = model.bfloat16().train()(IDS, labels=IDS).loss
    loss.backward()
    assert abs(loss.item() / reference.item() - 1) < 0.02
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# --- broken promises --------------------------------------------------------------------------


def lose_the_second_norm(model: Any) -> None:
    model.model.streams.second = nn.Identity()


def open_at_another_scale(model: Any) -> None:
    model.model.streams.scale = 1.0


def undo_the_divisor_of_layer_2(model: Any) -> None:
    model.model.layers[1].mlp_residual.post = Constant(32, value=1.0)


def join_one_stream(model: Any) -> None:
    spec = replace(model.config.residual_specs()[2][0], module="residual", second=None)
    model.model.layers[2].attn_residual = build_residual(spec, SHAPE["hidden_size"])


def normalize_with_another_eps(model: Any) -> None:
    model.model.streams.second.eps = 1e-6


def drop_the_gain_of_queries(model: Any) -> None:
    model.model.layers[0].self_attn.q_rotated = nn.Identity()


def start_at_another_rate(model: Any) -> None:
    model.model.layers[3].mlp_residual.first.value = 0.5


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "break_it", "message"),
    [
        ("residual_dual", lose_the_second_norm, "model.streams.second is Identity"),
        ("siamese_norm", lose_the_second_norm, "model.streams.second is Identity"),
        ("residual_dual", open_at_another_scale, "promises 0.5"),
        ("residual_dual", normalize_with_another_eps, "model.streams.second.eps is 1e-06"),
        ("siamese_norm", undo_the_divisor_of_layer_2, r"1.mlp_residual.post.value is 1\.0"),
        ("residual_dual", join_one_stream, "2.attn_residual is Residual; the scheme promises"),
        ("ngpt", drop_the_gain_of_queries, "0.self_attn.q_rotated is Identity"),
        ("ngpt", start_at_another_rate, r"3.mlp_residual.first.value is 0\.5"),
    ],
)
def test_the_self_test_finds_a_broken_joint(
    name: str, break_it: Callable[[Any], None], message: str
) -> None:
    model = joint(name)
    self_test(model, fresh=True)
    break_it(model)
    for fresh in (True, False):
        with pytest.raises(SelfTestError, match=message):
            self_test(model, fresh=fresh)


@pytest.mark.fast
def test_streams_and_residual_modules_belong_together() -> None:
    """Else one stream would be cut in two in forward, or two be joined as if they were a batch."""
    config = joint("residual_dual").config
    hand_made = {"placement": None, "norm": None, "wiring": None}
    alone = config.to_dict() | hand_made | {"streams": None}
    with pytest.raises(ValueError, match=r"residual_dual joins 2 stream\(s\), but the config"):
        LlmNormConfig(**alone).residual_specs()
    both = build_config(SHAPE).to_dict() | hand_made | {"streams": config.streams}
    with pytest.raises(ValueError, match=r"residual joins 1 stream\(s\), but the config opens 2"):
        LlmNormConfig(**both).residual_specs()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"second": {"op": "rmsnorm"}}, "module residual has no slot second"),
        ({"module": "residual_dual", "skips": "block"}, "reads and skips the stream alone"),
    ],
)
def test_what_a_residual_module_would_ignore_is_refused(
    words: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ResidualSpec.parse(words)
