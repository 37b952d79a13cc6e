"""The wings of the library, from the ground up: which imports which, and how much each holds.

`python tests/wings.py` prints both; `make lines` calls it.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

LIBRARY = Path(__file__).parents[1] / "repeatlab"
# A wing imports those before it.
ORDER = [
    "core",
    "repetition",
    "cost",
    "data",
    "store",
    "tasks",
    "methods",
    "training",
    "analysis",
    "figures",
    "studies",
    "report",
]
NO_CODE = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}


def wing_of(path: Path) -> str:
    return path.relative_to(LIBRARY).parts[0]


def imported(path: Path) -> set[str]:
    """Return the wings that a module imports, inside functions and for type checkers too."""
    modules = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # Within a wing only, so that none of them leads out of it unseen.
            assert not node.level, f"{path}: write imports with the package's name"
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [module.split(".") for module in modules]
    within = {part[1] for part in parts if part[0] == "repeatlab" and len(part) > 1}
    # The package itself has names as well.
    return {name for name in within if list(LIBRARY.glob(f"{name}*"))}


def arrows() -> set[tuple[str, str]]:
    """Return every pair (wing, other wing that it imports)."""
    found = set()
    for path in LIBRARY.rglob("*.py"):
        wing = wing_of(path)
        if wing in ORDER:
            found |= {(wing, other) for other in imported(path) - {wing}}
    return found


def lines_of_code(text: str) -> int:
    """Count the lines that hold code: no blank, comment or docstring."""
    strings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        holds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, holds) and ast.get_docstring(node, clean=False) is not None:
            strings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - strings)


def main() -> None:
    lines = Counter()
    for path in LIBRARY.rglob("*.py"):
        lines[wing_of(path)] += lines_of_code(path.read_text(encoding="utf-8"))
    below = arrows()
    for name in [*ORDER, *sorted(set(lines) - set(ORDER))]:
        imports = [other for other in ORDER if (name, other) in below]
        print(f"{name:12} {lines[name]:6}  imports {', '.join(imports) or '-'}")
    print(f"{'all':12} {lines.total():6}  {len(below)} arrows between {len(ORDER)} wings")


if __name__ == "__main__":
    main()
