"""A plain run needs none of the heavy libraries, and no part imports what stands above it."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = (
    "tensorrt", "tensorrt_rtx", "ray", "matplotlib", "onnx", "onnxscript", "onnxruntime",
    "cspd.export", "cspd.tools",
)  # fmt: skip
# What each part may import of the project.
ALLOWED = {
    "api": {"engines", "runtime"},
    "engines": {"engines"},
    "export": {"engines", "export"},
    "runtime": {"engines", "runtime"},
    "tools": {"engines", "export", "runtime", "tools"},
}


def loaded_by(statement: str) -> set[str]:
    """Names of the modules in memory after `statement` in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_runtime_imports_nothing_heavy():
    modules = loaded_by("import cspd.runtime, cspd.runtime.commands.cli, cspd.runtime.pipeline")
    assert "cspd.runtime.pipeline" in modules and "torch" in modules
    assert modules.isdisjoint(HEAVY)


def test_import_of_the_package_imports_nothing_of_weight():
    """Neither PyTorch nor anything else that it depends on, until a name is used."""
    modules = loaded_by("import cspd")
    assert "cspd" in modules
    assert modules.isdisjoint((*HEAVY, "torch", "numpy", "PIL", "pydantic", "click", "rich"))
    modules = loaded_by("import cspd; cspd.load, cspd.Pipeline, cspd.Images")
    assert {"torch", "cspd.runtime.api"} <= modules
    assert modules.isdisjoint((*HEAVY, "cspd.runtime.commands.cli"))


def test_exporter_s_command_line_imports_nothing_heavy():
    modules = loaded_by("import cspd.export.cli")
    assert "cspd.export.cli" in modules
    assert modules.isdisjoint(name for name in HEAVY if name != "cspd.export")


def imported(path: Path) -> set[str]:
    """What the file imports of the project anywhere, also for types alone and inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(str(node.module))
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name for name in names if name.startswith("cspd.")}


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_in_one_direction(part):
    files = sorted((ROOT / part).rglob("*.py"))
    assert files
    parts = {path: {name.split(".")[1] for name in imported(path)} for path in files}
    wrong = {str(path.relative_to(ROOT)): found - ALLOWED[part] for path, found in parts.items()}
    assert {name: found for name, found in wrong.items() if found} == {}


def module_name(path: Path) -> str:
    return ".".join(("cspd", *path.relative_to(ROOT).with_suffix("").parts))


def graph_of(part: str) -> dict[str, set[str]]:
    """What every module of a part imports of its part."""
    files = {module_name(path): path for path in (ROOT / part).rglob("*.py")}
    return {name: imported(path) & set(files) for name, path in files.items()}


@pytest.mark.parametrize("part", ALLOWED)
def test_no_modules_of_a_part_import_each_other_in_a_circle(part):
    """graphlib names the modules of a circle that it finds."""
    graph = graph_of(part)
    assert part == "api" or any(graph.values())
    graphlib.TopologicalSorter(graph).prepare()


def room(name: str) -> str:
    """The folder of a module; a module that lies in a part itself stands for its own."""
    return name.rpartition(".")[0] if name.count(".") > 2 else name


@pytest.mark.parametrize("part", ALLOWED)
def test_no_folders_of_a_part_import_each_other_in_a_circle(part):
    rooms: dict[str, set[str]] = {}
    for name, others in graph_of(part).items():
        rooms.setdefault(room(name), set()).update(room(other) for other in others)
    graphlib.TopologicalSorter({name: to - {name} for name, to in rooms.items()}).prepare()


@pytest.mark.parametrize("part", ALLOWED)
def test_no_folder_is_a_corridor(part):
    for folder in {path.parent for path in (ROOT / part).rglob("*.py")}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= 16, folder


def test_tests_do_not_import_each_other():
    """What several need lies in tests/helpers."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    assert len(files) > 100
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if str(name).startswith("test_")], path
