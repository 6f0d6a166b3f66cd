"""Modules that can be called: `flm_torchrec.prepare(...)` is the function, `flm_torchrec.prepare.options` a module.

The Python API has functions of the names of two modules, and Python binds a module to its name in the package as soon
as it is imported.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that, called, calls the function of its name in `function_in`."""

    function_in: str

    def _function(self) -> Callable[..., Any]:
        return getattr(import_module(self.function_in), self.__name__.rpartition(".")[2])

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the function."""
        return self._function()(*args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        """The function's, for help in a notebook."""
        return inspect.signature(self._function())


def make_callable(name: str, function_in: str) -> None:
    """Let a module, by its name, be called as the function of its last name in another module."""
    module = sys.modules[name]
    module.__class__ = CallableModule
    module.function_in = function_in  # type: ignore[attr-defined]
