"""Names the kinds of a part, such as compressors, and lets packages outside add theirs.

Knows names and what stands behind them. Does not know what any part does.

Each part that is open has a literal dict of its kinds in a `Registry` and one function to add to it:
`mllm.compressors.register_compressor`, `mllm.encoders.register_encoder`, `mllm.adapters.register_adapter` and
`mllm.evaluation.scorers.registry.register_benchmark`. In a notebook one calls it; a package that is to work with the
command line as well names, in its pyproject.toml, a function that does so:

    [project.entry-points."mllm.plugins"]
    mine = "my_package:register"

`load_plugins` calls each such function once. After that a config names the new kind by `kind:` as any other.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

PLUGINS = "mllm.plugins"
"""The group of entry points that name functions without arguments."""
Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """The kinds of one part by name: those of this package, and those that others have added.

    Args:
        part: what the kinds are kinds of, for messages.
        kinds: those of this package.
    """

    def __init__(self, part: str, kinds: Mapping[str, Entry]) -> None:
        self.part = part
        self._kinds = dict(kinds)

    def __getitem__(self, kind: str) -> Entry:
        return self._kinds[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def register(self, kind: str, entry: Entry) -> None:
        """Adds a kind; adding the very same entry again changes nothing.

        Raises:
            ValueError: the name is taken by another entry, or is empty.
        """
        self.check_free(kind, entry)
        self._kinds[kind] = entry

    def check_free(self, kind: str, entry: Entry) -> None:
        """Refuses a name that another entry has; who adds to several registries asks all of them first.

        Raises:
            ValueError: as `register`.
        """
        if not kind:
            raise ValueError(f"the name of a {self.part} is empty; give one")
        if self._kinds.get(kind, entry) is not entry:
            raise ValueError(f"{self.part} {kind!r} is taken by {_origin(self._kinds[kind])}; choose another name")

    def find(self, kind: str, *, key: str) -> Entry:
        """Finds a kind that a user named.

        Args:
            key: the key of the config that names it, for messages.

        Raises:
            ValueError: there is no such kind; those there are are named.
        """
        if kind not in self._kinds:
            raise ValueError(f"{key} is {kind!r}; allowed: {', '.join(self._kinds)}")
        return self._kinds[kind]


@cache
def load_plugins() -> tuple[str, ...]:
    """Calls the function of every installed plug-in, once per process, and returns their names.

    Raises:
        ImportError: a plug-in cannot be imported, or fails; it is named.
    """
    loaded = []
    for plugin in entry_points(group=PLUGINS):
        try:
            register: Callable[[], Any] = plugin.load()
            register()
        except Exception as error:
            raise ImportError(f"the plug-in {plugin.name} ({plugin.value}) cannot be loaded: {error}") from error
        loaded.append(plugin.name)
    return tuple(loaded)


def _origin(entry: Any) -> str:
    name = getattr(entry, "__qualname__", type(entry).__qualname__)
    return f"{getattr(entry, '__module__', type(entry).__module__)}.{name}"
