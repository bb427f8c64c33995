"""Imports single modules of released code from a checkout that the user has.

Not run by itself. Nothing is downloaded, and nothing of a checkout is imported but the module that is asked for and
what it imports itself: the `__init__` files of the packages above it, which import everything, are not run.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


def import_released(checkout: Path, name: str, absent: Mapping[str, Sequence[str]] | None = None) -> ModuleType:
    """Import a module of a checkout.

    Args:
        checkout: its top folder.
        name: of the module, with dots.
        absent: modules and names in them that the module imports and what is measured never uses. Those that are not
            installed, as old releases of libraries had them, are None while it is imported.

    Raises:
        SystemExit: the checkout does not hold the module.
    """
    parts = name.split(".")
    if not (file := checkout.joinpath(*parts).with_suffix(".py")).is_file():
        raise SystemExit(f"{checkout} is no checkout of the released code: it holds no {file.relative_to(checkout)}")
    sys.modules.update(_bare_packages(checkout, parts[:-1]))
    try:
        with _stand_ins(absent or {}):
            return importlib.import_module(name)
    finally:
        # Another checkout may have packages of the same name.
        for loaded in [one for one in sys.modules if one.split(".")[0] == parts[0]]:
            del sys.modules[loaded]


def _bare_packages(checkout: Path, parts: Sequence[str]) -> dict[str, ModuleType]:
    packages = {}
    for depth in range(1, len(parts) + 1):
        package = ModuleType(".".join(parts[:depth]))
        package.__path__ = [str(checkout.joinpath(*parts[:depth]))]
        packages[package.__name__] = package
    return packages


@contextmanager
def _stand_ins(absent: Mapping[str, Sequence[str]]) -> Iterator[None]:
    made: list[tuple[ModuleType, str]] = []
    modules: list[str] = []
    try:
        for name, attributes in absent.items():
            try:
                module = importlib.import_module(name)
            except ImportError:
                module = sys.modules[name] = ModuleType(name)
                modules.append(name)
            for attribute in attributes:
                if not hasattr(module, attribute):
                    setattr(module, attribute, None)
                    made.append((module, attribute))
        yield
    finally:
        for module, attribute in made:
            delattr(module, attribute)
        for name in modules:
            del sys.modules[name]
