"""Modules that scripts may know by another name: the documentation of the first version showed these paths.

Importing one warns (`DeprecationWarning`) and gives the module that it became. New code imports from `rankgate`, or
from where things are.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "rankgate.adapters": "rankgate.hub.adapters",
    "rankgate.answer": "rankgate.serving.answer",
    "rankgate.convert": "rankgate.conversion.convert",
    "rankgate.decode": "rankgate.decoding.loop",
    "rankgate.exact": "rankgate.decoding.exact",
    "rankgate.pipeline": "rankgate.hub.opening",
    "rankgate.sources": "rankgate.hub.sources",
    "rankgate.steps": "rankgate.decoding.steps",
    "rankgate.texts": "rankgate.hub.texts",
}


class _Moved(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        name, now = module.__name__, MOVED[module.__name__]
        warnings.warn(f"{name} is {now} now", DeprecationWarning, stacklevel=2)
        sys.modules[name] = importlib.import_module(now)  # what the import statement then finds


sys.meta_path.append(_Moved())
