"""Optimizers of flat shards: those that treat every element alike, and Muon.

ZeRO hands the optimizer flat ranges of concatenated parameters, on which one that looks at whole
matrices silently does something else. So an optimizer is tried out on a small case first, and Muon,
whose momentum is elementwise but whose update is not, gathers each matrix for the update.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmnorm.errors import ConfigError
from llmnorm.training.engines.deepspeed_shards import Shard
from llmnorm.training.muon import MuonWithAdamW, orthogonalizing_whole_matrices
from llmnorm.training.optimizer import naming_a_failure

_TOLERANCE = 1e-6
"""Of the trial in float64, relative to the largest step."""


def for_shards(optimizer: Any) -> torch.optim.Optimizer:
    """Return an optimizer that steps flat shards as `optimizer` steps whole parameters.

    Raises:
        ConfigError: if there is none.
    """
    if isinstance(optimizer, MuonWithAdamW):
        return ShardedMuon(optimizer)
    name = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"optimizer {name} is no torch.optim.Optimizer, as ZeRO needs; use ddp")
    if isinstance(optimizer, torch.optim.Adagrad):
        raise ConfigError(
            "DeepSpeed rebuilds Adagrad without its parameter groups, which carry weight decay; "
            "use another optimizer, or configs/accelerate/ddp.yaml"
        )
    with naming_a_failure(optimizer):
        (whole, _), (flat, kept) = _try(optimizer, (4, 3), (12,)), _try(optimizer, (24,))
    if not torch.allclose(whole, flat, rtol=0, atol=_TOLERANCE * float(whole.abs().max())):
        raise ConfigError(
            f"optimizer {name} steps a matrix as a whole, but ZeRO shards matrices into flat "
            "ranges; use adamw, muon or another elementwise one, or configs/accelerate/ddp.yaml"
        )
    for slot, value in kept.items():
        taken = isinstance(value, int | float | None)
        if isinstance(value, Tensor):
            taken = value.shape == flat.shape or value.numel() == 1
        if not taken:
            raise ConfigError(
                f"{name} keeps a {type(value).__name__} in state {slot!r} that is not one value an "
                "element; under ZeRO use another optimizer, or ddp.yaml"
            )
    return optimizer


def _try(optimizer: torch.optim.Optimizer, *sizes: tuple[int, ...]) -> tuple[Tensor, Any]:
    """Return how far 24 elements go in two steps, cut into tensors of these sizes.

    Beside it what is kept of the first tensor.
    """
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(3, 24, dtype=torch.float64, generator=generator)
    counts = [torch.Size(size).numel() for size in sizes]
    parameters = [
        nn.Parameter(part.reshape(size).clone())
        for part, size in zip(start.split(counts), sizes, strict=True)
    ]
    trial = object.__new__(type(optimizer))
    trial.__dict__.update(vars(optimizer), state=defaultdict(dict))
    trial.param_groups = [{**optimizer.param_groups[0], "params": parameters, "lr": 0.1}]
    for gradient in gradients:
        for parameter, part in zip(parameters, gradient.split(counts), strict=True):
            parameter.grad = part.reshape(parameter.shape).clone()
        trial.step()
    moved = torch.cat([parameter.detach().flatten() for parameter in parameters]) - start
    return moved, trial.state[parameters[0]]


class ShardedMuon(torch.optim.Optimizer):
    """Muon for shards of hidden matrices beside AdamW for the rest, as torch's pair computes it.

    The momentum and Nesterov's blend are elementwise and stay in shards. The blend is then made
    whole, one matrix after the other, and torch's own Muon turns it into the update, of which each
    rank keeps its part. DeepSpeed has a Muon too: it orthogonalizes before the gradient is clipped,
    so that clipping shrinks the update, and its steps would not be those of the other engines.

    Args:
        pair: what the run file's optimizer is for whole parameters.
    """

    def __init__(self, pair: MuonWithAdamW) -> None:
        self.muon, self.adamw = pair.members
        self.count = pair.counts["muon"]  # matrices
        self._shards: dict[int, Shard] = {}
        super().__init__(pair.param_groups, {})
        self._first_adamw = len(self.muon.param_groups)

    def attach(self, shards: Iterable[Shard]) -> None:
        """Take the shards, whose flat tensors are what `step` will meet."""
        self._shards = {id(s.flat): s for s in shards if s.group < self._first_adamw}
        found = sum(len(shard.parts) for shard in self._shards.values())
        assert found == self.count, f"{found} matrices are on the Muon branch, not {self.count}"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step the shards that the groups hold now; every rank must hold those of the same ones."""
        for group in self.param_groups:
            if any(id(flat) not in self._shards for flat in group["params"]):
                self.adamw.param_groups, self.adamw.state = [group], self.state
                self.adamw.step()
                continue
            for flat in group["params"]:
                self._turn(self._shards[id(flat)], flat, group)

    def _turn(self, shard: Shard, flat: Tensor, group: dict[str, Any]) -> None:
        """Step one shard of matrices.

        Raises:
            RuntimeError: if one was not orthogonalized.
        """
        state, gradient = self.state[flat], flat.grad
        assert gradient is not None
        momentum = state.setdefault("momentum_buffer", torch.zeros_like(flat))
        momentum.lerp_(gradient, 1 - group["momentum"])
        blend = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        with orthogonalizing_whole_matrices() as done:
            for part in shard.parts:
                whole = flat.new_zeros(part.shape.numel())
                whole[part.start : part.start + part.numel] = part.of(blend)
                dist.all_reduce(whole)
                if part.numel:
                    update = self._orthogonal(whole.view(part.shape), group).flatten()
                    part.of(flat).add_(update[part.start : part.start + part.numel])
        wanted = [part.shape for part in shard.parts if part.numel]
        if done != wanted:
            raise RuntimeError(
                f"Muon orthogonalized {len(done)} of {len(wanted)} matrices; this torch "
                f"({torch.__version__}) is not one it was tested with"
            )

    def _orthogonal(self, blend: Tensor, group: dict[str, Any]) -> Tensor:
        """Return torch's Muon step from zero without momentum of its own."""
        matrix = nn.Parameter(torch.zeros_like(blend))
        matrix.grad = blend
        options = {key: value for key, value in group.items() if key != "params"}
        options |= {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
        torch.optim.Muon([matrix], **options).step()
        return matrix.detach()
