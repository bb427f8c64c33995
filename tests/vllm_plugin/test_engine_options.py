"""vLLM's engine is started as an elastic model needs it, on exports alone, and no option is ignored."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toy_server import write_run

import mllm
from mllm.commands.serve import Settings
from mllm.serving.limits import Batching
from mllm.vllm_plugin.engine_options import EngineOptions, check_export, environment


def test_an_engine_reads_as_many_tokens_in_a_step_as_a_prompt_may_have() -> None:
    options = EngineOptions(model="exported", data_parallel=2, tensor_parallel=4, max_prompt_tokens=32_768)
    arguments = options.arguments(["image", "audio"], context_tokens=8_192)
    assert arguments["max_num_batched_tokens"] == 8_192
    assert arguments["limit_mm_per_prompt"] == {"image": 16, "audio": 16}
    assert (arguments["data_parallel_size"], arguments["tensor_parallel_size"]) == (2, 4)
    assert arguments["max_model_len"] == 8_192
    short = EngineOptions(model="exported", max_prompt_tokens=400, max_new_tokens=50)
    assert short.arguments(["image"], context_tokens=512)["max_model_len"] == 450
    assert short.arguments(["image"], context_tokens=512)["max_num_batched_tokens"] == 2_048


def test_what_the_environment_says_already_stays() -> None:
    assert "OMP_NUM_THREADS" not in environment(current={"OMP_NUM_THREADS": "8"})
    assert environment(current={})["OMP_NUM_THREADS"] == "1"
    assert environment(4, current={"OMP_NUM_THREADS": "8"})["OMP_NUM_THREADS"] == "4"


def test_only_exports_are_served(tmp_path: Path) -> None:
    run = write_run(tmp_path, ("image",))
    with pytest.raises(ValueError, match=r"is a run, and vLLM reads whole models: mllm export --model .*toy --out"):
        check_export(str(run))
    with pytest.raises(FileNotFoundError, match="holds no model"):
        check_export(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"engine": "vllm", "checkpoint": "12"}, "checkpoint"),
        ({"engine": "vllm", "merge_adapter": True}, "merge_adapter"),
        ({"engine": "vllm", "use_cpu": True}, "use_cpu"),
        ({"engine": "vllm", "batching": Batching(wait_seconds=1.0)}, "batching"),
        ({"data_parallel": 2}, "data_parallel"),
        ({"tensor_parallel": 2}, "tensor_parallel"),
    ],
)
def test_options_that_an_engine_does_not_read_are_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(
        ValueError, match=f"{name}.* is set, which engine {options.get('engine', 'mllm')} does not read"
    ):
        Settings(model="exported", **options)
    assert Settings(model="exported", engine="vllm", batching=Batching(max_rows=8)).engine == "vllm"


def test_the_plug_in_is_found_and_imports_nothing_until_it_is_called() -> None:
    code = (
        "import sys; from importlib.metadata import EntryPoint; "
        "assert EntryPoint('mllm', 'mllm.vllm_plugin:register', 'vllm.general_plugins').load(); "
        "print([name for name in ('torch', 'transformers', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_what_runs_inside_vllm_imports_it() -> None:
    package = Path(mllm.__file__).parent
    importing = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if any(line.startswith(("import vllm", "from vllm")) for line in path.read_text().splitlines())
    }
    inside = ("engine_config", "model", "parsing", "processing", "renderer")
    assert importing == {*(f"vllm_plugin/{name}.py" for name in inside), "serving/vllm_scheduler.py"}


def test_pyproject_names_the_plug_in() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"mllm": "mllm.vllm_plugin:register"}
