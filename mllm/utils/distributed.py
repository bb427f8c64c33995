"""Puts in place what transformers and accelerate look for on a machine, whichever launcher started this process.

Knows environment variables and executables. Does not know models, data or settings.

On a machine without a GPU accelerate's defaults start several processes that train apart in silence: it must be told
that this is a CPU run before anything else asks. DeepSpeed compiles its communication there when it is first used.
"""

import atexit
import importlib.util
import json
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mllm.utils.compile_locks import free_locks
from mllm.utils.extras import install_line

if TYPE_CHECKING:
    from torch import Tensor

COMPILERS = ("g++", "c++", "clang++")
_FSDP2_OPTIONS = {
    "FSDP_OFFLOAD_PARAMS": ("false", "shards stay on their GPU; with too little memory take more GPUs or fewer bits"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "that is train.gradient_checkpointing in the run's config"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "a layer is gathered for its forward and its backward pass, each time anew"),
    "FSDP_AUTO_WRAP_POLICY": ("TRANSFORMER_BASED_WRAP", "layers of the LLM are sharded, each by itself"),
}
"""What a launcher's config may ask of FSDP2, by accelerate's environment variable, and what to say of anything else."""
logger = logging.getLogger(__name__)


def world_size() -> int:
    """Count the processes that the launcher says there are.

    Raises:
        ValueError: WORLD_SIZE is set to something that is no count.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"the environment variable WORLD_SIZE is {text!r}; it must be a number of processes")
    return int(text)


def prepare_launch(*, use_cpu: bool, deepspeed: bool) -> bool:
    """Make the processes of a launcher one training; call it before anything of accelerate or transformers is made.

    Args:
        use_cpu: train on the CPU although there is a GPU.
        deepspeed: the settings ask for DeepSpeed; a launcher may ask for it too.

    Returns:
        Whether this is a CPU run.

    Raises:
        ValueError: fewer processes than the launcher started found each other, DeepSpeed cannot be used here, or the
            launcher asks for FSDP.
    """
    import torch
    from accelerate import PartialState

    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # workers that decode are forked from a process that tokenised
    on_cpu = use_cpu or not torch.cuda.is_available()
    _refuse_fsdp()
    deepspeed = deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true")
    if deepspeed:
        check_deepspeed(on_cpu=on_cpu)
    if on_cpu:
        check_process_count(PartialState(cpu=True).num_processes)
        if deepspeed:
            _start_deepspeed_on_cpu()
    return on_cpu


def take_fsdp2() -> bool:
    """Take FSDP2 over from a launcher that asks for it: the run shards its LLM itself, and accelerate sees DDP.

    accelerate's own FSDP2 shards what trains too, and leaves a run on CPUs unsharded without a word.

    Returns:
        Whether the launcher asks for it. It is asked once; another call finds no launcher that does.

    Raises:
        ValueError: it asks for FSDP1, or for something of FSDP2 that a run does not do; the key of accelerate's config
            is named.
    """
    if not _asks_for_fsdp():
        return False
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise ValueError(
            f"the launcher asks for FSDP{version}, whose shards cannot be saved as a run; take FSDP2: accelerate "
            "launch --config_file configs/accelerate_fsdp2.yaml"
        )
    for name, (allowed, instead) in _FSDP2_OPTIONS.items():
        if (value := os.environ.get(name, allowed)).lower() != allowed.lower():
            raise ValueError(f"the launcher's config has {name.lower()}: {value}; {instead}")
    del os.environ["ACCELERATE_USE_FSDP"]
    return True


def _refuse_fsdp() -> None:
    """Refuse what would shard a model that is not there to be sharded, such as one that answers.

    Raises:
        ValueError: the launcher's config asks for FSDP.
    """
    if _asks_for_fsdp():
        raise ValueError(
            "the launcher asks for FSDP (ACCELERATE_USE_FSDP), which only training knows; take "
            "configs/accelerate_ddp.yaml"
        )


def _asks_for_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def finish_launch(status: int) -> int:
    """Part the processes of a launcher in order, once all of them are done, and end this one; the last thing it does.

    The backend's threads run on after its groups are destroyed: the reducer of gradients keeps them, beyond any object
    of Python. One that still runs while the interpreter is taken down can abort a process that has done all its work.
    So a process that has others ends here, behind its exit functions and with its streams flushed.

    Args:
        status: the exit code of this process.

    Returns:
        The same, in a process that has no others, which goes on.
    """
    from accelerate import PartialState

    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()
    if state.num_processes == 1:
        return status
    if threading.current_thread() is threading.main_thread():
        # When the first of them has left with the code of an interruption, its launcher ends all others with SIGTERM, a
        # few tenths of a second before they leave with the same code. They would leave with that of SIGTERM.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


@contextmanager
def in_turn() -> Iterator[None]:
    """Let the processes of a machine run what is inside one after the other; every process calls this."""
    from accelerate import PartialState

    state = PartialState()
    number, num_turns = state.local_process_index, max(gather_json(state.local_process_index)) + 1
    # They meet behind every turn, so that none waits longer than one turn, and no group of processes loses patience.
    for _ in range(number):
        state.wait_for_everyone()
    yield
    for _ in range(number, num_turns):
        state.wait_for_everyone()


def gather_json(value: Any) -> list[Any]:
    """Gather the plain values of all processes, by rank; a collective.

    They travel as JSON in tensors: nothing is unpickled.
    """
    import torch
    from accelerate import PartialState

    state = PartialState()
    if state.num_processes == 1:
        return [value]
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=state.device)
    sizes = _gather(torch.tensor([len(text)], device=state.device)).tolist()
    padded = torch.zeros(1, max(sizes), dtype=torch.uint8, device=state.device)
    padded[0, : len(text)] = text
    rows = _gather(padded).cpu()
    return [json.loads(bytes(row[:size].tolist())) for row, size in zip(rows, sizes, strict=True)]


def _gather(value: "Tensor") -> "Tensor":
    from accelerate.utils import gather

    return cast("Tensor", gather(value))


def _start_deepspeed_on_cpu() -> None:
    """Let DeepSpeed know the processes that are there, before ZeRO-3 counts them to shard a model among them."""
    free_locks("deepspeed_shm_comm")
    logger.info("starting DeepSpeed; the first time it compiles its communication, which takes a minute or more")
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def check_process_count(num_processes: int) -> None:
    """Refuse processes that would train apart.

    Raises:
        ValueError: with both counts.
    """
    if num_processes != world_size():
        raise ValueError(
            f"the launcher started {world_size()} processes (WORLD_SIZE), but accelerate sees {num_processes}: they "
            "would train apart. Something used accelerate before training was set up, or the launcher's config "
            "contradicts this machine"
        )


def check_deepspeed(*, on_cpu: bool) -> None:
    """See that DeepSpeed is there with what it needs to compile; put this environment's `ninja` on PATH if need be.

    Raises:
        ValueError: DeepSpeed, ninja or a C++ compiler is missing; says how to get it.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"DeepSpeed is asked for but not installed: {install_line('deepspeed')}")
    if not on_cpu:
        return
    if shutil.which("ninja") is None:
        beside_python = Path(sys.executable).parent
        if not (beside_python / "ninja").exists():
            raise ValueError("DeepSpeed on a CPU needs the program ninja on PATH: pip install ninja")
        os.environ["PATH"] = f"{beside_python}{os.pathsep}{os.environ.get('PATH', '')}"
        logger.info("put %s on PATH, where ninja is", beside_python)
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX", ""), *COMPILERS) if compiler):
        raise ValueError("DeepSpeed on a CPU compiles its communication and needs a C++ compiler, such as g++, on PATH")
