"""`--eval`: score the model on the validation split, compressed or dense."""

from __future__ import annotations

from cli.data import eval_loader, warn_of_turned
from cli.model import compressed, for_inference, trained_model
from cli.results import report, save_model
from cli.resume import use_searched
from cli.runtime import Runtime
from cli.settings import Settings
from engine import evaluate


def run(settings: Settings, runtime: Runtime) -> None:
    """Score, report, and with `--save` leave the model in a file."""
    trained = trained_model(settings, runtime)
    warn_of_turned(settings, runtime, trained.val)
    model = compressed(trained.model, settings.model, trained.plan, trained.weights)
    use_searched(model, settings, trained.entry, runtime)
    save_model(settings, trained.entry, model, trained.classes, runtime)  # before its weights change precision
    running, inside = for_inference(model, settings.run.compile, settings.data.batch_size, runtime)
    scores = evaluate(
        running, eval_loader(trained.val, settings, runtime), inside, multi_label=settings.model.multi_label
    )
    report("eval", trained.entry, model, scores, runtime)
