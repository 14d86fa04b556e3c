"""One small registry, shared by methods and, later, attacks and judges."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from .errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Named things of one kind. Other packages add theirs through the entry-point group ``safegraft.<kind>s``,
    each entry point a module whose import registers them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}
        self._loaded = False

    def add(self, name: str, item: T) -> None:
        """Raises ConfigError when the name is taken."""
        if name in self._items:
            raise ConfigError(f"there are two {self.kind}s named {name!r}")
        self._items[name] = item

    def get(self, name: str) -> T:
        """Raises ConfigError, with the nearest name, when there is none."""
        self._load()
        if name not in self._items:
            close = difflib.get_close_matches(name, self._items, n=1)
            raise ConfigError(
                f"there is no {self.kind} {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""),
                f"Known: {', '.join(sorted(self._items))}.",
            )
        return self._items[name]

    def __iter__(self) -> Iterator[tuple[str, T]]:
        self._load()
        return iter(sorted(self._items.items()))

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            for point in entry_points(group=f"safegraft.{self.kind}s"):
                point.load()
