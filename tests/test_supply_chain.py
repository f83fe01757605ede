"""What the package stands on: pinned, hashed, declared, and quiet when it is imported."""

import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINE = re.compile(r"([a-z0-9.-]+)==(\S+) --hash=sha256:([0-9a-f]{64})")
# The first versions without a known way to run code from a file that is loaded.
SAFE = {"torch": "2.10", "transformers": "5.3", "pyyaml": "5.4", "jinja2": "3.1.6"}


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    found = [LINE.fullmatch(line) for line in lines if not line.startswith("#")]
    assert all(found), "every line is NAME==VERSION --hash=sha256:..."
    return {match[1].replace(".", "-"): match[2] for match in found if match}


def needed(name: str, extras: frozenset[str], seen: set[tuple[str, str]]) -> Iterator[str]:
    """All packages that an installed one needs, itself included."""
    yield canonicalize_name(name)
    for line in importlib.metadata.requires(name) or ():
        wanted = Requirement(line)
        asked = [{"extra": extra} for extra in (extras or {""})]
        if wanted.marker and not any(wanted.marker.evaluate(extra) for extra in asked):
            continue
        key = (canonicalize_name(wanted.name), ",".join(sorted(wanted.extras)))
        if key not in seen:
            seen.add(key)
            yield from needed(wanted.name, frozenset(wanted.extras), seen)


def test_the_lock_and_the_constraints_agree():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    for name, version in (pin.split("==") for pin in pins):
        assert locked()[canonicalize_name(name)].split("+")[0] == version


def test_the_lock_holds_every_package_that_a_developer_installs():
    missing = set(needed("llmnorm", frozenset({"dev"}), set())) - {"llmnorm"} - locked().keys()
    assert not missing, "run .ci/lock"


def test_no_registry_is_named():
    for name in ("requirements.lock", "constraints.txt", "pyproject.toml"):
        text = (ROOT / name).read_text()
        assert not re.search(r"index-url|find-links|https?://|file://", text), name


@pytest.mark.parametrize("name", SAFE)
def test_lower_bounds_are_above_known_holes(name):
    from packaging.version import Version

    wanted = [Requirement(line) for line in PROJECT["dependencies"]]
    bounds = [s for w in wanted if w.name == name for s in w.specifier if s.operator == ">="]
    assert [Version(bound.version) >= Version(SAFE[name]) for bound in bounds] == [True]
