"""`--compile`: one graph for the whole model, in evaluation and in training, with the eager results."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
from diffrate.device import FixedBatch
from tests.cli.test_eval import scores
from tests.conftest import Cli
from tests.forked import as_command, ended, started
from tests.test_patch import images, patched
from tests.tiny_models import saved_file

pytestmark = pytest.mark.usefixtures("nothing_compiled")


def traced_alone(model: torch.nn.Module) -> Any:
    """The one graph, forward and backward, run as it is: generating code for it takes minutes."""
    return torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")


def test_a_caformer_is_one_graph() -> None:
    """ViTs are in `test_constructions.py` and `test_rules.py`."""
    model, batch = patched("caformer"), images("caformer")
    graph = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(graph(batch, return_flop=False), model(batch, return_flop=False), atol=1e-4, rtol=1e-4)


def test_replaced_parts_are_refused() -> None:
    model = patched("deit")
    graph = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    graph(images("deit"), return_flop=False)
    model.blocks[2].attn = torch.nn.Identity()
    with pytest.raises(RuntimeError, match=r"UnsupportedModelError: blocks\.2\.attn: found Identity; accepted: "):
        graph(images("deit"), return_flop=False)


def test_smaller_batches_are_filled_up() -> None:
    model = patched("deit")
    fixed = FixedBatch(model, 4)
    for count in (1, 3, 4):
        batch = images("deit", count)
        torch.testing.assert_close(fixed(batch), model(batch, return_flop=False))
    with pytest.raises(ValueError, match="return_flop=True"):
        fixed(images("deit"), return_flop=True)


def test_evaluation_scores_the_same(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    file = saved_file(tmp_path / "tiny.safetensors")
    words = ("--eval", "--checkpoint", file, "--data-path", image_folder, "--batch-size", 4, "--num_workers", 0)
    eager, compiled = (cli(*words, *more) for more in ((), ("--compile",)))
    assert compiled[0] == 0, compiled[2]
    assert scores(compiled[1]) == pytest.approx(scores(eager[1]), abs=0.002)


def test_training_takes_the_same_course(
    cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "compile_model", traced_alone)
    words = ("--finetune", saved_file(tmp_path / "tiny.safetensors"), "--num_workers", 0, "--data-path", image_folder)
    words = (*words, "--batch-size", 4, "--epochs", 2, "--lr", 1e-3)
    losses = []
    for name, more in (("eager", ()), ("compiled", ("--compile", "--model-ema"))):
        out = tmp_path / name
        code, _, _ = cli(*words, "--unscale-lr", "--affine", 0, 0, 0, *more, "--output_dir", out)
        assert code == 0
        losses.append([json.loads(line)["train_loss"] for line in (out / "log.txt").read_text().splitlines()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def as_command_without_a_compiler(cache: Path, words: Sequence[object]) -> None:
    from torch._inductor import config

    config.cpp.cxx = (None, "/nowhere/c++")  # as from $CXX, which torch has read before
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    as_command(words)


def test_without_a_compiler_one_line_says_so(image_folder: Path, tmp_path: Path) -> None:
    file = saved_file(tmp_path / "tiny.safetensors")
    words = ("--eval", "--checkpoint", file, "--data-path", image_folder, "--batch-size", 4, "--num_workers", 0)
    run = partial(as_command_without_a_compiler, tmp_path / "cache", (*words, "--compile"))
    (done,) = ended(started(run, tmp_path, 1), tmp_path)
    assert done.code == 2
    line = done.err.splitlines()[-1]
    assert line.startswith("main.py: error: --compile: ")
    assert "/nowhere/c++" in line
    assert "Traceback" not in done.err
