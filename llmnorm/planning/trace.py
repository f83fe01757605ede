"""The memory of a step, found by running it on tensors that have sizes but no memory.

The real objective, optimizer and constraints run under torch's fake tensors, on the type of device
that the run will use, while a `Meter` counts. On a CPU this agrees with the allocator within a
thousandth; a GPU's adds rounding and the workspaces of libraries.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llmnorm.calibration import assumed
from llmnorm.errors import EnvironmentProblem
from llmnorm.evaluation.perplexity import token_nats
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.planning.meter import Meter, local
from llmnorm.training.constraints import Constraints
from llmnorm.training.engines.memory import Held, Step, Wrap
from llmnorm.training.engines.native import slots
from llmnorm.training.objective import Objective
from llmnorm.training.optimizer import OptimizerSettings, make_optimizer, naming_a_failure
from llmnorm.training.precision import Precision

_LATE = 10**9  # a step by which every rule of `weights` is at work


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a rank does in a step.

    Args:
        rows: sequences of a micro-batch.
        seq_len: their tokens.
        document_mask: attend within documents only.
        accumulation: micro-batches of a step.
        scored: sequences of a batch of validation, 0 for none.
        clip_norm: of the gradient, 0 for no clipping.
        activation_checkpointing: recompute the blocks' activations in backward.
    """

    rows: int
    seq_len: int
    document_mask: bool
    accumulation: int
    scored: int
    clip_norm: float
    activation_checkpointing: bool


def trace_step(
    config: LlmNormConfig,
    work: Work,
    settings: OptimizerSettings,
    precision: Precision,
    wrap: Wrap | None = None,
) -> Step:
    """Return the memory of one step of a model that is never built.

    Args:
        config: the model.
        work: what is done.
        settings: the optimizer.
        precision: the arithmetic, with the type of device.
        wrap: how an engine shards the objective.

    Raises:
        ConfigError: for an optimizer that a run would refuse.
        EnvironmentProblem: for one whose step cannot be followed on such tensors.
    """
    with FakeTensorMode(), torch.device(precision.device_type):
        model = LlmNormForCausalLM(assumed(config))
        model.train()
        if work.activation_checkpointing:
            model.activation_checkpointing_enable()
        objective = Objective(model)
        if wrap is not None:
            wrap(objective)
        optimizer = make_optimizer(model, settings)
        held = [*model.parameters(), *model.buffers()]
        backward = _backward(objective, work, precision, held)
        stepping = _update(model, optimizer, work.clip_norm)
        parameters = _parameters(model, optimizer.state)
        optimizer.zero_grad()
        scoring = _score(model, work, precision, held)
    return Step(
        parameters=parameters,
        backward=backward.most,
        activations=backward.most_beside_gradients,
        stepping=stepping,
        scoring=scoring,
        accumulation=work.accumulation,
    )


def _backward(objective: Objective, work: Work, precision: Precision, held: list[Tensor]) -> Meter:
    """Run a micro-batch; two where a step has more, since the second meets gradients."""
    with Meter(held) as meter:
        hooks = [
            parameter.register_post_accumulate_grad_hook(meter.claim_gradient)
            for parameter in objective.parameters()
            if parameter.requires_grad
        ]
        for _ in range(min(work.accumulation, 2)):
            ids = torch.zeros(work.rows, work.seq_len, dtype=torch.int64)
            batch = {"input_ids": ids, "targets": ids.clone()}
            if work.document_mask:
                batch["position_ids"] = ids.clone()
            with precision.autocast():
                loss_sum, _ = objective(**batch)
            (loss_sum * 0.5).backward()
    for hook in hooks:
        hook.remove()
    return meter


def _update(model: LlmNormForCausalLM, optimizer: Any, clip_norm: float) -> int:
    """Clip and step twice; return the temporaries of the second time, when all state is there."""
    constraints = Constraints(model)
    held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    most = 0
    for _ in range(2):
        states = [v for state in optimizer.state.values() for v in state.values()]
        with Meter([*held, *(v for v in states if isinstance(v, Tensor))]) as meter:
            norm = torch.nn.utils.get_total_norm([p.grad for p in held if p.grad is not None])
            if clip_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip_norm, norm)
            with constraints.around(_LATE), _following(optimizer):
                optimizer.step()
        most = meter.most
        list(slots(optimizer, dict(model.named_parameters())))
    return most


@contextmanager
def _following(optimizer: Any) -> Iterator[None]:
    """Enclose a step on tensors without values: what it lacks for that is not the run's."""
    with naming_a_failure(optimizer):
        try:
            yield
        except RuntimeError as error:
            of_fakes = type(error).__module__ == fake_tensor.__name__
            if not of_fakes and "FakeTensor" not in str(error):
                raise
            raise EnvironmentProblem(
                f"the memory of {type(optimizer).__name__} cannot be found: its step looks at "
                "values, which a run has and validate has not; the run may do well"
            ) from error


def _score(model: LlmNormForCausalLM, work: Work, precision: Precision, held: list[Tensor]) -> int:
    if not work.scored:
        return 0
    model.eval()
    with Meter(held) as meter, torch.no_grad(), precision.autocast():
        ids = torch.zeros(work.scored, work.seq_len, dtype=torch.int64)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        token_nats(logits.flatten(0, 1), ids.flatten())
    return meter.most


def _parameters(
    model: LlmNormForCausalLM, states: Mapping[Tensor, Mapping[str, Any]]
) -> tuple[Held, ...]:
    return tuple(_held(parameter, states.get(parameter, {})) for parameter in model.parameters())


def _held(parameter: nn.Parameter, state: Mapping[str, Any]) -> Held:
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    slots = sum(_bytes(v) for v in tensors if v.shape == parameter.shape and v.ndim)
    return Held(
        weight=_bytes(parameter),
        gradient=0 if parameter.grad is None else _bytes(parameter.grad),
        slots=slots,
        others=sum(_bytes(value) for value in tensors) - slots,
    )


def _bytes(tensor: Tensor) -> int:
    return local(tensor).nbytes
