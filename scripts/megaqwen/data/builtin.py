"""English text that every machine has: CPython's own documentation."""

import ast
import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

SHORTEST_DOCSTRING = 80  # characters: below that they say too little to be a document
SHORTEST_ANSWER, LONGEST_ANSWER = 20, 240  # characters: it fits the tiny models' samples
SYSTEM = "You explain Python's standard library in a few words."
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "ensurepip"}


def builtin_documents() -> Iterator[str]:
    """pydoc's topics, then one document a standard library module: its docstrings, in source order.

    Deterministic for one build of CPython: sorted by name, and duplicates left out.
    """
    for name in sorted(topics):
        yield topics[name].strip()
    seen: set[str] = set()
    for _, path in library_modules():
        docstrings = [text for _, text in documented(path) if text not in seen]
        docstrings = [text for text in docstrings if len(text) >= SHORTEST_DOCSTRING]
        seen.update(docstrings)
        if docstrings:
            yield "\n\n".join(docstrings)


@functools.cache
def builtin_conversations() -> tuple[dict[str, Any], ...]:
    """Questions about functions and classes of the standard library, answered by their docstrings.

    Some have a system message, some go on with a second question about the same module.
    Deterministic as `builtin_documents`.
    """
    conversations: list[dict[str, Any]] = []
    for module, path in library_modules():
        asked: list[list[dict[str, str]]] = []
        for name, text in documented(path):
            answer = " ".join(text.partition("\n\n")[0].split())
            if name and SHORTEST_ANSWER <= len(answer) <= LONGEST_ANSWER:
                question = f"What does {module}.{name} do?"
                asked.append(
                    [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": answer},
                    ]
                )
        while asked:
            number = len(conversations)
            system = [{"role": "system", "content": SYSTEM}] if number % 4 == 3 else []
            both = sum(len(turns[-1]["content"]) for turns in asked[:2])
            goes_on = number % 3 == 2 and len(asked) > 1 and both <= LONGEST_ANSWER
            more = asked.pop(1) if goes_on else []
            conversations.append({"messages": [*system, *asked.pop(0), *more]})
    return tuple(conversations)


@functools.cache
def library_modules() -> tuple[tuple[str, Path], ...]:
    """The standard library's modules by their dotted names, sorted by path."""
    library = Path(sysconfig.get_path("stdlib"))
    inside = (path.relative_to(library) for path in sorted(library.rglob("*.py")))
    return tuple(
        (".".join(path.with_suffix("").parts).removesuffix(".__init__"), library / path)
        for path in inside
        if LEFT_OUT.isdisjoint(path.parts)
    )


@functools.cache
def documented(path: Path) -> tuple[tuple[str, str], ...]:
    """Names and docstrings of a module (without a name), its classes and functions, in source order."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ()
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return tuple((getattr(node, "name", ""), ast.get_docstring(node) or "") for node in nodes)
