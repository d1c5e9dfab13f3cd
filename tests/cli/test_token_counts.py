"""Schedules at another input size: refused with both token counts, scaled when asked for, and said in files."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from diffrate.schedule import find_schedule
from tests.cli.test_errors import check
from tests.cli.test_eval import PROJECT, scores
from tests.cli.test_search import KEY, MODEL, words
from tests.conftest import Cli

TOKENS, TOKENS_AT_32 = 50, 65
HALF = ("--load_compression_rate", "--target_flops", 0.0242)
AT_32 = ("--input-size", 32)


def evaluation(folder: Path, *more: object) -> tuple[object, ...]:
    flags = ("--eval", "--model", MODEL, "--checkpoint", "scratch", "--data-path", folder, "--num_workers", 0)
    return (*flags, *more)


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "log.txt").read_text().splitlines()[-1])


def rates(path: Path, count: int, **more: object) -> tuple[object, ...]:
    """The flags that load a schedule of so many tokens in every block."""
    entry = {"prune_kept_num": [count] * 8, "merge_kept_num": [count] * 7 + [1], **more}
    path.write_text(json.dumps({KEY: {"1": entry}}))
    return ("--load_compression_rate", "--compression_rate_file", path)


def test_another_number_of_tokens_is_refused(cli: Cli, image_folder: Path) -> None:
    check(
        cli(*evaluation(image_folder, *HALF, *AT_32)),
        f"{KEY}: made for {TOKENS} tokens; accepted: {TOKENS_AT_32} tokens, as the model has at this input",
    )


def test_it_is_scaled_when_asked_for(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    """Every count keeps its share of the patches, and the whole its share of the dense model's cost."""
    cli(*evaluation(image_folder, *HALF, "--output_dir", tmp_path / "own"))
    code, _, err = cli(
        *evaluation(image_folder, *HALF, *AT_32, "--scale_compression_rate", "--output_dir", tmp_path / "scaled")
    )
    assert (code, err) == (0, "")
    own, scaled = record(tmp_path / "own"), record(tmp_path / "scaled")
    assert (own["tokens"], scaled["tokens"]) == (TOKENS, TOKENS_AT_32)
    for name in ("prune_kept_num", "merge_kept_num"):
        assert scaled[name] == [1 + round((count - 1) * (TOKENS_AT_32 - 1) / (TOKENS - 1)) for count in own[name]]
    shares = [found["gflops"] / found["dense_gflops"] for found in (own, scaled)]
    assert shares[1] == pytest.approx(shares[0], abs=0.01)


def test_scaling_to_its_own_size_changes_nothing(cli: Cli, image_folder: Path) -> None:
    plain, scaled = (cli(*evaluation(image_folder, *HALF, *more)) for more in ((), ("--scale_compression_rate",)))
    assert scaled[0] == 0
    assert scores(scaled[1]) == scores(plain[1])


@pytest.mark.parametrize(
    ("mode", "model", "target", "tokens"),
    [
        ("--eval", "vit_deit_tiny_patch16_224", 0.8, (197, 577)),
        ("--benchmark", "caformer_s36", 5.2, (196, 576)),
        ("--visualize", "vit_deit_tiny_patch16_224", 0.8, (197, 577)),
        ("--finetune", "caformer_s36", 5.2, (196, 576)),
    ],
)
def test_published_schedules_are_of_their_input(
    mode: str, model: str, target: float, tokens: tuple[int, int], cli: Cli, image_folder: Path, tmp_path: Path
) -> None:
    photograph = (PROJECT / "figures" / "chelsea.jpg",) if mode == "--visualize" else ()
    flags = ("--model", model, "--checkpoint", "scratch", "--data-path", image_folder, "--output_dir", tmp_path / "out")
    result = cli(mode, *photograph, *flags, "--load_compression_rate", "--target_flops", target, "--input-size", 384)
    check(result, f"made for {tokens[0]} tokens; accepted: {tokens[1]} tokens")
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize(
    ("model", "key", "target", "class_token"),
    [("vit_deit_tiny_patch16_224", "ViT-T-DeiT", 0.8, 1), ("caformer_s36", "CAFormer-S36", 5.2, 0)],
)
def test_published_schedules_scale(
    model: str, key: str, target: float, class_token: int, cli: Cli, image_folder: Path, tmp_path: Path
) -> None:
    """To a smaller input, of 6 by 6 patches instead of 14 by 14."""
    flags = ("--eval", "--model", model, "--checkpoint", "scratch", "--data-path", image_folder, "--num_workers", 0)
    load = ("--load_compression_rate", "--target_flops", target, "--scale_compression_rate", "--input-size", 96)
    code, _, err = cli(*flags, *load, "--output_dir", tmp_path)
    assert (code, err) == (0, "")
    found, published = record(tmp_path), find_schedule(PROJECT / "compression_rate.json", key, target)
    expected = [class_token + max(1 - class_token, round((c - class_token) * 36 / 196)) for c in published.merge]
    assert found["merge_kept_num"][: found["blocks"]] == expected[: found["blocks"]]
    assert found["tokens"] == 36 + class_token


def test_a_search_says_for_how_many_tokens_it_is(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    """And the command that it ends with evaluates at the same input."""
    base = words(image_folder, tmp_path, "--epochs", 1, *AT_32)
    code, text, err = cli(*base)
    assert (code, err) == (0, "")
    file = tmp_path / "compression_rate.json"
    assert json.loads(file.read_text())[KEY]["0.025"]["tokens"] == TOKENS_AT_32
    following = shlex.split(text.split("next: python main.py ")[1].splitlines()[0])
    code, text, err = cli(*following, "--num_workers", 0)
    assert (code, err) == (0, "")
    assert scores(text)[3] == 0.025
    load = ("--load_compression_rate", "--compression_rate_file", file)
    check(cli(*evaluation(image_folder, *load)), f"made for {TOKENS_AT_32} tokens; accepted: {TOKENS} tokens")


@pytest.mark.parametrize(
    ("count", "size", "more", "refused"),
    [
        (65, 32, {}, None),  # its largest count is what the model has at this input
        (50, 28, {}, None),
        (50, 32, {}, "made for 50 tokens; accepted: 65 tokens"),
        (65, 28, {}, "prune_kept_num[0]: found 65; accepted: 1 to 50"),
        (50, 32, {"tokens": 65}, None),
        (65, 32, {"tokens": 65}, None),
        (65, 32, {"tokens": 66}, "made for 66 tokens; accepted: 65 tokens"),
        (50, 28, {"tokens": 65}, "made for 65 tokens; accepted: 50 tokens"),
    ],
)
def test_files_with_and_without_tokens(
    count: int, size: int, more: dict[str, int], refused: str | None, cli: Cli, image_folder: Path, tmp_path: Path
) -> None:
    result = cli(*evaluation(image_folder, *rates(tmp_path / "a.json", count, **more), "--input-size", size))
    if refused is None:
        assert (result[0], result[2]) == (0, "")
    else:
        check(result, refused)


@pytest.mark.parametrize("tokens", ["50", 50.0, True, 0, -1, None, [50], {}], ids=repr)
def test_tokens_of_another_kind(tokens: object, cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    flags = rates(tmp_path / "a.json", 50, tokens=tokens)
    check(cli(*evaluation(image_folder, *flags)), f"{KEY} 1 tokens: found {tokens!r}; accepted: a whole number from ")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, f'{{"{KEY}": {"[" * 100_000}'])
def test_a_file_nested_too_deeply(content: str, cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)
    flags = ("--load_compression_rate", "--compression_rate_file", file)
    check(cli(*evaluation(image_folder, *flags)), f"{file}: cannot be read (nested too deeply); accepted")
