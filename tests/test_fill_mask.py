"""`python -m jaxllm.fill_mask` from end to end: the guesses of the API on standard output, and mistakes explained."""

import subprocess
import sys
from pathlib import Path

import pytest
from random_run import write_run

import jaxllm

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields = {"model__name": "bert", "model__kv_heads": 0, "model__layers": 1, "train__objective": "masked_lm"}
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", **fields)


def fill_mask(*flags: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "jaxllm.fill_mask", *flags], cwd=ROOT, capture_output=True, text=True, check=False)


def test_guesses_are_shown_for_every_mask(run: Path) -> None:
    done = fill_mask("--run", str(run), "--text", "The [MASK] and <mask>.", "--text", "[MASK]", "--top_k=3", "--step=10")
    assert done.returncode == 0, done.stderr
    model = jaxllm.load(run, 10)
    both, one = jaxllm.fill_mask(*model, ["The [MASK] and <mask>.", "[MASK]"], top_k=3)
    assert [len(guesses) for guesses in both] == [3, 3]
    for guess in (*both[0], *both[1], *one[0]):
        assert repr(guess.text) in done.stdout
        assert f"{guess.probability:.2%}" in done.stdout
    assert "The [MASK] and <mask>." in done.stdout
    alone = jaxllm.fill_mask(*model, "[MASK]", 3)
    assert [guess.id for guess in alone[0]] == [guess.id for guess in one[0]]


def test_fill_mask_is_a_function_also_after_the_command_was_imported() -> None:
    import jaxllm.fill_mask  # noqa: PLC0415

    assert sys.modules["jaxllm.fill_mask"] is jaxllm.fill_mask
    assert jaxllm.fill_mask.__call__ is __import__("jaxllm.api").api.fill_mask


def test_mistakes_are_explained_without_a_traceback(run: Path, tmp_path: Path) -> None:
    done = fill_mask("--run", str(run), "--text", "nothing to fill")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no mask in the text 'nothing to fill'.\n  Accepted: a text with [MASK] or <mask> in it")
    done = fill_mask("--run", str(run))
    assert (done.returncode, "no text is given.\n  Accepted: --text" in done.stderr) == (2, True)
    assert "Traceback" not in done.stderr
