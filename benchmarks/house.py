"""The size of the house: files, lines, arrows between rooms, long functions and long parameter lists of a checkout.

    python benchmarks/house.py                  # of this checkout
    python benchmarks/house.py PATH [PATH ..]   # of others, such as a worktree of an older commit, side by side

docs/architecture.md has the table before and after the rooms were built.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONG = 80  # lines of a function
Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules(root: Path) -> dict[str, ast.Module]:
    """Modules of the package by dotted name, parsed."""
    found = {}
    for path in sorted((root / "rtd_jax").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def room(name: str) -> str:
    """The folder of a module below rtd_jax."""
    return (name.split(".")[1:] or [""])[0]


def arrows(trees: dict[str, ast.Module]) -> set[tuple[str, str]]:
    """(room, room it imports from), without itself."""
    found = set()
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rtd_jax."):
                found.add((room(name), room(str(node.module))))
    return {(a, b) for a, b in found if a != b and a and b}


def functions(trees: dict[str, ast.Module]) -> list[tuple[str, Function]]:
    nodes = [(name, node) for name, tree in trees.items() for node in ast.walk(tree)]
    return [(f"{name}.{node.name}", node) for name, node in nodes if isinstance(node, Function)]


def parameters(function: Function) -> int:
    given = function.args
    return len(given.posonlyargs + given.args + given.kwonlyargs)


def measure(root: Path) -> dict[str, str]:
    trees = modules(root)
    lines = [line for path in (root / "rtd_jax").rglob("*.py") for line in path.read_text().splitlines()]
    config_lines = [line for path in (root / "configs").glob("*.py") for line in path.read_text().splitlines()]
    found = functions(trees)
    most = sorted(found, key=lambda x: -parameters(x[1]))[:3]
    long = {name: node.end_lineno - node.lineno + 1 for name, node in found if node.end_lineno - node.lineno >= LONG}
    return {
        "files of rtd_jax/": str(len(trees)),
        "lines of rtd_jax/ that are not blank": str(sum(bool(line.strip()) for line in lines)),
        "lines of configs/ that are not blank": str(sum(bool(line.strip()) for line in config_lines)),
        "rooms (the apps are one)": str(len({room(name) for name in trees} - {"", "__main__"})),
        "arrows between rooms": str(len(pairs := arrows(trees))),
        "pairs of rooms that import each other": str(sum((b, a) in pairs for a, b in pairs) // 2),
        "most parameters": ", ".join(f"{parameters(node)} ({name.rsplit('.', 1)[1]})" for name, node in most),
        f"functions over {LONG} lines": f"{len(long)} (longest {max(long.values(), default=0)})",
    }


def main() -> None:
    roots = [Path(argument) for argument in sys.argv[1:]] or [ROOT]
    tables = [measure(root) for root in roots]
    for key in tables[0]:
        print(f"| {key} | {' | '.join(table[key] for table in tables)} |")


if __name__ == "__main__":
    main()
