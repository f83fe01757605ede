"""Optimizer steps: the reference's tensors, or our model's parameters, trained as recorded."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from llmnorm.training.constraints import Constraints
from llmnorm.training.optimizer import make_optimizer, parameter_groups

from .cases import Case, NotImplementedCaseError, assert_equal, matching
from .stack import Stack, run, run_state

_OPTIMIZERS = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}


def start_weights(case: Case) -> dict[str, Tensor]:
    """The stored start weights that the case trains or keeps, in float64, as leaves."""
    data = case.manifest.tensors()
    names = [name for group in case.fields["groups"] for name in group["params"]]
    names = dict.fromkeys([*names, *case.fields["no_grad_params"]])
    return {name: data[f"w0.{name}"].double().requires_grad_() for name in names}


def official_decay(case: Case) -> dict[str, float]:
    """Weight decay of every parameter, by the reference's name."""
    groups = case.fields["groups"]
    return {name: group["weight_decay"] for group in groups for name in group["params"]}


def official_optimizer(case: Case, weights: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """torch's optimizer with exactly the groups of the manifest."""
    name = case.fields["optimizer"]
    if name not in _OPTIMIZERS or case.fields["coupled_l2"] != (name == "Adam"):
        raise NotImplementedCaseError(f"optimizer {name}, coupled_l2 {case.fields['coupled_l2']}")
    groups = [
        {"params": [weights[p] for p in group["params"]], "weight_decay": group["weight_decay"]}
        for group in case.fields["groups"]
    ]
    betas, eps = tuple(case.fields["betas"]), case.fields["eps"]
    return _OPTIMIZERS[name](groups, lr=0.0, betas=betas, eps=eps)


def take_step(
    case: Case,
    number: int,
    loss: Tensor,
    parameters: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Backward, clip over all parameters, step with the lr of this step; compare loss and norm."""
    data, tolerance = case.manifest.tensors(), case.manifest.content["tolerance"]
    parameters, clip = list(parameters), case.fields["clip_norm"]
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip or torch.inf)
    index = number - 1
    assert_equal("loss", loss, data[f"{case.name}/loss.f64"][index], tolerance["loss"])
    assert_equal("norm", norm, data[f"{case.name}/grad_norm.f64"][index], tolerance["grad_norm"])
    coef = (clip / (norm + 1e-6)).clamp(max=1.0) if clip else torch.ones_like(norm)
    assert_equal("clip", coef, data[f"{case.name}/clip_coef.f64"][index], tolerance["grad_norm"])
    for group in optimizer.param_groups:
        group["lr"] = case.fields["lr_per_step"][index]
    optimizer.step()


@torch.no_grad()
def renormalize(weights: Mapping[str, Tensor]) -> None:
    """Bring the reference's matrices back to unit length, as nGPT's code does after each step.

    Rows of what reads the stream or is looked up, columns of what writes to it.
    """
    for name, weight in weights.items():
        if weight.ndim == 2:
            weight /= weight.norm(dim=0 if "c_proj" in name else 1, keepdim=True)


def compare_official_steps(case: Case, stack: Stack) -> None:
    """Train the reference's own tensors, through our model, in the manifest's groups."""
    data, tolerance = case.manifest.tensors(), case.manifest.content["tolerance"]
    weights, model = start_weights(case), stack.model(torch.float64)
    optimizer = official_optimizer(case, weights)
    for number in range(1, len(case.fields["lr_per_step"]) + 1):
        batch = {"input_ids": data[f"batch.{number}.input_ids"]}
        loss = run(stack, model, weights, batch).loss
        take_step(case, number, loss, weights.values(), optimizer)
        before = f"{case.name}/w{number}_before_renorm."
        for key, name in matching(set(data), before, ".f64"):
            assert_equal(key, weights[name], data[key], tolerance["weights"])
        if stack.config.weights == "unit":
            renormalize(weights)
        for name, weight in weights.items():
            stored = data[f"{case.name}/w{number}.{name}.f64"]
            assert_equal(f"w{number}.{name}", weight, stored, tolerance["weights"])
    for moment in ("exp_avg", "exp_avg_sq"):
        prefix = f"{case.name}/{moment}.{number}."
        for name, parameter in matching(set(data), prefix, ".f64"):
            ours = optimizer.state[weights[parameter]][moment]
            assert_equal(name, ours, data[name], tolerance["weights"])
    batch = {"input_ids": data["batch.1.input_ids"]}
    after = torch.tensor(case.fields["loss_batch1_after_step3_f64"], dtype=torch.float64)
    assert_equal("loss after", run(stack, model, weights, batch).loss, after, tolerance["loss"])


@dataclass(kw_only=True)
class OurRun:
    """Our model at the start weights, with the optimizer and the rules of our training."""

    case: Case
    stack: Stack
    model: Any
    optimizer: Any
    constraints: Constraints
    deviating: dict[str, tuple[float, float]]
    """Our parameters whose (official, our) decay differ."""

    def step(self, number: int) -> None:
        batch = {"input_ids": self.case.manifest.tensors()[f"batch.{number}.input_ids"]}
        named = dict(self.model.named_parameters())
        state = {name: named.get(name) for name in self.model.state_dict()}
        if state["lm_head.weight"] is None:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        loss = run_state(self.stack, self.model, state, {}, batch).loss
        with self.constraints.around(number):
            take_step(self.case, number, loss, named.values(), self.optimizer)

    def compare(self, number: int, expected: Callable[[str, Tensor], Tensor]) -> None:
        """Compare all weights after a step with `expected(our name, the recorded weight)`."""
        tolerance = self.case.manifest.content["tolerance"]["weights"]
        ours = self.stack.to_ours(self.recorded(number))
        for name, weight in self.model.named_parameters():
            assert_equal(f"w{number} of {name}", weight, expected(name, ours[name]), tolerance)

    def recorded(self, number: int) -> dict[str, Tensor]:
        data = self.case.manifest.tensors()
        names = start_weights(self.case)
        if number == 0:
            return {name: data[f"w0.{name}"].double() for name in names}
        return {name: data[f"{self.case.name}/w{number}.{name}.f64"] for name in names}


def our_run(case: Case, stack: Stack) -> OurRun:
    """Our model and optimizer, set up as the case says; groups and decay rule are ours."""
    weights, decay = start_weights(case), official_decay(case)
    model = stack.model(torch.float64)
    model.load_state_dict({k: v.detach() for k, v in stack.to_ours(weights).items()})
    origin = _origin(stack, weights)
    settings = SimpleNamespace(
        name={"AdamW": "adamw", "Adam": "torch.optim:Adam"}[case.fields["optimizer"]],
        lr=1.0,
        weight_decay=max(decay.values()),
        betas=case.fields["betas"],
        eps=case.fields["eps"],
        options={},
    )
    groups = parameter_groups(model, settings)
    ours = {name: group.weight_decay for group in groups for name in group.names}
    return OurRun(
        case=case,
        stack=stack,
        model=model,
        optimizer=make_optimizer(model, settings),
        constraints=Constraints(model),
        deviating={
            name: (decay[origin[name]], mine)
            for name, mine in ours.items()
            if decay[origin[name]] != mine
        },
    )


def _origin(stack: Stack, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Which of the reference's tensors each of our parameters is made of (rows of, reordered).

    Raises:
        NotImplementedCaseError: if the map does more than that, so that steps do not commute.
    """
    ones = stack.to_ours({name: torch.ones_like(w) for name, w in weights.items()})
    zeros = stack.to_ours({name: torch.zeros_like(w) for name, w in weights.items()})
    if not all((ones[name] == 1).all() and (zeros[name] == 0).all() for name in ones):
        raise NotImplementedCaseError("our parameters are not the reference's one to one")
    numbers = {name: torch.full_like(w, i) for i, (name, w) in enumerate(weights.items())}
    names = list(weights)
    found = {}
    for ours, marked in stack.to_ours(numbers).items():
        assert marked.min() == marked.max(), f"{ours} mixes tensors of the reference"
        found[ours] = names[int(marked.min())]
    return found
