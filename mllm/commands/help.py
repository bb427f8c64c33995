"""Writes what `--help` says: the options of a command, or on one screen the groups they come in.

Reads the docstrings under the fields of dataclasses. Does not know what an option means.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from dataclasses import MISSING
from functools import cache
from typing import Any, Literal, cast

from mllm.config.nearest import nearest
from mllm.config.reading import TAG, Key, fields_of, keys_of, plain

WIDTH = 118
DEPTH = 3
"""Blocks deeper than model.image.encoder are listed with the block around them."""


def help_text(kind: Any, program: str, group: str = "") -> str:
    """Return the help of a command.

    Args:
        kind: the dataclass of its options.
        program: what the user typed so far.
        group: a block such as model.image, or `all`; the command's own options and its groups when empty.

    Raises:
        ValueError: a group that is none; the nearest is named.
    """
    groups = {name: key for name, key in keys_of(kind) if key.classes}
    if group and group not in ("all", *groups):
        raise ValueError(f"--help {group} is no group of options; {nearest(group, ['all', *groups])}")
    if group and group != "all":
        return "\n".join([*_group(group, groups[group], is_deep=False), ""])
    head = [f"usage: {program} [--config FILE] [--KEY VALUE ...]", "", *_wrapped(inspect.getdoc(kind) or "", "")]
    head += ["", "  --config FILE  YAML file with any of the options below; the command line overrules it."]
    if group == "all":
        return "\n".join([*head, *_keys(kind, "", is_deep=True), ""])
    lines = [line for name, key in _by_use(kind) if not key.classes for line in _option(name, key)]
    return "\n".join([*head, *lines, *_groups(groups, program), ""])


def _by_use(kind: Any) -> list[tuple[str, Key]]:
    """Return the options of a command: those it needs, then its own, then those that it shares with others."""
    defined = inspect.get_annotations(kind)

    def rank(option: tuple[str, Key]) -> int:
        field = option[1].field
        is_required = field.default is MISSING and field.default_factory is MISSING
        return 0 if is_required else 1 if option[0] in defined else 2

    return sorted(fields_of(kind).items(), key=rank)


def _groups(groups: dict[str, Key], program: str) -> list[str]:
    shown = {name: key for name, key in groups.items() if name.count(".") < DEPTH}
    if not shown:
        return []
    width = max(map(len, shown)) + 2
    rows = [f"  {name:<{width}}{_short(_doc(key), WIDTH - width - 2)}" for name, key in shown.items()]
    tail = f"`{program} --help GROUP` lists the keys of a group, `{program} --help all` every key there is."
    return ["", "groups of options, as blocks in YAML or with dots (--group.key value):", *rows, "", tail]


def _group(name: str, key: Key, *, is_deep: bool) -> list[str]:
    """The keys of one block; of one that comes in kinds, kind by kind."""
    lines = ["", f"{name}:", *_wrapped(_doc(key), "  ")]
    for kind, block_class in key.classes.items():
        if kind:
            lines += ["", f"  with {TAG}: {kind}", *_wrapped(inspect.getdoc(block_class) or "", "    ")]
        lines += _keys(block_class, f"{name}.", is_deep=is_deep)
    return lines


def _keys(kind: Any, prefix: str, *, is_deep: bool) -> list[str]:
    lines: list[str] = []
    for name, key in fields_of(kind).items():
        if key.classes and is_deep:
            lines += _group(f"{prefix}{name}", key, is_deep=True)
        elif name != TAG or not prefix:
            lines += _option(f"{prefix}{name}", key)
    return lines


def _option(name: str, key: Key) -> list[str]:
    """An option with its type, its default and what it does."""
    if key.classes:
        what = " | ".join(kind for kind in key.classes if kind) or "block"
        return [f"  --{name}.*  ({what}; see --help {name})", *_wrapped(_doc(key), "      ")]
    default = key.field.default
    if default is MISSING and key.field.default_factory is not MISSING:
        default = plain(key.field.default_factory())
    shown = "required" if default is MISSING else "" if default in (None, "", [], {}) else f"default {_value(default)}"
    return [f"  --{name} {_type(key.hint)}{f'  ({shown})' if shown else ''}", *_wrapped(_doc(key), "      ")]


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type(hint: Any) -> str:
    """A type as people write its values."""
    if typing.get_origin(hint) is Literal:
        return "|".join(map(str, typing.get_args(hint)))
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    origin = typing.get_origin(hint)
    if origin is list:
        return f"[{_type(options[0])}, ...]"
    if origin is dict:
        return f"{{{_type(options[0])}: {_type(options[1])}}}"
    if options:
        return "|".join(_type(option) for option in options)
    return {"str": "TEXT", "int": "INT", "float": "NUMBER", "bool": "true|false"}.get(getattr(hint, "__name__", ""), "")


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), WIDTH, initial_indent=indent, subsequent_indent=indent)


def _short(text: str, width: int) -> str:
    """The first clause of a docstring."""
    clause = re.split(r";|(?<!e\.g)\.(?:\s|$)", " ".join(text.split()))[0]
    return textwrap.shorten(clause, width, placeholder=" ...")


def _doc(key: Key) -> str:
    return docs_of(key.owner).get(key.name, "")


@cache
def docs_of(kind: Any) -> dict[str, str]:
    """Return the docstrings under the fields of a dataclass, those of its parents included."""
    docs: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(one):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cast(type, one)))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, follows in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = getattr(getattr(follows, "value", None), "value", None)
                if isinstance(follows, ast.Expr) and isinstance(text, str):
                    docs[statement.target.id] = text
    return docs
