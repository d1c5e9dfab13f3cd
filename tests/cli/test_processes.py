"""Who the processes of a run are, from the variables of their launchers."""

from __future__ import annotations

import pytest

from cli.runtime import Processes, processes_from_environment
from utils import UsageError


def test_alone_without_variables() -> None:
    assert processes_from_environment({}) == Processes(0, 1, 0, 1)


def test_torchrun_on_several_nodes() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert processes_from_environment(torchrun) == Processes(5, 8, 1, 4)


def test_the_shell_of_an_allocation_is_one_process() -> None:
    assert processes_from_environment({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}) == Processes()


def test_tasks_of_slurm_need_torchrun() -> None:
    step = {"SLURM_STEP_NUM_TASKS": "4"}
    with pytest.raises(UsageError, match="SLURM_STEP_NUM_TASKS=4; accepted: 1, or tasks that run torchrun"):
        processes_from_environment(step)
    assert processes_from_environment({**step, "RANK": "1", "WORLD_SIZE": "4"}) == Processes(1, 4)


@pytest.mark.parametrize("wrong", [{"WORLD_SIZE": "two"}, {"RANK": "-1"}, {"LOCAL_RANK": ""}])
def test_what_is_no_number_is_refused_by_name(wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"environment: \w+="):
        processes_from_environment(wrong)
