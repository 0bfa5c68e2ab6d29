"""`python -m jaxllm.adapters`: a list of adapters, their files, averages, and what is refused."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from adapted_runs import ROOT, TRAINED, command, logits
from random_run import write_run

from jaxllm import adapters, runs
from jaxllm.interop import peft


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_and_its_files_are_one_model(adapted: Path, name: str) -> None:
    run, opened = runs.load(adapted / name), runs.load(adapted / f"{name}_peft")
    np.testing.assert_allclose(logits(opened), logits(run), atol=1e-4)
    assert np.abs(logits(run) - logits(runs.load(adapted / "base"))).max() > 0.1
    assert opened.config.lora.rank == run.config.lora.rank * (2 if name == "pissa" else 1)
    assert opened.config.train.transforms == run.config.train.transforms
    assert opened.workdir.path == adapted / f"{name}_peft"
    elsewhere = runs.load(adapted / f"{name}_peft", base=adapted / "first")
    np.testing.assert_allclose(logits(elsewhere), logits(opened), atol=1e-4)


def test_each_weight_is_that_of_its_adapter(adapted: Path, tmp_path: Path) -> None:
    """In the order in which both are given: with 1 and 0 the first one is left."""
    one, other = (str(adapted / f"{name}_peft") for name in ("lora", "pissa"))
    for paths in ((one, other), (other, one)):
        target = tmp_path / Path(paths[0]).name
        adapters.average(paths, target, ["1", "0"])
        np.testing.assert_allclose(logits(runs.load(target)), logits(runs.load(paths[0])), atol=1e-4)
    assert np.abs(logits(runs.load(one)) - logits(runs.load(other))).max() > 1e-2


def test_list(adapted: Path) -> None:
    done = command("jaxllm.adapters", "list", str(adapted), str(ROOT / "tests" / "golden" / "peft" / "llama_rslora"))
    assert done.returncode == 0, done.stderr
    rows = {Path(row.path).name: row for row in adapters.find([adapted]).rows}
    assert rows.keys() == {*TRAINED, *(f"{name}_peft" for name in TRAINED)}
    assert rows["dora_peft"][2:5] == ("dora, rslora", "2", "32") and rows["dora"][2:5] == ("dora, rslora", "2", "32")
    assert rows["pissa"].kind == "lora, pissa" and rows["pissa_peft"].rank == "6"
    for name in ("lora", "dora"):
        assert rows[name].parameters == rows[f"{name}_peft"].parameters
        assert rows[name].base == rows[f"{name}_peft"].base == str(adapted / "base")
    for words in ("dora, rslora, rank 2, alpha 32", "of q_proj, v_proj", f" {rows['lora'].parameters:,} "):
        assert words in done.stdout
    with pytest.raises(ValueError, match=r"is no adapter, and has none in it.\n  Accepted: a run whose train.transforms"):
        adapters.find([adapted / "base"])


def test_list_goes_past_what_cannot_be_read(adapted: Path, tmp_path: Path) -> None:
    """And says why below the table. Where nothing can be read that is the error, in full where it is one thing."""
    for name in ("lora_peft", "dora_peft", "lora"):
        shutil.copytree(adapted / name, tmp_path / name)
    (tmp_path / "dora_peft" / peft.TENSORS).write_bytes(b"cut")
    shutil.rmtree(tmp_path / "lora" / "tokenizer")
    (tmp_path / "hurt").mkdir()
    (tmp_path / "hurt" / "config.json").write_text("{")
    done = command("jaxllm.adapters", "list", str(tmp_path), str(adapted / "first"), str(tmp_path / "gone"))
    assert done.returncode == 0, done.stderr
    table, *below = done.stdout.partition("MB: of these in float32\n")
    assert "lora_peft" in table and "dora_peft" not in table
    reasons = "".join(below).splitlines()[1:]
    assert [line.startswith("not listed: ") for line in reasons] == [True] * 5
    for name, line in zip(("dora_peft", "hurt", "lora", "first", "gone"), reasons, strict=True):
        assert name in line, line
    assert reasons[3].endswith("is no adapter, and has none in it.") and reasons[4].endswith("does not exist.")
    shutil.rmtree(tmp_path / "lora_peft")
    done = command("jaxllm.adapters", "list", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no adapter that can be read:\n    ") and done.stderr.count("\n    ") == 3
    assert "\n  Accepted: a run whose train.transforms has lora or dora" in done.stderr
    done = command("jaxllm.adapters", "list", str(tmp_path / "dora_peft"))
    assert done.returncode == 2 and done.stderr.startswith(f"error: '{tmp_path / 'dora_peft' / peft.TENSORS}'"), done.stderr


def test_export_average_and_generate(adapted: Path, tmp_path: Path) -> None:
    done = command("jaxllm.adapters", "export", "--run", str(adapted / "lora"), "--to", str(tmp_path / "one"), "--base=moved")
    assert done.returncode == 0, done.stderr
    said = adapters.export(
        str(adapted / "lora"), tmp_path / "again", base=str(shutil.copytree(adapted / "first", tmp_path / "a base"))
    )
    assert f"python -m jaxllm.convert --from '{tmp_path / 'a base'}' --to DIR --format hf" in said
    shutil.rmtree(tmp_path / "again")
    shutil.rmtree(tmp_path / "a base")
    assert json.loads((tmp_path / "one" / peft.CONFIG).read_text())["base_model_name_or_path"] == "moved"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]
    both = ("--from", str(adapted / "lora_peft"), "--from", str(adapted / "pissa_peft"))
    done = command("jaxllm.adapters", "average", *both, "--to", str(tmp_path / "mean"), "--weights=0.5,0.25", "--rank=3")
    assert done.returncode == 0, done.stderr
    assert "relative error (Frobenius)" in done.stdout and "0.25 * " in done.stdout
    assert {product.rank for product in peft.read(tmp_path / "mean").products.values()} == {3}
    prompt = ("--prompt=The quick", "--max_tokens=8", "--temperature=0")
    texts = [
        command("jaxllm.generate", f"--run={path}", *flags, *prompt).stdout
        for path, flags in ((adapted / "lora", ()), (tmp_path / "one", (f"--base={adapted / 'base'}",)))
    ]
    assert texts[0] == texts[1] != ""


def test_an_average_without_an_error_and_one_of_a_run(adapted: Path, tmp_path: Path) -> None:
    """Two of rank 4 that are one are of rank 4, exactly; of rank 3 they are not. A run is exported first, as the error says."""
    one = str(adapted / "lora_peft")
    assert "of the products: exact up to rounding" in adapters.average([one, one], tmp_path / "exact", rank=4)
    said = adapters.average([one, one], tmp_path / "thin", rank=3)
    assert "exact" not in said and re.search(r"of the products: \d\.\d\de-0\d of all", said)
    shutil.copytree(adapted / "lora", tmp_path / "a lora")
    with pytest.raises(
        ValueError, match=r"lora/' is a run, and what .* of PEFT.\n  Accepted: directories with ad.*\n  Export"
    ) as error:
        adapters.average([str(tmp_path / "a lora") + "/", one], tmp_path / "mean")
    done = command(*shlex.split(re.findall(r"\(python -m (.*)\)", str(error.value))[0]))
    assert done.returncode == 0, done.stderr
    adapters.average([f"{tmp_path / 'a lora'}_peft", one], tmp_path / "mean")
    np.testing.assert_allclose(logits(runs.load(tmp_path / "mean")), logits(runs.load(one)), atol=1e-3)
    with pytest.raises(ValueError, match=rf"has no {peft.CONFIG}.\n  Accepted: "):
        adapters.average([str(adapted / "first"), one], tmp_path / "other")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("lsit", "x"), "unexpected argument 'lsit'.\n  Accepted: list PATH ..., train, export, average"),
        ((), "no action is given.\n  Accepted: list PATH ..., train, export, average"),
        (("list",), "no path is given.\n  Accepted: list PATH ..."),
        (("export", "--run=x"), "--to is not given.\n  Accepted: a directory that does not exist"),
        (("export", "--run=x", "--to=jaxllm"), "--to jaxllm is there already"),
    ],
)
def test_misuse(flags: tuple[str, ...], words: str) -> None:
    done = command("jaxllm.adapters", *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr


def test_pissa_whose_rest_was_quantized_is_refused_before_its_base_is_asked_for(tmp_path: Path) -> None:
    fields = {"model__name": "llama", "train__transforms": ("lora", "int8"), "lora__init": "pissa", "lora__rank": 2}
    run = write_run(tmp_path / "run", train__start="gone", **fields)
    words = r"quantized what that left of layers/attention/k/kernel, .*\n  Accepted: runs of PiSSA.*\n  Write the merged"
    for base in ("", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match=words):
            adapters.export(str(run), tmp_path / "out", base=base)
    # Where other kernels are quantized than those with adapters, it is the base that is missing.
    run = write_run(
        tmp_path / "apart", train__start="gone", **fields, lora__targets=".*mlp/.*/kernel", quant__targets=".*attention/.*/kernel"
    )
    with pytest.raises(ValueError, match="its base 'gone' is not here"):
        adapters.export(str(run), tmp_path / "out")


def test_what_is_not_exported(adapted: Path) -> None:
    target = adapted / "x"
    for name, words in (("first", r"'.*first' trained no adapter"), ("base", r"'.*base' is no run"), ("lora_peft", "is no run")):
        with pytest.raises(ValueError, match=rf"{words}.\n  Accepted: a run whose train.transforms"):
            adapters.export(str(adapted / name), target)
    with pytest.raises(
        ValueError, match=r"took a part of each kernel away, and its base 'gone' is not here.\n  Accepted: the model"
    ):
        adapters.export(str(adapted / "pissa"), target, base="gone")
    shutil.copytree(adapted / "lora", adapted / "all")
    values = json.loads((adapted / "all" / "config.json").read_text())
    values["train"]["trainable"] = ".*"
    (adapted / "all" / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match=r"trained layers/attention/q/kernel/base, .*, which have adapters beside them.\n  Accepted"
    ):
        adapters.export(str(adapted / "all"), target)
    shutil.rmtree(adapted / "all")
    with pytest.raises(ValueError, match=r"1 adapters to average.\n  Accepted: two or more"):
        adapters.average([str(adapted / "lora_peft")], target)
    with pytest.raises(ValueError, match=r"--weights 1,b for 2 adapters.\n  Accepted: 2 numbers"):
        adapters.average([str(adapted / "lora_peft")] * 2, target, ["1", "b"])
    assert not target.exists()
