"""What a message says of an optional library that is missing: the line that installs it, which works in a clone.

The name `mllm` on the public index is somebody else's package, so no line may tell pip to fetch that.
"""

DISTRIBUTION = "elastic-mllm"
"""What this project is called where installed packages are listed; what is imported is `mllm`."""


def install_line(extra: str) -> str:
    """The command that installs an extra of this project.

    Args:
        extra: a key of `[project.optional-dependencies]` in pyproject.toml.
    """
    return f"pip install -e '.[{extra}]' in the folder of the clone"
