"""The floors of the house: imports only go down, and an app stands on the core alone."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "rtd_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the ground up. A room may import from itself and from the rooms before it.
ROOMS = ("base", "data", "models", "losses", "methods", "teacher", "steps", "eval", "train", "apps", "__main__")


def module_name(path: Path) -> str:
    parts = ("rtd_jax", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in FILES}


def imports(path: Path) -> set[str]:
    """Modules of this project that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & NAMES
            found |= submodules or {node.module}
    return {name for name in found if name.split(".")[0] in ("rtd_jax", "configs", "launch")}


def may_import(importer: str, imported: str) -> bool:
    """Whether the rules of the house allow it."""
    here, there = importer.split("."), imported.split(".")
    if there[0] != "rtd_jax" or len(here) < 2 or len(there) < 2:
        return False
    if there[1] == "apps" and here[1] == "apps" and len(here) > 2 and len(there) > 2:
        return there[2] in (here[2], "report")
    return ROOMS.index(there[1]) <= ROOMS.index(here[1])


def test_imports_only_go_down():
    pairs = {(module_name(path), name) for path in FILES for name in imports(path)}
    wrong = {pair for pair in pairs if not may_import(*pair)}
    assert not wrong, sorted(wrong)
    assert wrong >= TO_DO, f"undone already: {sorted(TO_DO - wrong)}"


def test_the_trainer_names_no_method():
    """It may know what a term is, and the settings of all methods together."""
    known = {"rtd_jax.methods", *(f"rtd_jax.methods.{name}" for name in ("term", "own_chains", "maps"))}
    for path in (PACKAGE / "train").glob("*.py"):
        methods = {name for name in imports(path) if name.startswith("rtd_jax.methods")}
        assert methods <= known, f"{path} imports {methods - known}"


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
