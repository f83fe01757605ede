"""What a folder of golden vectors holds: manifests, cases, tensors, and the comparison itself."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16}


class NotImplementedCaseError(Exception):
    """The case asks for something llmnorm or its adapter does not have (yet); says what."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One JSON file of the folder; its tensors lie beside it in a file of the same stem."""

    path: Path
    name: str
    """Path inside the folder without suffix, such as `stacks/torchscale_4l`."""
    content: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.content.get("kind"))

    @property
    def family(self) -> str:
        """The stem up to the layer count: `torchscale_7l` is of the family `torchscale`."""
        return re.sub(r"_\d+l(_.*)?$", "", self.path.stem)

    @cached_property
    def recorded(self) -> set[str]:
        """Names of the tensors, known without opening their file."""
        return set(self.content.get("tensors", ()))

    def tensors(self) -> dict[str, Tensor]:
        return _tensors(self.path.with_suffix(".safetensors"))


@lru_cache(maxsize=4)
def _tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One recorded computation in one precision."""

    manifest: Manifest
    name: str
    fields: dict[str, Any]
    variant: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Config fields of ours that the reference's forward does not fix (init, embedding)."""

    @property
    def id(self) -> str:
        return "::".join(filter(None, (self.manifest.name, self.name, self.variant)))

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.variant or "f64"]

    @property
    def prefix(self) -> str:
        """What the names of this case's own tensors start with."""
        return f"{self.name}/" if self.name else ""

    @property
    def seq_len(self) -> int:
        """Tokens of the longest recorded sequence, 0 if there is none."""
        shapes = self.manifest.content.get("tensors", {})
        ids = [shape[-1] for name, (_, shape) in shapes.items() if name.endswith("input_ids")]
        return max(ids, default=0)


def read_manifests(folder: Path) -> list[Manifest]:
    """Every JSON file below `folder`."""
    return [
        Manifest(
            path=path,
            name=path.relative_to(folder).with_suffix("").as_posix(),
            content=json.loads(path.read_text(encoding="utf-8")),
        )
        for path in sorted(folder.rglob("*.json"))
    ]


def layer_cases(manifests: list[Manifest]) -> list[Case]:
    return [
        Case(manifest=manifest, name=entry["case"], fields=entry, variant=entry["dtype"])
        for manifest in manifests
        if manifest.kind in ("layer", "stateful_layer")
        for entry in manifest.content["cases"]
    ]


def stack_cases(manifests: list[Manifest]) -> list[Case]:
    """Both kinds of stacks; a manifest without a list of cases is one nameless case."""
    found = []
    for manifest in manifests:
        if manifest.kind in ("stack", "stack_family"):
            for entry in manifest.content.get("cases", [manifest.content]):
                name = entry.get("case", "")
                case = Case(manifest=manifest, name=name, fields=entry)
                precisions = _suffixes(manifest.recorded, f"{case.prefix}loss.")
                found += [replace(case, variant=variant) for variant in sorted(precisions)[::-1]]
    return found


def entry_cases(manifests: list[Manifest], kind: str, entries: str, name: str) -> list[Case]:
    """Cases of a kind whose manifest lists them under `entries`, each named by its field `name`."""
    return [
        Case(manifest=manifest, name=entry[name], fields=entry)
        for manifest in manifests
        if manifest.kind == kind
        for entry in manifest.content[entries]
    ]


def _suffixes(names: set[str], prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


class Switches:
    """A reference's hyper-parameters, read one by one; one that nobody read is not implemented."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._left = dict(given)

    def take(self, name: str, default: Any = ...) -> Any:
        if name not in self._left and default is ...:
            raise NotImplementedCaseError(f"no switch {name!r} in the manifest")
        return self._left.pop(name, default)

    def expect(self, name: str, *allowed: Any) -> None:
        """Take a switch that must be absent or have one of these values."""
        if name in self._left and (value := self._left.pop(name)) not in allowed:
            raise NotImplementedCaseError(f"{name}={value!r}")

    def done(self) -> None:
        if self._left:
            names = ", ".join(f"{name}={value!r}" for name, value in sorted(self._left.items()))
            raise NotImplementedCaseError(f"unknown switch {names}")


def assert_equal(
    what: str, ours: Tensor, reference: Tensor, tolerance: Mapping[str, float]
) -> None:
    """Raise AssertionError naming `what` unless |ours - reference| <= atol + rtol |reference|."""

    def explain(text: str) -> str:
        return f"{what}: {text}"

    torch.testing.assert_close(
        ours.detach(),
        reference.to(ours.dtype),
        rtol=tolerance["rtol"],
        atol=tolerance["atol"],
        msg=explain,
    )


def matching(names: set[str], prefix: str, suffix: str = "") -> Iterator[tuple[str, str]]:
    """(full name, the part between prefix and suffix) of the recorded tensors that have both."""
    for name in sorted(names):
        if name.startswith(prefix) and name.endswith(suffix):
            yield name, name[len(prefix) : len(name) - len(suffix)]


Map = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""From the reference's tensors to our state dict, differentiable."""
