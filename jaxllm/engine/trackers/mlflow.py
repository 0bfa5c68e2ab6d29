"""MLflow (https://mlflow.org), through its client. MLFLOW_TRACKING_URI chooses the server; without it, files in WORKDIR/mlruns.

MLflow does not forget, so the rows that a resumed run repeats are there twice; they are equal, as resuming is exact.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.config import flatten
from jaxllm.engine.trackers.tracker import Row, Tracker, optional, scalars, stored_run

STORED = "mlflow_run.txt"
EXPERIMENT = "jaxllm"
# A request holds at most so many (mlflow.utils.validation).
PARAMS_A_BATCH = 100


def make(workdir: Path, config: Mapping[str, Any], resume_step: int) -> Tracker:
    """A new run, or the one that this directory began if it resumes. MLflow's environment variables are obeyed."""
    mlflow = optional("mlflow", "mlflow")
    entities = optional("mlflow.entities", "mlflow")
    workdir.mkdir(parents=True, exist_ok=True)
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        uri = (workdir.resolve() / "mlruns").as_uri()
        # MLflow 3.17 asks for this before it writes plain files, which need neither a server nor a database package.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    run_id = stored_run(workdir / STORED, resume_step)
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        if run_id:
            client.update_run(run_id, status="RUNNING")
        else:
            run_id = client.create_run(_experiment(client), run_name=workdir.resolve().name).info.run_id
            params = [entities.Param(key, str(value)) for key, value in flatten(config).items()]
            for start in range(0, len(params), PARAMS_A_BATCH):
                client.log_batch(run_id, params=params[start : start + PARAMS_A_BATCH])
    except mlflow.MlflowException as error:
        raise ValueError(
            f"train.trackers names 'mlflow', but a run could not be started at {uri}: {error}\n"
            "  Accepted: the address of a server that answers, or none for files in the run directory.\n"
            "  Set or unset MLFLOW_TRACKING_URI."
        ) from error
    (workdir / STORED).write_text(run_id + "\n", encoding="utf-8")
    return MlflowRun(client, run_id, entities.Metric)


def _experiment(client: Any) -> str:
    """Id of the experiment, made if it is not there yet."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name)


class MlflowRun:
    def __init__(self, client: Any, run_id: str, metric: Any):
        self._client, self._run_id, self._metric = client, run_id, metric

    def write(self, row: Row) -> None:
        now_ms = int(time.time() * 1000)
        metrics = [self._metric(name, value, now_ms, row["step"]) for name, value in scalars(row).items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._run_id, text, f"{name}/{step:08d}.txt")

    def close(self) -> None:
        self._client.set_terminated(self._run_id)
