"""Crashes are played in memory, where there is some; each test gets an empty folder there.

Campaigns say at the end how much they went through: a test that has tried nothing also passes.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from janus_mega.checkpoint import finding
from tests.support.crash_campaign import ALL, FAST_FOLDER, SEED


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be read is looked at again at once."""
    monkeypatch.setattr(finding, "_LOOK_AGAIN_S", (0.0, 0.0))


@pytest.fixture
def fast_folder() -> Iterator[Path]:
    """An empty folder in memory."""
    with tempfile.TemporaryDirectory(dir=FAST_FOLDER, prefix="faults_") as folder:
        yield Path(folder)


@pytest.fixture
def new_folder(fast_folder: Path) -> Callable[[], Path]:
    """Makes empty folders in memory, one for each call."""
    return lambda: Path(tempfile.mkdtemp(dir=fast_folder))


_TALLY: list[str] = []


@pytest.fixture(scope="session")
def tally() -> Callable[[str], None]:
    """Adds a line to what is said after the tests."""
    return _TALLY.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what the campaigns went through, and by which seed."""
    terminalreporter.write_line(f"faults: JANUS_FAULT_SEED={SEED}, {'the whole campaign' if ALL else 'a fifth of it'}")
    for line in _TALLY:
        terminalreporter.write_line(line)
