"""How many cases the fuzzers ran, added up over the processes that the tests are spread over.

`make fuzz` fails below `MINIMUM` cases and keeps the counts in a file.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

FULL = os.environ.get("CSPD_FUZZ", "ci") == "full"
MINIMUM = 10_000
CASES: Counter[str] = Counter()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take in the cases of a process of pytest-xdist."""
    CASES.update(getattr(node, "workeroutput", {}).get("cases", {}))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Hand the cases on; alone, a full run of fewer than MINIMUM cases is a failure."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["cases"] = dict(CASES)
    elif FULL and not session.config.option.collectonly and CASES.total() < MINIMUM:
        if not session.config.getoption("keyword"):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the cases of every target; `make fuzz` keeps them in a file too."""
    if not CASES:
        return
    terminalreporter.section("fuzzing")
    for target, count in sorted(CASES.items()):
        terminalreporter.write_line(f"{count:7,} {target}")
    terminalreporter.write_line(f"{CASES.total():7,} cases in all")
    if os.environ.get("CSPD_FUZZ_COUNTS"):
        Path(os.environ["CSPD_FUZZ_COUNTS"]).write_text(json.dumps(dict(sorted(CASES.items()))))
