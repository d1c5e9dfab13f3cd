"""`--benchmark scaling` and `--benchmark loading`, and the exponents that they fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scaling import ScalingRow, exponents, share_schedule
from benchmarks.tables import table
from tests.conftest import Cli
from tests.test_patch import patched
from tests.tiny_models import FAMILIES, TOKENS


def row(size: int, batch: int, share: float, speed: float) -> ScalingRow:
    tokens = (size // 16) ** 2
    kept = round(share * tokens)
    return ScalingRow("m", "float32", size, batch, tokens, kept, share, kept / 100, speed, 1 / speed, speed, 1.0, 1.0)


@given(st.floats(-2, -0.5), st.floats(-1.5, -0.3), st.floats(-0.1, 0.9))
def test_power_laws_are_found_again(by_size: float, by_tokens: float, by_batch: float) -> None:
    """Rows of `size^a kept^b batch^c`: tokens grow with the input's area at a fixed share."""
    rows = [
        row(size, batch, share, size**by_size * round(share * (size // 16) ** 2) ** by_tokens * batch**by_batch)
        for size in (224, 384, 512)
        for batch in (1, 8)
        for share in (1.0, 0.5, 0.25)
    ]
    found = exponents(rows)
    assert len(found) == 3 * 2 + 3 * 2 + 3 * 3  # every axis, for each setting of the other two
    expected = {"input_size": by_size + 2 * by_tokens, "tokens_kept": by_tokens, "batch_size": by_batch}
    for fit in found:
        assert fit.measured == pytest.approx(expected[fit.axis], abs=1e-6)
        assert fit.ideal == pytest.approx({"input_size": -2, "tokens_kept": -1, "batch_size": 0}[fit.axis], abs=1e-6)


def test_a_single_value_of_an_axis_has_no_exponent() -> None:
    assert {fit.axis for fit in exponents([row(224, 1, 1.0, 9.0), row(224, 1, 0.5, 12.0)])} == {"tokens_kept"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.75, 0.25])
def test_a_share_of_the_tokens_goes_through_the_blocks(family: str, share: float) -> None:
    model = patched(family)
    schedule = share_schedule(model.compression.space, share)
    model.check(schedule)
    searchable = model.compression.space.searchable
    assert {schedule.merge[block] for block in searchable} == {round(share * TOKENS[family])}


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
        assert 0 < row["whole_images_per_second"] < 1.5 * alone  # 1.5: a busy machine
        assert "bound by the" in out


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
    lines = table([row(224, 1, 1.0, 9.0), row(384, 16, 0.5, 12.0)], {"batch_size": "batch", "speedup": "share %"})
    assert lines == ["batch  share %", "    1      900", "   16     1200"]
