"""`--baseline`: score uniform schedules that meet `--target_flops`."""

from __future__ import annotations

from dataclasses import replace

from cli.data import eval_loader
from cli.model import patched
from cli.results import report, save_schedules
from cli.schedules import targets_of
from cli.settings import Settings
from cli.trained import trained_model
from diffrate.budgets.uniform import baseline_schedule
from engine import evaluate
from processes.runtime import Runtime


def run(settings: Settings, runtime: Runtime) -> None:
    """One schedule, one line of scores, for each target."""
    kind = settings.run.baseline
    assert kind is not None, "the mode that is asked for"
    trained = trained_model(settings, runtime)
    model = patched(trained.model, settings.model).to(runtime.device)
    loader = eval_loader(trained.val, settings, runtime)
    if kind == "random":
        model.rules = replace(model.rules, random=True)
    for target in targets_of(settings.model, model):
        schedule = baseline_schedule(kind, model.compression.space, model.flops_at, target * 1e9)
        model.set_kept_num(schedule.prune, schedule.merge)
        report(f"baseline {kind}", trained.entry, model, evaluate(model, loader, runtime), runtime)
        save_schedules(settings, trained.entry, target, schedule, runtime)
