"""The sample's model, from its files: as many digits right as the live model, at two of its schedules."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cli.data import eval_dataset
from cli.flags import parse_flags
from cli.model import chosen_entry
from diffrate.files.runtimes import load_exported
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
    """As `--eval` has them: docs/fine-tune.md."""
    path = tmp_path / f"digits{suffix}"
    code, _, err = cli("--export", path, "--load_compression_rate", "--target_flops", gflops)
    assert (code, err) == (0, "")
    logits = load_exported(path).logits
    images, labels = digits
    found = torch.cat([logits(batch) for batch in images.split(300)])  # the last is smaller
    assert int((found.argmax(1) == labels).sum()) == right


def test_onnxruntimes_quantizer_takes_the_file(
    digits: tuple[torch.Tensor, torch.Tensor], cli: Cli, tmp_path: Path
) -> None:
    """In int8 nearly as many digits are right as the 95.2 % of float32."""
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path, prepared, smaller = (tmp_path / f"{name}.onnx" for name in ("digits", "prepared", "smaller"))
    code, _, err = cli("--export", path, "--load_compression_rate", "--target_flops", 0.0242)
    assert (code, err) == (0, "")
    quant_pre_process(path, prepared)
    quantize_dynamic(prepared, smaller)
    assert smaller.stat().st_size < path.stat().st_size / 2
    images, labels = digits
    found = load_exported(smaller).logits(images)
    assert float((found.argmax(1) == labels).float().mean()) == pytest.approx(0.948, abs=0.01)


def test_opsets(cli: Cli, tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "digits.onnx"
    words = ["--export", path, "--load_compression_rate", "--target_flops", 0.0242]
    for opset, operator in ((18, "Softmax"), (23, "Attention")):
        code, _, err = cli(*words, "--export-opset", opset)
        assert (code, err) == (0, "")
        written = onnx.load(path)
        assert written.opset_import[0].version == opset
        assert operator in {node.op_type for node in written.graph.node}
        assert written.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    for word, message in ((17, "found the opset 17; accepted: 18 to"), (999, "accepted: 18 to")):
        code, _, err = cli(*words, "--export-opset", word)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
    code, _, err = cli("--export", tmp_path / "digits.pt2", "--load_compression_rate", "--export-opset", 18)
    assert (code, err.count("\n")) == (2, 1)
    assert "it goes with .onnx" in err
    code, _, err = cli("--eval", "--export-opset", 18)
    assert (code, "--export-opset goes with --export" in err) == (2, True)
