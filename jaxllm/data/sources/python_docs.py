"""English prose that is on every machine with Python: the language reference and the docstrings of the standard library.

Nothing is downloaded and no library module is imported: docstrings are read from the source files by their syntax trees. What
it gives depends on the Python version: about 2.5 MB in 500 to 650 documents.
"""

import ast
import importlib
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from absl import logging
from ml_collections import ConfigDict

from jaxllm.data.documents import Document

# Tests, third-party code and data in the form of code, which hold no prose.
SKIPPED = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_vendor", "pydoc_data", "encodings")
)


class Module(NamedTuple):
    """name: json.decoder. path: json/decoder.py. tree: its syntax."""

    name: str
    path: str
    tree: ast.Module


def read(location: str, config: ConfigDict) -> Iterator[Document]:
    """First the topics of the language reference, by name, then one document a module, by path."""
    del location, config
    yield from _topics()
    for module in modules():
        text = "\n\n\n".join(f"{name}\n\n{docstring}" for name, docstring in _docstrings(module.tree, module.name))
        if text:
            yield Document(text, f"python_docs:{module.path}")


def _topics() -> Iterator[Document]:
    """The topics of `help()`; a minimal Python comes without them."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        logging.warning("python_docs: this Python has no pydoc_data (the topics of help()); going on with the docstrings alone.")
        return
    for name in sorted(topics):
        yield Document(topics[name].strip("\n") + "\n", f"python_docs:topics/{name}")


def modules() -> Iterator[Module]:
    """Of the standard library, those that may hold prose, by path: the files of a folder by name, then its subfolders."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in _sources(library):
        tree = _parse(path)
        if tree is not None:
            within = path.relative_to(library)
            yield Module(".".join(within.with_suffix("").parts).removesuffix(".__init__"), within.as_posix(), tree)


def _sources(library: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(library):
        folders[:] = sorted(name for name in folders if name not in SKIPPED)
        yield from (Path(parent, name) for name in sorted(files) if name.endswith(".py"))


def _parse(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings(action="ignore"):  # an invalid escape in the library's source is no news to our user
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError) as error:
        logging.warning("Python's documentation: %s is left out: %s", path, error)
        return None


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(full name, docstring without its indentation) of a node and of all that is defined in it, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield name, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.excepthandler):  # expressions define nothing that has a docstring
            yield from _docstrings(child, name)
