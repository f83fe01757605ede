"""The option `--golden DIR`, the shared package `goldens`, and the count at the end."""

import sys
from collections import Counter, defaultdict
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from goldens.cases import Case, NotImplementedCaseError, read_manifests  # noqa: E402 (needs the path above)

_CASES = "golden case"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", default=None, metavar="DIR", help="folder of golden vectors to compare with"
    )


def golden_folder(config: pytest.Config) -> Path:
    chosen = config.getoption("--golden", default=None)
    return Path(chosen).resolve() if chosen else HERE / "data"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Generator[None, None, None]:
    """Tensors here are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def manifests(request: pytest.FixtureRequest) -> list:
    return read_manifests(golden_folder(request.config))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test module names its cases: `golden_cases(manifests) -> list[Case]`."""
    if "case" in metafunc.fixturenames and hasattr(metafunc.module, "golden_cases"):
        folder = golden_folder(metafunc.config)
        if not folder.is_dir():
            raise pytest.UsageError(f"--golden {folder}: no such folder")
        cases = metafunc.module.golden_cases(read_manifests(folder))
        metafunc.parametrize("case", cases, ids=[case.id for case in cases])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        if isinstance(case, Case):
            item.user_properties.append((_CASES, case.id))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A case that llmnorm cannot express yet is skipped by name, never passed."""
    try:
        return (yield)
    except NotImplementedCaseError as reason:
        pytest.skip(f"not implemented: {reason}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count what was compared and list what is not implemented, by file and reason."""
    run = _golden(terminalreporter, "passed") + _golden(terminalreporter, "failed")
    skipped = _golden(terminalreporter, "skipped")
    if not run and not skipped:
        return
    folders = Counter(Path(case).parts[0] for case, _ in run)
    missing = defaultdict(list)
    for case, report in skipped:
        file, _, name = case.partition("::")
        reason = str(report.longrepr[2]).partition("not implemented: ")[2]
        if name not in missing[file, reason]:
            missing[file, reason].append(name)
    count = sum(len(names) for names in missing.values())
    terminalreporter.section("golden vectors")
    counts = ", ".join(f"{folder} {number}" for folder, number in sorted(folders.items()))
    terminalreporter.line(f"{len(run)} comparisons run ({counts}); {count} cases not implemented:")
    for (file, reason), names in sorted(missing.items()):
        terminalreporter.line(f"  not implemented: {file} ({reason}): {', '.join(names)}")


def _golden(
    terminalreporter: pytest.TerminalReporter, outcome: str
) -> list[tuple[str, pytest.TestReport]]:
    """(case, report) of the tests with this outcome that ran or skipped a golden case."""
    return [
        (case, report)
        for report in terminalreporter.stats.get(outcome, [])
        for key, case in getattr(report, "user_properties", ())
        if key == _CASES
    ]
