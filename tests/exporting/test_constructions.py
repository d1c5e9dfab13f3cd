"""Constructions of each way in which tokens carry what they need, as files; `table.py` beside has all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.exporting.table import differences

pytest.importorskip("onnxruntime", reason="needs requirements-export.txt")
pytest.importorskip("openvino", reason="needs requirements-export.txt")


@pytest.mark.parametrize(("name", "suffix"), [("relative_table", ".onnx"), ("naflex_attention_pool", ".xml")])
def test_files_of_a_construction_answer_as_the_model(name: str, suffix: str, tmp_path: Path) -> None:
    ((_, found),) = differences(name, tmp_path, (suffix,), depth=3)  # the fewest
    assert not isinstance(found, str), found
    assert found < 1e-4
