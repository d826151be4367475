"""Published checkpoints of other projects, read as they are and written as ours.

Every file here and in `layouts/` registers what it knows when it is imported: a new one needs no entry elsewhere.
"""

from importlib import import_module
from pkgutil import walk_packages

from .published import load_published

for _found in walk_packages(__path__, f"{__name__}."):
    import_module(_found.name)

__all__ = ["load_published"]
