"""The files of launch/: their syntax, the commands that they give, and the launcher of local processes, really run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxllm.parallel import environments

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
LOCAL = [sys.executable, str(LAUNCH / "local_processes.py")]

# What is used of the API of JobSet (jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2), Job (batch/v1) and Pod (core/v1).
# Each field has its type. One that is not here is an error, as a misspelt one would be; "!" marks one that must be there.
ENV = {"name!": str, "value": str, "valueFrom": {"fieldRef!": {"fieldPath!": str}}}
VOLUME = {"name!": str, "persistentVolumeClaim": {"claimName!": str}, "emptyDir": {"medium": str}}
CONTAINER = {
    "name!": str,
    "image!": str,
    "workingDir": str,
    "command": [str],
    "args": [str],
    "env": [ENV],
    "resources": {"limits": {"nvidia.com/gpu": int}},
    "volumeMounts": [{"name!": str, "mountPath!": str}],
}
POD = {"restartPolicy!": str, "terminationGracePeriodSeconds": int, "containers!": [CONTAINER], "volumes": [VOLUME]}
JOB = {
    "parallelism!": int,
    "completions!": int,
    "completionMode": str,
    "backoffLimit": int,
    "template!": {"spec!": POD},
}
JOB_SET = {
    "apiVersion!": str,
    "kind!": str,
    "metadata!": {"name!": str},
    "spec!": {
        "failurePolicy": {"maxRestarts": int},
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
        "replicatedJobs!": [{"name!": str, "replicas": int, "template!": {"spec!": JOB}}],
    },
}


def problems(value: Any, schema: Any, where: str = "") -> list[str]:
    """Where `value` is not of the schema."""
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{where}: no list"]
        return [problem for index, each in enumerate(value) for problem in problems(each, schema[0], f"{where}[{index}]")]
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{where}: no mapping"]
        known = {name.rstrip("!"): each for name, each in schema.items()}
        found = [f"{where}.{name[:-1]}: missing" for name in schema if name.endswith("!") and name[:-1] not in value]
        found += [f"{where}.{name}: unknown" for name in value if name not in known]
        return found + [each for name in value if name in known for each in problems(value[name], known[name], f"{where}.{name}")]
    return [] if type(value) is schema else [f"{where}: {value!r} is no {schema.__name__}"]


@pytest.fixture
def job_set() -> dict:
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


def test_job_set_has_the_fields_of_its_api(job_set: dict) -> None:
    assert problems(job_set, JOB_SET) == []
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    # A pod must not be started again alone: the others wait for the one that is gone.
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    # No address of a registry: the image is for the user to name.
    assert pod["containers"][0]["image"] == "${IMAGE}"


def test_the_schema_notices_mistakes(job_set: dict) -> None:
    spec = job_set["spec"]
    spec["failurepolicy"] = spec.pop("failurePolicy")
    spec["replicatedJobs"][0]["template"]["spec"]["parallelism"] = "2"
    del spec["replicatedJobs"][0]["name"]
    assert problems(job_set, JOB_SET) == [
        ".spec.failurepolicy: unknown",
        ".spec.replicatedJobs[0].name: missing",
        ".spec.replicatedJobs[0].template.spec.parallelism: '2' is no int",
    ]


def test_pods_of_the_job_set_find_each_other(job_set: dict) -> None:
    """With the variables that Kubernetes makes of the file, the table of environments gives each pod its place."""
    name, (replicated,) = job_set["metadata"]["name"], job_set["spec"]["replicatedJobs"]
    labels = {"jobset.sigs.k8s.io/jobset-name": name, "jobset.sigs.k8s.io/replicatedjob-name": replicated["name"]}
    job = replicated["template"]["spec"]
    places = []
    for index in range(job["completions"]):
        environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": str(index)}
        for entry in job["template"]["spec"]["containers"][0]["env"]:
            path = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
            found = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
            environ[entry["name"]] = labels[found[1]] if found else entry["value"]
        places.append(environments.find(environ))
    assert job["parallelism"] == job["completions"] == len(places) > 1
    for index, place in enumerate(places):
        coordinator = f"jaxllm-workers-0-0.jaxllm:{environments.POD_PORT}"
        assert place == environments.Place("Kubernetes JobSet", coordinator, len(places), index)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(path: Path) -> None:
    """bash understands them, they stop at the first error, and no variable stands outside of quotes."""
    text = path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert os.access(path, os.X_OK)
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    outside = re.sub(r"\"(?:\\.|[^\"\\])*\"|'[^']*'", "", code, flags=re.DOTALL)
    assert set(re.findall(r"\$\S*", outside)) <= {"$#"}, path.name
    assert subprocess.run([str(path)], capture_output=True, check=False, env=os.environ).returncode == 2, "needs arguments"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """run(script, *arguments) -> the commands that it gave, as lists, to programs that only write down their arguments."""
    record = tmp_path / "told"
    for name in ("srun", "gcloud", "git"):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(
            f"#!{sys.executable}\nimport json, sys\nopen({str(record)!r}, 'a').write(json.dumps([{name!r}, *sys.argv[1:]]) + '\\n')\n"
        )
        stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def run(script: str, *arguments: str) -> list[list[str]]:
        record.write_text("")
        subprocess.run([str(LAUNCH / script), *arguments], check=True, cwd=LAUNCH.parent)
        return [json.loads(line) for line in record.read_text().splitlines()]

    return run


def test_slurm_starts_every_task(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON", "/env/bin/python")
    (command,) = told("slurm.sbatch", "--config", "a b.py", "--workdir", "/shared/run")
    assert command[0] == "srun"
    assert "--kill-on-bad-exit=1" in command
    assert command[-7:] == ["/env/bin/python", "-m", "jaxllm.train", "--config", "a b.py", "--workdir", "/shared/run"]
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.+)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE))
    assert int(options["nodes"]) > 1
    assert options["ntasks-per-node"] == "1"
    assert options["signal"].startswith("TERM@")


def test_a_tpu_pod_gets_the_files_and_the_command(told: Any) -> None:
    (create,) = told("tpu_pod.sh", "create")
    assert create[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "jaxllm"]
    assert {"--accelerator-type", "--version", "--zone"} <= set(create)
    pack, copy, install = told("tpu_pod.sh", "copy")
    assert pack[:2] == ["git", "archive"] and pack[-2] == copy[5]
    assert copy[4] == "scp" and copy[5].endswith("jaxllm.tar.gz") and "--worker=all" in copy
    assert not Path(copy[5]).exists()
    assert "pip install --quiet --editable '.[tpu]'" in install[-1]
    (run,) = told("tpu_pod.sh", "run", "--config", "a b.py", "--config.seed=3")
    assert run[4] == "ssh" and "--worker=all" in run
    assert run[-1] == r"cd jaxllm && .venv/bin/python -m jaxllm.train --config a\ b.py --config.seed=3"
    (delete,) = told("tpu_pod.sh", "delete")
    assert delete[4] == "delete"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_local_processes_get_their_places_and_their_lines_a_number() -> None:
    """As the table of environments reads them. The result is 0 only if all ended well."""
    code = "import json, os; print(json.dumps({k: v for k, v in os.environ.items() if k.startswith('JAXLLM')}))"
    done = subprocess.run([*LOCAL, "3", *python(code)], capture_output=True, text=True, check=True, timeout=60)
    said = dict(re.findall(r"^\[(\d)\] (\{.*\})$", done.stdout, re.MULTILINE))
    places = [environments.find(json.loads(said[str(number)])) for number in range(3)]
    assert [(place.processes, place.process) for place in places] == [(3, 0), (3, 1), (3, 2)]
    assert len({place.coordinator for place in places}) == 1


FAILS = """
import os, signal, sys, time
number = int(os.environ["JAXLLM_PROCESS_ID"])
if number == 1:
    print("no!")
    sys.exit(7)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
time.sleep(60)
"""


def test_when_one_fails_the_others_are_stopped(tmp_path: Path) -> None:
    """Its exit code wins over those of the processes that end because of it."""
    patient = (LAUNCH / "local_processes.py").read_text().replace("PATIENCE_SECS = 10.0", "PATIENCE_SECS = 0.5")
    (tmp_path / "quick.py").write_text(patient)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(tmp_path / "quick.py"), "2", *python(FAILS)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 7
    assert "[1] no!" in done.stdout
    assert time.monotonic() - began < 20


HOLDS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: print("saving", flush=True))
print("ready", flush=True)
while True:
    time.sleep(1)
"""


def test_a_second_signal_kills() -> None:
    with subprocess.Popen([*LOCAL, "2", *python(HOLDS)], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        pids, seen = [], []

        def read_until(word: str) -> None:
            while sum(word in line for line in seen) < 2:
                seen.append(launcher.stdout.readline())

        read_until("ready")
        pids = [int(found[1]) for line in seen if (found := re.search(r"is process (\d+)", line))]
        launcher.send_signal(signal.SIGTERM)
        read_until("saving")
        assert launcher.poll() is None
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(timeout=20) == 128 + signal.SIGKILL
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("arguments", [[], ["2"], ["0", "true"], ["two", "true"]])
def test_wrong_use_of_the_launcher(arguments: list[str]) -> None:
    done = subprocess.run([*LOCAL, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "launch/local_processes.py N COMMAND" in done.stderr


def test_the_readme_names_every_file_and_every_row() -> None:
    text = (LAUNCH / "README.md").read_text()
    for path in LAUNCH.iterdir():
        if path.is_file() and path.name != "README.md":
            assert f"`{path.name}`" in text, path.name
            section = text.partition(f"`{path.name}`\n")[2].partition("\n## ")[0]
            assert "Edit" in section, f"{path.name}: the README does not say what to edit"
    for row in environments.TABLE:
        for sign in row.sign.split(" or "):
            assert sign in text or row.name == "TPU", sign
