"""Call a function as soon as a module has been imported, without importing it."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Hook = Callable[[ModuleType], None]


def when_imported(name: str, hook: Hook) -> None:
    """Call `hook(module)` now if the module `name` is there, else once, as soon as its own code has run.

    The hook runs before whoever asked for the module sees it; modules that import each other may not be whole yet, so
    it imports nothing itself.

    >>> when_imported("json", lambda module: print(module.__name__))
    json
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        hook(module)
        return
    finder = next((found for found in sys.meta_path if isinstance(found, _Finder)), None)
    if finder is None:
        finder = _Finder()
        sys.meta_path.insert(0, finder)
    finder.waiting.setdefault(name, []).append(hook)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that are waited for by what the other finders find, and no others."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Hook]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self.waiting)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """A module's own loader, with the hooks behind it; the module keeps its own."""

    def __init__(self, own: Any, waiting: dict[str, list[Hook]]) -> None:
        self.own, self.waiting = own, waiting

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        spec.loader = self.own
        made: ModuleType | None = self.own.create_module(spec)
        spec.loader = self
        return made

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.own
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        self.own.exec_module(module)
        for hook in self.waiting.pop(module.__name__, []):
            hook(module)
