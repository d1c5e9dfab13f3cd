"""The parser: spellings, abbreviations, and no flag that is parsed and unused."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from flags import get_args_parser, parse_flags

PROJECT = Path(__file__).parent.parent
READERS = [path for path in PROJECT.glob("*.py") if path.name != "flags.py"]


def attributes_read(path: Path) -> set[str]:
    """Names that the code in `path` reads from `args`."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }


def test_every_flag_is_read_and_every_read_is_a_flag() -> None:
    declared = {action.dest for action in get_args_parser()._actions} - {"help"}
    declared.add("batch_size")  # the first of --batch-size, made by parse_flags
    read = set().union(*(attributes_read(path) for path in READERS))
    assert declared - read == set()
    assert read - declared == set()


@pytest.mark.parametrize("spelling", ["--data-path", "--data_path", "--data-pat"])
def test_dashes_underscores_and_abbreviations(spelling: str) -> None:
    assert parse_flags(["--eval", "--model", "x", spelling, "there"]).data_path == "there"
    assert parse_flags(["--eval", "--model", "x", f"{spelling}=a_b"]).data_path == "a_b"


def test_abbreviations_of_the_published_commands() -> None:
    args = parse_flags(["--finetune", "--epoch", "3", "--batch", "8", "--output", "o", "--load-comp"])
    assert (args.epochs, args.batch_size, args.output_dir, args.load_compression_rate) == (3, 8, Path("o"), True)


def test_no_data_path_means_the_sample() -> None:
    args = parse_flags(["--eval"])
    assert (args.data_set, args.model, args.checkpoint) == ("SAMPLE", "vit_sample_patch4_28", "official")


def test_a_data_path_means_imagenets_layout() -> None:
    args = parse_flags(["--eval", "--data-path", "x", "--model", "caformer_s36"])
    assert (args.data_set, args.checkpoint) == ("IMNET", "official")


def test_finetuning_starts_from_scratch_or_a_checkpoint() -> None:
    assert parse_flags(["--finetune"]).checkpoint == "scratch"
    assert parse_flags(["--finetune", "a.pth"]).checkpoint == "a.pth"
    assert parse_flags(["--finetune", "--checkpoint", "official"]).checkpoint == "official"
