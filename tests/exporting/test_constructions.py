"""Constructions of each way in which tokens carry what they need, as files; `table.py` beside has all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.exporting.table import differences

pytest.importorskip("onnxruntime", reason="needs requirements-export.txt")
pytest.importorskip("openvino", reason="needs requirements-export.txt")


@pytest.mark.parametrize("name", ["relative_table", "naflex_attention_pool"])
def test_files_of_a_construction_answer_as_the_model(name: str, tmp_path: Path) -> None:
    for suffix, found in differences(name, tmp_path, depth=3):  # the fewest
        assert not isinstance(found, str), f"{suffix}: {found}"
        assert found < 1e-4, suffix
