"""`--plot`, and the plots at the end of a run: from the logs in an output folder to files beside them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from cli.runtime import FOUND, LATENCY, LOG, SCALING, SENSITIVITY, SPEED, STEPS, WORK, Runtime
from cli.settings import Settings
from diffrate.atomic import first_line, one_line, parse_json, refuse_pipe, whole_file
from diffrate.budget import PEERS
from diffrate.schedule import MERGE_FIELD, PRUNE_FIELD, RULES_FIELD, Kept, ScheduleError, make_schedule, running_counts
from utils import UsageError

OTHER = "uniform, another rule"
# Okabe and Ito's colours; every curve also has a mark or a stroke of its own, for grey print.
STYLES = {
    "dense": ("#000000", "*"),
    "searched": ("#0072b2", "o"),
    "schedule": ("#56b4e9", "s"),
    "fine-tuned": ("#009e73", "P"),
    "uniform merge": ("#d55e00", "^"),
    "uniform prune": ("#e69f00", "v"),
    "uniform both": ("#cc79a7", "D"),
    "uniform random": ("#999999", "X"),
    OTHER: ("#8c510a", "p"),
    "tome": ("#b2182b", "<"),
    "pitome": ("#762a83", ">"),
}
LATENCIES = (
    ("attention_ms", "attention, of tokens that enter", "-"),
    ("mlp_ms", "MLP, of tokens that leave", "-"),
    ("prune_ms", "pruning a tenth", "--"),
    ("merge_ms", "merging a tenth", "--"),
)
WORK_STYLES = {"gradient": ("#0072b2", "o"), "calibrated": ("#d55e00", "^")}
ALONE = {"prune": "pruning", "merge": "merging"}
LEAST_LOSS = 1e-6  # where lower ones are drawn
DPI = 110
log = logging.getLogger(__name__)
Record = dict[str, Any]


def accuracy_figure(records: Sequence[Record]) -> Figure | None:
    """Top-1 against GFLOPs of every model that was scored, a panel per architecture."""
    others = {"mae", "mean_average_precision"}  # scores of heads that have no accuracy
    scored = [(record, kind) for record in records if not others & record.keys() and (kind := _kind(record))]
    names = sorted({record["model"] for record, _ in scored})
    if not names:
        return None
    figure, panels = _panels(6, names)
    for axes, name in panels:
        for kind, (color, marker) in STYLES.items():
            here = [record for record, of in scored if of == kind and record["model"] == name]
            points = {record["gflops"]: record["acc1"] for record in here}  # the last counts
            if points:
                line = "-" if len(points) > 1 else "none"
                axes.plot(*zip(*sorted(points.items()), strict=True), line, color=color, marker=marker, label=kind)
        axes.set(title=name, xlabel="GFLOPs (multiply-accumulates)", ylabel="top-1 accuracy in %")
    return figure


def kept_tokens_figure(records: Sequence[Record]) -> Figure | None:
    """Tokens after each block: a panel per searched schedule, with uniform ones of the same cost."""
    found = {(r["model"], r["target_gflops"]): r for r in records if r.get("mode") == "found"}
    if not found:
        return None
    figure, panels = _panels(5.5, list(found.values()))
    for axes, record in panels:
        # Uniform schedules mostly keep the same tokens at the same cost: one curve for all that do.
        curves: dict[tuple[int, ...], list[str]] = {}
        for kind, counts in record["uniform"].items():
            curves.setdefault(tuple(kept.merged for kept in _kept(counts, record)), []).append(kind)
        for merged, kinds in curves.items():
            color, marker = STYLES[f"uniform {kinds[0]}"]
            axes.plot(merged, "--", color=color, marker=marker, markersize=4, label=f"uniform {', '.join(kinds)}")
        draw_kept_tokens(axes, _kept(record, record))
        axes.set_title(f"{record['model']}, {record['gflops']:.4g} GFLOPs")
    return figure


def draw_kept_tokens(axes: Axes, kept: Sequence[Kept]) -> None:
    """Tokens that pruning and then merging leaves in each block, between the tokens that enter and leave it."""
    blocks, (color, marker) = range(len(kept)), STYLES["searched"]
    entering, pruned, merged = zip(*((count.entering, count.pruned, count.merged) for count in kept), strict=True)
    axes.plot(blocks, merged, color=color, marker=marker, label="after merging")
    if pruned != entering:
        axes.plot(blocks, pruned, ":", color=color, marker="x", label="after pruning")
    for before, after, hatch, label in ((entering, pruned, "xx", "pruned"), (pruned, merged, "//", "merged")):
        gone = [more - fewer for more, fewer in zip(before, after, strict=True)]
        if any(gone):
            axes.bar(blocks, gone, 0.5, after, color="#dddddd", hatch=hatch, edgecolor="#777777", label=label)
    axes.set(xlabel="block", ylabel="tokens", ylim=(0, 1.05 * entering[0]))


def search_figure(steps: Sequence[Record]) -> Figure | None:
    """How the expected counts of every block moved, and the expected cost towards the target."""
    start = max((index for index, step in enumerate(steps) if step["epoch"] == step["step"] == 0), default=0)
    latest = {(step["epoch"], step["step"]): step for step in steps[start:]}  # a resumed run repeats steps
    course = [latest[position] for position in sorted(latest)]
    kinds = [kind for kind in (PRUNE_FIELD, MERGE_FIELD) if course[0][kind] is not None]
    done = [step["done"] for step in course]
    figure = Figure(figsize=(4.5 * (len(kinds) + 1), 4), layout="constrained")
    *panels, cost = figure.subplots(1, len(kinds) + 1)
    for axes, kind in zip(panels, kinds, strict=True):
        for block, counts in enumerate(zip(*(step[kind] for step in course), strict=True)):
            axes.plot(done, counts, color=colormaps["viridis"](block / max(1, len(course[0][kind]) - 1)))
            axes.annotate(str(block), (done[-1], counts[-1]), fontsize=7, xytext=(2, 0), textcoords="offset points")
        after = "pruning" if kind == PRUNE_FIELD else "merging"
        axes.set(title=f"expected after {after}, by block", xlabel="step", ylabel="tokens", ylim=(0, None))
    flops = "gflops" in course[-1]
    name, words = ("gflops", "GFLOPs (multiply-accumulates)") if flops else ("seconds", "seconds of an image")
    cost.plot(done, [step[name] for step in course], color=STYLES["searched"][0], label="expected")
    cost.axhline(course[-1][f"target_{name}"], color="black", linestyle="--", label="target")
    cost.set(title="cost", xlabel="step", ylabel=words)
    _finish(cost)
    return figure


def speed_figure(rows: Sequence[Record]) -> Figure | None:
    """Speed-up of each row with its lowest and highest, and the ideal beside it."""
    figure = Figure(figsize=(2 + 1.1 * len(rows), 4), layout="constrained")
    axes = figure.subplots()
    speeds, ideal = [row["speedup"] for row in rows], [row["ideal_speedup"] for row in rows]
    span = [[row["speedup"] - row["speedup_low"], row["speedup_high"] - row["speedup"]] for row in rows]
    style = {"color": "#56b4e9", "edgecolor": "black", "label": "measured"}
    axes.bar(range(len(rows)), speeds, 0.6, yerr=list(zip(*span, strict=True)), capsize=4, **style)
    for column, row in enumerate(rows):
        axes.annotate(f"{row['share_of_ideal']:.0%}", (column, 0.05), ha="center")
    starts = [column - 0.4 for column in range(len(rows))]
    axes.hlines(ideal, starts, [start + 0.8 for start in starts], "black", "dashed", label="ideal: FLOPs ratio")
    axes.set_xticks(range(len(rows)), [f"batch {row['batch_size']}\n{row['precision']}\n{row['mode']}" for row in rows])
    axes.set(title=rows[0]["model"], ylabel="times the dense images/s", ylim=(0, 1.3 * max(speeds + ideal)))
    _finish(axes)
    return figure


def latency_figure(rows: Sequence[Record]) -> Figure | None:
    """A panel for each kind of block: milliseconds of its parts over the tokens, and of a reduction of a tenth."""
    figure, panels = _panels(5, sorted({row["block"] for row in rows}))
    for axes, kind in panels:
        of_kind = sorted((row for row in rows if row["block"] == kind), key=lambda row: row["tokens"])
        for name, label, line in LATENCIES:
            points = [(row["tokens"], row[name]) for row in of_kind if row[name] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), line, label=label)
        row = of_kind[0]
        use = f"batch {row['batch_size']}, {row['precision']}, {row['mode']}"
        axes.set(title=f"block {kind}: {use}", xlabel="tokens", ylabel="ms of a batch", xlim=(0, None), ylim=(0, None))
    return figure


def scaling_figure(rows: Sequence[Record]) -> Figure | None:
    """Images per second against tokens kept, a curve per input size, a panel per batch size."""
    figure, panels = _panels(4.5, sorted({row["batch_size"] for row in rows}))
    for axes, batch in panels:
        here = [row for row in rows if row["batch_size"] == batch]
        styles = zip(sorted({row["input_size"] for row in here}), list(STYLES.values())[1:], strict=False)
        for size, (color, marker) in styles:
            points = sorted((row["tokens_kept"], row["images_per_second"]) for row in here if row["input_size"] == size)
            axes.loglog(*zip(*points, strict=True), color=color, marker=marker, label=f"{size} pixels")
        axes.set(title=f"{here[0]['model']}, batch {batch}", xlabel="tokens kept", ylabel="images/s")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_locator(NullLocator())
    return figure


def sensitivity_figure(records: Sequence[Record]) -> Figure | None:
    """What the outputs lose where one block alone prunes, or merges: a curve per block, a row per architecture."""
    latest = {(r["model"], r["kind"], r["block"], r["kept"]): r for r in records}.values()  # the last counts
    names = list(dict.fromkeys(r["model"] for r in latest))
    kinds = [kind for kind in ALONE if any(r["kind"] == kind for r in latest)]
    if not kinds:
        return None
    blocks = sorted({r["block"] for r in latest})
    colors = {block: colormaps["viridis"](number / max(1, len(blocks) - 1)) for number, block in enumerate(blocks)}
    handles: dict[int, Line2D] = {}
    figure = Figure(figsize=(5 * len(kinds) + 1, 4 * len(names)), layout="constrained")
    for name, row in zip(names, figure.subplots(len(names), len(kinds), squeeze=False), strict=True):
        losses = [LEAST_LOSS, *(r["loss"] for r in latest if r["model"] == name)]
        lowest = min((loss for loss in losses if loss > LEAST_LOSS), default=0) / 2
        bottom = max(LEAST_LOSS, lowest)  # of the axis: there is no log 0
        for axes, kind in zip(row, kinds, strict=True):
            here = [r for r in latest if (r["model"], r["kind"]) == (name, kind)]
            if not here:  # of a model that only merges, beside one that also prunes
                axes.remove()
                continue
            for block in sorted({r["block"] for r in here}):
                points = sorted((r["share"], max(r["loss"], bottom)) for r in here if r["block"] == block)
                style: Record = {"color": colors[block], "marker": ".", "label": f"block {block}"}
                (handles[block],) = axes.plot(*zip(*points, strict=True), **style)
                axes.annotate(str(block), points[0], fontsize=7, xytext=(-4, 0), textcoords="offset points", ha="right")
            axes.set(title=f"{name}, {ALONE[kind]} alone", xlabel="share of the tokens kept", xlim=(0, 1))
            axes.set(ylabel=f"loss against the dense outputs (bottom: up to {bottom:.1g})", yscale="log")
            axes.set_ylim(bottom / 1.2, 1.5 * max(losses))
            _finish(axes, legend=False)
    shown = [handles[block] for block in blocks if block in handles]
    figure.legend(handles=shown, loc="outside right center", fontsize=8, ncols=1 + (len(shown) - 1) // 24)
    return figure


def work_figure(records: Sequence[Record]) -> Figure | None:
    """The loss that searches came to against the work that they had spent: gradient and calibrated in one picture."""
    runs = {search: _last_run([r for r in records if r["search"] == search]) for search in WORK_STYLES}
    uniform = {r["stage"]: r["loss"] for r in records if r["search"] == "uniform"}  # the last of each counts
    if not any(runs.values()):
        return None
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    for search, course in runs.items():
        color, marker = WORK_STYLES[search]
        work, losses = [r["work"] for r in course], [r["loss"] for r in course]
        if course and search == "gradient":
            axes.plot(work, losses, color=color, marker=marker, markersize=4, label=search)
        elif course:
            axes.scatter(work, losses, 16, color=color, marker=marker, label="calibrated, each stage")
            best = list(accumulate(losses, min))
            axes.step(work, best, color=color, where="post", label="calibrated, best so far")
    for stage, loss in uniform.items():
        label = stage if stage.startswith("uniform") else f"uniform {stage}".strip()
        axes.axhline(loss, color=STYLES.get(label, STYLES[OTHER])[0], linestyle="--", label=label)
    drawn = [r for course in runs.values() for r in course]
    axes.set(xlabel="work (forward passes of the dense model on one image)", ylabel="loss against the dense outputs")
    axes.set_xscale(_scale([r["work"] for r in drawn]))
    axes.set_yscale(_scale([r["loss"] for r in drawn] + list(uniform.values())))
    _finish(axes)
    return figure


def _last_run(records: Sequence[Record]) -> Sequence[Record]:
    """Those of the last search alone: work only grows in one."""
    pairs = pairwise(records)
    start = max((index for index, (one, then) in enumerate(pairs, 1) if then["work"] < one["work"]), default=0)
    return records[start:]


def _scale(values: Sequence[float]) -> str:
    """Logarithmic where they span more than a decade."""
    return "log" if min(values) > 0 and max(values) > 10 * min(values) else "linear"


def _kind(record: Record) -> str | None:
    """Which curve of the accuracy plot a record belongs to, None for one without a score."""
    mode = record.get("mode", "")
    if mode in ("eval", "found") and record["gflops"] == record["dense_gflops"]:
        return "dense"
    if mode.startswith("baseline "):
        kind = mode.removeprefix("baseline ")
        if record.get(RULES_FIELD) not in (None, "random", *PEERS):
            return OTHER
        return kind if kind in PEERS else f"uniform {kind}"
    return {"eval": "schedule", "found": "searched", "finetune": "fine-tuned"}.get(mode)


def _kept(counts: Record, record: Record) -> list[Kept]:
    """What `counts` make of the tokens in the compressible blocks of the model in `record`."""
    schedule = make_schedule(counts[PRUNE_FIELD], counts[MERGE_FIELD])
    return running_counts(schedule, record["tokens"])[: record["blocks"]]


def _panels(width: float, of: Sequence[Any]) -> tuple[Figure, Iterator[tuple[Axes, Any]]]:
    """A figure with a panel, `width` inches wide, for each of these; a panel is finished when the next is asked for."""
    figure = Figure(figsize=(width * len(of), 4), layout="constrained")

    def panels() -> Iterator[tuple[Axes, Any]]:
        for axes, item in zip(figure.subplots(1, len(of), squeeze=False)[0], of, strict=True):
            yield axes, item
            _finish(axes)

    return figure, panels()


def _finish(axes: Axes, legend: bool = True) -> None:
    axes.grid(color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=8)


# The file of each plot, and the logs with its figures.
PLOTS = {
    "accuracy.png": (accuracy_figure, LOG, FOUND),
    "kept_tokens.png": (kept_tokens_figure, LOG, FOUND),
    "search_counts.png": (search_figure, STEPS),
    "search_work.png": (work_figure, WORK),
    "sensitivity.png": (sensitivity_figure, SENSITIVITY),
    "speed.png": (speed_figure, SPEED),
    "scaling.png": (scaling_figure, SCALING),
    "latency.png": (latency_figure, LATENCY),
}


def run(settings: Settings, runtime: Runtime) -> None:
    """Draw every plot that the logs in the folder, and in the folders of its targets, have the figures for."""
    folder = settings.run.folder
    assert folder is not None, "the mode that is asked for"
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--plot {folder}: cannot be written")
    written = _draw_all(folder)
    if not written:
        raise UsageError(f"--plot {folder}: nothing to draw; accepted: the output folder of a run that scored or timed")
    for path in written:
        log.info("drew %s", path)


def plot_run(folder: Path) -> None:
    """The plots of a folder that a run has just written its figures to."""
    try:
        _draw_all(folder)
    except UsageError as error:  # the figures are safe; what is damaged was there before
        log.warning("no plots: %s", error)


def _draw_all(folder: Path) -> list[Path]:
    written = []
    for inside in (folder, *sorted(folder.glob("target_*"))):
        logs = {name: _records(inside / name) for _, *names in PLOTS.values() for name in names}
        for name, (draw, *names) in PLOTS.items():
            records = [record for log_name in names for record in logs[log_name]]
            try:
                figure = draw(records) if records else None
            except (KeyError, TypeError, ValueError, IndexError, ScheduleError) as error:
                raise UsageError(
                    f"{inside}: no figures for {name} ({error!r}); accepted: logs as a run left them"
                ) from error
            if figure is not None:
                with whole_file(inside / name) as file:
                    figure.savefig(file, format="png", dpi=DPI)
                written.append(inside / name)
    return written


def as_drawn(text: str) -> str:
    """`text` as a figure is to show it: one line, in which dollars are no formula."""
    return one_line(text).replace("$", r"\$")


def _records(path: Path) -> list[Record]:
    """The rows of a benchmark's file, or the objects of a log, a line each; none where there is no file."""
    if not path.exists():
        return []
    table = path.suffix == ".json"
    accepted = "rows of a benchmark" if table else "a JSON object a line"
    try:
        refuse_pipe(path)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    records: list[Record] = []
    for number, part in enumerate([text] if table else text.splitlines(), start=1):
        try:
            found = parse_json(part)
        except ValueError as error:
            decoding = isinstance(error, json.JSONDecodeError)
            line = error.lineno if decoding and table else number
            said = error.msg if decoding else first_line(error)
            raise UsageError(f"{path}: line {line}: {said}; accepted: {accepted}") from error
        rows = found if table else [found]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UsageError(f"{path}:{'' if table else f' line {number}:'} accepted: {accepted}")
        drawn = [row.items() for row in rows]
        records += [
            {name: as_drawn(value) if isinstance(value, str) else value for name, value in row} for row in drawn
        ]
    return records
