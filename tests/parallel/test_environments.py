"""The table of environments: every row, from variables as its launcher sets them, without starting anything."""

import pytest

from jaxllm.parallel import environments
from jaxllm.parallel.environments import Alone, Metadata, Place, find

MANUAL = {"JAXLLM_COORDINATOR": "node17:4521", "JAXLLM_PROCESSES": "8", "JAXLLM_PROCESS_ID": "3"}
# Two nodes, one task a node, as in the first report of "only one GPU a process" (jax issue 16788).
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_GPUS_ON_NODE": "2",
    "CUDA_VISIBLE_DEVICES": "0,1",
}
# The same with one task a GPU.
TASK_A_GPU = SLURM | {
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
MPI_5 = {name: value for name, value in MPI.items() if "hnp" not in name} | {"PMIX_NAMESPACE": "prterun-host-77@1"}
TPU = {"TPU_ML_PLATFORM": "JAX"}
JOB_SET = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JOB_COMPLETION_INDEX": "5",
    "JOBSET_NAME": "llama",
    "JOBSET_REPLICATED_JOB": "workers",
    "JOBSET_PROCESSES": "16",
}
SLURM_PORT = find(SLURM).coordinator.rpartition(":")[2]


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, Alone()),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "CUDA_VISIBLE_DEVICES": "0,1"}, Alone()),
        (MANUAL, Place("by hand", "node17:4521", 8, 3)),
        (MANUAL | {"JAXLLM_LOCAL_DEVICES": "2,3"}, Place("by hand", "node17:4521", 8, 3, (2, 3))),
        (MANUAL | {"JAXLLM_COORDINATOR": "[fe80::1]:4521"}, Place("by hand", "[fe80::1]:4521", 8, 3)),
        ({"JAXLLM_PROCESSES": "1"}, Alone()),
        # What a person says comes before what a launcher says; mpirun inside a Slurm job counts by itself.
        (SLURM | MANUAL, Place("by hand", "node17:4521", 8, 3)),
        (SLURM | MPI, Place("Open MPI", find(MPI).coordinator, 4, 2, (0,))),
        (SLURM | {"JAXLLM_PROCESSES": "1"}, Alone()),
        # One task a node takes all GPUs of the node.
        (SLURM, Place("Slurm", f"gpu03:{SLURM_PORT}", 2, 1, None)),
        (SLURM | {"JAXLLM_COORDINATOR": "gpu03:1234"}, Place("Slurm", "gpu03:1234", 2, 1, None)),
        # One task a GPU, all seeing both; each bound to its own, which it sees as number 0; two of four.
        (TASK_A_GPU, Place("Slurm", f"gpu03:{SLURM_PORT}", 4, 3, (1,))),
        (without(TASK_A_GPU, "CUDA_VISIBLE_DEVICES"), Place("Slurm", f"gpu03:{SLURM_PORT}", 4, 3, (1,))),
        (TASK_A_GPU | {"CUDA_VISIBLE_DEVICES": "0"}, Place("Slurm", f"gpu03:{SLURM_PORT}", 4, 3, None)),
        (
            TASK_A_GPU | {"CUDA_VISIBLE_DEVICES": "4,5,6,7", "SLURM_GPUS_ON_NODE": "4"},
            Place("Slurm", f"gpu03:{SLURM_PORT}", 4, 3, (2, 3)),
        ),
        (
            without(TASK_A_GPU, "CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE"),
            Place("Slurm", f"gpu03:{SLURM_PORT}", 4, 3, (1,)),
        ),
        (MPI | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, Place("Open MPI", find(MPI).coordinator, 4, 2, (0, 1))),
        (
            MPI_5 | {"JAXLLM_COORDINATOR": "first:9000", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
            Place("Open MPI", "first:9000", 4, 2),
        ),
        (TPU, Metadata("TPU")),
        (TPU | {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, Metadata("TPU")),
        (TPU | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, Metadata("TPU")),
        (TPU | {"JAX_PLATFORMS": "cpu"}, Alone()),
        (JOB_SET, Place("Kubernetes JobSet", f"llama-workers-0-0.llama:{environments.POD_PORT}", 16, 5)),
        # On a TPU of Kubernetes JAX knows more than the JobSet.
        (JOB_SET | TPU | {"TPU_WORKER_HOSTNAMES": "a,b"}, Metadata("TPU")),
    ],
)
def test_each_row_gives_its_place(environ: dict[str, str], place: environments.Found) -> None:
    assert find(environ) == place


@pytest.mark.parametrize(
    ("environ", "name", "words"),
    [
        # An interactive shell of salloc with one task: the command runs once, and that is right.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0"}, "Slurm", "without srun"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "Slurm", "has one task"),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, "Open MPI", "one process"),
        (TPU | {"TPU_WORKER_HOSTNAMES": "localhost"}, "TPU", "only host"),
        (TPU | {"TPU_SKIP_MDS_QUERY": "1"}, "TPU", "no metadata"),
        (without(JOB_SET, "JOBSET_NAME"), "Kubernetes", "JOBSET_NAME"),
        (JOB_SET | {"JOBSET_PROCESSES": "1"}, "Kubernetes JobSet", "is 1"),
    ],
)
def test_one_process_trains_alone_and_the_reason_is_known(environ: dict[str, str], name: str, words: str) -> None:
    found = find(environ)
    assert isinstance(found, Alone)
    assert found.environment == name
    assert words in found.reason


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"JAXLLM_PROCESSES": "4"}, "JAXLLM_COORDINATOR and JAXLLM_PROCESS_ID are not"),
        ({"JAXLLM_PROCESS_ID": "0"}, "JAXLLM_COORDINATOR and JAXLLM_PROCESSES are not"),
        ({"JAXLLM_COORDINATOR": "node:1"}, "JAXLLM_PROCESSES and JAXLLM_PROCESS_ID are not"),
        (SLURM | {"JAXLLM_PROCESSES": "4"}, "JAXLLM_COORDINATOR and JAXLLM_PROCESS_ID are not"),
        (MANUAL | {"JAXLLM_PROCESS_ID": "8"}, "this is process 8 of 8"),
        (MANUAL | {"JAXLLM_PROCESSES": "0"}, "this is process 3 of 0"),
        (MANUAL | {"JAXLLM_PROCESS_ID": "-1"}, "JAXLLM_PROCESS_ID is '-1'"),
        (MANUAL | {"JAXLLM_PROCESSES": "two"}, "JAXLLM_PROCESSES is 'two'"),
        (MANUAL | {"JAXLLM_COORDINATOR": "node17"}, "'node17' is no address"),
        (MANUAL | {"JAXLLM_COORDINATOR": "node17:70000"}, "is no address"),
        (MANUAL | {"JAXLLM_LOCAL_DEVICES": "all"}, "JAXLLM_LOCAL_DEVICES is 'all'"),
        # sbatch without srun: one of eight processes would train, and the others' GPUs would stand idle.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, "Slurm job 7 has 8 tasks, but .* not started by srun"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}, "Slurm job 7 has 2 tasks"),
        (SLURM | {"SLURM_PROCID": "2"}, "this is process 2 of 2"),
        (TASK_A_GPU | {"CUDA_VISIBLE_DEVICES": "0,1,2", "SLURM_GPUS_ON_NODE": "3"}, "2 processes on this host would share 3 GPUs"),
        (MPI_5, "does not say where process 0 is"),
        (without(MPI, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK is not set"),
        (without(JOB_SET, "JOBSET_PROCESSES"), "JOBSET_PROCESSES is not set"),
        (JOB_SET | {"JOBSET_PROCESSES": "4"}, "this is process 5 of 4"),
    ],
)
def test_what_is_incomplete_or_wrong_is_refused(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        find(environ)
    assert str(caught.value).count("\n  ") == 2
    assert "\n  Accepted: " in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "host"),
    [
        (MPI, "10.96.0.1"),
        (
            MPI | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:ac5d:9cf0:b858,2620:10d::2]:43370"},
            "[fe80::b9b:ac5d:9cf0:b858]",
        ),
        (MPI_5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "localhost"),
    ],
)
def test_the_address_of_mpirun(environ: dict[str, str], host: str) -> None:
    found = find(environ)
    assert isinstance(found, Place)
    assert found.coordinator.rpartition(":")[0] == host


def test_a_job_has_one_port_of_its_own() -> None:
    """The same on all its processes, above those that systems hand out (32768 to 60999), another for another job or step."""
    ports = set()
    for change in ({}, {"SLURM_JOB_ID": "4712"}, {"SLURM_STEP_ID": "1"}):
        found = [find(SLURM | change | {"SLURM_PROCID": number}) for number in "01"]
        assert found[0].coordinator == found[1].coordinator
        ports.add(int(found[0].coordinator.rpartition(":")[2]))
    assert len(ports) == 3
    assert all(60999 < port < 65536 for port in ports)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-015],host2", "node001"),
        ("node[001,007-015],host2", "node001"),
        ("a-b[9,11]", "a-b9"),
        ("rack[2-3]n[04-07]", "rack2n04"),
        ("gpu-node-7.cluster", "gpu-node-7.cluster"),
    ],
)
def test_first_host_of_a_list(nodes: str, first: str) -> None:
    assert environments.first_host(nodes) == first


def test_tasks_on_a_node() -> None:
    assert [environments.tasks_on_node("2(x3),1", node) for node in range(4)] == [2, 2, 2, 1]
    assert environments.tasks_on_node("8", 0) == 8


def test_every_row_is_tested_and_has_its_own_sign() -> None:
    names = {find(environ).environment for environ in (MANUAL, SLURM, MPI, TPU, JOB_SET)}
    assert names == {row.name for row in environments.TABLE}
    assert len({row.sign for row in environments.TABLE}) == len(environments.TABLE)
