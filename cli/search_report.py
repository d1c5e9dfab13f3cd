"""What a search tells while it goes on: progress, records in the output folder, the best checkpoint."""

from __future__ import annotations

import logging
import shutil

import diffrate
from cli.log import Progress
from cli.runtime import STEPS, WORK, Runtime
from cli.training_checkpoint import BEST, LAST
from datasets import ImageLoader
from diffrate.budgets.schedule import fields_of
from diffrate.files import whole_file
from diffrate.running.evaluation import Tally
from diffrate.searching.calibrate import UNIFORM, Calibrated, CalibrationObserver
from diffrate.searching.calibrated import TrialRecord
from diffrate.searching.target import Goal
from engine import shown_scores
from utils import StopRequestedError, StopSignals

TOLD_EVERY = 5.0  # seconds
STEP_WORK = 3  # dense forward passes that a step takes for an image: the teacher, the search's own, and back

log = logging.getLogger(__name__)


class Reporter(diffrate.Observer):
    """Of the search of `model` for a goal over the training and validation loaders."""

    def __init__(
        self,
        model: diffrate.CompressedModel,
        goal: Goal,
        loaders: tuple[ImageLoader, ImageLoader | None],
        accumulate: int,
        taught: bool,
        runtime: Runtime,
        signals: StopSignals,
    ) -> None:
        self.model, self.goal, self.runtime, self.signals = model, goal, runtime, signals
        self.taught = taught  # by the dense model: only then losses are those of a search at hard counts
        train, self.val = loaders
        self.images = accumulate * (train.batch_size or 1) * runtime.processes.world  # of a step
        self.epoch: list[diffrate.StepRecord] = []  # steps of this epoch that this process has seen

    def stop(self) -> bool:
        return self.signals.requested

    def on_course(self, epochs: int, steps: int) -> None:
        self.steps = steps

    def on_start(self, epoch: int, step: int) -> None:
        left = self.steps - step
        self.epoch, self.progress = [], Progress(left, f"Search [{epoch}]", left * self.images, self.runtime)

    def on_step(self, record: diffrate.StepRecord) -> None:
        self.epoch.append(record)
        self.progress.advance(self._describe)
        if record.step % self.runtime.print_freq == 0:
            place = {"epoch": record.epoch, "step": record.step, "done": record.epoch * self.steps + record.step}
            costs = self._costs("", record.flops)
            expected = self.model.compression.space.schedule(record.counts)  # type: ignore[arg-type]  # not rounded
            self.runtime.append(place | fields_of(expected) | costs, STEPS)
            if self.taught:
                figures = {"work": float(STEP_WORK * self.images * (place["done"] + 1)), "loss": self._recent_loss()}
                self.runtime.append({"search": "gradient", "stage": "steps"} | figures, WORK)

    def on_score_start(self) -> None:
        assert self.val is not None, "there is something to score on"
        self.show = shown_scores(self.val, self.runtime)

    def on_score(self, tally: Tally) -> None:
        if self.signals.requested:  # what is scored is in the last checkpoint, or a few steps from it
            raise StopRequestedError("stopped while an epoch was scored: go on with --resume")
        self.show(tally)

    def on_epoch(self, record: diffrate.EpochRecord) -> None:
        counts = fields_of(record.schedule)
        figures = {
            "train_loss": record.loss,
            "train_flops_loss": record.flops_loss,
            **self._costs("train_", record.expected_flops),
            "lr": record.learning_rate,
        }
        scores = {"gflops": record.flops / 1e9} if record.scores is None else record.scores.record(record.flops)
        self.runtime.record({"mode": "search", "epoch": record.epoch, **figures, **scores, **counts})
        for name, values in counts.items():
            if values is not None:
                log.info("%s %s", name, list(values))
        if record.scores is not None:
            log.info(record.scores.line(record.flops))
        else:
            log.info("* loss %#.3g flops %.3f", record.loss, record.flops / 1e9)
        if record.best and self.runtime.writes:
            assert self.runtime.output_dir is not None
            with (
                (self.runtime.output_dir / LAST).open("rb") as last,
                whole_file(self.runtime.output_dir / BEST) as best,
            ):
                shutil.copyfileobj(last, best)

    def _recent_loss(self) -> float:
        """The mean over the steps since the last record."""
        recent = self.epoch[-self.runtime.print_freq :]
        return sum(record.loss for record in recent) / len(recent)

    def _describe(self) -> str:
        """Means of the epoch so far."""
        count = len(self.epoch)
        loss = sum(record.loss for record in self.epoch) / count
        cost = sum(record.flops_loss for record in self.epoch) / count
        spent = sum(record.flops for record in self.epoch) / count
        gflops = f"GFLOPs {spent / 1e9:.4f}" if self.goal.table is None else f"ms an image {1000 * spent:.3f}"
        rate = self.epoch[-1].learning_rate
        return f"loss {loss:#.3g}  cost loss {cost:.5f}  {gflops}  lr {rate:.2e}"

    def _costs(self, before: str, spent: float) -> dict[str, float]:
        """An expected cost and its target, for records: in GFLOPs, or in seconds of an image."""
        name, per = ("gflops", 1e9) if self.goal.table is None else ("seconds", 1.0)
        return {f"{before}{name}": spent / per, f"target_{name}": self.goal.budget.target / per}


class TrialReporter(CalibrationObserver):
    """Of a search at hard counts: how far it is, and records of the loss against the work."""

    def __init__(self, runtime: Runtime, signals: StopSignals) -> None:
        self.runtime, self.signals, self.told = runtime, signals, 0.0

    def on_plan(self, images: int, work: float, speed: float) -> None:
        self.work = work
        minutes = work / speed / 60
        log.info(
            "calibrated search: %d images, up to %.0f forward passes of the dense model, about %.1f minutes at %.0f "
            "images/s",
            *(images, work, minutes, speed),
        )

    def on_trials(self, record: TrialRecord) -> None:
        figures = {"work": record.work, "loss": record.loss, "seconds": record.seconds}
        self.runtime.append({"search": "calibrated", "stage": "trials"} | figures, WORK)
        if record.seconds - self.told >= TOLD_EVERY:
            self.told = record.seconds
            log.info(
                "Calibrate: [%.0f/%.0f]  %d schedules  loss %#.3g  %.0f s",
                *(record.work, self.work, record.trials, record.loss, record.seconds),
            )

    def stop(self) -> bool:
        return self.signals.requested


def log_calibrated(found: Calibrated, runtime: Runtime) -> float:
    """What each stage took, and whose schedule it is; its loss on the images held back.

    The uniform schedules' losses stay as records.
    """
    for stage in found.stages:
        log.info("took: %-17s %6.0f forward passes of the dense model, %.1f s", stage.name, stage.work, stage.seconds)
    best: dict[str, float] = {}
    for name, loss in found.losses:
        best[name] = min(loss, best.get(name, loss))
    log.info("on images held back: %s", ", ".join(f"{name} {loss:#.3g}" for name, loss in best.items()))
    if len(found.alike) > 1:
        log.info(
            "chosen: %s, the simplest of %s: their losses differ by less than the noise of measurement (%#.3g)",
            *(found.chosen, ", ".join(found.alike), found.noise),
        )
    else:
        log.info("chosen: %s", found.chosen)
    for name, loss in best.items():
        if name.startswith(UNIFORM):
            stage = name.removeprefix(UNIFORM).strip()
            runtime.append({"search": UNIFORM, "stage": stage, "work": 0.0, "loss": loss}, WORK)
    return best[found.chosen]
