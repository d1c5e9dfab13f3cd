"""`python -m benchmarks.gpu` where there is no GPU, and all that it is made of, on the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from diffrate import timing
from tests.gpu import test_cuda

TINY = gpu.SETTINGS["cpu"]


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORT", 0.001)
    monkeypatch.setattr(timing, "FEWEST", 2)


def check_speed(row: dict[str, object], precision: str, mode: str) -> None:
    assert (row["model"], row["batch_size"], row["precision"]) == ("vit_sample_patch4_28", 1, precision)
    assert row["mode"] == mode
    assert row["ideal_speedup"] == pytest.approx(2, abs=0.02)
    json.dumps(row)


def test_without_a_gpu_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert gpu.main([]) == 0
    assert capsys.readouterr().out == f"no GPU that torch {torch.__version__} can use: nothing was measured\n"
    assert not list(tmp_path.iterdir())


def test_parts_fail_alone_and_what_there_is_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    row = {"model": "m", "mode": "eager", "speedup": 0.5, "dense_gflops": 1.0}
    speaks = f"print('torch says'); print({json.dumps(row)!r})"
    fails = "import sys; print('1 failed, 2 passed in 3s'); sys.exit('out of memory')"
    hangs = "import os, sys, time; print(os.getpid()); time.sleep(60)"
    searches = (
        "print('[2026] dense: * Acc@1 98.000 Acc@5 99.6')\n"
        "print('[2026] found: * Acc@1 95.500 Acc@5 99.2 (50 % of dense)')\n"
        "print('[2026] speed-up: asked 1.50, predicted 1.49, measured 1.51 (batch 64, float32, eager)')"
    )
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGALRM)"

    def parts(setting: gpu.Setting, scratch: Path) -> list[gpu.Part]:
        def part(name: str, seconds: int, *codes: str) -> gpu.Part:
            return gpu.Part(name, seconds, [(sys.executable, "-c", code) for code in codes])

        return [
            part("numerics", 20, "print('FAILED a::b - no'); print('1 failed, 2 passed in 3s')"),
            part("eager", 20, speaks, fails, killed),
            part("calibrated", 20, searches),
            part("gradient", 2, hangs),
            gpu.Part("gone", 20, [("/nowhere/python",)]),
            part("late", 0, speaks),
        ]

    monkeypatch.setattr(gpu, "parts", parts)
    monkeypatch.setattr(gpu, "LEAST", 1)
    file = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--out", str(file)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6
    record = json.loads(file.read_text())
    assert set(record["about"]["versions"]) == {"torch", "CUDA", "timm", "diffrate", "Python"}
    found = record["parts"]
    assert (found["numerics"]["passed"], found["numerics"]["failed"]) == (2, 1)
    assert found["numerics"]["lines"] == ["FAILED a::b - no"]
    assert found["eager"]["rows"] == [row]
    assert found["eager"]["failures"] == ["out of memory", "ended by SIGALRM"]
    assert (found["calibrated"]["dense top-1"], found["calibrated"]["found top-1"]) == (98, 95.5)
    assert found["calibrated"]["ended"]
    assert found["gradient"]["failures"] == ["cut off after 2 s"]
    assert not found["gradient"]["ended"]
    assert found["gone"]["failures"] == ["No such file or directory"]
    assert found["late"]["failures"] == ["left out: no time left"]

    found["reductions"] = {"rows": [{"model": "m", "reduction": "prunes one", "ms": 0.25}], "failures": []}
    file.write_text(json.dumps(record))  # rows of another part have other columns
    assert gpu.main(["--table", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{record['about']['card']}, driver ")
    assert lines[2:5] == ["| model | mode | speed-up |", "|---|---|---|", "| m | eager | 0.500 |"]
    assert "| m | prunes one | 0.250 |" in lines
    assert any(line.startswith("| numerics | ") and "| True | 2 | 1 | - |" in line for line in lines)
    assert any(line.startswith("| calibrated | ") and "| 98.0 | 95.5 | asked 1.50, " in line for line in lines)
    assert any(line.startswith("| gradient | ") and "| False | - |" in line for line in lines)
    assert "- eager: ended by SIGALRM" in lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "/nowhere/gpu.json"), "--out /nowhere/gpu.json: accepted: the name of a file in a folder"),
        (("--table", "/nowhere/gpu.json"), "--table /nowhere/gpu.json: found No such file or directory; accepted: "),
        (("--table", "compression_rate.json"), "--table compression_rate.json: found 'about'; accepted: a file that"),
    ],
)
def test_bad_input_is_one_line(
    words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(gpu.PROJECT)
    assert gpu.main(["--device", "cpu", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"benchmarks.gpu: error: {message}")
    assert err.count("\n") == 1


def test_every_part_has_its_commands(tmp_path: Path) -> None:
    found = {part.name: part for part in gpu.parts(gpu.SETTINGS["cuda"], tmp_path)}
    searches = ["target_speedup", "gradient", "calibrated"]
    assert list(found) == ["numerics", "eager", "compiled", "reductions", *searches, "onnx"]
    assert len(found["compiled"].commands) == 6
    for part in found.values():
        for words in part.commands:
            if "--rows" in words:
                assert words[words.index("--device") + 1] == "cuda"
                assert words[words.index("--rows") + 2] == part.name


def test_speeds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(gpu.PROJECT)
    assert gpu.main(["--device", "cpu", "--rows", str(tmp_path / "lock"), "eager"]) == 0
    rows = gpu.read(capsys.readouterr().out)["rows"]
    assert len(rows) == 2
    for row, precision in zip(rows, ("float32", "bf16"), strict=True):
        check_speed(row, precision, "eager")


def test_speeds_of_compiled_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiled = []
    monkeypatch.setattr(timing, "compile_model", lambda model: compiled.append(model) or model)
    (row,) = gpu.speeds(TINY, str(tmp_path / "lock"), "compiled", ["vit_sample_patch4_28", "1"])
    check_speed(row, "bf16", "compiled")
    assert len(compiled) == 3


def test_what_is_compared_on_a_gpu_runs(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    test_cuda.test_golden_vectors("deit", 0, cpu, tmp_path)
    test_cuda.test_constructions("rope", cpu)
    test_cuda.test_a_step_of_the_search("mae", cpu)
    test_cuda.test_a_search_is_saved_and_goes_on(None, cpu, tmp_path)
