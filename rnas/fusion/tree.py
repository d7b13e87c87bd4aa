"""Where modules stand in a model: the cells above edges, and the nodes of a cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from .plan import original_class

FORWARDS = {nn.ModuleList.forward, nn.ModuleDict.forward, nn.Sequential.forward}
"""Of modules that do nothing but hold others."""


class Tree:
    """A model, from below."""

    def __init__(self, model: nn.Module) -> None:
        self._parents: dict[nn.Module, nn.Module] = {}  # the first of each
        for module in model.modules():
            for child in module.children():
                self._parents.setdefault(child, module)

    def above(self, modules: Iterable[nn.Module]) -> list[nn.Module]:
        """The nearest module with a forward above each of them: the cell of an edge."""
        found: dict[nn.Module, None] = {}
        for module in modules:
            parent = self._parents.get(module)
            while parent is not None and original_class(parent).forward in FORWARDS:
                parent = self._parents.get(parent)
            if parent is not None:
                found[parent] = None
        return list(found)

    def around(self, holders: Iterable[nn.Module]) -> list[nn.Module]:
        """The modules above the holders; and the cells above those where they are wrappers of one edge each."""
        inside = self._inside(holders)
        found: dict[nn.Module, None] = dict.fromkeys(self.above(holders))
        for each in list(found):
            wrappers: list[nn.Module] = []
            while each is not None and inside[each] == 1:
                wrappers.append(each)
                each = next(iter(self.above([each])), None)
            if wrappers and each is not None:
                found.update(dict.fromkeys([*wrappers, each]))
        return list(found)

    def nodes(self, modules: Iterable[nn.Module], candidates: Iterable[nn.Module]) -> list[nn.Module]:
        """Those of the modules that are nodes of a cell: each holds more candidates than the one before it."""
        inside = self._inside(candidates)
        alike: dict[tuple, list[nn.Module]] = {}
        for each in modules:
            for parent in self.above([each]):
                alike.setdefault((parent, original_class(each)), []).append(each)
        found = []
        for group in alike.values():
            counts = [inside[each] for each in group]
            if len(group) > 1 and all(a < b for a, b in zip(counts, counts[1:])):
                found += group
        return found

    def _inside(self, modules: Iterable[nn.Module]) -> Counter[nn.Module]:
        """How many of the modules others hold."""
        found: Counter[nn.Module] = Counter()
        for each in modules:
            parent = self._parents.get(each)
            while parent is not None:
                found[parent] += 1
                parent = self._parents.get(parent)
        return found
