"""The real command line on real files: evaluation of every family, its records, its last line."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import models
from diffrate.device import shapes_alone
from tests import recipe_weights
from tests.conftest import Cli, ran_once
from tests.tiny_models import saved_file

PROJECT = Path(__file__).parent.parent.parent
LAST_LINE = re.compile(r"\* Acc@1 (\d+\.\d{3}) Acc@5 (\d+\.\d{3}) loss (\d+\.\d{3}) flops (\d+\.\d{3})$")
FAST = ("--num_workers", 0)


def scores(output: str) -> tuple[float, ...]:
    found = LAST_LINE.search(output.strip())
    assert found, output
    return tuple(float(number) for number in found.groups())


def official_file(name: str, path: Path) -> Path:
    """A full-size checkpoint of the zoo's ViT `name` in its official layout."""
    with shapes_alone():
        model = models.create(models.entry_of(name))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    torch.save({"model": recipe_weights.state_dict(shapes, torch.float32)}, path)
    return path


def test_an_official_file_evaluates_at_full_size(tmp_path: Path, image_folder: Path, cli: Cli) -> None:
    """Of each other family a small one is read in `test_golden.py`."""
    name, target, gflops = "vit_deit_tiny_patch16_224", "0.80", 0.809
    file = official_file(name, tmp_path / "official.pth")
    words = ("--eval", "--model", name, "--checkpoint", file, "--data-path", image_folder, *FAST)
    code, out, err = cli(*words, "--load_compression_rate", "--target_flops", target)
    assert (code, err) == (0, "")
    assert "not ImageNet ids" in out
    assert scores(out)[3] == gflops


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What an evaluation of the sample at half its cost prints, and the folder that it leaves."""
    folder = tmp_path_factory.mktemp("half") / "new" / "folder"
    return ran_once("--eval", "--load_compression_rate", "--output-dir", folder, *FAST), folder


@pytest.mark.quick
def test_the_sample_evaluates_with_no_data_path(half: tuple[str, Path]) -> None:
    acc1, acc5, _, gflops = scores(half[0])
    assert acc1 > 80
    assert acc5 > 95
    assert gflops == 0.024


def test_the_sample_is_accurate_without_compression(cli: Cli) -> None:
    acc1, _, _, gflops = scores(cli("--eval", *FAST)[1])
    assert acc1 >= 97
    assert gflops == 0.048


def on_few(folder: Path) -> tuple[object, ...]:
    """The sample's model with fresh weights, on nine images."""
    return ("--eval", "--model", "vit_sample_patch4_28", "--checkpoint", "scratch", "--data-path", folder, *FAST)


def test_scores_do_not_depend_on_the_batch_size(image_folder: Path, cli: Cli) -> None:
    """Nor on the number of images in the last one."""
    words = (*on_few(image_folder), "--load-compression-rate", "--batch_size")
    expected, found = (scores(cli(*words, size)[1]) for size in (9, 2))
    assert found[:2] == expected[:2]
    assert found[2] == pytest.approx(expected[2], abs=0.001)


def test_records_in_the_output_folder(half: tuple[str, Path]) -> None:
    out, folder = half
    record = json.loads((folder / "log.txt").read_text())
    acc1, acc5, loss, _ = scores(out)
    assert (round(record["acc1"], 3), round(record["acc5"], 3), round(record["loss"], 3)) == (acc1, acc5, loss)
    assert record["images"] == 1000
    assert (folder / "log_rank0.txt").read_text() == out
    assert "eta 0:00:00" in out
    assert "\033" not in out


def test_other_input_sizes_interpolate(cli: Cli) -> None:
    acc1, _, _, gflops = scores(cli("--eval", "--input-size", 32, *FAST)[1])
    assert gflops == 0.064
    assert acc1 > 50


def test_bfloat16_on_the_cpu(half: tuple[str, Path], cli: Cli, tmp_path: Path) -> None:
    assert cli("--eval", "--load_compression_rate", "--amp", "bf16", "--output_dir", tmp_path, *FAST)[0] == 0
    full, rounded = (json.loads((folder / "log.txt").read_text()) for folder in (half[1], tmp_path))
    assert abs(full["acc1"] - rounded["acc1"]) < 2
    assert full["loss"] != rounded["loss"]  # of more digits than are printed


def test_the_crop_is_the_users(image_folder: Path, cli: Cli) -> None:
    whole, cropped = (scores(cli(*on_few(image_folder), *crop)[1]) for crop in ((), ("--crop-pct", 0.5)))
    assert whole[2] != cropped[2]


def test_the_command_itself_with_loader_processes(tmp_path: Path) -> None:
    """From another folder, as a process of its own, with the default number of workers."""
    command = [sys.executable, str(PROJECT / "main.py"), "--eval", "--load_compression_rate"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert scores(done.stdout)[3] == 0.024
    assert list(tmp_path.iterdir()) == []


def test_the_benchmark_reports_each_batch_size_and_precision(
    cli: Cli, tmp_path: Path, memory: Callable[..., float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--benchmark", "--load_compression_rate", "--rounds")
    code, _, err = cli(*words, 1, "--batch-size", 1, "--output_dir", tmp_path / "both")
    assert (code, err) == (0, "")
    both = json.loads((tmp_path / "both" / "benchmark.json").read_text())
    assert [(row["batch_size"], row["precision"]) for row in both] == [(1, "float32"), (1, "bf16")]
    monkeypatch.setattr("benchmarks.speed.memory_mib", memory)
    code, out, err = cli(*words, 2, "--batch-size", 1, 8, "--amp", "off", "--output_dir", tmp_path)
    assert (code, err) == (0, "")
    rows = json.loads((tmp_path / "benchmark.json").read_text())
    assert [(row["batch_size"], row["precision"], row["mode"]) for row in rows] == [
        *((1, "float32", "eager"), (8, "float32", "eager"))
    ]
    for row in rows:
        assert row["ideal_speedup"] == pytest.approx(1.99, abs=0.02)
        assert row["share_of_ideal"] == pytest.approx(row["speedup"] / row["ideal_speedup"])
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert 0 < row["share_of_bound"] < 2
        assert 0 < row["bound_speedup"] < 4
        assert row["dense_ms_per_image"] == pytest.approx(1000 / row["dense_images_per_second"])
        assert row["dense_memory_mib"] > 0
    with (tmp_path / "benchmark.csv").open() as file:
        assert [float(row["speedup"]) for row in csv.DictReader(file)] == [row["speedup"] for row in rows]
    assert [json.loads(line)["speedup"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        row["speedup"] for row in rows
    ]
    assert "share" in out


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_compiled")
def test_the_benchmark_compiles_in_one_graph(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code is generated in `test_compiled.py`."""
    compiler = partial(torch.compile, fullgraph=True, dynamic=False, backend="eager")
    monkeypatch.setattr("diffrate.timing.compile_model", compiler)
    file = saved_file(tmp_path / "tiny.safetensors")
    words = ("--benchmark", "--checkpoint", file, "--batch-size", 4, "--rounds", 1, "--amp", "off", "--compile")
    code, _, err = cli(*words, "--output_dir", tmp_path)
    assert (code, err) == (0, "")
    assert [row["mode"] for row in json.loads((tmp_path / "benchmark.json").read_text())] == ["eager", "compiled"]
