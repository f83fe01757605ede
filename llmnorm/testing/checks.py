"""The checks of a scheme as a function: gradients, precision, causality, caches, compilation.

Each returns what it saw in a few words and raises CheckError where a fact is broken.
"""

import math
import warnings
from typing import Any

import torch
from torch import nn

from llmnorm.build import source_of
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.modeling.operations import operation, read_choice
from llmnorm.modeling.residual import NormSpec, ResidualSpec
from llmnorm.placements import parse_placement
from llmnorm.testing.scheme import TOLERANCE, Scheme, expect, tokens

_IDS = tokens(2, 11)


def check_documentation(scheme: Scheme) -> str:
    """Norm and placement say what they are and where they come from."""
    op = read_choice("norm", scheme.norm, "op")["op"]
    sources = []
    for part in (operation(op), type(parse_placement(scheme.placement))):
        text = vars(part).get("__doc__") or ""
        own = text and not text.startswith(f"{part.__name__}(")  # which a dataclass writes itself
        expect(bool(own), f"no docstring on {part.__name__}", "what it is, its formula and source")
        if op != "none" or part is not operation(op):  # no norm at all comes from no paper
            expect("Source" in text, f"no source in the docstring of {part.__name__}", "Source:")
            sources.append(source_of(part))
    return "; ".join(sources)


def check_build(scheme: Scheme) -> str:
    """The model is float32 and starts near the uniform distribution over the vocabulary."""
    model = scheme.model()
    dtypes = {parameter.dtype for parameter in model.parameters()}
    expect(dtypes == {torch.float32}, f"parameters of {dtypes}", "float32")
    with torch.no_grad():
        loss = model(_IDS, labels=_IDS).loss.item()
    uniform = math.log(model.config.vocab_size)
    near = abs(loss / uniform - 1) < 0.1
    expect(near, f"an initial loss of {loss:.3f}", f"log(vocabulary) = {uniform:.3f} within 10 %")
    return f"{sum(p.numel() for p in model.parameters())} parameters, first loss {loss:.3f}"


def check_gradients(scheme: Scheme) -> str:
    """Every trainable parameter, moved off its start, gets a gradient; a step lowers the loss."""
    model = scheme.moved(std=0.05)
    _backward(model)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = _gradients(model)
    for name in trainable:
        expect(name in gradients, f"no gradient at {name}", "one at every trainable parameter")
        moves = bool((gradients[name] != 0).any())
        expect(moves, f"a gradient of 0 at {name}", "one that moves it")
    _expect_finite(model)
    _expect_descent(scheme)
    return f"{len(trainable)} parameters get one"


def check_bfloat16(scheme: Scheme) -> str:
    """Loss and gradients of a model in bfloat16 are finite."""
    model = scheme.model().bfloat16()
    loss = _backward(model)
    expect(math.isfinite(loss), f"loss {loss}", "a finite one")
    _expect_finite(model)
    return f"loss {loss:.3f}"


@torch.no_grad()
def check_causality(scheme: Scheme) -> str:
    """Outputs before a changed token stay as they are, in training mode; later ones do not."""
    model, changed, place = scheme.moved(), _IDS.clone(), 6
    changed[:, place] = (changed[:, place] + 1) % model.config.vocab_size
    one, two = model(_IDS).logits, model(changed).logits
    moved = (one - two).abs().amax(dim=(0, 2))
    early, last = moved[:place].max().item(), moved[-1].item()
    seen = f"token {place} changing logits before it by {early:.2g}"
    expect(early <= TOLERANCE[torch.float64]["atol"], seen, "no change")
    expect(last > 0, f"token {place} without effect on the last logits", "one through attention")
    return f"token {place} changes the last logits by {last:.2g}, earlier ones by {early:.2g}"


@torch.no_grad()
def check_generation(scheme: Scheme) -> str:
    """Greedy generation with a cache gives the tokens of generation without one."""
    model = scheme.moved().eval()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(_IDS, use_cache=False, **options)
    cached = model.generate(_IDS, use_cache=True, **options)
    same = torch.equal(plain, cached)
    expect(same, f"{cached[0, -6:].tolist()} with a cache", f"{plain[0, -6:].tolist()} as without")
    return f"{plain.shape[1] - _IDS.shape[1]} tokens"


def check_checkpointing(scheme: Scheme) -> str:
    """Activation checkpointing changes no bit of a gradient."""
    model = scheme.moved().float()
    _backward(model)
    plain = _gradients(model)
    model.zero_grad()
    model.activation_checkpointing_enable()
    _backward(model)
    for name, gradient in _gradients(model).items():
        same = torch.equal(gradient, plain[name])
        expect(same, f"another gradient at {name} under checkpointing", "the same bits")
    return f"{len(plain)} gradients equal"


def check_compilation(scheme: Scheme, backend: str = "aot_eager", **fields: Any) -> str:
    """Compiled blocks equal eager ones and make at most two graphs for each kind of block.

    Two, because numbers that differ between layers cost one more compilation; more would mean one
    a layer, until torch gives up at eight.
    """
    model, counter = scheme.moved(**fields).float(), _CountedBackend(backend)
    eager = model(_IDS, labels=_IDS, use_cache=False)
    eager.loss.backward()
    plain = _gradients(model)
    model.zero_grad()
    torch._dynamo.reset()
    with warnings.catch_warnings():  # dynamo reads .grad of what it traces, and is warned of it
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")
        for layer in model.model.layers:
            layer.compile(backend=counter)
        compiled = model(_IDS, labels=_IDS, use_cache=False)
        compiled.loss.backward()
    torch._dynamo.reset()
    _expect_close("logits", compiled.logits, eager.logits, rtol=1e-5, atol=1e-6)
    for name, gradient in _gradients(model).items():
        _expect_close(f"the gradient of {name}", gradient, plain[name], rtol=1e-4, atol=1e-6)
    kinds = len({_kind(pair) for pair in model.config.residual_specs()})
    few = 1 <= counter.graphs <= 2 * kinds
    expect(few, f"{counter.graphs} graphs", f"1 to {2 * kinds} for {kinds} kinds of block")
    return f"{counter.graphs} graphs for {kinds} kinds of block"


class _CountedBackend:
    """A compiler that counts the graphs it is given."""

    def __init__(self, name: str) -> None:
        self.graphs, self.compile = 0, torch._dynamo.lookup_backend(name)

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.graphs += 1
        return self.compile(graph, inputs)


def _kind(pair: tuple[ResidualSpec, ResidualSpec]) -> str:
    """What two blocks share that run the same code: everything but numbers."""

    def shape_of(spec: NormSpec) -> list[Any]:
        words = {k: v for k, v in spec.options.items() if not isinstance(v, float)}
        return [spec.op, spec.per_head, spec.shared, words]

    return repr(
        [
            [
                spec.reads,
                spec.skips,
                spec.module,
                *((k, shape_of(v)) for k, v in spec.slots().items()),
            ]
            for spec in pair
        ]
    )


def _backward(model: LlmNormForCausalLM) -> float:
    loss = model(_IDS, labels=_IDS, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


def _gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _expect_finite(model: nn.Module) -> None:
    for name, gradient in _gradients(model).items():
        finite = bool(torch.isfinite(gradient).all())
        expect(finite, f"a gradient at {name} that is not finite", "finite ones")


def _expect_descent(scheme: Scheme) -> None:
    """A fresh model's loss falls in a step along its gradient, short enough for any curvature."""
    model = scheme.model().double()
    before, gradients = _backward(model), _gradients(model)
    length = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients.values()))
    with torch.no_grad():
        for name, gradient in gradients.items():
            model.get_parameter(name).sub_(gradient, alpha=1e-6 / length)
        after = model(_IDS, labels=_IDS).loss.item()
    seen = f"a loss of {before} before and {after} after a step along the gradient"
    expect(after < before, seen, "a lower one")


def _expect_close(
    what: str, seen: torch.Tensor, wanted: torch.Tensor, *, rtol: float, atol: float
) -> None:
    off = (seen - wanted).abs().max().item()
    close = torch.allclose(seen, wanted, rtol=rtol, atol=atol)
    expect(close, f"{what} off by {off:.2g} when compiled", f"eager's within {rtol} and {atol}")
