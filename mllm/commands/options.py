"""Reads a command's config from the command line and YAML files, and names the nearest key of one that is none.

Knows dataclasses and how people write options. Does not know what any of them means.

    --config run.yaml --train.max_steps 100 --train.use_cpu --manifest a.jsonl --manifest b.jsonl

Later ones win. Dashes may stand for underscores, a bare flag for true, and a list may be given one item at a time.
"""

import dataclasses
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mllm.config.nearest import nearest
from mllm.config.reading import TEXT, Key, Text, check_keys, keys_of, parse_yaml, read
from mllm.utils.registry import load_plugins

Settings = TypeVar("Settings")
_BOOLEANS = ("true", "false", "yes", "no")


def parse_settings(
    kind: type[Settings], arguments: Sequence[str], *, program: str, positional: str | Sequence[str] | None = None
) -> Settings:
    """Read what a command is to do.

    Args:
        kind: a dataclass; nested dataclasses are written with dots.
        arguments: what follows the verb.
        program: what the user typed so far, for `--help`.
        positional: a field that may be given without its name, or several, in their order.

    Raises:
        ValueError: unknown keys (the nearest valid one is named), values of another type, contradictions.
        FileNotFoundError: no such config file.
        SystemExit: after `--help`.
    """
    load_plugins()
    keys = dict(keys_of(kind))
    values: dict[str, Any] = {}
    begun: set[str] = set()
    waiting = list(arguments)
    nameless = [positional] if isinstance(positional, str) else list(positional or [])
    while waiting:
        word = waiting.pop(0)
        if word in ("-h", "--help"):
            _show_help(kind, program, waiting[0] if waiting else "")
        if not word.startswith("--"):
            if not nameless:
                raise ValueError(f"unexpected {word!r}: options begin with --")
            # The last one may be given again, as every option may: later ones win.
            _assign(values, keys, nameless.pop(0) if len(nameless) > 1 else nameless[0], word, begun)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        _check_option(name, keys)
        if not equals:
            value = _next_value(name, keys.get(name), waiting)
        if name == "config":
            _merge(values, _read_file(kind, value))
            begun.clear()
        else:
            _assign(values, keys, name, value, begun)
    return read(kind, values)


def without_extras(kind: type[Settings], settings: Any) -> Settings:
    """Return the part of a verb's config that is the `kind` it extends."""
    return kind(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(typing.cast(Any, kind))})


def _show_help(kind: Any, program: str, group: str) -> typing.NoReturn:
    """Print the options and end.

    Raises:
        ValueError: a group that is none; the nearest is named. SystemExit: always otherwise.
    """
    from mllm.commands.help import help_text

    sys.stdout.write(help_text(kind, program, group.removeprefix("--").replace("-", "_")))
    raise SystemExit(0)


def _next_value(name: str, key: Key | None, waiting: list[str]) -> str:
    """Take the word after an option, or true for a switch that stands alone."""
    follows = waiting[0] if waiting else None
    if key is not None and key.hint is bool and (follows is None or follows.lower() not in _BOOLEANS):
        return "true"
    if follows is None or (follows.startswith("--") and len(follows) > 2):
        raise ValueError(f"--{name} needs a value")
    return waiting.pop(0)


def _check_option(name: str, keys: Mapping[str, Key]) -> None:
    parent = keys.get(name.rpartition(".")[0])
    if name == "config" or name in keys or (parent is not None and parent.holds(dict)):
        return
    raise ValueError(f"unknown option --{name}; {nearest(name, ['config', *keys])}")


def _assign(values: dict[str, Any], keys: Mapping[str, Key], name: str, text: str, begun: set[str]) -> None:
    """Put a value where its option says.

    Args:
        begun: lists whose items the command line has begun to name, which later ones add to.
    """
    *blocks, last = name.split(".")
    inner, path = values, ""
    for block in blocks:
        path = f"{path}.{block}".removeprefix(".")
        inner = _open_block(inner, block, keys.get(path))
    key = keys.get(name)
    value = _as_list(text) if key is not None and key.holds(list) else None
    if key is None or not key.holds(list) or key.holds(str) or value is not None or text.startswith("{"):
        begun.discard(name)
        # Text in place of a block is one key of it, such as its source; what else the block holds stays.
        if key is not None and key.field.metadata.get(TEXT) == "source" and not text.startswith("{"):
            _open_block(inner, last, key)["source"] = Text(text)
        else:
            inner[last] = Text(text) if value is None else value
    elif name in begun:
        inner[last].append(Text(text))
    else:
        begun.add(name)
        inner[last] = [Text(text)]


def _open_block(values: dict[str, Any], name: str, key: Key | None) -> dict[str, Any]:
    """Return the keys of a block, which may have been given as text so far or not at all."""
    held = values.get(name)
    if isinstance(held, Text) and held.startswith("{"):
        held = parse_yaml(held)
    if isinstance(held, str) and key is not None and TEXT in key.field.metadata:
        held = {key.field.metadata[TEXT]: held}
    values[name] = dict(held) if isinstance(held, Mapping) else {}
    return values[name]


def _as_list(text: str) -> list[Any] | None:
    """Return the list that a text is; a text may begin with a bracket too."""
    if not text.startswith("["):
        return None
    try:
        value = parse_yaml(text)
    except ValueError:
        return None
    return value if isinstance(value, list) else None


def _merge(values: dict[str, Any], later: Mapping[str, Any]) -> None:
    """Let the values of a later file win, key by key."""
    for name, value in later.items():
        held = values.get(name)
        if isinstance(held, Mapping) and isinstance(value, Mapping):
            values[name] = dict(held)
            _merge(values[name], value)
        else:
            values[name] = value


def _read_file(kind: Any, path: str) -> Mapping[str, Any]:
    """Read a config file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no YAML, or unknown keys.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no config file {path}")
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    check_keys(kind, values, where=path)
    return values
