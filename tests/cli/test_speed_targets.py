"""`--target_speedup`, `--target_latency` and `--benchmark latency` from the command line."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

import cli.benchmark
import diffrate.latency.measure as measure
from diffrate import timing
from diffrate.schedule import find_schedule
from diffrate.searching import hard_counts
from sample import MODEL as SAMPLE
from tests.cli.test_errors import check
from tests.conftest import Cli


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tables are kept: one is measured for all searches."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(measure, "WHOLE_RUNS", 0.01)
    monkeypatch.setattr(timing, "SHORT", 0.001)
    monkeypatch.setattr(timing, "FEWEST", 2)
    monkeypatch.setattr(measure, "RUNS", (20, 20))
    monkeypatch.setattr(measure, "NOISY", math.inf)  # other tests run beside these
    monkeypatch.setattr(measure, "REACH_SECONDS", 0.01)
    monkeypatch.setattr(measure, "CONFIRMED", 0.01)
    monkeypatch.setattr(measure, "CLOSE", 0.9)  # what is tested is not how precise a time is
    monkeypatch.setattr(cli.benchmark, "RANDOM", 2)
    monkeypatch.setattr(hard_counts, "LOOKS_AN_IMAGE", 15)
    measured = measure.measured_speedup
    monkeypatch.setattr(measure, "measured_speedup", lambda *which: measured(*which[:-1], seconds=0.01))


@pytest.mark.parametrize("search", ["calibrated", "gradient"])
def test_a_search_for_a_speed(search: str, cli: Cli, photographs: Path, cache: Path, tmp_path: Path) -> None:
    words = ("--target_speedup", 1.05, "--latency_batch", 16, "--search", search)
    few = ("--data-path", photographs, "--model", SAMPLE, "--batch-size", 4, "--num_workers", 0)
    steps = ("--epochs", 2) if search == "gradient" else ()
    code, out, err = cli(*words, *few, *steps, "--output_dir", tmp_path / "out", "--seed", 0)
    assert (code, err) == (0, ""), err
    line = next(line for line in out.splitlines() if "speed-up: asked" in line)
    assert re.search(r"asked 1\.05, predicted \d\.\d\d, measured \d+\.\d\d \(batch 16, float32, eager\)$", line)
    assert len(list((cache / "diffrate" / "latency").glob("*.json"))) == 1
    rates = json.loads((tmp_path / "out" / "compression_rate.json").read_text())
    (name,) = rates["ViT-Sample"]
    assert 0 < float(name) < 0.05
    assert f"--target_flops {name}" in out
    assert find_schedule(tmp_path / "out" / "compression_rate.json", "ViT-Sample", float(name))


def test_a_baseline_for_a_latency(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    code, out, err = cli("--baseline", "prune", "--target_speedup", 1.05, "--latency_batch", 16, "--latency_file", file)
    assert (code, err) == (0, ""), err
    assert "speed-up: asked 1.05" in out
    assert json.loads(file.read_text())["setting"]["batch_size"] == 16


@pytest.mark.usefixtures("painted")
def test_the_parts_of_a_block(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("--benchmark", "latency", "--batch-size", 2, "--output_dir", tmp_path / "out")
    assert (code, err) == (0, ""), err
    assert re.search(r"prediction: median error \d+\.\d %, worst \d+\.\d % over 6 schedules$", out.strip())
    rows = json.loads((tmp_path / "out" / "benchmark_latency.json").read_text())
    assert {row["block"] for row in rows} == {0, 7}
    assert (tmp_path / "out" / "latency.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target_speedup", 99), "--target_speedup 99: accepted: 1 to "),
        (("--target_latency", 1e-7), "--target_latency 1e-07 s: accepted: "),
        (("--target_speedup", 1.1, 9), "--target_speedup 9: accepted: 1 to "),
        (("--target_speedup", 1.5, "--target_flops", 0.03), "found several; accepted: one of them"),
        (("--target_speedup", 1.5, 1.5), "--target_speedup 1.5 1.5: accepted: each once"),
        (("--eval", "--latency_batch", 1), "--latency_batch goes with --target_speedup, --target_latency and"),
        (("--eval", "--target_speedup", 1.5), "--target_speedup goes with a search or a --baseline"),
        (("--target_speedup", 0), "--target_speedup: found 0; accepted: above 0"),
        (("--target_speedup", 1.1, "--latency_file", "/dev/null/x.json"), "/dev/null/x.json: cannot be "),
    ],
)
def test_targets_that_make_no_sense(words: tuple[object, ...], message: str, cli: Cli, tmp_path: Path) -> None:
    check(cli(*words, "--output_dir", tmp_path / "out"), message)


@pytest.mark.parametrize("option", ["--target_speedup", "--target_latency"])
def test_what_is_far_out_of_reach_is_refused_before_a_table_is_measured(
    option: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise AssertionError("it takes a minute")

    monkeypatch.setattr(measure, "_sampled", fails)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    check(cli(option, 99, "--output_dir", tmp_path / "out"), f"{option} 99", "; a larger batch")
    assert not list(tmp_path.glob("cache/diffrate/latency/*.json"))
