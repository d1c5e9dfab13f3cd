"""`--benchmark scaling` and `--benchmark loading`, and the exponents that they fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.speed import Row, exponents, line, share_schedule, table
from tests.conftest import Cli
from tests.test_patch import patched
from tests.tiny_models import FAMILIES, TOKENS


def row(size: int, batch: int, share: float, speed: float) -> Row:
    tokens = (size // 16) ** 2
    kept = round(share * tokens)
    about = {"input_size": size, "batch_size": batch, "tokens_kept": kept, "kept_share": share}
    return about | {"gflops": kept / 100, "images_per_second": speed, "speedup": speed}


@given(st.floats(-2, -0.5), st.floats(-1.5, -0.3), st.floats(-0.1, 0.9))
def test_power_laws_are_found_again(by_size: float, by_tokens: float, by_batch: float) -> None:
    """Rows of `size^a kept^b batch^c`: tokens grow with the input's area at a fixed share."""
    rows = [
        row(size, batch, share, size**by_size * round(share * (size // 16) ** 2) ** by_tokens * batch**by_batch)
        for size in (224, 384, 512)
        for batch in (1, 8)
        for share in (1.0, 0.5, 0.25)
    ]
    found = list(exponents(rows))
    assert len(found) == 3 * 2 + 3 * 2 + 3 * 3  # every axis, for each setting of the other two
    expected = {"input size": by_size + 2 * by_tokens, "tokens kept": by_tokens, "batch size": by_batch}
    ideal = {"input size": -2, "tokens kept": -1, "batch size": 0}
    for fit in found:
        assert fit["measured"] == pytest.approx(expected[fit["axis"]], abs=1e-6)
        assert fit["ideal"] == pytest.approx(ideal[fit["axis"]], abs=1e-6)


def test_a_single_value_of_an_axis_has_no_exponent() -> None:
    assert {fit["axis"] for fit in exponents([row(224, 1, 1.0, 9.0), row(224, 1, 0.5, 12.0)])} == {"tokens kept"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.75, 0.25])
def test_a_share_of_the_tokens_goes_through_the_blocks(family: str, share: float) -> None:
    model = patched(family)
    schedule = share_schedule(model.compression.space, share)
    model.check(schedule)
    searchable = model.compression.space.searchable
    assert {schedule.merge[block] for block in searchable} == {round(share * TOKENS[family])}


@pytest.mark.usefixtures("painted")
def test_scaling_from_the_command_line(cli: Cli, tmp_path: Path) -> None:
    words = ("--benchmark", "scaling", "--batch-size", 1, 2, "--rounds", 1, "--input-size", 28)
    code, out, err = cli(*words, "--output_dir", tmp_path)
    assert (code, err) == (0, "")
    rows = json.loads((tmp_path / "benchmark_scaling.json").read_text())
    assert [(row["batch_size"], row["tokens_kept"]) for row in rows] == [
        (batch, kept) for batch in (1, 2) for kept in (50, 38, 25, 12)
    ]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(1000 / row["ms_per_image"])
        assert row["ideal_speedup"] == pytest.approx(rows[0]["gflops"] / row["gflops"])
    assert "(tokens kept)^" in out
    assert "(batch size)^" in out
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_sizes_that_the_model_does_not_allow_are_left_out(cli: Cli) -> None:
    code, _, err = cli("--benchmark", "scaling", "--input-size", 30, "--rounds", 1)
    assert (code, err) == (2, "main.py: error: --input-size 30: accepted: a multiple of 4, the side of a patch\n")


def test_loading_on_photographs_made_for_it_and_on_a_folder(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    for data in ((), ("--data-path", image_folder, "--model", "vit_sample_patch4_28")):
        words = ("--benchmark", "loading", "--batch-size", 3, "--rounds", 3, "--num_workers", 0, *data)
        code, out, err = cli(*words, "--output_dir", tmp_path)
        assert (code, err) == (0, "")
        row = json.loads((tmp_path / "benchmark_loading.json").read_text())[0]
        assert row["images"] == 9
        alone = min(row["loader_images_per_second"], row["model_images_per_second"])
        assert 0 < row["both_images_per_second"] < 5 * alone  # a busy machine
        assert f"bound by {row['bound_by']}" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("scaling", "--load_compression_rate"), "--benchmark scaling has schedules of its own"),
        (("search", "--load_compression_rate"), "--benchmark search has schedules of its own"),
        (("loading", "--batch-size", 1, 2), "--batch-size: found 2 sizes"),
        (
            ("loading", "--batch-size", 9, "--data-path", "{folder}"),
            "--batch-size 9: found 9 images; accepted: two batches at least",
        ),
        (("speed",), "accepted"),
    ],
)
def test_bad_input(words: tuple[object, ...], expected: str, cli: Cli, image_folder: Path) -> None:
    filled = [str(word).format(folder=image_folder) for word in words]
    code, _, err = cli("--benchmark", *filled, "--model", "vit_sample_patch4_28", "--num_workers", 0)
    assert code == 2
    assert expected in err.replace("choose from", "accepted")
    assert err.count("\n") == 1


def test_tables_are_aligned() -> None:
    rows = [
        {"model": "m", "batch_size": 1, "compressed_memory_mib": None, "share_of_ideal": 0.9, "ideal_speedup": 1.98},
        {"model": "m", "batch_size": 16, "compressed_memory_mib": 12.34, "share_of_ideal": 1.2, "ideal_speedup": 12.0},
    ]
    assert table(rows) == [
        "batch  compr. MiB  share %  ideal",
        "    1           -       90  1.980",
        "   16        12.3      120   12.0",
    ]
    assert line(rows[0]) == "batch 1, compr. MiB -, share % 90, ideal 1.980"
