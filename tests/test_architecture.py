"""Imports go downwards only, the model sees no paths, and importing the package loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import mllm

PACKAGE = Path(mllm.__file__).parent
# A module may import from its own level or from a lower one. A package stands for its modules.
LEVELS = [
    {
        *("budget", "grammar", "tiling", "maps", "sampler", "metrics", "benchmarks"),
        *("settings", "sources", "checkpoint_layouts", "registration", "filterbank", "segments", "progress"),
        *("cache_names", "extras", "image_processors", "plain_text", "probes", "run_folders", "tensor_files"),
        *("windows", "grouping"),
    },
    {"configuration", "media", "encoders", "compressors", "adapters"},
    {
        *("new_tokens", "precision", "splice", "layout", "image_tiles", "augmentation", "log_mel", "transforms"),
        *("expansion", "trainables", "pretrained"),
        *("beams", "prefixes", "packing", "segment_attention", "constant_prompt"),
    },
    {"modeling", "modeling_base", "modeling_body", "routing", "processing", "loaded", "data", "chat"}
    | {"chat_template", "conversations", "processor_calls"},
    {"vocabulary", "building", "loading", "cost", "convert"},
    {"generation", "growing", "asking", "decoding", "timing", "long_audio", "training"},
    {"evaluation"},
    {"world", "doctor", "preparation", "lmms"},
    {"real"},
    {"commands", "cli", "__main__"},
]
# Registering needs the classes at the moment transformers loads; it imports them inside functions.
EXCEPTIONS = {"registration", "__init__"}
STRANGERS = [("encoders", "compressors"), ("encoders", "adapters"), ("compressors", "adapters")]


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(path: Path) -> set[str]:
    units = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mllm":
            names = node.module.split(".")
            units |= {names[1]} if len(names) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            units |= {a.name.split(".")[1] for a in node.names if a.name.startswith("mllm.")}
    return units


def all_imports() -> list[tuple[str, str, Path]]:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 30
    return [(unit_of(path), unit, path) for path in files for unit in imported_units(path)]


def level_of(unit: str) -> int:
    found = [index for index, units in enumerate(LEVELS) if unit in units]
    assert found, f"{unit} has no level: add it to LEVELS where it belongs"
    return found[0]


def test_imports_go_downwards_only() -> None:
    upwards = [
        f"{path.relative_to(PACKAGE)} imports {unit}"
        for own, unit, path in all_imports()
        if own not in EXCEPTIONS and (PACKAGE / unit).with_suffix(".py").exists() | (PACKAGE / unit).is_dir()
        if level_of(unit) > level_of(own)
    ]
    assert not upwards


def test_encoders_compressors_and_adapters_never_see_each_other() -> None:
    pairs = {(own, unit) for own, unit, _ in all_imports()}
    assert not [(a, b) for a, b in STRANGERS if (a, b) in pairs or (b, a) in pairs]


def test_the_model_sees_no_paths_and_the_budget_no_torch() -> None:
    for module, forbidden in (("modeling", "pathlib"), ("budget", "torch"), ("sampler", "torch"), ("metrics", "torch")):
        names = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in ([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) else node.names)
        }
        assert forbidden not in names, f"{module} imports {forbidden}"


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, mllm; print([m for m in ('torch', 'transformers', 'peft', 'av', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_functions_files_and_arguments_stay_small() -> None:
    too_long = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        if len(text.splitlines()) > 400:
            too_long.append(f"{path.relative_to(PACKAGE)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                doc = ast.get_docstring(node, clean=False)
                length = node.end_lineno - node.lineno + 1 - (len(doc.splitlines()) if doc else 0)
                if length >= 60 and node.name != "forward":
                    too_long.append(f"{path.relative_to(PACKAGE)}: {node.name} has {length} lines")
    assert not too_long
