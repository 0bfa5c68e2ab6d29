"""Referees: what the architecture promises, read from the source itself."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm import config, registry

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxllm"
FILES = sorted(PACKAGE.rglob("*.py"))

# Imports run from the right to the left, or stay inside a level.
LEVELS = (
    ("types", "schema", "config", "consistency", "registry", "ops", "data", "__init__"),
    ("transforms", "optim"),
    ("models", "parallel", "pipeline"),
    ("objectives", "decode", "evals", "report", "interop", "compression"),
    ("engine",),
    (
        "command",
        "runs",
        "start",
        "teacher",
        "beginning",
        "series",
        "logits",
        "api",
        "dry_run",
        "train",
        "prepare",
        "generate",
        "conversation",
        "evaluate",
        "compare",
        "convert",
        "quantize",
        "fill_mask",
        "classify",
        "reward",
        "schedules",
        "hosts",
        "adapters",
    ),
)
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute names of all modules that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def area(module: str) -> str:
    """`jaxllm.ops.attention` -> `ops`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_one_way(path: Path) -> None:
    mine = area(module_name(path))
    assert mine in LEVEL, f"{path}: give '{mine}' a level"
    for name in imports(path):
        if name.startswith("jaxllm."):
            theirs = area(name)
            theirs = theirs if theirs in LEVEL else "__init__"
            assert LEVEL[theirs] <= LEVEL[mine], f"{module_name(path)} imports {name}, which lies above it"


def test_no_import_cycles() -> None:
    known = {module_name(path) for path in FILES}
    graph = {module_name(path): {name for name in imports(path, top_level_only=True) if name in known} for path in FILES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for other in graph[name] - {name}:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_forbidden_imports(path: Path) -> None:
    for name in imports(path):
        assert not re.match(r"(torch|transformers|peft|pickle|qwix|jax\._src|flax\.nnx)(\.|$)", name), f"{path} imports {name}"


@pytest.mark.parametrize("area_name", ["data", "report", "pipeline", "config", "registry"])
def test_no_jax_where_it_is_not_needed(area_name: str) -> None:
    for path in FILES:
        if area(module_name(path)) == area_name and path.name != "loader.py":
            heavy = {name for name in imports(path, top_level_only=True) if re.match(r"(jax|flax|optax|orbax)(\.|$)", name)}
            assert not heavy, f"{path} imports {heavy} at its top"


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, table in registry.TABLE.items() for name in table])
def test_registry_lines_resolve(kind: str, name: str) -> None:
    assert callable(registry.resolve(kind, name))


def test_registry_suggests_the_nearest_name() -> None:
    with pytest.raises(ValueError, match="unknown model 'lama'. Did you mean 'llama'"):
        registry.resolve("model", "lama")


@pytest.mark.parametrize("key", config.SCHEMA)
def test_schema_key_is_read(key: str) -> None:
    """Some file other than the schema reads `config.section.name`, `section.name`, or "name" out of `config.section[...]`."""
    section, _, name = key.rpartition(".")
    pattern = rf"\b{section}\.{name}\b" if section else rf"\bconfig\.{name}\b"
    aliases = rf"\b(config|settings|model|options|tokenizer|data|parallel|optimizer|schedule|precision|train|sample)\.{name}\b"
    texts = [path.read_text("utf-8") for path in FILES if path.name not in ("schema.py", "config.py", "consistency.py")]
    indexed = [text for text in texts if re.search(rf"config\.{section}\[", text) and f'"{name}"' in text]
    assert indexed or any(re.search(f"{pattern}|{aliases}", text) for text in texts), (
        f"nothing reads config.{key}: delete the field or use it"
    )


def test_import_is_light() -> None:
    """`import jaxllm` loads nothing but the standard library, so it cannot cost more than `import jax`."""
    code = "import sys; before = set(sys.modules); import jaxllm; new = {m.split('.')[0] for m in set(sys.modules) - before}; print(*new)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert not {"jax", "flax", "numpy", "orbax", "optax", "sentencepiece", "ml_collections"} & set(loaded)


def test_engine_does_not_import_nnx() -> None:
    code = (
        "import sys, jaxllm.train, jaxllm.api; print('flax.nnx' in sys.modules, 'torch' in sys.modules, 'datasets' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    assert found == ["False", "False", "False"]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 400, f"{path}: find the missing idea"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 70, f"{path}:{node.name} has {length} lines: find the missing idea"
