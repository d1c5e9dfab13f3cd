"""Plots: what is drawn from records, and `--plot` on folders whole and damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from cli.plot import (
    LEAST_LOSS,
    accuracy_figure,
    kept_tokens_figure,
    scaling_figure,
    search_figure,
    sensitivity_figure,
    speed_figure,
    work_figure,
)
from diffrate import budget
from diffrate.schedule import Schedule
from tests.conftest import Cli
from tests.test_patch import patched

MODEL = {"model": "m", "dense_gflops": 4.0, "tokens": 50, "blocks": 3}
DENSE = {"prune_kept_num": [50, 50, 50], "merge_kept_num": [50, 50, 50]}
HALF = {"prune_kept_num": [50, 40, 22], "merge_kept_num": [50, 30, 20]}


def score(mode: str, gflops: float, acc1: float, **more: Any) -> dict[str, Any]:
    return {"mode": mode, "gflops": gflops, "acc1": acc1, **MODEL, **HALF, **more}


def curves(figure: Figure | None, panel: int = 0) -> dict[str, list[tuple[float, float]]]:
    """The points of each labelled curve."""
    assert figure is not None
    lines = figure.axes[panel].get_lines()
    return {str(line.get_label()): [tuple(point) for point in line.get_xydata().tolist()] for line in lines}


def test_accuracy_marks_dense_searched_and_uniform() -> None:
    records = [
        score("eval", 4.0, 80.0, **DENSE),
        score("found", 2.0, 78.0),
        score("found", 3.0, 79.0),
        score("eval", 2.5, 75.0),
        score("baseline merge", 2.0, 70.0),
        score("finetune", 2.0, 60.0),
        score("finetune", 2.0, 79.5),
        {"mode": "search", "epoch": 0, "acc1": 1.0, "gflops": 2.0},
        {"mode": "benchmark", "model": "m"},
    ]
    assert curves(accuracy_figure(records)) == {
        "dense": [(4.0, 80.0)],
        "searched": [(2.0, 78.0), (3.0, 79.0)],
        "schedule": [(2.5, 75.0)],
        "uniform merge": [(2.0, 70.0)],
        "fine-tuned": [(2.0, 79.5)],
    }
    assert accuracy_figure(records[-2:]) is None


def test_kept_tokens_are_the_running_minimum_beside_uniform_ones() -> None:
    uniform = {"merge": DENSE | {"merge_kept_num": [50, 35, 25]}, "both": DENSE | {"merge_kept_num": [50, 35, 25]}}
    record = score("found", 2.0, 78.0, target_gflops=2.0, uniform=uniform)
    drawn = curves(kept_tokens_figure([record]))
    assert drawn["after merging"] == [(0, 50), (1, 30), (2, 20)]
    assert drawn["after pruning"] == [(0, 50), (1, 40), (2, 22)]
    assert drawn["uniform merge, both"] == [(0, 50), (1, 35), (2, 25)]
    assert kept_tokens_figure([score("eval", 2.0, 78.0)]) is None


def test_a_model_that_only_merges_has_no_pruning_curve() -> None:
    counts = {"prune_kept_num": None, "merge_kept_num": [50, 30, 20, 9]}  # the last is of stage 4
    record = score("found", 2.0, 78.0, target_gflops=2.0, uniform={"merge": counts}) | counts
    assert set(curves(kept_tokens_figure([record]))) == {"uniform merge", "after merging"}


def step(epoch: int, number: int, kept: float, prune: bool = True) -> dict[str, Any]:
    return {
        **{"epoch": epoch, "step": number, "done": 10 * epoch + number, "gflops": kept / 10, "target_gflops": 2.0},
        **{"prune_kept_num": [50, kept] if prune else None, "merge_kept_num": [50, kept - 1]},
    }


def test_the_search_plot_takes_the_last_run_and_each_step_once() -> None:
    steps = [step(0, 0, 9), step(0, 5, 8), step(0, 0, 40), step(0, 5, 30), step(0, 5, 31), step(1, 0, 20)]
    figure = search_figure(steps)
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == [
        "expected after pruning, by block",
        "expected after merging, by block",
        "cost",
    ]
    assert figure.axes[0].get_lines()[1].get_xydata().tolist() == [[0, 40], [5, 31], [10, 20]]
    assert curves(figure, 2)["expected"] == [(0, 4.0), (5, 3.1), (10, 2.0)]
    merging = search_figure([step(0, 0, 40, prune=False)])
    assert merging is not None
    assert len(merging.axes) == 2


def test_speed_and_scaling_show_every_row() -> None:
    timing = {"speedup": 1.5, "speedup_low": 1.4, "speedup_high": 1.7, "ideal_speedup": 2.0, "share_of_ideal": 0.75}
    rows = [{"model": "m", "batch_size": size, "precision": "float32", "mode": "eager", **timing} for size in (1, 8)]
    figure = speed_figure(rows)
    assert figure is not None
    bars = [patch.get_height() for patch in figure.axes[0].patches]
    assert bars == [1.5, 1.5]
    scaling = [
        {"model": "m", "batch_size": 1, "input_size": size, "tokens_kept": kept, "images_per_second": 1000 / kept}
        for size in (224, 384)
        for kept in (100, 50)
    ]
    assert curves(scaling_figure(scaling)) == {
        "224 pixels": [(50, 20), (100, 10)],
        "384 pixels": [(50, 20), (100, 10)],
    }


def lost(model: str, kind: str, block: int, kept: int, loss: float) -> dict[str, Any]:
    return {"model": model, "kind": kind, "block": block, "kept": kept, "tokens": 50, "share": kept / 50, "loss": loss}


def test_sensitivity_has_a_panel_for_pruning_and_one_for_merging() -> None:
    records = [
        *(
            lost("m", kind, block, kept, block / kept)
            for kind in ("merge", "prune")
            for block in (1, 2)
            for kept in (5, 25)
        ),
        lost("m", "prune", 2, 25, 0.01),  # measured again
        lost("m", "prune", 3, 5, 0.0),
        lost("only merges", "merge", 7, 10, 0.0),
    ]
    figure = sensitivity_figure(records)
    assert figure is not None
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["m, pruning alone", "m, merging alone", "only merges, merging alone"]
    assert curves(figure, 0) == {
        "block 1": [(0.1, 1 / 5), (0.5, 1 / 25)],
        "block 2": [(0.1, 2 / 5), (0.5, 0.01)],
        "block 3": [(0.1, 0.01 / 2)],  # there is no zero: half of the least
    }
    assert set(curves(figure, 1)) == {"block 1", "block 2"}
    assert curves(figure, 2) == {"block 7": [(0.2, LEAST_LOSS)]}
    assert [axes.get_yscale() for axes in figure.axes] == ["log"] * 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["block 1", "block 2", "block 3", "block 7"]


def spent(search: str, work: float, loss: float, stage: str = "") -> dict[str, Any]:
    return {"search": search, "stage": stage, "work": work, "loss": loss, "seconds": work / 100}


def test_work_has_both_searches_and_the_best_so_far() -> None:
    records = [
        spent("gradient", 5000, 3.0),
        spent("gradient", 1000, 2.0),  # a second search
        spent("calibrated", 100, 0.9),
        spent("calibrated", 200, 0.4),
        spent("gradient", 2000, 0.5),
        spent("calibrated", 300, 0.6),
        spent("calibrated", 400, 0.1),
        spent("uniform", 0, 5.0, "merge"),
        spent("uniform", 0, 0.7, "merge"),
    ]
    figure = work_figure(records)
    assert figure is not None
    (axes,) = figure.axes
    drawn = curves(figure)
    assert drawn["gradient"] == [(1000, 2.0), (2000, 0.5)]
    assert drawn["calibrated, best so far"] == [(100, 0.9), (200, 0.4), (300, 0.4), (400, 0.1)]
    assert drawn["uniform merge"] == [(0, 0.7), (1, 0.7)]  # from side to side
    points: Any = axes.collections[0].get_offsets()
    assert points.tolist() == [[100, 0.9], [200, 0.4], [300, 0.6], [400, 0.1]]
    (line,) = (line for line in axes.get_lines() if line.get_label() == "calibrated, best so far")
    assert line.get_drawstyle() == "steps-post"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_work_has_plain_axes_within_a_decade() -> None:
    figure = work_figure([spent("calibrated", 0, 0.9), spent("calibrated", 500, 0.4), spent("uniform", 0, 0.0)])
    assert figure is not None
    assert (figure.axes[0].get_xscale(), figure.axes[0].get_yscale()) == ("linear", "linear")
    assert "uniform" in curves(figure)
    assert work_figure([spent("uniform", 0, 0.7)]) is None


def test_work_is_drawn_from_its_log(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "search_work.txt").write_text(json.dumps(spent("calibrated", 100, 0.9)) + "\n")
    code, text, err = cli("--plot", tmp_path)
    assert (code, err) == (0, "")
    assert str(tmp_path / "search_work.png") in text
    assert [path.name for path in tmp_path.glob("*.png")] == ["search_work.png"]


def on_few(folder: Path) -> tuple[object, ...]:
    """The flags of a run on nine images, with fresh weights."""
    return ("--model", "vit_sample_patch4_28", "--checkpoint", "scratch", "--data-path", folder, "--num_workers", 0)


@pytest.mark.usefixtures("painted")
def test_a_folder_is_drawn_again_from_its_logs(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for words in (("--eval",), ("--baseline", "merge", "--target_flops", 0.03)):
        assert cli(*words, *on_few(image_folder), "--output_dir", out)[0] == 0
    first = (out / "accuracy.png").read_bytes()
    (out / "accuracy.png").unlink()
    code, text, err = cli("--plot", out)
    assert (code, err) == (0, "")
    assert (out / "accuracy.png").read_bytes() == first
    assert str(out / "accuracy.png") in text
    with Image.open(out / "accuracy.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 10


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "nothing to draw"),
        ({"log.txt": ""}, "nothing to draw"),
        ({"log.txt": '{"mode": "eval"'}, "log.txt: line 1: "),
        ({"log.txt": "[1]"}, "log.txt: line 1: accepted: a JSON object a line"),
        ({"log.txt": json.dumps({"mode": "found", "gflops": 2})}, "no figures for accuracy.png"),
        ({"benchmark.json": "{}"}, "benchmark.json: accepted: rows of a benchmark"),
        ({"benchmark.json": "[{}]"}, "no figures for speed.png"),
        ({"search_steps.txt": '{"epoch": 0}'}, "no figures for search_counts.png"),
        ({"search_work.txt": '{"search": "gradient"}'}, "no figures for search_work.png"),
        ({"sensitivity.txt": '{"model": "m"}'}, "no figures for sensitivity.png"),
    ],
)
def test_damaged_logs_are_named(files: dict[str, str], expected: str, cli: Cli, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    code, _, err = cli("--plot", tmp_path)
    assert code == 2
    assert expected in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


def test_a_run_keeps_its_scores_beside_a_damaged_log(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("not a log\n")
    code, text, err = cli("--eval", *on_few(image_folder), "--output_dir", tmp_path)
    assert (code, err) == (0, "")
    assert "* Acc@1 " in text
    assert "no plots" in text


def test_no_folder_is_an_error(cli: Cli, tmp_path: Path) -> None:
    assert cli("--plot", tmp_path / "gone")[::2] == (2, f"main.py: error: --plot {tmp_path / 'gone'}: no such folder\n")


def test_a_budget_that_no_uniform_schedule_meets_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: str, *rest: object) -> Schedule:
        if kind != "merge":
            raise budget.BudgetError(kind)
        return Schedule((65,) * 6, (60,) * 6)

    monkeypatch.setattr(budget, "baseline_schedule", refuse)
    model = patched("deit")
    found = budget.uniform_schedules(model.compression.space, budget.Budget(model.flops_at, 1.0))
    assert found == {"merge": Schedule((65,) * 6, (60,) * 6)}
