"""`--export` and `--benchmark FILE...` on the command line: what they leave, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import diffrate
from diffrate.files import header
from diffrate.files.runtimes import Loaded, load_exported
from tests.cli.test_errors import check
from tests.conftest import Cli, ran_once
from tests.constructions import since
from tests.tiny_models import saved_file

TRACES = since(".".join(map(str, header.TRACES)), "torch")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_file(tmp_path_factory.mktemp("saved") / "model.safetensors")


@pytest.fixture(scope="module")
def small(saved: Path) -> Path:
    """The model of the file, as a file for torch."""
    ran_once("--export", saved.with_name("small.pt2"), "--checkpoint", saved)
    return saved.with_name("small.pt2")


@pytest.fixture(scope="module")
def dense(saved: Path) -> Path:
    ran_once("--export", saved.with_name("dense.pt2"), "--checkpoint", saved, "--dense")
    return saved.with_name("dense.pt2")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--export", "a.tflite"), ["--export a.tflite: found the suffix '.tflite'; accepted: .onnx, .pt2, .xml"]),
        pytest.param(("--export", "/nowhere/a.pt2"), ["--export /nowhere/a.pt2: no folder /nowhere"], marks=TRACES),
        (("--export", "a.onnx", "--eval"), ["accepted: one of --eval, ", "--export, "]),
        (("--export-normalize",), ["--export-normalize goes with --export"]),
        (("--eval", "--export-dtype", "fp16"), ["--export-dtype goes with --export"]),
        (("--export", "a.pt2", "--export-dtype", "fp8"), ["--export-dtype", "fp8"]),
        (("--export", "a.pt2", "--save", "a.safetensors"), ["--save goes with a search, --eval and --finetune"]),
        (
            ("--benchmark", "flight"),
            ["--benchmark: found flight; accepted: one of eval, search, scaling, loading, latency, or "],
        ),
        (("--benchmark", "eval", "a.pt2"), ["--benchmark: found eval; accepted"]),
        (("--benchmark", "gone.pt2"), ["gone.pt2: found no such file"]),
    ],
)
def test_what_cannot_be_is_one_line(words: tuple[str, ...], expected: list[str], cli: Cli) -> None:
    check(cli(*words), *expected)


def test_half_precision_that_the_runtime_has_not(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs requirements-export.txt")
    words = ("--export", tmp_path / "a.onnx", "--export-dtype", "bf16")
    check(cli(*words), "found the precision bf16; onnxruntime accepts: float32, fp16")


def test_a_missing_package_is_named(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "find_spec", lambda name: None if name == "openvino" else object())
    words = ("--export", tmp_path / "a.xml")
    check(cli(*words), "needs openvino; accepted: after pip install openvino, or all of requirements-export.txt")


@TRACES
def test_files_are_compared_on_the_images_of_the_data(
    saved: Path, image_folder: Path, photographs: Path, cli: Cli, tmp_path: Path
) -> None:
    """Nine images of the validation split, eight of a folder without splits, and no fewer than two."""
    named = tmp_path / "named.safetensors"  # without, classes are read off folders
    diffrate.save(diffrate.load(saved), named, classes=["cat", "dog", "emu"])
    words = ("--export", tmp_path / "a.pt2", "--checkpoint", named, "--data-path")
    for folder, count, more in ((image_folder, 9, ()), (photographs, 8, ("--export-normalize",))):
        code, out, err = cli(*words, folder, *more)
        assert (code, err) == (0, "")
        assert f"comparing on {count} images of {folder}" in out
        assert f"of {count} given images" in out
    for path in sorted(photographs.iterdir())[1:]:
        path.unlink()
    check(cli(*words, photographs), "found 1 images; accepted: 2 or more")


@TRACES
def test_files_are_timed_beside_their_model(saved: Path, dense: Path, small: Path, cli: Cli, tmp_path: Path) -> None:
    words = ("--rounds", 2, "--batch-size", 1, 3, "--output_dir", tmp_path)
    code, _, err = cli("--benchmark", dense, small, *words, "--model", "vit_tiny_patch16_224", "--input-size", 32)
    assert code == 2  # of other patches: another model
    code, _, err = cli("--benchmark", dense, small, "--checkpoint", saved, *words)
    assert (code, err) == (0, "")
    rows = json.loads((tmp_path / "benchmark_files.json").read_text())
    subjects = [("dense model", "eager"), ("compressed model", "eager"), ("dense.pt2", "torch"), ("small.pt2", "torch")]
    assert [(row["subject"], row["runtime"]) for row in rows] == 2 * subjects
    for base, row in ((rows[0], rows[1]), (rows[2], rows[3])):
        assert base["speedup"] == 1
        assert row["ideal_speedup"] == pytest.approx(base["gflops"] / row["gflops"])
        assert row["share_of_ideal"] == pytest.approx(row["speedup"] / row["ideal_speedup"])
        assert (base["bound_speedup"], base["share_of_bound"]) == (None, None)
        assert row["speedup"] / row["share_of_bound"] == pytest.approx(row["bound_speedup"], rel=0.5)
    assert all((row["file_mib"] is None) == (row["runtime"] == "eager") for row in rows)


@TRACES
def test_files_of_other_models_are_refused(
    saved: Path, dense: Path, small: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other, message in (
        ({"input_size": (3, 28, 28)}, "small.pt2: found images of 3 x 28 x 28; accepted: 3 x 32 x 32"),
        ({"model": "another"}, "small.pt2: found one of another; accepted: of vit_tiny_patch16_224, as the first"),
    ):

        def of_another(path: Path, *more: Any, other: Any = other) -> Loaded:
            logits, said = load_exported(path, *more)
            return Loaded(logits, replace(said, **other) if path.name == small.name else said)

        monkeypatch.setattr("benchmarks.speed.load_exported", of_another)
        check(cli("--benchmark", dense, small, "--checkpoint", saved), message)
