"""Two optimizers as one: Muon for hidden matrices, AdamW for everything else.

torch's Muon takes matrices only; embeddings, head, norms and biases need another. The pair shares
the interface that engines use, so nothing else knows that there are two.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import _muon


class MuonWithAdamW:
    """Step `muon` and `adamw`, each on its own parameters.

    Args:
        muon: optimizer of the hidden matrices.
        adamw: optimizer of the rest.
    """

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer) -> None:
        self.members = (muon, adamw)
        counts = [sum(len(group["params"]) for group in m.param_groups) for m in self.members]
        self.counts = {"muon": counts[0], "adamw": counts[1]}
        distinct = {
            id(p) for m in self.members for group in m.param_groups for p in group["params"]
        }
        assert len(distinct) == sum(counts), "a parameter is in both branches"

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of both, Muon's first; changing an entry changes the member's."""
        return [group for member in self.members for group in member.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """State of both by parameter."""
        return {p: state for member in self.members for p, state in member.state.items()}

    def step(self) -> None:
        """Step both.

        Raises:
            RuntimeError: if a matrix of the Muon branch was not orthogonalized.
        """
        muon, adamw = self.members
        with orthogonalizing_whole_matrices() as done:
            muon.step()
        wanted = sum(p.grad is not None for group in muon.param_groups for p in group["params"])
        if len(done) != wanted:
            raise RuntimeError(
                f"Muon orthogonalized {len(done)} of {wanted} matrices; this torch "
                f"({torch.__version__}) is not one it was tested with"
            )
        adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of both."""
        for member in self.members:
            member.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return both states as one, parameters numbered through."""
        merged: dict[str, Any] = {"state": {}, "param_groups": []}
        offset = 0
        for member in self.members:
            part = member.state_dict()
            merged["state"].update({offset + i: slots for i, slots in part["state"].items()})
            for group in part["param_groups"]:
                numbers = [offset + i for i in group["params"]]
                merged["param_groups"].append({**group, "params": numbers})
            offset += sum(len(group["params"]) for group in part["param_groups"])
        return merged

    def load_state_dict(self, merged: dict[str, Any]) -> None:
        """Set both states from what `state_dict` returned."""
        offset, first = 0, 0
        for member in self.members:
            count = sum(len(group["params"]) for group in member.param_groups)
            last = first + len(member.param_groups)
            groups = [
                {**group, "params": [i - offset for i in group["params"]]}
                for group in merged["param_groups"][first:last]
            ]
            state = {
                i - offset: slots
                for i, slots in merged["state"].items()
                if offset <= i < offset + count
            }
            member.load_state_dict({"state": state, "param_groups": groups})
            offset, first = offset + count, last


@contextmanager
def orthogonalizing_whole_matrices() -> Iterator[list[torch.Size]]:
    """Give torch's Newton-Schulz iteration whole matrices inside; yields the shapes it was given.

    A matrix in shards is gathered for it, and each rank keeps its rows of the result. Left to
    itself every product of the iteration would be sharded: more traffic, and partial sums in
    bfloat16. torch has no public way in; `MuonWithAdamW.step` notices if this one closes.
    """
    iterate, done = _muon._zeropower_via_newtonschulz, []

    def on_whole(update: Tensor, *args: Any) -> Tensor:
        done.append(update.shape)
        if not isinstance(update, DTensor):
            return iterate(update, *args)
        whole = iterate(update.full_tensor(), *args).contiguous()
        return distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)

    _muon._zeropower_via_newtonschulz = on_whole  # type: ignore[assignment]
    try:
        yield done
    finally:
        _muon._zeropower_via_newtonschulz = iterate
