"""`--visualize`: what is seen of an image, and the files it leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli.data import View, crop_view, eval_transform
from cli.settings import PROJECT
from cli.visualize import MOST_BLOCKS, Seen, page, see, shown_blocks
from diffrate.pictures import PRUNED
from tests.conftest import Cli, write_image
from tests.test_patch import FALLING, patched
from tests.tiny_models import FAMILIES, IMAGE_SIZE


def seen_by(family: str, *photographs: Image.Image) -> list[Seen]:
    return see(patched(family), photographs, View(IMAGE_SIZE[family], 0.875))


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_block_shows_its_tokens(family: str) -> None:
    class_token = family != "caformer"
    for seen in seen_by(family, noise(300, 200), noise(50, 80)):
        assert seen.grid[0] * seen.grid[1] == len(seen.origins[0]) == seen.tokens - class_token
        for kept, origin in zip(seen.kept, seen.origins, strict=True):
            assert len(set(origin.tolist()) - {PRUNED}) == kept - class_token
        assert seen.view.size == seen.tokens_after(0).size
        assert min(seen.view.size) >= 448
        for probabilities in (seen.dense, seen.compressed):
            torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_are_those_of_the_model_and_leave_it_as_it_was(family: str) -> None:
    model, photograph = patched(family), noise(90, 60)
    images = eval_transform(View(IMAGE_SIZE[family], 0.875))(photograph)[None]
    seen = see(model, [photograph], View(IMAGE_SIZE[family], 0.875))[0]
    assert model.get_kept_num() == FALLING[family]
    with torch.inference_mode():
        torch.testing.assert_close(seen.compressed, model(images, return_flop=False)[0].softmax(0))
        whole = model.dense_schedule()
        model.set_kept_num(whole.prune, whole.merge)
        torch.testing.assert_close(seen.dense, model(images, return_flop=False)[0].softmax(0))


@pytest.mark.parametrize("size", [(300, 200), (31, 400), (64, 64)])
def test_the_view_is_what_the_model_sees(size: tuple[int, int]) -> None:
    """At the input's own size the view is the input, but for the borders that resizing rounds."""
    ramp = np.linspace(0, 255, size[0])[None, :, None] + np.zeros((size[1], size[0], 3))
    photograph = Image.fromarray(ramp.astype(np.uint8))
    seen = np.asarray(crop_view(photograph, View(32, 0.875), 32), dtype=float)
    given = eval_transform(View(32, 0.875))(photograph).permute(1, 2, 0).numpy()
    given = 255 * (given * np.array([0.229, 0.224, 0.225]) + np.array([0.485, 0.456, 0.406]))
    assert np.abs(seen - given).max() < 8


def test_a_sheet_has_a_panel_for_each_block() -> None:
    seen = seen_by("deit", noise(60, 60))[0]
    names = [f"class {index}" for index in range(10)]
    titles = [axes.get_title() for axes in page(seen, names, "all").axes]
    assert [title for title in titles if title.startswith("after")] == [
        f"after block {block}: {seen.kept[block]} of 65 tokens" for block in shown_blocks(seen)
    ]
    chosen = page(seen, names, "chosen", blocks=[4, 0])
    titles = [axes.get_title() for axes in chosen.axes]
    assert [title.split(":")[0] for title in titles if title.startswith("after")] == ["after block 4", "after block 0"]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_stands_beside_the_tokens_of_the_same_blocks(family: str) -> None:
    model, view = patched(family), View(IMAGE_SIZE[family], 0.875)
    seen = see(model, [noise(60, 60), noise(70, 60)], view, attention=True)[1]
    assert seen.attention is not None
    whose, dense, compressed = seen.attention
    assert whose == ("all tokens" if family == "caformer" else "the class token")
    assert dense.blocks.shape == compressed.blocks.shape == (len(seen.kept), *seen.grid)
    drawn = page(seen, [f"class {index}" for index in range(10)], "title")
    titles = [axes.get_title() for axes in drawn.axes]
    blocks = shown_blocks(seen)
    expected = ["rollout", *(f"in block {block}" for block in blocks)]
    assert [title for title in titles if title.endswith("dense")] == [f"{name}, dense" for name in expected]
    assert [title for title in titles if title.endswith("compressed")] == [f"{name}, compressed" for name in expected]
    rows = [axes.images[0].get_clim() for axes in drawn.axes if axes.get_title().endswith(("dense", "compressed"))]
    assert all(low == 0 for low, _ in rows)
    assert rows[0] == rows[1]
    assert rows[2] == rows[3] == rows[4] == rows[5]  # a row of two blocks


def test_many_blocks_are_thinned_out_and_the_last_stays() -> None:
    seen = seen_by("deit", noise(60, 60))[0]
    kept = tuple(range(64, 34, -1))
    many = replace(seen, origins=seen.origins[:1] * len(kept), kept=kept)
    blocks = shown_blocks(many)
    assert len(blocks) <= MOST_BLOCKS
    assert blocks[-1] == 29
    whole = replace(seen, origins=seen.origins[:1] * 2, kept=(65, 65))
    assert shown_blocks(whole) == [1]


def test_where_the_class_token_alone_is_left_the_last_block_with_patches_is_shown() -> None:
    seen = seen_by("deit", noise(60, 60))[0]
    some = seen.origins[0]
    seen = replace(seen, origins=(some, some, torch.full_like(some, PRUNED)), kept=(9, 5, 1))
    assert shown_blocks(seen) == [0, 1]
    titles = [axes.get_title() for axes in page(seen, [f"class {index}" for index in range(10)], "title").axes]
    assert "after block 1, the last with patches: 5 of 65 tokens" in titles
    assert not any(title.startswith("at the end") or "block 2" in title for title in titles)
    chosen = [axes.get_title() for axes in page(seen, [""] * 10, "title", blocks=[2]).axes]
    assert "after block 2: 1 of 65 tokens, no patches" in chosen


def test_pictures_of_any_file(cli: Cli, tmp_path: Path) -> None:
    """Greyscale, transparent, tiny, long, turned by the camera; two of one name; in batches of two."""
    out, folder = tmp_path / "out", tmp_path / "in"
    write_image(folder / "a.png", seed=1, size=70)
    write_image(folder / "b" / "a.png", seed=2, size=70)
    Image.new("L", (30, 20), 90).save(folder / "grey.png")
    Image.new("RGBA", (400, 30), (9, 9, 200, 90)).save(folder / "long.png")
    Image.new("RGB", (1, 1)).save(folder / "dot.jpg")
    turned = Image.new("RGB", (40, 20))
    turned.getexif()[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=turned.getexif())
    files = [folder / name for name in ("a.png", "b/a.png", "grey.png", "long.png", "dot.jpg", "turned.jpg")]
    words = ("--visualize", *files, "--load_compression_rate", "--output_dir", out, "--batch-size", 2, "--blocks", 0)
    code, text, err = cli(*words)
    assert (code, err) == (0, "")
    names = ["a", "a-2", "grey", "long", "dot", "turned"]
    assert {path.name for path in out.glob("*.png")} == {
        f"{name}{end}.png" for name in names for end in ("", "_tokens")
    }
    for path in out.glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
            assert min(picture.size) >= 448
    records = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert [record["image"] for record in records] == [str(file) for file in files]
    assert all(record["kept"][-1] == 3 for record in records)
    assert text.count("->") == len(files)


def test_what_cannot_be_read_is_left_out_on_request(cli: Cli, tmp_path: Path) -> None:
    good, bad, out = tmp_path / "good.png", tmp_path / "bad.png", tmp_path / "out"
    write_image(good, seed=1)
    bad.write_bytes(b"no picture")
    words = ("--load_compression_rate", "--output_dir", out, "--skip-unreadable")
    code, text, err = cli("--visualize", bad, good, bad, *words)
    assert (code, err) == (0, "")
    assert f"left out 1 images that cannot be read: {bad}" in text
    assert {path.name for path in out.glob("*.png")} == {"good.png", "good_tokens.png"}
    code, _, err = cli("--visualize", bad, *words)
    assert code == 2
    assert f"image {bad}: cannot be read, nor any other; accepted: one that can" in err


def test_turned_pictures_are_drawn_upright(cli: Cli, tmp_path: Path) -> None:
    """As one that was saved upright, and a transparent one as on white."""
    image, exif = Image.new("RGB", (40, 40), "white"), Image.Exif()
    image.paste("black", (0, 0, 20, 10))
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    image.save(tmp_path / "lying.png", exif=exif)
    mask = image.convert("L").point(lambda value: 255 - value)
    clear = Image.composite(image, Image.new("RGB", image.size, "red"), mask)
    clear.putalpha(mask)
    clear.save(tmp_path / "clear.png", exif=exif)
    files = [tmp_path / f"{name}.png" for name in ("upright", "lying", "clear")]
    words = ("--visualize", *files, "--load_compression_rate", "--output_dir", tmp_path / "out", "--blocks", 0)
    assert cli(*words)[0] == 0
    drawn = [Image.open(tmp_path / "out" / f"{file.stem}_tokens.png").tobytes() for file in files]
    assert drawn[0] == drawn[1] == drawn[2]


def test_a_photograph_on_a_full_size_model(cli: Cli, tmp_path: Path) -> None:
    photograph = PROJECT / "figures" / "chelsea.jpg"
    model = ("--model", "vit_deit_tiny_patch16_224", "--checkpoint", "scratch")
    rates = ("--load_compression_rate", "--target_flops", 0.7, "--attention")
    code, _, err = cli("--visualize", photograph, *model, *rates, "--blocks", 3, "--output_dir", tmp_path)
    assert (code, err) == (0, "")
    with Image.open(tmp_path / "chelsea_tokens.png") as tokens:
        assert tokens.size == (448, 448)
    with Image.open(tmp_path / "chelsea.png") as drawn:
        assert drawn.height > drawn.width  # four rows, two of them of attention


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gone.png"], "gone.png: cannot be read"),
        ([str(PROJECT)], "cannot be read"),
        ([str(PROJECT / "README.md")], "accepted: a whole image file"),
        (["{image}", "gone.png"], "gone.png: cannot be read"),
        (["{image}", "--blocks", "8"], "--blocks 8: accepted: 0 to 7"),
        (["{image}", "--blocks", "-1"], "--blocks"),
        (["{image}", "--eval"], "accepted: one of"),
        (["{image}", "--resume", "auto"], "--resume auto: no checkpoint.pth"),
    ],
)
def test_bad_input_writes_no_picture(words: list[str], expected: str, cli: Cli, tmp_path: Path) -> None:
    write_image(tmp_path / "in.png", seed=0)
    filled = [word.format(image=tmp_path / "in.png") for word in words]
    code, _, err = cli("--visualize", *filled, "--output_dir", tmp_path / "out")
    assert code == 2
    assert expected in err
    assert err.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize("flag", [("--attention",), ("--blocks", "1")])
def test_what_pages_show_is_asked_with_pages_alone(flag: tuple[str, ...], cli: Cli) -> None:
    assert cli("--eval", *flag) == (2, "", f"main.py: error: {flag[0]} goes with --visualize\n")
