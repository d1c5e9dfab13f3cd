"""`--input-size ROWS COLUMNS`, and what timm's configurations say of how pictures become inputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torchvision import transforms

import diffrate
import models
from benchmarks import speed
from benchmarks.speed import Setting, Subject, build_side, build_step, scaling_rows
from cli.data import View, crop_view, eval_transform, train_transform
from cli.flags import parse_flags
from cli.settings import Augmentation
from cli.visualize import page, see
from diffrate.files.header import about
from diffrate.timing import Use
from tests.cli.test_errors import check
from tests.cli.test_eval import scores
from tests.conftest import Cli, write_image
from tests.constructions import lacking, since

MODEL = ("--model", "test_vit")  # of 160 pixels, patches of 16
AT = ("--input-size", 48, 96)
FAST = ("--num_workers", 0)
NONE = Augmentation(0.0, None, "bicubic", 0.0, "const", 1, 0.0, None, False)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("photograph", [(300, 200), (90, 250), (64, 64)])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(64, 64), (48, 96), (100, 33)])
def test_pictures_become_inputs_as_in_timm(size: tuple[int, int], mode: str, photograph: tuple[int, int]) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    view = View(size, 0.875, mean, std, "bilinear", mode)
    expected = create_transform(
        size, crop_pct=0.875, crop_mode=mode, interpolation="bilinear", mean=mean, std=std, is_training=False
    )
    torch.testing.assert_close(eval_transform(view)(noise(*photograph)), expected(noise(*photograph)), rtol=0, atol=0)


def test_a_side_is_rows_and_columns() -> None:
    for resized, view in ((256, View(224, 224 / 256)), (128, View((112, 112), 0.875))):
        first, second = eval_transform(view).transforms[-4:-2]
        assert isinstance(first, transforms.Resize)
        assert (first.size, tuple(second.size)) == (resized, view.size)


@pytest.mark.parametrize("photograph", [(300, 200), (90, 250)])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_the_view_is_what_the_model_sees(mode: str, photograph: tuple[int, int]) -> None:
    """At the input's own size the view is the input, but for the borders that resizing rounds."""
    width, height = photograph
    ramp = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 50, height)[:, None, None] + np.zeros(3)
    picture = Image.fromarray(ramp.astype(np.uint8))
    view = View((32, 56), 0.875, (0.0,) * 3, (1.0,) * 3, crop_mode=mode)
    seen = np.asarray(crop_view(picture, view, view.size), dtype=float)
    given = 255 * eval_transform(view)(picture).permute(1, 2, 0).numpy()
    assert np.abs(seen - given).max() < 8
    assert crop_view(picture, view, (320, 560)).size == (560, 320)


@pytest.mark.parametrize("size", [(24, 32), (48, 96)])
def test_training_sees_pictures_of_the_size(size: tuple[int, int]) -> None:
    assert train_transform(View(size, 0.875), NONE)(noise(70, 50)).shape == (3, *size)


def test_two_numbers_are_rows_and_columns() -> None:
    assert parse_flags(["--eval"]).model.input_size is None
    for words, size, flag in ((["32"], (32, 32), 32), (["32", "32"], (32, 32), 32), (["32", "48"], (32, 48), [32, 48])):
        settings = parse_flags(["--eval", "--input-size", *words])
        assert settings.model.input_size == size
        assert settings.run.flags["input_size"] == flag


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--input-size", 48, 100), "--input-size 48 100: accepted: a multiple of 16, the side of a patch"),
        (("--input-size", 48, 96, 3), "--input-size: found 3 numbers; accepted: a side, or rows and columns"),
        (("--input-size", 48, 0), "--input-size: found 0"),
        (("--input-size", 4096, 4096, "--batch-size", 999999, *MODEL), "at --input-size 4096"),
        (("--input-size", 4096, 2048, "--batch-size", 999999, *MODEL), "at --input-size 4096 2048"),
        (("--input-size", 160, 80, "--crop-pct", 0.001), "--crop-pct 0.001: accepted: 0.00977 to 1 at 160 pixels"),
    ],
)
def test_sizes_that_are_refused(words: tuple[object, ...], expected: str, cli: Cli) -> None:
    check(cli("--eval", *MODEL, "--checkpoint", "scratch", *FAST, *words), expected)


def test_a_model_whose_own_size_its_patches_do_not_tile_runs_at_it(cli: Cli, tmp_path: Path) -> None:
    """27 patches of 14 pixels of 384: the picture shows what they cover."""
    entry = models.entry_of("vit_so400m_patch14_siglip_gap_384")
    entry = replace(entry, options={"depth": 3, "embed_dim": 48, "num_heads": 3, "mlp_ratio": 1})
    model = diffrate.patch.vit(models.create(entry))
    with pytest.raises(models.InputSizeError, match="--input-size 385: accepted: a multiple of 14"):
        models.create(entry, 385)
    photograph = noise(400, 300)
    seen = see(model, [photograph], View(384, 1.0))[0]
    assert seen.grid == (27, 27)
    assert seen.view.size == (756, 756)
    assert seen.dense is None
    whole = crop_view(photograph, View(384, 1.0), 768)
    assert seen.view.tobytes() == whole.crop((0, 0, 756, 756)).tobytes()
    assert page(seen, [], "title").axes[0].get_title() == "input"


def test_a_training_of_oblong_inputs_is_evaluated(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    flags = (*MODEL, *AT, "--data-path", image_folder, *FAST)
    trained = cli("--finetune", *flags, "--epochs", 1, "--batch-size", 4, "--output_dir", tmp_path)
    assert (trained[0], trained[2]) == (0, "")
    code, out, err = cli("--eval", *flags, "--checkpoint", tmp_path / "checkpoint.pth")
    assert (code, err) == (0, "")
    assert scores(out)[0] == scores(trained[1].rpartition("  best")[0])[0]


def test_what_a_search_at_oblong_inputs_finds_is_evaluated(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    data = ("--data-path", image_folder, *FAST)
    search = ("--target_flops", "60%", "--granularity", 1, "--epochs", 1, "--batch-size", 4, "--output_dir", tmp_path)
    code, out, err = cli(*MODEL, *AT, *data, "--checkpoint", "scratch", *search)
    assert (code, err) == (0, "")
    following = out.strip().splitlines()[-1]
    assert following.endswith("--input-size 48 96")
    code, out, err = cli(*following.split("main.py ")[1].split(), *FAST)
    assert (code, err) == (0, "")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A file of `--save` for inputs of 3 by 6 patches."""
    model = diffrate.patch.vit(models.create(models.entry_of("test_vit"), (48, 96), num_classes=3))
    model.set_kept_num([19, 14] * 3, [19, 10] * 3)
    diffrate.save(model, tmp_path / "oblong.safetensors", name="mine", classes=("cat", "dog", "emu"))
    return tmp_path / "oblong.safetensors"


def test_files_of_oblong_inputs_say_so(saved: Path, cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    data = ("--data-path", image_folder, *FAST)
    code, first, err = cli("--eval", "--checkpoint", saved, *data, "--save", tmp_path / "again.safetensors")
    assert (code, err) == (0, "")
    assert about(tmp_path / "again.safetensors").input_size == (3, 48, 96)
    code, second, err = cli("--eval", "--checkpoint", tmp_path / "again.safetensors", *data)
    assert scores(first) == scores(second)
    turned = cli("--eval", "--checkpoint", saved, *data, "--input-size", 96, 48, "--dense")
    if lacking("1.0.31"):
        check(turned, "oblong.safetensors: positions for 48 by 96 pixels at 96 by 48 need timm 1.0.31; found ")
    else:
        assert (turned[0], turned[2]) == (0, "")


def test_pictures_of_oblong_inputs(saved: Path, cli: Cli, tmp_path: Path) -> None:
    write_image(tmp_path / "photograph.png", seed=1, size=90)
    flags = ("--checkpoint", saved, "--output_dir", tmp_path / "out")
    assert cli("--visualize", tmp_path / "photograph.png", *flags)[0] == 0
    with Image.open(tmp_path / "out" / "photograph_tokens.png") as tokens:
        assert tokens.size == (960, 480)  # whole pixels for each of the input's


def test_benchmarks_of_oblong_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, cpu = Subject(models.entry_of("test_vit"), (48, 96), None, 1, 0), torch.device("cpu")
    build_step("search", subject, 2, cpu)()
    assert build_side("compressed", subject, Use(2, torch.float32, False, cpu))().shape == (2, 1000)
    monkeypatch.setattr(speed, "SHARES", (0.5,))
    setting = Setting((2,), (torch.float32,), (False,), 1, cpu)
    whole, half = scaling_rows(subject, [(48, 96), (48, 100)], setting)  # the second is left out
    assert (whole["tokens_kept"], half["tokens_kept"]) == (19, 10)
    assert whole["input_size"] == 68  # the side of a square of as many pixels


def test_a_schedule_of_another_shape_is_scaled(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    data = ("--data-path", image_folder, *FAST)
    flags = ("--eval", *MODEL, "--checkpoint", "scratch", *data, "--load_compression_rate")
    table = {"test_vit.r160_in1k": {"1": {"prune_kept_num": [19] * 6, "merge_kept_num": [19, 10, 10, 10, 10, 10]}}}
    (tmp_path / "rates.json").write_text(json.dumps(table))
    flags = (*flags, "--target_flops", 1, "--compression_rate_file", tmp_path / "rates.json")
    assert cli(*flags, *AT)[0] == 0
    check(cli(*flags, "--input-size", 48, 48), "rates.json", "test_vit.r160_in1k")
    flags = (*flags, "--scale_compression_rate")
    assert cli(*flags, "--input-size", 64, 96)[0] == 0


def test_the_whole_picture_is_divided_into_the_grid() -> None:
    """Register tokens come first, too, and stand for no patch."""
    origin = torch.tensor([0, 1, 2, 3, 3, 5, 6, 7, 8])
    picture = diffrate.make_visualization(noise(48, 32), origin, 16, class_token=3)
    assert picture.size == (48, 32)
    same = diffrate.make_visualization(noise(48, 32), origin[2:], 16, class_token=True)
    assert picture.tobytes() == same.tobytes()
    with pytest.raises(diffrate.VisualizationError):
        diffrate.make_visualization(noise(48, 32), origin, 16, class_token=2)


@since("1.0.31")
@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "test_vit_relpos"])
def test_counts_of_a_model_without_position_embeddings_are_of_its_size(
    name: str, cli: Cli, image_folder: Path, tmp_path: Path
) -> None:
    """Nothing in the tensors tells, but the training's flags do: here at 2 by 3 patches."""
    side = 14 if "14" in name else 16
    flags = ("--model", name, "--data-path", image_folder, *FAST)
    at, other = ("--input-size", 2 * side, 3 * side), ("--input-size", 3 * side, 3 * side)
    entry = models.entry_of(name)
    model = diffrate.patch.vit(models.create(entry, (2 * side, 3 * side), num_classes=3))
    prune, merge = ([model.compression.space.limits[0] - 1] * len(model.blocks) for _ in range(2))
    model.set_kept_num(prune, merge)
    content = {"mode": "finetune", "model": model.state_dict(), "flags": {"input_size": [2 * side, 3 * side]}}
    torch.save(content, tmp_path / "trained.pth")
    checkpoint = ("--checkpoint", tmp_path / "trained.pth")
    assert cli("--eval", *flags, *at, *checkpoint)[0] == 0
    check(cli("--eval", *flags, *other, *checkpoint), "made for")
    assert cli("--eval", *flags, *other, *checkpoint, "--scale_compression_rate")[0] == 0
