"""Who the processes of a run are, from the variables of their launchers; others in the same folder; their clocks."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import tqdm.std

from cli import runtime
from cli.runtime import Processes, processes_from_environment
from sample import MODEL
from tests.cli.test_errors import check
from tests.conftest import Cli, free_port
from utils import UsageError, alone_in

PROJECT = Path(__file__).parents[2]
# A run, with a loader process that outlives it until nobody writes to it any more.
OTHER = """
import sys, os
from pathlib import Path
from utils import alone_in
with alone_in(Path(sys.argv[1]), "log_rank0.txt"):
    if os.fork():
        print(flush=True)
    sys.stdin.read()
"""
WALL_CLOCK = re.compile(r"\btime\.(time|time_ns|localtime|ctime)\(|datetime\.(now|today|utcnow)\(|getmtime|st_mtime\b")
DAY = 86_400


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


@pytest.mark.parametrize(
    "wrong",
    [{"WORLD_SIZE": "two"}, {"RANK": "-1"}, {"LOCAL_RANK": ""}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "1"}],
)
def test_what_is_no_number_is_refused_by_name(wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"environment: \w+="):
        processes_from_environment(wrong)


@pytest.mark.parametrize("named", [{}, {"MASTER_ADDR": "localhost", "MASTER_PORT": "one"}])
def test_an_environment_that_does_not_say_where_processes_meet(
    named: dict[str, str], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        **({"MASTER_ADDR": "localhost"} if named else {}),
        **named,
    }.items():
        monkeypatch.setenv(name, value)
    check(cli("--eval"), "error: environment: ", "'one'" if named else "MASTER_ADDR", "accepted: as torchrun sets it")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_never_comes(rank: int, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "PATIENCE", timedelta(seconds=1))
    there = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    for name, value in there.items():
        monkeypatch.setenv(name, str(value))
    code, _, err = cli("--eval")
    assert (code, err.count("\n")) == (1, 1)
    assert f"process {rank} stops: another process is gone (" in err


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """In the folder `out`."""
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", OTHER, str(tmp_path / "out")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=PROJECT, text=True, **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        yield process


def test_a_folder_is_one_runs_until_it_ends(
    other_run: subprocess.Popen[str], cli: Cli, image_folder: Path, tmp_path: Path
) -> None:
    """Even where it ends by `kill -9`, and its loader processes have not noticed."""
    out, said = tmp_path / "out", f"--output_dir {tmp_path / 'out'}: another run writes to it; accepted: another folder"
    for mode in ("--target_flops 50%", "--finetune", "--baseline both --target_flops 50%", "--sensitivity 8"):
        check(cli(*mode.split(), "--output_dir", out), said)
    assert (out / "log_rank0.txt").read_text() == ""
    looks_on = ("--eval", "--model", MODEL, "--checkpoint", "scratch", "--data-path", image_folder, "--num_workers", 0)
    assert cli(*looks_on, "--output_dir", out)[0] == 0
    other_run.kill()
    other_run.wait()
    with alone_in(out, "log_rank0.txt"):
        pass


def test_nothing_goes_by_the_wall_clock() -> None:
    """But the date of a report, and whether a file was written at all."""
    found = {
        f"{path.relative_to(PROJECT)}: {line.strip()}"
        for path in PROJECT.rglob("*.py")
        if not {"tests", "sample"} & set(path.relative_to(PROJECT).parts)
        for line in path.read_text().splitlines()
        if WALL_CLOCK.search(line)
    }
    assert {line.split(":")[0] for line in found} <= {"benchmarks/gpu.py"}, found


def test_a_bar_goes_on_where_the_clock_is_set_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    back = itertools.count(time.time(), -DAY)
    monkeypatch.setattr(tqdm.std, "time", lambda: next(back))
    here = runtime.Runtime(Processes(), runtime.torch.device("cpu"), None, 1, None, bar=True)
    progress = runtime.Progress(3, "Test", 3, here)
    time.sleep(0.15)
    progress.advance(lambda: "")
    assert "1/3" in capsys.readouterr().err
    progress.close()
