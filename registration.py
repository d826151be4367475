"""Register the policies with transformers, installed plugins' too, in whichever order the two libraries are imported.

Registering needs transformers' Auto classes, which take seconds to import, and `import manipulators` is to stay light.
So everything is registered when a public name of `manipulators` is taken, or as soon as the Auto classes are imported
for another reason. An import finder notices the latter: it wraps the import of every module of the watched libraries,
and acts when the outermost one has ended.
"""

from __future__ import annotations

import sys
import threading
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import ModuleType
from typing import Any

AUTO_CLASSES = "transformers.models.auto.configuration_auto"  # which every other one imports
# Libraries that we import and that import the Auto classes: registering has to wait until they are whole.
WATCHED = frozenset(("transformers", "accelerate", "datasets", "diffusers", "peft", __package__))


def register_all() -> None:
    """Register every policy, and the pipeline, with transformers; then load the plugins of installed packages.

    Raises:
        PluginError: a plugin cannot be loaded.
    """
    _watcher.is_done = True
    import_module(".inference.pipeline", __package__)
    import_module(".plugins", __package__).load_entry_points()


def register_when_needed() -> None:
    """Register everything now, if the Auto classes are imported, or else once they are."""
    sys.meta_path.insert(0, _watcher)
    _watcher.register_if_possible()


class _Watcher:
    """Notice when imports of the watched libraries end."""

    is_done = False

    def __init__(self) -> None:
        # Of each thread: how many of those imports are under way, and the module that is looked for.
        self._imports = threading.local()

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return what the other finders find, with a loader that reports the end of the import."""
        if self.is_done or name.partition(".")[0] not in WATCHED:
            return None
        if getattr(self._imports, "sought", None) == name:  # another finder that asks the others, this one too
            return None
        self._imports.sought = name
        try:
            finders = (finder for finder in list(sys.meta_path) if finder is not self and hasattr(finder, "find_spec"))
            spec = next((found for finder in finders if (found := finder.find_spec(name, path, target))), None)
        finally:
            self._imports.sought = None
        if spec is not None and type(spec.loader) is SourceFileLoader:
            self._notice_end(spec.loader)
        return spec

    def _notice_end(self, loader: SourceFileLoader) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)  # as it was, for whoever looks at it later
            self._imports.open = getattr(self._imports, "open", 0) + 1
            try:
                execute(module)
            finally:
                self._imports.open -= 1
            self.register_if_possible()

        loader.exec_module = exec_module

    def register_if_possible(self) -> None:
        """Register everything, unless there is no need yet or something that it needs is only half imported."""
        auto_classes = sys.modules.get(AUTO_CLASSES)
        if self.is_done or auto_classes is None or getattr(self._imports, "open", 0):
            return
        try:
            register_all()
        except Exception as error:  # whoever imports transformers is not to fail
            warnings.warn(
                f"manipulators has not registered everything with transformers: {type(error).__name__}: {error}",
                stacklevel=2,
            )


_watcher = _Watcher()
