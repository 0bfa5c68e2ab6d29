"""Conversations about Python's standard library, made from the docstrings that are on every machine with Python (python_docs.py).

    What does textwrap.fill do?                    Fill a single paragraph of text, returning a new string.
    Which module has the class Fraction?           It is in the module fractions.
    Which arguments does bisect.insort take?       It takes (a, x, lo=0, hi=None, *, key=None).

No answer repeats the name that it was asked about: to copy a rare name is more than so small a model as that of the quickstart learns.

One question is asked about each module, class, function and method: what is held out is asked about other objects than those in the
training data. Which question it is, and in which words, is decided by a hash of the object's name. It depends on the Python version:
about 4,000 conversations.
"""

import ast
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from jaxllm.data.documents import Document
from jaxllm.data.sources import conversations, python_docs

# Programs that come with Python, and packages that have been taken out of it.
NO_LIBRARY = frozenset(("idlelib", "turtledemo", "lib2to3", "distutils", "ensurepip"))
# Docstrings of what nobody should call.
NOT_FOR_USE = re.compile(
    r"deprecated|obsolete|internal|private|\balias\b|synonym|do not use|not implemented|undocumented", re.IGNORECASE
)
ANSWER_WORDS, ANSWER_CHARS = 3, 200

PURPOSES = {
    "module": ("What is the module {name} for?", "What does the module {name} do?", "Tell me about the module {name}."),
    "class": ("What is {name}?", "What is the class {name} for?", "Tell me about the class {name}."),
    "function": ("What does {name} do?", "What is the function {name} for?", "Tell me about {name}."),
    "method": ("What does {name} do?", "What is the method {name} for?", "Tell me about {name}."),
    "property": ("What is {name}?", "What does {name} give?", "Tell me about {name}."),
}
PLACES = ("Which module has the {kind} {short}?", "Where is the {kind} {short}?", "In which module do I find {short}?")
ARGUMENTS = ("Which arguments does {name} take?", "What are the arguments of {name}?", "How do I call {name}?")


class Thing(NamedTuple):
    """Something that has a docstring.

    kind: a key of PURPOSES. short: its name within its module. arguments: as the source has them; None of what is not called.
    """

    name: str
    kind: str
    module: str
    short: str
    docstring: str
    arguments: str | None = None


def read(location: str, config: ConfigDict) -> Iterator[Document]:
    """A conversation of a question and its answer about each object, module by module in the order of the source."""
    del location, config
    things = list(_things())
    count = Counter(thing.short for thing in things)
    answered = set()
    for thing in things:
        question, answer = _exchange(thing, alone=count[thing.short] == 1)
        # A sentence that is said of several objects says little about each, and would be on both sides of the split.
        if answer and answer not in answered:
            if answer == _sentence(thing.docstring):
                answered.add(answer)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            yield conversations.document(messages, f"python_questions:{thing.name}")


def _things() -> Iterator[Thing]:
    """What has a public name and a docstring, each name once (setters and definitions for other systems share one)."""
    seen = set()
    for module in python_docs.modules():
        parts = module.name.split(".")
        if parts[0] in NO_LIBRARY or not all(part.isidentifier() and _public(part) for part in parts):
            continue
        found = [Thing(module.name, "module", module.name, "", ast.get_docstring(module.tree) or "")]
        for thing in [*found, *_defined(module.tree, module.name, "")]:
            if thing.name not in seen and thing.docstring and not NOT_FOR_USE.search(thing.docstring):
                seen.add(thing.name)
                yield thing


def _public(name: str) -> bool:
    return not name.startswith("_")


def _defined(node: ast.AST, module: str, within: str) -> Iterator[Thing]:
    """Public classes, functions and methods below the node; `within` is the class that it is, with a dot behind it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not _public(child.name):
                continue
            short, docstring = within + child.name, ast.get_docstring(child) or ""
            if isinstance(child, ast.ClassDef):
                yield Thing(f"{module}.{short}", "class", module, short, docstring)
                yield from _defined(child, module, f"{short}.")
            else:
                kind = _kind(child, within)
                arguments = _arguments(child, kind)
                yield Thing(f"{module}.{short}", kind, module, short, docstring, arguments)
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _defined(child, module, within)


def _kind(function: ast.FunctionDef | ast.AsyncFunctionDef, within: str) -> str:
    decorators = [ast.unparse(each) for each in function.decorator_list]
    if any("property" in each or each.endswith((".setter", ".deleter")) for each in decorators):
        return "property"
    return "method" if within and "staticmethod" not in decorators else "function"


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef, kind: str) -> str | None:
    """Those that a caller gives: a method's without the object that it belongs to; None for what is not called with what stands there."""
    text = ast.unparse(function.args)
    if kind == "method":
        return re.sub(r"^\w+(, /)?(, |$)", "", text)
    # A function of `self` outside of a class has become something else by its decorator, as typing.Optional.
    return None if kind == "property" or text.startswith("self") else text


def _exchange(thing: Thing, *, alone: bool) -> tuple[str, str]:
    """(question, answer); the answer is empty if the docstring does not give one. alone: no other module has something of this name."""
    number = zlib.crc32(thing.name.encode())
    about, number = number % 4, number // 4
    if about == 0 and alone and thing.kind in ("class", "function") and "." not in thing.short:
        questions, answer = PLACES, f"It is in the module {thing.module}."
    elif about == 1 and thing.arguments is not None and len(thing.arguments) < ANSWER_CHARS:
        questions, answer = ARGUMENTS, f"It takes ({thing.arguments})." if thing.arguments else "It takes no arguments."
    else:
        questions, answer = PURPOSES[thing.kind], _sentence(thing.docstring)
    return questions[number % len(questions)].format(**thing._asdict()), answer


def _sentence(docstring: str) -> str:
    """Its first sentence, empty if that is none: a signature, an example, a heading, or too long for an answer."""
    paragraph = docstring.partition("\n\n")[0]
    first = re.split(r"(?<=[.!?])\s+(?=[A-Z`*'\"])", " ".join(paragraph.split()))[0]
    unlike = re.search(r">>>|->|[-=*#]{3}|^\W|^\w+(\.\w+)*\(", first) or first.endswith((":", ",", ";"))
    if unlike or len(first.split()) < ANSWER_WORDS or len(first) > ANSWER_CHARS:
        return ""
    return first if first.endswith((".", "!", "?")) else f"{first}."
