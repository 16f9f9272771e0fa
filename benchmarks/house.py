"""The size of the house: files, lines, arrows between rooms, long functions and long parameter lists of a checkout.

    python benchmarks/house.py                  # of this checkout
    python benchmarks/house.py PATH [PATH ..]   # of others, such as a worktree of an older commit, side by side

docs/architecture.md has the table before and after the rooms were built.
"""

import ast
import io
import sys
import tokenize
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


def code_lines(text: str) -> int:
    """Lines of a module without blank ones, comments and docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | Function) and body and ast.get_docstring(node) is not None:
            docstrings |= set(range(body[0].lineno, body[0].end_lineno + 1))
    lines: set[int] = set()
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def measure(root: Path) -> dict[str, str]:
    trees = modules(root)
    texts = {
        room: [path.read_text() for path in (root / room).rglob("*.py")] for room in ("rtd_jax", "launch", "configs")
    }
    found = functions(trees)
    most = sorted(found, key=lambda x: -parameters(x[1]))[:3]
    long = {name: node.end_lineno - node.lineno + 1 for name, node in found if node.end_lineno - node.lineno >= LONG}
    return {
        "files of rtd_jax/": str(len(trees)),
        "lines of rtd_jax/ that are not blank": str(
            sum(bool(x.strip()) for y in texts["rtd_jax"] for x in y.splitlines())
        ),
        "code lines of rtd_jax/ and launch/": str(sum(map(code_lines, texts["rtd_jax"] + texts["launch"]))),
        "lines of configs/": str(sum(len(text.splitlines()) for text in texts["configs"])),
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
