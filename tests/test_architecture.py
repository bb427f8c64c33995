"""Imports go downwards only, the model sees no paths, and importing the package loads nothing heavy."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import mllm

PACKAGE = Path(mllm.__file__).parent
LOOSE_MODULES = {"__init__", "__main__", "cli"}
# A package may import from those before it and from no other.
ORDER = [
    *(
        "utils",
        "budget",
        "media",
        "config",
        "transforms",
        "packing",
        "encoders",
        "compressors",
        "hosts",
        "adapters",
        "testing",
    ),
    *("kv_cache", "model", "data", "processing", "checkpoints"),
    *("convert", "router", "inference", "training", "evaluation", "vllm_plugin", "serving", "page"),
    *("lip_crops", "lmms", "synthetic", "real", "commands", "cli"),
]
STRANGERS = [
    *(("encoders", "compressors"), ("encoders", "adapters"), ("compressors", "adapters")),
    ("training", "evaluation"),
]
# What a module or a package must not import itself.
FORBIDDEN = {"model": "pathlib", "budget": "torch", "config": "torch"}
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60


@cache
def parsed() -> dict[Path, ast.Module]:
    """Every file of the package, parsed once."""
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 200
    return {path: ast.parse(path.read_text()) for path in files}


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.Module) -> set[str]:
    """Full names of what a file imports anywhere, such as `mllm.budget.space` or `torch`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def package_imports() -> set[tuple[str, str, Path]]:
    """Who imports whom: (package, imported package, file)."""
    return {
        (package_of(path), name.split(".")[1], path)
        for path, tree in parsed().items()
        for name in imported_modules(tree)
        if name.startswith("mllm.") and (PACKAGE / name.split(".")[1]).is_dir()
    }


def test_no_module_lies_loose_in_the_package() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == LOOSE_MODULES
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} | {"cli"} == set(ORDER)


def test_imports_go_downwards_only() -> None:
    upwards = [
        f"{path.relative_to(PACKAGE)} imports {imported}"
        for package, imported, path in package_imports()
        if package not in ("__init__", "__main__") and ORDER.index(imported) > ORDER.index(package)
    ]
    assert not upwards


def test_strangers_never_see_each_other() -> None:
    pairs = {(package, imported) for package, imported, _ in package_imports()}
    assert not [(a, b) for a, b in STRANGERS if (a, b) in pairs or (b, a) in pairs]


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Packages cannot by their order; inside one, a circle hides behind an import in a function or for types alone."""
    names = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in parsed()}
    names = {path: name.removesuffix(".__init__") for path, name in names.items()}
    imports: dict[str, set[str]] = {}
    for path, tree in parsed().items():
        loaded = {name for one in imported_modules(tree) for name in (one, one.rpartition(".")[0])}
        imports[names[path]] = (loaded & set(names.values())) - {names[path], *packages_around(names[path])}
    while leaves := [name for name, imported in imports.items() if not imported & imports.keys()]:
        for name in leaves:
            del imports[name]
    assert not imports, f"these import each other, or what does: {sorted(imports)}"


def packages_around(name: str) -> set[str]:
    """The packages that a module lies in; what imports `a.b.c` runs `a` and `a.b` in any case."""
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def test_the_model_sees_no_paths_and_budgets_and_configs_no_torch() -> None:
    for path, tree in parsed().items():
        if (forbidden := FORBIDDEN.get(package_of(path))) is not None:
            imported = {name.split(".")[0] for name in imported_modules(tree)}
            assert forbidden not in imported, f"{path.relative_to(PACKAGE)} imports {forbidden}"


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, mllm; print([m for m in ('torch', 'transformers', 'peft', 'av', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_functions_and_files_stay_small() -> None:
    too_long = []
    for path, tree in parsed().items():
        lines = len(path.read_text().splitlines())
        if lines > MAX_FILE_LINES:
            too_long.append(f"{path.relative_to(PACKAGE)}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                docstring = ast.get_docstring(node, clean=False)
                length = node.end_lineno - node.lineno + 1 - (len(docstring.splitlines()) if docstring else 0)
                if length >= MAX_FUNCTION_LINES and node.name != "forward":
                    too_long.append(f"{path.relative_to(PACKAGE)}: {node.name} has {length} lines")
    assert not too_long
