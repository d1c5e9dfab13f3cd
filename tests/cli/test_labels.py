"""Labels of a search are the model's outputs, in training as in validation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffrate
import models
from sample import MODEL as SAMPLE_MODEL
from sample import unpack_sample
from tests.cli.test_eval import scores
from tests.conftest import Cli
from tests.tiny_models import dense

WORKERS = ("--num_workers", 0)


def _sample(input_size: int | None = None) -> diffrate.CompressedModel:
    """The sample's model with its weights, keeping all tokens."""
    entry = models.entry_of(SAMPLE_MODEL)
    model = models.create(entry, input_size)
    models.load_weights(model, models.official_file(entry))
    return dense(diffrate.patch.vit(model))


def test_a_search_on_some_of_the_classes_takes_their_outputs(cli: Cli, tmp_path: Path) -> None:
    """Digits 3 and 7 of a model of ten: outputs 3 and 7, which it knows well, not 0 and 1."""
    digits, part, file = unpack_sample(), tmp_path / "part", tmp_path / "sample.safetensors"
    for split in ("train", "val"):
        for name in ("3", "7"):
            for image in sorted((digits / split / name).iterdir())[:50]:
                target = part / split / name / image.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(image, target)
    diffrate.save(_sample(), file, name=SAMPLE_MODEL, classes=[str(digit) for digit in range(10)])
    words = ("--checkpoint", file, "--data-path", part, "--target_flops", "90%", "--epochs", 1, "--batch-size", 50)
    words = (*words, "--search_loss", "labels", "--search_transform", "train", "--budget", "penalty")
    code, _, err = cli(*words, *WORKERS, "--output_dir", tmp_path / "out")
    assert (code, err) == (0, "")
    record = json.loads((tmp_path / "out" / "log.txt").read_text().splitlines()[0])
    assert record["train_loss"] < 1.0
    assert record["acc1"] > 90


def test_a_searched_schedule_belongs_to_its_tokens_too(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    data = ("--model", SAMPLE_MODEL, "--checkpoint", "scratch", "--data-path", image_folder, *WORKERS)
    assert cli(*data, "--epochs", 1, "--target_flops", "90%", "--output_dir", tmp_path / "out")[0] == 0
    resumed = ("--eval", "--resume", tmp_path / "out" / "checkpoint.pth", *data)
    assert cli(*resumed)[0] == 0
    code, _, err = cli(*resumed, "--input-size", 32)
    assert code == 2
    assert "made for 50 tokens; accepted: 65 tokens" in err
    code, out, _ = cli(*resumed, "--input-size", 32, "--scale_compression_rate")
    assert code == 0
    assert scores(out)[3] < 0.9 * 0.066


def test_a_saved_size_does_not_make_published_schedules_fit(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "large.safetensors"
    diffrate.save(_sample(32), file, name=SAMPLE_MODEL)
    code, _, err = cli("--eval", "--checkpoint", file, "--load_compression_rate", "--target_flops", 0.0242, *WORKERS)
    assert code == 2
    assert "made for 50 tokens; accepted: 65 tokens" in err
