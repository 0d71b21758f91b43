"""English text that every machine has: CPython's own documentation."""

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

SHORTEST_DOCSTRING = 80  # characters: below that they say too little to be a document
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "ensurepip"}


def builtin_documents() -> Iterator[str]:
    """pydoc's topics, then one document a standard library module: its docstrings, in source order.

    Deterministic for one build of CPython: sorted by name, and duplicates left out.
    """
    for name in sorted(topics):
        yield topics[name].strip()
    seen: set[str] = set()
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if LEFT_OUT.isdisjoint(path.relative_to(library).parts):
            docstrings = [text for text in module_docstrings(path) if text not in seen]
            seen.update(docstrings)
            if docstrings:
                yield "\n\n".join(docstrings)


def module_docstrings(path: Path) -> list[str]:
    """The docstrings, long enough, of a module, its classes and functions, in source order."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    texts = [ast.get_docstring(node) or "" for node in nodes]
    return [text for text in texts if len(text) >= SHORTEST_DOCSTRING]
