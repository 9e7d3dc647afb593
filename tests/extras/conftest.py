"""Tests of what needs an extra: collected only where this folder is named (`make test-extras`), and failing, with the
name of the extra, where it is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    named = any("extras" in str(argument) for argument in config.invocation_params.args)
    return None if named else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:  # what the libraries warn of themselves
            item.add_marker(pytest.mark.filterwarnings("default"))
