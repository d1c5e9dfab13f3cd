"""`--list-models`: what there is, found out by building it."""

from __future__ import annotations

import os
import sys

import pytest
import timm
import torch
from torch import nn

import diffrate
import models
from tests.cli.test_errors import check
from tests.conftest import Cli


def listed(cli: Cli, *pattern: str) -> list[str]:
    code, out, err = cli("--list-models", *pattern)
    assert (code, err) == (0, "")
    return out.split("\n")[:-1]


def test_tags_come_with_the_names(cli: Cli) -> None:
    found = listed(cli, "vit_small_patch14*")
    assert found == timm.list_models("vit_small_patch14*", pretrained=True)
    for name in found:
        assert models.entry_of(name).name == name


def test_a_name_without_weights_stands_alone(cli: Cli) -> None:
    assert listed(cli, "test_vit4") == ["test_vit4"]


def test_the_published_names_come_first(cli: Cli) -> None:
    found = listed(cli, "caformer_s*")
    assert found[0] == "caformer_s36"
    assert {"caformer_s36.sail_in22k_ft_in1k", "caformer_s18.sail_in1k"} <= set(found)
    assert listed(cli, "*_mae") == ["vit_base_patch16_mae", "vit_large_patch16_mae", "vit_huge_patch14_mae"]


@pytest.mark.parametrize("pattern", ["resnet*", "vit_base_patch16_18x2*", "convformer_s18*", "nothing*"])
def test_what_cannot_be_compressed_is_not_there(pattern: str, cli: Cli) -> None:
    check(cli("--list-models", pattern), f"--list-models {pattern}: no model that can be compressed; accepted: ")


def test_few_blocks_tell_as_much_as_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole models are built where timm builds none with few blocks, or where those are refused."""
    depths = []

    def accepts(model: nn.Module) -> bool:
        depths.append(len(model.blocks))
        return len(model.blocks) > 3

    assert list(models.supported_names("test_vit", diffrate.patch.families(), accepts)) == ["test_vit.r160_in1k"]
    assert depths == [3, 6]
    assert next(timm.create_model("test_vit").parameters()).device == torch.device("cpu")


def test_a_reader_who_has_seen_enough_ends_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        code, _, err = cli("--list-models", "*deit*")
    assert (code, err) == (0, "")
