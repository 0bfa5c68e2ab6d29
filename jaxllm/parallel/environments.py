"""Which process of how many this one is, read from what its launcher left in the environment. Pure: nothing is started here.

`TABLE` has one row an environment, tried from the top. What a person sets by hand comes first; mpirun comes before Slurm, since it
may run inside a Slurm job. JAXLLM_COORDINATOR and JAXLLM_LOCAL_DEVICES replace what any row finds.
"""

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

Environ = Mapping[str, str]

COORDINATOR, PROCESSES, PROCESS = "JAXLLM_COORDINATOR", "JAXLLM_PROCESSES", "JAXLLM_PROCESS_ID"
DEVICES = "JAXLLM_LOCAL_DEVICES"
# Ports that systems do not hand out by themselves. A job takes one by its number, so that two jobs on a host rarely meet.
FIRST_PORT, PORTS = 61440, 4096
# Each pod has ports of its own.
POD_PORT = 8476
ALONE = f"{PROCESSES}=1 trains with this process alone"


@dataclass(frozen=True)
class Place:
    """One process among those of a run. coordinator: "host:port" of process 0. process: which one this is, from 0.

    local_devices: of the GPUs that this process sees, counted from 0, those that it takes; None: all.
    """

    environment: str
    coordinator: str
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Metadata:
    """The machine has metadata that JAX asks for the rest."""

    environment: str


@dataclass(frozen=True)
class Alone:
    """This process is the whole run. reason: why that is so although the environment looks like more; else empty."""

    environment: str = ""
    reason: str = ""


Found = Place | Metadata | Alone


class Row(NamedTuple):
    """name: as printed. sign: the variable that tells this environment. read: what the others say; ValueError if they do not fit."""

    name: str
    sign: str
    found: Callable[[Environ], bool]
    read: Callable[[Environ], Found]


def find(environ: Environ) -> Found:
    """The place of this process by the first row of the table that fits; Alone if none does. ValueError for what is incomplete."""
    row = next((row for row in TABLE if row.found(environ)), None)
    if row is None:
        if COORDINATOR in environ:
            raise _incomplete(environ, [PROCESSES, PROCESS])
        return Alone()
    found = row.read(environ)
    if not isinstance(found, Place):
        return found
    if DEVICES in environ:
        found = replace(found, local_devices=_ordinals(environ))
    return _checked(found)


def _manual(environ: Environ) -> Place | Alone:
    if environ.get(PROCESSES, "").strip() == "1":
        return Alone()
    if missing := [name for name in (COORDINATOR, PROCESSES, PROCESS) if name not in environ]:
        raise _incomplete(environ, missing)
    return Place("by hand", environ[COORDINATOR], _number(environ, PROCESSES), _number(environ, PROCESS))


def _open_mpi(environ: Environ) -> Place | Alone:
    processes = _number(environ, "OMPI_COMM_WORLD_SIZE")
    if processes == 1:
        return Alone("Open MPI", "mpirun started one process")
    here, local = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE"), _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK")
    # Up to version 4 the address of mpirun, such as 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911; later only the name of the job.
    address, job = environ.get("OMPI_MCA_orte_hnp_uri", ""), environ.get("PMIX_NAMESPACE", "")
    said = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", address)
    host = "localhost" if here == processes else (said[1] or f"[{said[2]}]") if said else None
    coordinator = environ.get(COORDINATOR) or (f"{host}:{_port(address or job)}" if host and (address or job) else None)
    if coordinator is None:
        raise ValueError(
            f"Open MPI started {processes} processes on several hosts and does not say where process 0 is.\n"
            "  Accepted: mpirun of Open MPI 4, or the address of the first host.\n"
            f"  Add to mpirun: -x {COORDINATOR}=HOST:PORT, with the first host of the host file and a free port."
        )
    return Place(
        "Open MPI", coordinator, processes, _number(environ, "OMPI_COMM_WORLD_RANK"), _share(environ, here, local, gpus=None)
    )


def _slurm(environ: Environ) -> Place | Alone:
    job = environ["SLURM_JOB_ID"]
    if "SLURM_STEP_NODELIST" not in environ or "SLURM_PROCID" not in environ:
        tasks = max(_number(environ, name, 1) for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES"))
        if tasks > 1:
            raise ValueError(
                f"Slurm job {job} has {tasks} tasks, but this command was not started by srun, so that it would run once.\n"
                f"  Accepted: srun, which starts every task; or {ALONE}.\n"
                "  Put srun before the command: srun python -m jaxllm.train ..."
            )
        return Alone("Slurm", f"job {job} runs this command once, without srun")
    processes = _number(environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS")
    if processes == 1:
        return Alone("Slurm", f"this step of job {job} has one task")
    port = _port(f"{job}.{environ.get('SLURM_STEP_ID', '0')}")
    coordinator = environ.get(COORDINATOR) or f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}"
    here = tasks_on_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(processes)), _number(environ, "SLURM_NODEID", 0))
    gpus = _number(environ, "SLURM_GPUS_ON_NODE", 0)
    local = _share(environ, here, _number(environ, "SLURM_LOCALID", 0), gpus or None)
    return Place("Slurm", coordinator, processes, _number(environ, "SLURM_PROCID"), local)


def _on_tpu(environ: Environ) -> bool:
    # `import jax` sets the first where it finds the chips of a TPU and its library.
    return "TPU_ML_PLATFORM" in environ and "tpu" in environ.get("JAX_PLATFORMS", "tpu")


def _tpu(environ: Environ) -> Metadata | Alone:
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
    slices = _number(environ, "MEGASCALE_NUM_SLICES", 1)
    if slices == 1 and hosts and "," not in hosts:
        return Alone("TPU", "its only host is this one")
    if not hosts and "TPU_SKIP_MDS_QUERY" in environ:
        return Alone("TPU", "TPU_SKIP_MDS_QUERY says that there is no metadata to ask for other hosts")
    return Metadata("TPU")


def _job_set(environ: Environ) -> Place | Alone:
    name, job = environ.get("JOBSET_NAME"), environ.get("JOBSET_REPLICATED_JOB")
    if not name:
        return Alone("Kubernetes", "this indexed job does not say JOBSET_NAME, as launch/jobset.yaml does")
    processes = _number(environ, "JOBSET_PROCESSES")
    if processes == 1:
        return Alone("Kubernetes JobSet", "JOBSET_PROCESSES is 1")
    # The pod 0 of job 0, by the name that JobSet gives it in the service that it makes for the set.
    coordinator = environ.get(COORDINATOR) or f"{name}-{job}-0-0.{name}:{POD_PORT}"
    return Place("Kubernetes JobSet", coordinator, processes, _number(environ, "JOB_COMPLETION_INDEX"))


TABLE: Sequence[Row] = (
    Row("by hand", f"{PROCESSES} or {PROCESS}", lambda environ: PROCESSES in environ or PROCESS in environ, _manual),
    Row("Open MPI", "OMPI_COMM_WORLD_SIZE", lambda environ: "OMPI_COMM_WORLD_SIZE" in environ, _open_mpi),
    Row("Slurm", "SLURM_JOB_ID", lambda environ: "SLURM_JOB_ID" in environ, _slurm),
    Row("TPU", "TPU_ML_PLATFORM", _on_tpu, _tpu),
    Row("Kubernetes JobSet", "JOB_COMPLETION_INDEX", lambda environ: "JOB_COMPLETION_INDEX" in environ, _job_set),
)


def first_host(nodes: str) -> str:
    """The first of Slurm's `node[001-004,9],other`: node001."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def tasks_on_node(tasks: str, node: int) -> int:
    """Tasks on node number `node` of Slurm's `2(x3),1`, which stands for 2, 2, 2, 1."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(count)] * int(times or 1)
    return counts[node] if node < len(counts) else max(counts, default=1)


def _share(environ: Environ, here: int, local: int, gpus: int | None) -> tuple[int, ...] | None:
    """The GPUs of process number `local` of the `here` ones on this host, which has `gpus` (None: not said); None: all it sees.

    JAX by itself would take one GPU a process whatever their number (jax issue 16788), and the wrong one if each process is bound
    to its own (jax issue 28194).
    """
    if here == 1:
        return None
    visible = next((environ[name] for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES") if environ.get(name)), "")
    seen = len(visible.split(",")) if visible else gpus
    if seen is None:
        return (local,)
    bound = seen * here <= gpus if gpus is not None else seen < here
    if bound:
        return None
    if seen % here:
        raise ValueError(
            f"{here} processes on this host would share {seen} GPUs.\n"
            f"  Accepted: a number of processes that divides {seen}, such as one a host or one a GPU.\n"
            f"  Change the tasks a node, or say which GPUs this process takes: {DEVICES}=0,1"
        )
    each = seen // here
    return tuple(range(local * each, (local + 1) * each))


def _port(job: str) -> int:
    return FIRST_PORT + zlib.crc32(job.encode()) % PORTS


def _number(environ: Environ, name: str, missing: int | None = None) -> int:
    """The whole number in this variable. ValueError if it is something else, or not there and `missing` is None."""
    value = environ.get(name, "" if missing is None else str(missing)).strip()
    if not re.fullmatch(r"\d+", value):
        raise ValueError(
            f"the environment variable {name} is {repr(value) if name in environ else 'not set'}.\n"
            f"  Accepted: a whole number of 0 or more, as the launcher sets it.\n  Set {name}; {ALONE}."
        )
    return int(value)


def _ordinals(environ: Environ) -> tuple[int, ...]:
    value = environ[DEVICES]
    if not re.fullmatch(r"\d+(,\d+)*", value):
        raise ValueError(
            f"{DEVICES} is '{value}'.\n  Accepted: numbers of GPUs that this process sees, from 0, with commas.\n"
            f"  Set it to one like {DEVICES}=0,1, or unset it."
        )
    return tuple(map(int, value.split(",")))


def _incomplete(environ: Environ, missing: Sequence[str]) -> ValueError:
    given = ", ".join(f"{name}={environ[name]}" for name in (COORDINATOR, PROCESSES, PROCESS) if name in environ)
    return ValueError(
        f"{given} is set, but {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not.\n"
        f"  Accepted: all three, the same on each process but for {PROCESS} = 0, 1, ...; or {ALONE}.\n"
        f"  Set {' and '.join(missing)}, or unset the rest."
    )


def _checked(place: Place) -> Place:
    """The place, if its numbers fit; ValueError else."""
    if place.process >= place.processes:
        raise ValueError(
            f"{place.environment}: this is process {place.process} of {place.processes}.\n"
            f"  Accepted: 0 to {place.processes - 1}; the first is 0.\n"
            f"  Correct the number of this process or that of all ({PROCESS} and {PROCESSES}, if set by hand)."
        )
    host, _, port = place.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(
            f"{place.environment}: '{place.coordinator}' is no address for the coordinator.\n"
            f"  Accepted: HOST:PORT of process 0, such as node17:4521, with a port up to {2**16 - 1}.\n  Correct {COORDINATOR}."
        )
    return place
