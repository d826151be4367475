"""Shared fixtures, and one hook that lets pytest run from a root that is itself a package."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


class _RootIsAFolder:
    """Collect the repository root as a plain folder: pytest would import its `__init__.py` a second time."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path, parent):
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config):
    config.pluginmanager.register(_RootIsAFolder(), "root-is-a-folder")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of goldens and sample data beside the repository; its absence fails in CI and skips elsewhere."""
    if not SHARED.is_dir():
        reason = f"reference data not found at {SHARED}: it is handed out beside the repository, not inside it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return SHARED
