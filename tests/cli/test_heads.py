"""`--multi-label`, and heads with one output, from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_errors import check
from tests.cli.test_unlabelled import FAST
from tests.conftest import Cli


def test_a_search_of_labels_of_their_own(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    more = ("--checkpoint", "scratch", "--data-path", image_folder, "--output_dir", tmp_path / "out")
    code, text, err = cli(*FAST, *more, "--multi-label")
    assert (code, err) == (0, "")
    assert "dense: * mAP " in text
    assert "% of dense, mAP " in text
    again = (*FAST, *more, "--resume", "auto")
    check(cli(*again), "was made with --multi-label True; accepted: False")


def test_multi_label_goes_with_what_looks_at_outputs(cli: Cli) -> None:
    check(cli("--benchmark", "--multi-label"), "--multi-label goes with a search")
