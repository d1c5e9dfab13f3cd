"""The README's lines that run an exported file, as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Cli

README = (Path(__file__).parent.parent.parent / "README.md").read_text()


@pytest.mark.parametrize(("runtime", "file"), [("onnxruntime", "small.onnx"), ("openvino", "small.xml")])
def test_the_lines_run(runtime: str, file: str, cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip(runtime, reason="needs requirements-export.txt")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (lines,) = (block for block in blocks if f", {runtime}\n" in block)
    code, _, err = cli("--export", tmp_path / file, "--load_compression_rate", "--export-normalize")
    assert (code, err) == (0, "")
    Image.new("RGB", (40, 30), "black").save(tmp_path / "picture.png")
    words = [sys.executable, "-I", "-W", "error", "-c", lines]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in set("0123456789")
