"""Nothing in a folder of golden vectors is passed over without a word."""

import pytest
from goldens.cases import Case, Manifest, NotImplementedCaseError

KINDS = {"layer", "stateful_layer", "stack", "stack_family", "optimizer_steps", "init", "eval"}


def golden_cases(manifests: list[Manifest]) -> list[Case]:
    """The manifests of a kind that no test reads."""
    return [
        Case(manifest=manifest, name=manifest.kind, fields=manifest.content)
        for manifest in manifests
        if manifest.kind not in KINDS
    ]


def test_manifest_of_an_unknown_kind(case: Case) -> None:
    raise NotImplementedCaseError(f"kind {case.manifest.kind}")


@pytest.mark.fast
def test_folder_has_manifests(manifests: list[Manifest]) -> None:
    assert manifests, "no manifest (*.json) in the folder of golden vectors"
