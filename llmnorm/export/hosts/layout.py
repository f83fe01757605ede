"""How a class lays out its tensors: their names, and which of ours share one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from llmnorm.export.form import Form, Tensors

LINEARS = {
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
_TOP = ("model.embed_tokens", "model.embed_positions", "model.norm", "lm_head")
_ROTATED = (LINEARS["q"], LINEARS["k"])


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names and packing of a class's tensors, both ways.

    Args:
        modules: modules of a layer that have another name than ours, by ours (norms apart).
        trunk: other modules likewise, and `model.layers`.
        fused: modules of a layer whose rows are those of several of ours.
        by_head: fused rows are in turn those of a head's parts, not one part after the other.
        transposed: whether the matrices of a layer are (in, out).
    """

    modules: Mapping[str, str] = field(default_factory=dict)
    trunk: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_head: bool = False
    transposed: bool = False

    def theirs(self, tensors: Tensors, names: Mapping[str, str], heads: int) -> Tensors:
        """Our tensors as the class's. `names` are those of `names`; consumes nothing."""
        tensors = dict(tensors)
        for theirs, ours in self._fusions(names):
            for part in ("weight", "bias"):
                if f"{ours[0]}.{part}" in tensors:
                    several = [tensors.pop(f"{name}.{part}") for name in ours]
                    tensors[f"{theirs}.{part}"] = self._fuse(several, heads)
        renamed = {_renamed(name, names): tensor for name, tensor in tensors.items()}
        return {name: self._turned(name, tensor) for name, tensor in renamed.items()}

    def ours(self, state: Tensors, names: Mapping[str, str], heads: int) -> Tensors:
        """The class's tensors as ours."""
        back = {theirs: ours for ours, theirs in names.items()}
        turned = {name: self._turned(name, tensor) for name, tensor in state.items()}
        tensors = {_renamed(name, back): tensor for name, tensor in turned.items()}
        for theirs, ours in self._fusions(names):
            for part in ("weight", "bias"):
                if (whole := tensors.pop(f"{theirs}.{part}", None)) is not None:
                    several = self._split(whole, len(ours), heads)
                    tensors |= {f"{n}.{part}": t for n, t in zip(ours, several, strict=True)}
        return tensors

    def names(self, norms: Mapping[str, str], layers: int) -> dict[str, str]:
        """Our modules' names and the class's; `norms` are those of a layer."""
        inside = {**{name: name for name in LINEARS.values()}, **self.modules, **norms}
        return {**{name: self.trunk.get(name, name) for name in _TOP}} | {
            f"model.layers.{i}.{ours}": f"{self._stem}.{i}.{theirs}"
            for i in range(layers)
            for ours, theirs in inside.items()
        }

    @property
    def _stem(self) -> str:
        return self.trunk.get("model.layers", "model.layers")

    def _fusions(self, names: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
        end = f".{LINEARS['q']}"
        for ours, theirs in names.items():
            if ours.endswith(end):
                stem, layer = ours.removesuffix(end), theirs.rsplit(".", 2)[0]
                for fused, parts in self.fused.items():
                    yield f"{layer}.{fused}", [f"{stem}.{name}" for name in parts]

    def _fuse(self, parts: list[torch.Tensor], heads: int) -> torch.Tensor:
        if not self.by_head:
            return torch.cat(parts)
        return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 2)

    def _split(self, whole: torch.Tensor, count: int, heads: int) -> list[torch.Tensor]:
        if not self.by_head:
            return list(whole.chunk(count))
        parts = whole.unflatten(0, (heads, count, -1)).unbind(1)
        return [part.flatten(0, 1) for part in parts]

    def _turned(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        inside = name.startswith(f"{self._stem}.")
        return tensor.mT.contiguous() if self.transposed and inside and tensor.ndim == 2 else tensor


def interleaved(tensors: Tensors, head_dim: int, *, back: bool = False) -> Tensors:
    """Queries' and keys' rows for a RoPE that turns neighbours (2i, 2i + 1), not (i, i + half).

    Args:
        back: from that order to ours.
    """
    shape = (-1, head_dim // 2, 2) if back else (-1, 2, head_dim // 2)
    return {
        name: tensor.unflatten(0, shape).transpose(1, 2).flatten(0, 2)
        if name.rpartition(".")[0].endswith(_ROTATED)
        else tensor
        for name, tensor in tensors.items()
    }


def _renamed(name: str, names: Mapping[str, str]) -> str:
    module, _, part = name.rpartition(".")
    return f"{names.get(module, module)}.{part}"


def repeat_heads(form: Form) -> None:
    """Write keys and values of grouped heads once for every head, for classes without groups."""
    shape = form.shape
    times = shape["num_attention_heads"] // shape["num_key_value_heads"]
    if times == 1:
        return
    for name, tensor in form.tensors.items():
        if name.rpartition(".")[0].endswith((LINEARS["k"], LINEARS["v"])):
            rows = tensor.unflatten(0, (-1, shape["head_dim"])).repeat_interleave(times, 0)
            form.tensors[name] = rows.flatten(0, 1)
    shape["num_key_value_heads"] = shape["num_attention_heads"]
    form.notes.append(f"keys and values are written {times} times: the class has no grouped heads")
