"""The parser: spellings, abbreviations, and no flag that is parsed and unused."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest

from cli.flags import GOES_WITH, SAMPLE_TUNING, get_args_parser, parse_flags
from cli.settings import MODES, PARTS, Settings
from diffrate.searching.settings import TARGETS
from sample import MODEL as SAMPLE
from utils import UsageError

PROJECT = Path(__file__).parent.parent.parent
FLAGS, SETTINGS = PROJECT / "cli" / "flags.py", PROJECT / "cli" / "settings.py"
SOURCES = [path for path in PROJECT.glob("**/*.py") if "tests" not in path.parts and ".venv" not in path.parts]
CLASSES = (Settings, *PARTS.values())


def attributes_read(path: Path, owner: str) -> set[str]:
    """Names that the code in `path` reads from the variable `owner`."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == owner
    }


def test_checks_read_flags_that_there_are() -> None:
    parsed = {action.dest for action in get_args_parser()._actions}
    assert attributes_read(FLAGS, "args") - parsed == set()
    assert set(MODES) <= parsed
    assert GOES_WITH.keys() <= parsed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--eval --epochs 7", "--epochs goes with a search, --baseline and --finetune"),
        ("--eval --no-repeated-aug --data-path a --model b", "--repeated-aug goes with a search, --baseline and"),
        ("--eval --init_compression_rate 2.9", "--init_compression_rate goes with a search and --baseline"),
        ("--eval --rounds 3", "--rounds goes with --benchmark"),
        ("--eval --search gradient", "--search goes with a search and --baseline"),
        ("--finetune --accum-steps 4", "--accum-steps goes with a search and --baseline"),
        ("--benchmark --lr 1", "--lr goes with --finetune"),
        ("--export a.onnx --amp bf16", "--amp goes with a search, --eval, "),
        ("--sensitivity --minutes 2", "--minutes goes with a search and --baseline"),
        ("--eval --distill 0", "--distill goes with --finetune"),
        ("--weight-decay 0", "--weight-decay goes with --finetune"),
    ],
)
def test_flags_of_other_modes_are_refused(words: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
        parse_flags(words.split())


@pytest.fixture(scope="module")
def attributes() -> set[str]:
    """What is read as an attribute anywhere else."""
    trees = [ast.parse(path.read_text()) for path in SOURCES if path not in (SETTINGS, FLAGS)]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_setting_is_used(kind: type, attributes: set[str]) -> None:
    """Read as an attribute somewhere else than where the settings are made, but for those that make the mode."""
    read = attributes | {*attributes_read(SETTINGS, "self"), *TARGETS, "eval", "finetune"}
    assert {field.name for field in dataclasses.fields(kind)} - read == set()


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_settings_are_frozen(kind: type) -> None:
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_parsed_flags_end_in_the_command_lines_folder() -> None:
    """No function elsewhere has a parameter of type `Namespace`, under whatever name."""
    for path in SOURCES:
        if path.parent.name == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.arg) and node.annotation is not None:
                assert "Namespace" not in ast.unparse(node.annotation), f"{path}: {node.arg}"
            if isinstance(node, ast.FunctionDef):
                assert "args" not in [argument.arg for argument in node.args.args], f"{path}: {node.name}"


@pytest.mark.parametrize("spelling", ["--data-path", "--data_path", "--data-pat"])
def test_dashes_underscores_and_abbreviations(spelling: str) -> None:
    assert parse_flags(["--eval", "--model", "x", spelling, "there"]).data.path == "there"
    assert parse_flags(["--eval", "--model", "x", f"{spelling}=a_b"]).data.path == "a_b"


def test_abbreviations_of_the_published_commands() -> None:
    found = parse_flags(["--finetune", "--epoch", "3", "--batch", "8", "--output", "o", "--load-comp"])
    assert (found.training.epochs, found.data.batch_size) == (3, 8)
    assert (found.run.output_dir, found.model.load) == (Path("o"), True)


def test_no_data_path_means_the_sample() -> None:
    found = parse_flags(["--eval"])
    assert (found.data.data_set, found.model.name, found.model.checkpoint) == (
        *("SAMPLE", "vit_sample_patch4_28", "official"),
    )


def test_a_data_path_means_imagenets_layout() -> None:
    found = parse_flags(["--eval", "--data-path", "x", "--model", "caformer_s36"])
    assert (found.data.data_set, found.model.checkpoint) == ("IMNET", "official")


def test_finetuning_starts_from_scratch_or_a_checkpoint() -> None:
    assert parse_flags(["--finetune"]).model.checkpoint == "scratch"
    assert parse_flags(["--finetune", "a.pth"]).model.checkpoint == "a.pth"
    assert parse_flags(["--finetune", "--checkpoint", "official"]).model.checkpoint == "official"


def test_the_samples_weights_are_finetuned_within_minutes() -> None:
    """From scratch, and with data of one's own, a training is what it is for all models."""
    usual = parse_flags(["--finetune"]).training
    assert (usual.epochs, usual.learning_rate, usual.warmup_epochs) == (30, 1e-5, None)
    for words in (["--finetune", "scratch"], ["--finetune", "official", "--data-path", "x", "--model", SAMPLE]):
        assert parse_flags(words).training == usual
    for words in (["--finetune", "official"], ["--finetune", "--checkpoint", "official"]):
        found = parse_flags(words).training
        expected = (SAMPLE_TUNING["epochs"], SAMPLE_TUNING["lr"], SAMPLE_TUNING["warmup_epochs"])
        assert (found.epochs, found.learning_rate, found.warmup_epochs) == expected
    assert parse_flags(["--finetune", "official", "--epochs", "1"]).training.epochs == 1


def test_seconds_are_measured_in_the_precision_of_the_run() -> None:
    words = ["--target_speedup", "1.2"]
    assert parse_flags(words).latency.precision == "off"
    assert parse_flags([*words, "--amp", "bf16"]).latency.precision == "bf16"
    assert parse_flags([*words, "--amp", "bf16", "--latency_precision", "off"]).latency.precision == "off"
