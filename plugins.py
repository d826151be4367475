"""Plugins: packages that add policies, simulators or published layouts without a change in this one.

An installed package names its plugins in the entry-point group `manipulators.plugins`, each a module that is imported
or a callable that is then called without arguments:

```ini
[options.entry_points]
manipulators.plugins =
    my_robot = my_robot.plugin
    my_arm = my_arm:register
```

They are loaded once: when the first public name of `manipulators` is taken, and before a policy type or an environment
is looked up.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib import import_module, invalidate_caches
from importlib.metadata import EntryPoint, entry_points
from threading import RLock

from .errors import PluginError

GROUP = "manipulators.plugins"

_lock = RLock()
_requested: dict[str, None] = {}  # modules that were named, in their order
_loaded: set[EntryPoint] = set()
_complete_for: list[str] | None = None  # the sys.path of which every plugin is loaded


def load_plugins(modules: Iterable[str] = ()) -> None:
    """Load the plugins of the installed packages, then import `modules`.

    Args:
        modules (`Iterable[str]`, *optional*): names of importable modules, which may also be in the working directory.

    Raises:
        PluginError: a plugin cannot be loaded.
    """
    load_entry_points()
    modules = list(modules)
    if modules and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a file here must not hide an installed package
        invalidate_caches()
    for module in modules:
        try:
            import_module(module)
        except Exception as error:
            raise PluginError(module, error) from error
        _requested[module] = None


def requested_plugins() -> list[str]:
    """Return the modules that have been named as plugins; those of installed packages need no naming."""
    return list(_requested)


def load_entry_points() -> None:
    """Load the plugins of the installed packages that are not loaded yet.

    Raises:
        PluginError: one cannot be loaded; the next call tries it again.
    """
    global _complete_for
    with _lock:
        path = list(sys.path)
        if path == _complete_for:  # reading the metadata of all packages takes tens of milliseconds
            return
        waiting = False
        for entry_point in entry_points(group=GROUP):
            if entry_point in _loaded:
                continue
            if _is_being_imported(entry_point.module):
                waiting = True
            else:
                _load(entry_point)
        _complete_for = None if waiting else path


def _load(entry_point: EntryPoint) -> None:
    global _complete_for
    _loaded.add(entry_point)  # before it is loaded, because what it imports may look up types itself
    try:
        plugin = entry_point.load()
        if entry_point.attr:
            plugin()
    except Exception as error:
        _loaded.discard(entry_point)
        _complete_for = None  # a look-up from within the plugin may have set it
        package = entry_point.dist.name if entry_point.dist is not None else None
        raise PluginError(entry_point.name, error, entry_point.value, package) from error


def _is_being_imported(module: str) -> bool:
    """Tell whether a module, or a package around it, is only half imported, so that it cannot be loaded yet."""
    parts = module.split(".")
    outer = [sys.modules.get(".".join(parts[:count])) for count in range(1, len(parts) + 1)]
    return any(getattr(getattr(found, "__spec__", None), "_initializing", False) for found in outer)
