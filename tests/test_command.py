"""The command line: what a mistake looks like to the person who made it, and `python -m jaxllm.prepare` from end to end."""

import json
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from random_run import write_run

from jaxllm.config import base, to_json

ROOT = Path(__file__).resolve().parents[1]
CONFIG = """
    from jaxllm.config import base

    def get_config():
        config = base()
        config.tokenizer.kind = "byte"
        config.data.row_tokens = 16
        config.data.validation_frac = 0.3
        config.data.source = "texts.jsonl"
        {line}
        return config
"""
PROGRAM = """
    from jaxllm import command

    def main(arguments):
        config, workdir = command.experiment()
        {line}

    command.define_flags()
    command.run(main)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"document {'o' * n}"}) + "\n" for n in range(12)))
    write(tmp_path / "good.py", CONFIG, "")
    return tmp_path


def write(path: Path, template: str, line: str) -> None:
    path.write_text(textwrap.dedent(template).replace("{line}", line))


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


MISTAKES = {
    "no config": ([], "no config is given.\n  Accepted: "),
    "no file": (["--config=none.py"], "error: no config at 'none.py'.\n  Accepted: a Python file with get_config()"),
    "misspelt section": (
        ["--config=good.py", "--config.modle.layers=3"],
        "error: unknown config key 'modle.layers'. Did you mean 'model.layers'?\n  Accepted: chat, checkpoint, data,",
    ),
    "misspelt field": (
        ["--config=good.py", "--config.data.min_char", "3"],
        "unknown config key 'data.min_char'. Did you mean 'data.min_chars'?",
    ),
    "wrong type in the file": (["--config=worse.py"], "worse.py, line 10: train.steps = 'many' is not of type int (optimizer"),
    "misspelt in an update": (
        ["--config=update.py"],
        "update.py, line 10: unknown config key 'data.min_char'. Did you mean 'data.min_c",
    ),
    "no get_config": (["--config=empty.py"], "error: empty.py has no get_config() that returns a config.\n  Accepted: "),
    "misspelt in JSON": (["--config=bad.json"], "error: bad.json: unknown config key 'train.step'. Did you mean 'train.steps'?"),
    "misspelt in the file": (["--config=bad.py"], "bad.py, line 10: unknown config key 'train.step'. Did you mean 'train.steps'?"),
    "wrong type": (
        ["--config=good.py", "--config.train.steps=many"],
        "train.steps = 'many' is not of type int (optimizer updates).\n  Accepted: 1 or more",
    ),
    "out of range": (
        ["--config=good.py", "--config.train.steps=0"],
        "error: train.steps = 0 (optimizer updates).\n  Accepted: 1 or more.\n",
    ),
    "unknown flag": (["--config=good.py", "--workdri=x"], "Unknown command line flag 'workdri'. Did you mean: workdir"),
    "stray argument": (["--config=good.py", "x"], "unexpected argument 'x'"),
    "no data": (["--config=good.py", "--config.data.source=none.txt"], "error: there is no 'none.txt'."),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_explained_without_a_traceback(folder: Path, name: str) -> None:
    flags, words = MISTAKES[name]
    write(folder / "bad.py", CONFIG, "config.train.step = 3")
    write(folder / "worse.py", CONFIG, "config.train.steps = 'many'")
    write(folder / "update.py", CONFIG, "config.data.update({'min_char': 3})")
    write(folder / "empty.py", "{line}", "")
    (folder / "bad.json").write_text('{"train": {"step": 3}}')
    done = run(folder, "-m", "jaxllm.prepare", *flags)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "runs" / "good" / "data" / "data.json").exists()


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("raise KeyboardInterrupt", 130, "error: interrupted\n"),
        ("open('missing.txt')", 2, "error: 'missing.txt': No such file or directory.\n  Accepted: a path that this user can read"),
        (
            "raise OSError(28, 'No space left on device')",
            2,
            "error: [Errno 28] No space left on device.\n  Accepted: a disk with room",
        ),
        ("return 3", 3, ""),
        ("int('x')", 1, "Traceback (most recent call last):"),
        ("raise ValueError('a bug,\\\\n  not a mistake of the user')", 1, "Traceback (most recent call last):"),
        ("print(workdir, config.train.steps, config.data.cleaners)", 0, ""),
    ],
)
def test_bugs_keep_their_traceback(folder: Path, line: str, code: int, words: str) -> None:
    """Only texts from inside the package that say what to change are shown alone."""
    write(folder / "program.py", PROGRAM, line)
    done = run(folder, "program.py", "--config=good.py", "--config.train.steps=5", "--config.data.cleaners=('unicode',)")
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(words)
    if not code:
        assert done.stdout == "runs/good 5 ('unicode',)\n"


def test_a_tuple_is_given_as_the_help_says(folder: Path) -> None:
    """As a whole, or part by part; either takes the place of what the file says."""
    write(folder / "program.py", PROGRAM, "print(config.train.transforms, config.data.cleaners, config.train.steps)")
    said = " ".join(run(folder, "program.py", "--help").stdout.split())
    (whole,), parts = map(shlex.split, re.findall(r"as a whole, (.*), or part by part, (.*): it", said)[0])
    write(folder / "good.py", CONFIG, "config.train.transforms = ('int8', 'dora')")
    for flags in ((whole,), parts, ("--config.train.transforms=('nf4',)", parts[1])):
        done = run(folder, "program.py", "--config=good.py", *flags, "--config.data.cleaners=unicode", "--config.train.steps=5")
        assert done.stdout == "('nf4', 'lora') ('unicode',) 5\n", done.stderr


def test_what_is_asked_for_beside_a_model_is_told_from_a_default(folder: Path) -> None:
    """tokenizer.kind is bpe already, and model.layers 6."""
    write_run(folder / "model")
    write(folder / "program.py", PROGRAM, "print(config.model.layers, config.tokenizer.kind)")
    write(folder / "start.py", CONFIG.replace('config.tokenizer.kind = "byte"', "config.train.start = 'model'"), "")
    done = run(folder, "program.py", "--config=start.py")
    assert done.stdout == "2 file\n", done.stderr
    for flag, words in (
        ("--config.tokenizer.kind=bpe", "tokenizer.kind = 'bpe' with train.start = 'model', whose embeddings belong"),
        ("--config.tokenizer.path=other", "tokenizer.path = 'other' and no tokenizer.kind with train.start = 'model', whose"),
        ("--config.model.layers=6", "contradicts the model that train.start = 'model' begins with: model.layers = 6, there 2.\n"),
    ):
        done = run(folder, "program.py", "--config=start.py", flag)
        assert done.returncode == 2 and words in done.stderr, done.stderr


def test_help_is_no_failure_and_warnings_are_plain(folder: Path) -> None:
    write(folder / "program.py", PROGRAM, "from absl import logging; logging.warning('%d tokens', 3); logging.info('unseen')")
    done = run(folder, "program.py", "--config=good.py")
    assert (done.returncode, done.stderr) == (0, "warning: 3 tokens\n")
    done = run(folder, "program.py", "--help")
    assert done.returncode == 0 and "--workdir" in done.stdout


def test_prepare_from_end_to_end(folder: Path) -> None:
    """The first call prepares and shows; the second finds all fresh; a run's config.json serves as a config too."""
    first = run(folder, "-m", "jaxllm.prepare", "--config=good.py", "--show=2")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("preparing runs/good/data: nothing is there yet\n")
    assert first.stdout.count(" of 16 tokens trained") == 2
    assert "ment oooo" in first.stdout
    assert re.search(r"document 2, \d+ tokens", first.stdout)
    assert re.search(r"documents +9 +3 *\n", first.stdout)
    assert "data.source texts.jsonl: read 12 documents, kept 12, dropped none" in first.stdout

    config = base()
    config.tokenizer.kind = "byte"
    config.data.update({"row_tokens": 16, "validation_frac": 0.3, "source": "texts.jsonl"})
    (folder / "runs" / "good" / "config.json").write_text(to_json(config))
    second = run(folder, "-m", "jaxllm.prepare", "--config=runs/good/config.json")
    assert second.returncode == 0, second.stderr
    assert "preparing" not in second.stdout
    assert second.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]

    config.data.replay_source = "texts.jsonl"
    (folder / "runs" / "good" / "config.json").write_text(to_json(config))
    third = run(folder, "-m", "jaxllm.prepare", "--config=runs/good/config.json")
    assert re.search(r" train +validation +replay +replay validation\b", third.stdout), third.stderr
    assert third.stdout.splitlines()[-1].startswith("replay: no row of a batch (data.replay_frac = 0)")
