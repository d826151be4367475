"""The simulators that come with this library: one module per family, named after it, which registers itself.

A new simulator is a new module here that calls `register_environment` when it is imported. It must import without the
simulator itself: that waits until an environment is made.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ..registry import registered_families


def load_simulators() -> None:
    """Let every simulator register its family, except where the user has registered one of that name."""
    known = registered_families()
    for module in iter_modules(__path__):
        if module.name not in known:
            import_module(f"{__name__}.{module.name}")
