"""Command line and YAML files to a settings dataclass: jsonargparse, with messages that name the nearest key.

Knows dataclasses and how people write options. Does not know what any of them means.

    --config run.yaml --train.max_steps 100 --train.use_cpu --manifest a.jsonl --manifest b.jsonl

Later ones win. Dashes may stand for underscores, a bare flag for true, and a list may be given one item at a time.
"""

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, Union

import yaml

Settings = TypeVar("Settings")
_OWN = ("config", "print_config", "help")
_BOOLEANS = ("true", "false", "yes", "no")
_NO_REASONS = ("Parser key", "Does not validate", "Subtypes", "Errors:", "Problem with", "Given value")


def parse_settings(
    kind: type[Settings], arguments: Sequence[str], *, program: str, positional: str | Sequence[str] | None = None
) -> Settings:
    """Read settings.

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
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    words = _named(kind, arguments, [positional] if isinstance(positional, str) else positional or [])
    parser = jsonargparse.ArgumentParser(prog=program, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_class_arguments(kind)
    for path in _values_of(words, "config"):
        _check_file(kind, path)
    try:
        values = parser.instantiate_classes(parser.parse_args(_with_lists(kind, words)))
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise ValueError(plain_message(str(error))) from error
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})  # type: ignore[arg-type]


def without_extras(kind: type[Settings], settings: Settings) -> Settings:
    """The part of a verb's settings that is the `kind` they extend."""
    return kind(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(kind)})  # type: ignore[arg-type]


def keys_of(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a dataclass with its type, blocks before what is in them."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        yield key, hint
        if (block := _block_of(hint)) is not None:
            yield from keys_of(block, f"{key}.")


ALIASES = {
    **dict.fromkeys(("lr", "peak_lr", "max_lr"), "learning_rate"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("betas", "adam_beta1", "adam_beta2"), "adam_betas"),
    **dict.fromkeys(("grad_clip", "clip_grad", "gradient_clip", "clip_grad_norm"), "max_grad_norm"),
    **dict.fromkeys(("grad_accum", "gradient_accumulation_steps", "accumulate_grad_batches"), "accumulation"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "scheduler"), "schedule"),
    **dict.fromkeys(("warmup_ratio", "warmup"), "warmup_fraction"),
    **dict.fromkeys(("iterations", "iters", "total_steps", "num_steps", "steps"), "max_steps"),
    **dict.fromkeys(("num_epochs", "num_train_epochs", "max_epochs"), "epochs"),
    **dict.fromkeys(
        ("bs", "batch", "batch_size", "per_device_train_batch_size", "micro_batch_size"), "tokens_per_batch"
    ),
    **dict.fromkeys(("bf16", "fp16", "amp", "mixed_precision"), "precision"),
    **dict.fromkeys(("output", "output_dir", "output_path", "out_dir", "save_dir"), "out"),
    **dict.fromkeys(("save_steps", "checkpoint_every"), "save_every"),
    **dict.fromkeys(("save_total_limit",), "keep_checkpoints"),
    **dict.fromkeys(("logging_steps", "log_steps"), "log_every"),
    **dict.fromkeys(("eval_steps", "eval_every"), "validate_every"),
    **dict.fromkeys(("eval_data", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("train_data", "dataset", "data_path"), "train"),
    **dict.fromkeys(("resume_from", "resume_from_checkpoint"), "resume"),
    **dict.fromkeys(("init_from", "pretrained"), "start_from"),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "adapter.rank"),
    **dict.fromkeys(("lora_alpha",), "adapter.alpha"),
    **dict.fromkeys(("lora_dropout",), "adapter.dropout"),
    **dict.fromkeys(("target_modules",), "adapter.targets"),
    **dict.fromkeys(("vision_tower", "image_encoder"), "image.encoder"),
    **dict.fromkeys(("audio_encoder",), "audio.encoder"),
    **dict.fromkeys(("video_encoder",), "video.encoder"),
    **dict.fromkeys(("attn_implementation", "attn"), "attention"),
    **dict.fromkeys(("torch_dtype",), "dtype"),
    **dict.fromkeys(("device", "cpu", "no_cuda"), "use_cpu"),
    **dict.fromkeys(("model_path", "model_name_or_path", "checkpoint_path", "ckpt"), "model"),
    **dict.fromkeys(("prompt", "question", "query"), "--text"),
    **dict.fromkeys(("beams", "beam_size", "beam"), "num_beams"),
    **dict.fromkeys(("max_length", "max_tokens"), "max_new_tokens"),
}
"""What options are called elsewhere, and the end of our name for them; for messages, they are not accepted.

With dashes before it a name is the whole option: a block may have a key of that name that is something else.
"""


def nearest(key: str, allowed: Sequence[str]) -> str:
    """The end of a message: the key that goes by this name elsewhere or is most similar, or all of them."""
    block, _, word = key.rpartition(".")
    if meant := ALIASES.get(word.lower()):
        # First the block that was written, where it has one.
        within = f"{block}.{meant.rpartition('.')[2]}"
        known = [name for name in allowed if f"--{name}" == meant or name == meant or name.endswith(f".{meant}")]
        known = [within] * (within in allowed) + known
        if known:
            return f"did you mean {known[0]}?"
    # Someone who leaves a block out writes the last part right, so that is compared too.
    last = {name.rpartition(".")[2]: name for name in reversed(allowed)}
    found = get_close_matches(key, allowed, n=1, cutoff=0.75)
    found = found or [last[name] for name in get_close_matches(key.rpartition(".")[2], list(last), n=1, cutoff=0.6)]
    found = found or get_close_matches(key, allowed, n=1, cutoff=0.6)
    return f"did you mean {found[0]}?" if found else f"allowed: {', '.join(allowed)}"


def plain_message(message: str) -> str:
    """What jsonargparse says, in one line and without its search through the alternatives of a type."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    if not keys and "Errors:" not in message:
        return " ".join(message.split())
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    given = next((line.partition(": ")[2] for line in lines if line.startswith("Given value: ")), "")
    reasons = [line for line in lines if line and not line.startswith(_NO_REASONS)]
    known = [line for line in reasons if not re.fullmatch(r"Expected a <class '\w+'>\.?", line)]
    classes = re.findall(r"Expected a <class '(\w+)'>", message)
    if not known and classes:
        known = [f"expected {' or '.join(dict.fromkeys(classes)).replace('NoneType', 'null')}, got {given}"]
    text = "; ".join(dict.fromkeys(known)) or "is not valid"
    text = re.sub(r"Expected a typing\.Literal(\[.*?\])\. Got value:", r"expected one of \1, got", text)
    text = re.sub(r"Expected a <class '(\w+)'>\. Got value:", r"expected \1, got", text)
    return " ".join(f"{'.'.join(keys)}: {text}".removeprefix(": ").split())


def _named(kind: Any, arguments: Sequence[str], positional: Sequence[str]) -> list[str]:
    """Arguments as `--key=value` throughout; unknown keys are refused here."""
    types_by_key = dict(keys_of(kind))
    waiting = list(arguments)
    nameless = list(positional)
    words: list[str] = []
    while waiting:
        word = waiting.pop(0)
        if word in ("-h", "--help"):
            words.append("--help")
        elif not word.startswith("--"):
            if not nameless:
                raise ValueError(f"unexpected {word!r}: options begin with --")
            # The last one may be given again, as every option may: later ones win.
            words.append(f"--{nameless.pop(0) if len(nameless) > 1 else nameless[0]}={word}")
        else:
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            _check_option(key, types_by_key)
            if not equals and not key.endswith((".help", "print_config")):
                value = _next_value(key, types_by_key.get(key), waiting)
                equals = "="
            words.append(f"--{key}{equals}{value}")
    return words


def _next_value(key: str, hint: Any, waiting: list[str]) -> str:
    """The word after an option, or true for a switch that stands alone."""
    follows = waiting[0] if waiting else None
    if hint is bool and (follows is None or follows.lower() not in _BOOLEANS):
        return "true"
    if follows is None or (follows.startswith("--") and len(follows) > 2):
        raise ValueError(f"--{key} needs a value")
    return waiting.pop(0)


def _check_option(key: str, types_by_key: Mapping[str, Any]) -> None:
    if key in (*_OWN, *types_by_key) or (key.endswith("+") and key[:-1] in types_by_key):
        return
    parent = key.rpartition(".")[0]
    if (key.endswith(".help") and parent in types_by_key) or _is_mapping(types_by_key.get(parent)):
        return
    raise ValueError(f"unknown option --{key}; {nearest(key, ['config', *types_by_key])}")


def _values_of(words: Sequence[str], key: str) -> list[str]:
    return [word.partition("=")[2] for word in words if word.startswith(f"--{key}=")]


def _with_lists(kind: Any, words: Sequence[str]) -> list[str]:
    """Items of a list that were given one at a time, put together where the first of them stood."""
    items_by_key = {key: typing.get_args(hint)[0] for key, hint in keys_of(kind) if typing.get_origin(hint) is list}
    out: list[str] = []
    places: dict[str, int] = {}
    items: dict[str, list[Any]] = {}
    for word in words:
        key, _, value = word[2:].partition("=")
        holds_text = key in items_by_key and str in (items_by_key[key], *typing.get_args(items_by_key[key]))
        if key not in items_by_key or (_is_list(value) if holds_text else value.startswith("[")):
            out.append(word)
            continue
        if key not in places:
            places[key] = len(out)
            out.append("")
        items.setdefault(key, []).append(value if holds_text else yaml.safe_load(value))
        out[places[key]] = f"--{key}={json.dumps(items[key])}"
    return out


def _is_list(text: str) -> bool:
    """Whether a value is a list; a text may begin with a bracket too."""
    if not text.startswith("["):
        return False
    try:
        return isinstance(yaml.safe_load(text), list)
    except yaml.YAMLError:
        return False


def _check_file(kind: Any, path: str) -> None:
    """Refuse a config file with a key that is none, which jsonargparse would only name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no YAML, or unknown keys.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no config file {path}")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} must hold keys and values, got {type(values).__name__}")
    _check_keys(kind, values, path, "")


def _check_keys(kind: Any, values: Mapping[Any, Any], path: str, prefix: str) -> None:
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            every = [name for name, _ in keys_of(kind, prefix)]
            raise ValueError(f"unknown key {prefix}{key} in {path}; {nearest(f'{prefix}{key}', every)}")
        block = _block_of(hints[key])
        if block is not None and isinstance(value, Mapping):
            _check_keys(block, value, path, f"{prefix}{key}.")


def _block_of(hint: Any) -> Any:
    """The dataclass of a field that is one or may be one, or None."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _is_mapping(hint: Any) -> bool:
    return typing.get_origin(hint) is dict
