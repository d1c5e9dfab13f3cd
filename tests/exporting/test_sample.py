"""The sample's model, from its files: as many digits right as the live model, at two of its schedules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cli.data import eval_dataset
from cli.entry import chosen_entry
from cli.flags import parse_flags
from diffrate.exporting.files import load_exported
from tests.conftest import Cli

pytest.importorskip("onnxruntime", reason="needs requirements-export.txt")
pytest.importorskip("openvino", reason="needs requirements-export.txt")


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    settings = parse_flags(["--eval"])
    images, labels = zip(*eval_dataset(settings, chosen_entry(settings.model), None, None), strict=True)
    return torch.stack(images), torch.tensor(labels)


@pytest.mark.slow
@pytest.mark.parametrize(("gflops", "right", "suffix"), [(0.0242, 952, ".onnx"), (0.0169, 828, ".xml")])
def test_as_many_digits_are_right(
    gflops: float,
    right: int,
    suffix: str,
    digits: tuple[torch.Tensor, torch.Tensor],
    cli: Cli,
    tmp_path: Path,
) -> None:
    """As `--eval` has them: README, "Fine-tune"."""
    path = tmp_path / f"digits{suffix}"
    code, _, err = cli("--export", path, "--load_compression_rate", "--target_flops", gflops)
    assert (code, err) == (0, "")
    logits = load_exported(path).runner.logits
    images, labels = digits
    found = torch.cat([logits(batch) for batch in images.split(300)])  # the last is smaller
    assert int((found.argmax(1) == labels).sum()) == right
