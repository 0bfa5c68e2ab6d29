"""metrics.jsonl: one JSON object a line. samples.txt: the texts."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxllm.engine.trackers.tracker import Row, Tracker, plain
from jaxllm.engine.workdir import write_text

METRICS = "metrics.jsonl"
TEXTS = "samples.txt"
# One line before each text, from which a resumed run reads the step.
HEADING = "=== step {step}: {name} ===\n"


def make(workdir: Path, config: Mapping[str, Any], resume_step: int) -> Tracker:
    """Appends to the files of `workdir`, after dropping what lies beyond `resume_step`, and all that is not of this run."""
    del config
    # What stands there of step 0 is of a run that was begun anew, maybe with another model.
    last_step = resume_step or -1
    workdir.mkdir(parents=True, exist_ok=True)
    _keep(workdir / METRICS, _rows_until(workdir / METRICS, last_step))
    _keep(workdir / TEXTS, _texts_until(workdir / TEXTS, last_step))
    return JsonLines(workdir)


def find(workdir: Path, kind: str, step: int) -> Row | None:
    """The row of this kind and step in metrics.jsonl, if there is one."""
    for line in _rows_until(workdir / METRICS, step):
        row = json.loads(line)
        if (row.get("kind"), row["step"]) == (kind, step):
            return dict(row)
    return None


class JsonLines:
    """Every row reaches the operating system before `write` returns, so that `kill -9` loses none."""

    def __init__(self, workdir: Path):
        self._metrics = (workdir / METRICS).open("a", encoding="utf-8", buffering=1)
        self._texts = (workdir / TEXTS).open("a", encoding="utf-8", errors="backslashreplace", newline="\n")

    def write(self, row: Row) -> None:
        self._metrics.write(json.dumps({name: plain(value) for name, value in row.items()}, allow_nan=False) + "\n")

    def text(self, step: int, name: str, text: str) -> None:
        self._texts.write(HEADING.format(step=step, name=name) + text.rstrip("\n") + "\n\n")
        self._texts.flush()

    def close(self) -> None:
        self._metrics.close()
        self._texts.close()


def _lines(path: Path) -> list[str]:
    """Complete lines; a last one that was cut short by a kill is left out."""
    if not path.is_file():
        return []
    # Only "\n" ends a line here: a sample may hold any other character that str.splitlines() would split at.
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        return [line for line in file if line.endswith("\n")]


def _rows_until(path: Path, last_step: int) -> Iterator[str]:
    for line in _lines(path):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if step <= last_step:
            yield line


def _texts_until(path: Path, last_step: int) -> Iterator[str]:
    kept = False
    for line in _lines(path):
        words = line.split(maxsplit=3)
        if words[:2] == ["===", "step"] and line.endswith(" ===\n") and words[2].rstrip(":").isdigit():
            kept = int(words[2].rstrip(":")) <= last_step
        if kept:
            yield line


def _keep(path: Path, lines: Iterator[str]) -> None:
    """Replaces the file at once by these lines of it, if that changes it."""
    text = "".join(lines)
    if path.is_file() and path.read_bytes() != text.encode():
        write_text(path, text)
