"""Writes the line that installs an optional library, for messages that say it is missing.

The name `mllm` on the public index is somebody else's package, so no line may tell pip to fetch that.
"""

DISTRIBUTION = "elastic-mllm"
"""The name of this project where installed packages are listed; what is imported is `mllm`."""


def install_line(extra: str) -> str:
    """Give the command that installs an extra of this project.

    Args:
        extra: a key of `[project.optional-dependencies]` in pyproject.toml.
    """
    return f"pip install -e '.[{extra}]' in the folder of the clone"
