"""Who the processes of a run are, from the variables of their launchers."""

from __future__ import annotations

import pytest

from processes.group import EnvironmentVariableError, Processes, first_host, processes_from_environment, tasks_per_node

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM = {
    **{"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "2"},
    **{"SLURM_STEP_TASKS_PER_NODE": "2(x2),3", "SLURM_STEP_NODELIST": "gpu[07-08,12]", "SLURM_JOB_ID": "1234567"},
}


def test_alone_without_variables() -> None:
    assert processes_from_environment({}) == Processes(0, 1, 0, 1)


def test_torchrun_on_several_nodes() -> None:
    assert processes_from_environment(TORCHRUN) == Processes(5, 8, 1, 4)


def test_a_slurm_step_on_several_nodes() -> None:
    assert processes_from_environment(SLURM) == Processes(5, 7, 1, 3, "tcp://gpu07:24567")


def test_the_meeting_place_can_be_named() -> None:
    named = {**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "29500"}
    assert processes_from_environment(named).address == "tcp://head:29500"


def test_torchrun_inside_a_slurm_step_leads() -> None:
    assert processes_from_environment({**SLURM, **TORCHRUN}) == Processes(5, 8, 1, 4)


def test_the_shell_of_an_allocation_is_one_process() -> None:
    assert processes_from_environment({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == Processes()


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [("a1", "a1"), ("a1,b2", "a1"), ("gpu[03-05,9],x1", "gpu03"), ("n[1,3]-ib", "n1-ib"), ("r-1-n[10-12]", "r-1-n10")],
)
def test_first_host(nodes: str, expected: str) -> None:
    assert first_host(nodes) == expected


def test_tasks_per_node() -> None:
    assert tasks_per_node("4") == [4]
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]


@pytest.mark.parametrize(
    "wrong",
    [{"WORLD_SIZE": "two"}, {"RANK": "-1"}, {**SLURM, "SLURM_PROCID": ""}, {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "x"}],
)
def test_what_is_no_number_is_refused_by_name(wrong: dict[str, str]) -> None:
    with pytest.raises(EnvironmentVariableError, match=r"environment: \w+="):
        processes_from_environment(wrong)
