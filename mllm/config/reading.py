"""Reads plain values, from YAML, the command line or Python, into dataclasses: the one reader of every config.

Knows dataclasses and their types. Does not know what any key means. Every refusal names the key with all its blocks,
`model.image.compressor.num_queries`, as a user types it.

A block that comes in kinds is a field whose metadata, made by `kinds`, names the dataclass of each kind; the kind
decides which keys exist. Such a field, or one made by `block`, may be given as plain text, which then is one key of it.
"""

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from typing import Any, Literal, TypeVar, Union

import yaml

from mllm.config.nearest import nearest

Config = TypeVar("Config")
KINDS, TEXT, TAG = "kinds", "text", "kind"
MAX_SHOWN = 200
"""How many characters of a text that cannot be read a message repeats."""


class ConfigError(ValueError):
    """Says what is wrong with a key, relative to the dataclass that found it; the reader puts the blocks before it."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}{problem}" if problem.startswith(":") else f"{key} {problem}")
        self.key, self.problem = key, problem

    def inside(self, path: str) -> "ConfigError":
        """Return the same error as seen from the block around it."""
        return ConfigError(f"{path}.{self.key}" if path else self.key, self.problem)


class Text(str):
    """Holds a value as it was typed on the command line, whose type only the key's own tells."""


class _Mismatch(Exception):
    """A value is not of a type; another alternative of the key may fit."""


def kinds(classes: Mapping[str, type], *, default: str = "", text: str = TAG) -> dict[str, Any]:
    """Make the metadata of a field that comes in kinds.

    Args:
        classes: the dataclass of each kind; what is added to it later can be used too.
        default: the kind of a block that names none; such a block is refused where there is none.
        text: the key that plain text in place of the block stands for.
    """
    return {KINDS: classes, TEXT: text, "default_kind": default}


def block(*, text: str) -> dict[str, Any]:
    """Make the metadata of a field whose block may be given as plain text, which is the key `text` of it."""
    return {TEXT: text}


def read(kind: type[Config], values: Any, path: str = "") -> Config:
    """Read plain values into a dataclass.

    Args:
        kind: the dataclass.
        values: keys and values; those of blocks may be mappings, or dataclasses as they are.
        path: where the block stands, such as "model.image"; for messages.

    Raises:
        ValueError: an unknown or missing key, a key of another kind, a value of another type, or a contradiction; the
            key is named in full.
    """
    check_keys(kind, values, path=path)
    try:
        return _read(kind, values)
    except ConfigError as error:
        raise error.inside(path) from None if path else error.__cause__


def check_keys(kind: type, values: Any, *, path: str = "", where: str = "") -> None:
    """Refuse keys that no kind of any block has.

    Args:
        where: the file they stand in, for the message.

    Raises:
        ValueError: the first of them, with the nearest that there is.
    """
    if not isinstance(values, Mapping):
        got = type(values).__name__
        raise ValueError(f"{where or path or 'a config'} must hold keys and values, got {got}")
    every = [f"{path}.{key}".removeprefix(".") for key, _ in keys_of(kind)]
    _check_keys(fields_of(kind), values, path, where, every)


def _check_keys(known: Mapping[str, "Key"], values: Mapping[Any, Any], path: str, where: str, every: list[str]) -> None:
    for name, value in values.items():
        key = f"{path}.{name}".removeprefix(".")
        if name not in known:
            in_file = f" in {where}" if where else ""
            raise ValueError(f"unknown key {key}{in_file}; {nearest(key, every)}")
        if isinstance(value, Mapping) and known[name].classes:
            chosen, classes = value.get(TAG), known[name].classes
            if KINDS in known[name].field.metadata and chosen is not None and chosen not in classes:
                raise ValueError(f"{key}.{TAG} is {chosen!r}; allowed: {', '.join(classes)}")
            _check_keys(known[name].inner(), value, key, where, every)


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a dataclass: its type, and where it is a block the dataclasses of its kinds; `owner` declares it."""

    name: str
    hint: Any
    field: Any
    owner: type

    def holds(self, kind: type) -> bool:
        """Tell whether a value may be a list, a dict or a text."""
        return any(option is kind or typing.get_origin(option) is kind for option in _options(self.hint))

    @property
    def classes(self) -> Mapping[str, type]:
        """The dataclasses of a block by kind; one without a name where there are no kinds, none for plain values."""
        if KINDS in self.field.metadata:
            return dict(self.field.metadata[KINDS])
        block_class = next((option for option in _options(self.hint) if dataclasses.is_dataclass(option)), None)
        return {} if block_class is None else {"": typing.cast(type, block_class)}

    def inner(self) -> "dict[str, Key]":
        """List the keys of the block, of every kind."""
        return {name: key for one in self.classes.values() for name, key in fields_of(one).items()}


def keys_of(kind: type, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """List every dotted key of a dataclass, blocks before what is in them, the keys of all kinds included."""
    for key in fields_of(kind).values():
        yield from _keys_from(key, prefix)


def _keys_from(key: Key, prefix: str) -> Iterator[tuple[str, Key]]:
    yield f"{prefix}{key.name}", key
    for inner in key.inner().values():
        yield from _keys_from(inner, f"{prefix}{key.name}.")


@functools.cache
def fields_of(kind: type) -> dict[str, Key]:
    """List the keys of a dataclass by name."""
    hints = typing.get_type_hints(kind)
    config_class: Any = kind
    return {one.name: Key(one.name, hints[one.name], one, kind) for one in dataclasses.fields(config_class) if one.init}


def _read(kind: type[Config], values: Mapping[str, Any]) -> Config:
    known = fields_of(kind)
    arguments = {}
    for name, value in values.items():
        try:
            arguments[name] = _convert_key(known[name], value)
        except ConfigError as error:
            raise error.inside(name) if error.key else ConfigError(name, error.problem) from None
    for name, key in known.items():
        if name not in arguments and key.field.default is MISSING and key.field.default_factory is MISSING:
            raise ConfigError(name, "is missing")
    return kind(**arguments)


def _convert_key(key: Key, value: Any) -> Any:
    """The value of a field; an error's key is relative to the field, and empty where the field itself is wrong."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if key.classes and not isinstance(value, tuple(key.classes.values())):
            raise ConfigError("", f": expected {_names(key)}, got {type(value).__name__}")
        return value
    if key.classes and (value is None or (isinstance(value, Text) and value in ("null", ""))):
        if type(None) in _options(key.hint) or key.field.default is None:
            return None
        raise ConfigError("", f": expected {_names(key)}, got null")
    if key.classes:
        return _read_block(key, value)
    return _convert(key.hint, value)


def _names(key: Key) -> str:
    return " or ".join(f"kind {name}" for name in key.classes if name) or "keys and values"


def _read_block(key: Key, value: Any) -> Any:
    if isinstance(value, Text) and value.lstrip().startswith("{"):
        value = parse_yaml(value)
    if isinstance(value, str) and TEXT in key.field.metadata:
        value = {key.field.metadata[TEXT]: str(value)}
    if not isinstance(value, Mapping):
        raise ConfigError("", f": expected {_names(key)}, got {value!r}")
    if KINDS not in key.field.metadata:
        return _read(key.classes[""], value)
    name = value.get(TAG, key.field.metadata["default_kind"])
    if not name:
        raise ConfigError(TAG, f"is missing; allowed: {', '.join(key.classes)}")
    if name not in key.classes:
        raise ConfigError(TAG, f"is {name!r}; allowed: {', '.join(key.classes)}")
    chosen = key.classes[name]
    for word in value:
        if word not in fields_of(chosen):
            _refuse_key(key, name, str(word))
    return _read(chosen, value)


def _refuse_key(key: Key, name: str, word: str) -> None:
    takes = ", ".join(field for field in fields_of(key.classes[name]) if field != TAG) or "no keys"
    owners = [kind for kind, one in key.classes.items() if word in fields_of(one)]
    if owners:
        raise ConfigError(word, f"goes with kind {' or '.join(owners)}, not with {name}, which takes {takes}")
    raise ConfigError(word, f"is no key of kind {name}; {nearest(word, list(fields_of(key.classes[name])))}")


def _convert(hint: Any, value: Any) -> Any:
    """A plain value as one of the types that a key allows."""
    options = _options(hint)
    # What a text is on the command line: the most telling type first, text itself last.
    for option in sorted(options, key=lambda option: option is str):
        try:
            return _convert_one(option, value)
        except _Mismatch:
            continue
    literals = [
        value for option in options if typing.get_origin(option) is Literal for value in typing.get_args(option)
    ]
    if literals and all(typing.get_origin(option) is Literal or option is type(None) for option in options):
        raise ConfigError("", f": expected one of {literals}, got {value}")
    raise ConfigError("", f": expected {' or '.join(map(_name, options))}, got {_shown(value)}")


def _convert_one(option: Any, value: Any) -> Any:
    origin = typing.get_origin(option)
    if option is Any:
        return value
    if option is type(None):
        return _none(value)
    if origin is Literal:
        return _literal(option, value)
    if origin is list:
        return _list(option, value)
    if origin is dict:
        return _dict(option, value)
    if option is str:
        if not isinstance(value, str):
            raise _Mismatch
        return str(value)
    return _scalar(option, _parsed(value))


def _parsed(value: Any) -> Any:
    if not isinstance(value, Text):
        return value
    try:
        return parse_yaml(value)
    except ValueError as error:
        raise _Mismatch from error


def _none(value: Any) -> None:
    if value is not None and not (isinstance(value, Text) and value in ("null", "~", "")):
        raise _Mismatch


def _literal(option: Any, value: Any) -> Any:
    plain = str(value) if isinstance(value, Text) else value
    for allowed in typing.get_args(option):
        if plain == allowed and type(plain) is type(allowed):
            return allowed
    raise _Mismatch


def _list(option: Any, value: Any) -> list[Any]:
    value = _parsed(value)
    if not isinstance(value, list | tuple):
        raise _Mismatch
    (item,) = typing.get_args(option)
    return [_convert(item, one) for one in value]


def _dict(option: Any, value: Any) -> dict[Any, Any]:
    value = _parsed(value)
    if not isinstance(value, Mapping):
        raise _Mismatch
    name, item = typing.get_args(option)
    out = {}
    for key, one in value.items():
        try:
            out[_convert(name, key)] = _convert(item, one)
        except ConfigError as error:
            raise error.inside(str(key)) if error.key else ConfigError(str(key), error.problem) from None
    return out


def _scalar(option: type, value: Any) -> Any:
    if option is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if type(value) is option:
        return value
    raise _Mismatch


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _name(option: Any) -> str:
    if option is type(None):
        return "null"
    origin = typing.get_origin(option)
    if origin is Literal:
        return " or ".join(map(str, typing.get_args(option)))
    return (origin or option).__name__


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


class _Loader(yaml.SafeLoader):
    """Reads YAML in which 1e-3 is a number, as everybody means it; YAML 1.1 wants 1.0e-3."""


_Loader.yaml_implicit_resolvers = {
    letter: list(resolvers) for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Read YAML.

    Raises:
        ValueError: text that is none.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{_some(text)} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(f"{_some(text)} is nested too deeply to be read as YAML") from error


def _some(text: str) -> str:
    return repr(text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}...")


def plain(config: Any) -> Any:
    """Return a dataclass as plain values that read as the same again: nothing where null says as much as silence."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {
            field.name: plain(value)
            for field in dataclasses.fields(config)
            if not ((value := getattr(config, field.name)) is None and field.default is None)
        }
    if isinstance(config, Mapping):
        return {key: plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, list | tuple) else config
