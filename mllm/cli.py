"""Runs the command line: finds the command, reads its settings, runs it, and says in one line what a user did wrong.

Knows the commands by name. Loads only the file of the command that is asked for, so that `--help` is quick.

Exit codes are named in `mllm.utils.exit_codes`: 0 done, 1 done but something needs attention, 2 refused, 3 a run that
ended itself, 128 + n after signal n (130 after Ctrl-C).
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from mllm.utils.exit_codes import BROKEN_DOWN, INTERRUPTED, REFUSED

VERBS = {
    "train": "mllm.commands.train",
    "generate": "mllm.commands.generate",
    "chat": "mllm.commands.chat",
    "evaluate": "mllm.commands.evaluate",
    "compare": "mllm.commands.compare",
    "report": "mllm.commands.report",
    "lmms-eval": "mllm.commands.lmms_eval",
    "serve": "mllm.commands.serve",
    "page": "mllm.commands.page",
    "bench": "mllm.commands.bench",
    "router fit": "mllm.commands.router_fit",
    "router certify": "mllm.commands.router_certify",
    "router report": "mllm.commands.router_report",
    "demo": "mllm.commands.demo",
    "export": "mllm.commands.export",
    "push": "mllm.commands.push",
    "check": "mllm.commands.check",
    "data check": "mllm.commands.data_check",
    "data balance": "mllm.commands.data_balance",
    "data import": "mllm.commands.data_import",
    "features build": "mllm.commands.features_build",
    "features check": "mllm.commands.features_check",
    "convert av-hubert": "mllm.commands.convert_av_hubert",
    "convert llama-avsr": "mllm.commands.convert_llama_avsr",
    "convert llama-mtsk": "mllm.commands.convert_llama_mtsk",
    "convert llava": "mllm.commands.convert_llava",
    "convert llava-m3": "mllm.commands.convert_llava_m3",
    "convert mqt-llava": "mllm.commands.convert_mqt_llava",
    "convert omni-avsr": "mllm.commands.convert_omni_avsr",
    "prepare lips": "mllm.commands.prepare_lips",
    "adopt": "mllm.commands.adopt",
    "init": "mllm.commands.init",
    "doctor": "mllm.commands.doctor",
    "synthetic pretrain": "mllm.commands.synthetic_pretrain",
}
DEBUG = "--debug"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: what follows `mllm`; those of this process when left out.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG in words
    # The launcher of DeepSpeed adds this; the same number stands in the environment, where it is read.
    words = [word for word in words if word != DEBUG and not word.startswith(("--local_rank=", "--local-rank="))]
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0
    if words[0] == "--version":
        from mllm import __version__

        sys.stdout.write(f"mllm {__version__}\n")
        return 0
    try:
        run, settings = parse(words)
        _set_up_logging(debug=debug)
        from mllm.utils.broken_packages import hide_broken_packages

        hide_broken_packages()  # before a command imports transformers
        return run(settings)
    except KeyboardInterrupt as interrupted:
        sys.stderr.write("interrupted\n")
        return getattr(interrupted, "exit_status", INTERRUPTED)  # that of a run says by which signal
    except FloatingPointError as error:
        if debug:
            raise
        sys.stderr.write(f"mllm: {_shown(error)}\n")
        return BROKEN_DOWN
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        sys.stderr.write(f"mllm: {_shown(error)}\n")
        return REFUSED


def parse(words: Sequence[str]) -> tuple[Callable[[Any], int], Any]:
    """Find out what `mllm WORDS` would run, and the settings it would run with.

    Raises:
        ValueError: no such command, unknown options, values that are refused; the nearest valid name is told.
        FileNotFoundError: a config file that is not there.
        SystemExit: after `--help`.
    """
    from mllm.commands.options import parse_settings
    from mllm.utils.registry import load_plugins

    verb, rest = find_verb(words)
    load_plugins()  # what they add may be named in a config
    command = import_module(VERBS[verb])
    positional = getattr(command, "POSITIONAL", None)
    return command.run, parse_settings(command.Settings, rest, program=f"mllm {verb}", positional=positional)


def find_verb(words: Sequence[str]) -> tuple[str, list[str]]:
    """Find the command at the beginning, of one word or two, and return what follows it.

    Raises:
        ValueError: no verb; the nearest is named.
    """
    for length in (2, 1):
        if (verb := " ".join(words[:length])) in VERBS:
            return verb, list(words[length:])
    wanted = " ".join(word for word in words[:2] if not word.startswith("-"))
    names = [verb for verb in VERBS if verb.partition(" ")[0] == words[0]]
    names = names or get_close_matches(wanted, VERBS, n=1, cutoff=0.5) or get_close_matches(words[0], VERBS, n=1)
    hint = f"did you mean {' or '.join(names)}?" if names else f"there are {', '.join(VERBS)}"
    raise ValueError(f"there is no command {wanted or words[0]!r}; {hint}")


def usage() -> str:
    """Write what `mllm --help` says."""
    width = max(map(len, VERBS)) + 2
    lines = [f"  {verb:<{width}}{import_module(module).SUMMARY}" for verb, module in VERBS.items()]
    head = ["usage: mllm COMMAND [options]", "", "Multimodal LLMs with an elastic token budget.", "", "commands:"]
    tail = ["", "mllm COMMAND --help lists the options of one; --debug shows where an error comes from.", ""]
    return "\n".join([*head, *lines, *tail])


def _set_up_logging(*, debug: bool) -> None:
    """Send our messages to the terminal, on the first process only; those of transformers when they are errors."""
    is_first = os.environ.get("RANK", "0") == "0"
    level = logging.DEBUG if debug else logging.INFO if is_first else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("mllm").setLevel(level)
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _shown(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    from mllm.data.findings import ManyLines

    lines = str(error).splitlines() if isinstance(error, ManyLines) else [str(error)]
    return "\n".join(" ".join(line.split()) for line in lines) or type(error).__name__
