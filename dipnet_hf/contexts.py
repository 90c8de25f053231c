"""State that is not the same for all who use one model: that of a thread, and that of a `with` block.

A server answers several requests at once with one model, each in a thread or an asyncio task of its own.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch

Value = TypeVar("Value")
_VALUES: ContextVar[Mapping["ContextValue", Any]] = ContextVar("dipnet_hf", default=MappingProxyType({}))


class ContextValue(Generic[Value]):
    """A value that a `with` block sets for itself, and for no other thread or asyncio task.

    A thread that is started in the block has the default, as with `torch.no_grad()`. In a copy of the block's context
    (`contextvars.copy_context().run`, `asyncio.to_thread`, the thread pools of web frameworks) it has the value.

    Args:
        default: the value outside all blocks.
    """

    def __init__(self, default: Value) -> None:
        self._default = default
        self._entered: list[tuple[object, Value]] = []  # of all threads, the latest last
        self._latest = default

    def __reduce__(self):
        return type(self), (self._default,)  # a copy of the model is in no block

    def get(self) -> Value:
        """The value here. A compiled pass, which can read no context, has the one that was set last in any thread."""
        if torch.compiler.is_compiling():
            return self._latest
        return _VALUES.get().get(self, self._default)

    @contextmanager
    def set_to(self, value: Value) -> Iterator[None]:
        """Context in which the value is another."""
        previous = _VALUES.get()
        _VALUES.set({**previous, self: value})
        entry = (object(), value)
        self._entered.append(entry)
        self._latest = value
        try:
            yield
        finally:
            # Not by a token: a server may end a generator in another context than the one in which it began.
            others = {key: other for key, other in _VALUES.get().items() if key is not self}
            _VALUES.set({**others, self: previous[self]} if self in previous else others)
            # Blocks of several threads may end in any order.
            self._entered.remove(entry)
            self._latest = self._entered[-1][1] if self._entered else self._default


class PerThread(threading.local):
    """A base of objects whose attributes every thread has for itself; a copy and a pickled one begin anew."""

    def __reduce__(self):
        return type(self), ()
