"""Writes a run config that a command has made up for a user to change: as YAML, checked, and over no other file."""

import json
import re
from pathlib import Path

_YAML_WORDS = ("true", "false", "null", "yes", "no", "on", "off")


def yaml_scalar(text: str) -> str:
    """Return a text as YAML reads it back."""
    is_plain = re.fullmatch(r"[A-Za-z_./][\w./:-]*[\w/]", text) and text.lower() not in _YAML_WORDS
    return text if is_plain else json.dumps(text, ensure_ascii=False)


def write_new_config(text: str, out: str) -> Path:
    """Write a config to a file that is not there yet.

    Args:
        text: YAML.
        out: the file; its folder is made.

    Raises:
        ValueError: no valid config, of which no file is left, or a file that is there.
    """
    import yaml

    from mllm.config.run import read_run_config

    read_run_config(yaml.safe_load(text))
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ValueError(f"{path} is there already and is left as it is; give another name") from error
    return path
