"""The sample's model, from its files: as many digits right as the live model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from cli.data import eval_dataset
from cli.flags import parse_flags
from cli.model import chosen_entry
from diffrate.files import export
from diffrate.files.graph import traced
from diffrate.files.runtimes import load_exported
from tests.conftest import Cli, ran_once
from tests.test_docs import DOCS, blocks
from tests.tiny_models import saved_file

pytest.importorskip("onnxruntime", reason="needs requirements-export.txt")
pytest.importorskip("openvino", reason="needs requirements-export.txt")
FILES = ("small.onnx", "small.xml")


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """As the files take them: in [0, 1]."""
    settings = parse_flags(["--eval"])
    entry = chosen_entry(settings.model)
    images, labels = zip(*eval_dataset(settings, entry, None, None), strict=True)
    mean, std = (torch.tensor(row)[:, None, None] for row in (entry.mean, entry.std))
    return torch.stack(images) * std + mean, torch.tensor(labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a file for each runtime and a picture, by the names that docs/export.md gives them."""
    folder, traces = tmp_path_factory.mktemp("files"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "traced", lambda *given: (traces or traces.append(traced(*given)) or traces)[0])
        for name in FILES:
            ran_once("--export", folder / name, "--load_compression_rate", "--export-normalize")
    Image.new("RGB", (40, 30), "black").save(folder / "picture.png")
    return folder


@pytest.mark.parametrize("name", FILES)
def test_as_many_digits_are_right(name: str, digits: tuple[torch.Tensor, torch.Tensor], folder: Path) -> None:
    """As `--eval` has them: README.md."""
    logits = load_exported(folder / name).logits
    images, labels = digits
    found = torch.cat([logits(batch) for batch in images.split(300)])  # the last is smaller
    assert int((found.argmax(1) == labels).sum()) == 952


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_pages_lines_run_a_file(runtime: str, folder: Path) -> None:
    (lines,) = (block for block in blocks(DOCS / "export.md", "python") if f", {runtime}\n" in block)
    words = [sys.executable, "-I", "-W", "error", "-c", lines]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in set("0123456789")


def test_onnxruntimes_quantizer_takes_the_file(
    digits: tuple[torch.Tensor, torch.Tensor], folder: Path, tmp_path: Path
) -> None:
    """In int8 nearly as many digits are right as the 95.2 % of float32."""
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path, prepared, smaller = folder / "small.onnx", tmp_path / "prepared.onnx", tmp_path / "smaller.onnx"
    quant_pre_process(path, prepared)
    quantize_dynamic(prepared, smaller)
    assert smaller.stat().st_size < path.stat().st_size / 2
    images, labels = digits
    found = load_exported(smaller).logits(images)
    assert float((found.argmax(1) == labels).float().mean()) == pytest.approx(0.948, abs=0.01)


def test_opsets(folder: Path, cli: Cli, tmp_path: Path) -> None:
    import onnx

    saved, path = saved_file(tmp_path / "tiny.safetensors"), tmp_path / "tiny.onnx"
    words = ["--export", path, "--checkpoint", saved]
    code, _, err = cli(*words, "--export-opset", 23)
    assert (code, err) == (0, "")
    for file, opset, operator in ((folder / "small.onnx", 18, "Softmax"), (path, 23, "Attention")):
        written = onnx.load(file)
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
