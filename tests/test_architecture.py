"""The floors of the house: imports only go down, files stay readable."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "rtd_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
SIBLINGS = {"losses", "models", "data", "segmentation", "evaluation", "generation", "teacher"}
# What a room may use beside itself and common. Siblings meet in training; these few lie on top of one another.
MAY_USE = {
    "common": set(),
    "losses": set(),
    "models": set(),
    "data": {"segmentation"},
    "segmentation": {"data"},  # a segmenter reads a Trace, and encoding asks a segmenter; modules make no cycle
    "generation": {"models"},
    "evaluation": {"generation", "models"},
    "teacher": {"models"},
    "reporting": set(),  # plain numbers in, a page out; training ends with it, and so do the jobs of assessment
    "training": SIBLINGS | {"reporting"},
    "assessment": SIBLINGS | {"training", "reporting", "settings"},  # reads the recipes and checkpoints of runs
    "tracing": SIBLINGS | {"training"},  # asks a teacher, judges its chains, writes data
    "study": {"reporting"},  # its runs are processes of launch/train.py
    "planning": {"models", "generation", "training"},  # compiles what training runs
}


def module_name(path: Path) -> str:
    parts = ("rtd_jax", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Modules of this project that a file imports."""
    names = {module_name(file) for file in FILES}
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & names
            found |= submodules or {node.module}
    return {name for name in found if name.split(".")[0] in ("rtd_jax", "configs", "launch")}


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_imports_only_go_down():
    for path in FILES:
        here = room(module_name(path))
        if here in ("", "settings"):
            assert not imports(path), f"{path} imports {imports(path)}"
            continue
        for name in imports(path):
            assert name.split(".")[0] == "rtd_jax", f"{path} imports {name}"
            assert room(name) in {here, "common"} | MAY_USE[here], f"{path} imports {name}"


def test_no_module_imports_itself_by_a_detour():
    graph = {module_name(path): imports(path) for path in FILES}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        for other in graph.get(name, ()):
            if other not in done:
                visit(other, (*trail, name))
        done.add(name)

    done: set[str] = set()
    for name in graph:
        visit(name, ())


def test_files_are_few_and_short():
    files = [path for path in FILES if path.name != "__init__.py"]
    assert len(files) <= 104
    for path in files:
        assert len(path.read_text().splitlines()) <= 400, path
    for path in (PACKAGE.parent / "launch").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 100, path
