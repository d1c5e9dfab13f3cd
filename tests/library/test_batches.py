"""What a batch may look like, in all that takes batches."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import diffrate
from diffrate.evaluation import split_batch
from diffrate.searching.teacher import losses_at
from tests.library.test_search_function import small

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 5


def gradient(loader: Any) -> Any:
    return diffrate.search(small(), loader, share=0.6, loss="distill").history


def calibrated(loader: Any) -> Any:
    return diffrate.search(small(), loader, share=0.6, method="calibrated", work=50).schedule


def dense_and_least(loader: Any) -> list[float]:
    model = small()
    return losses_at(model, [model.dense_schedule(), diffrate.Schedule((9,) * 4, (9,) * 4)], loader)


CALLS: dict[str, Callable[[Any], Any]] = {
    "evaluate": lambda loader: diffrate.evaluate(small(), loader),
    "gradient": gradient,
    "calibrated": calibrated,
    "sensitivity": lambda loader: diffrate.sensitivity(small(), loader, shares=(0.5,)),
    "losses_at": dense_and_least,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_mappings_and_longer_tuples_are_batches(call: Callable[[Any], Any]) -> None:
    expected = call([(IMAGES, LABELS)])
    assert call([[IMAGES, LABELS, "more"]]) == expected
    assert call([{"label": LABELS, "image": IMAGES}]) == expected
    assert call([UserDict(pixel_values=IMAGES, labels=LABELS)]) == expected


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"picture": IMAGES, "label": LABELS}, "no images in a dict with the names 'picture', 'label'"),
        ("batch", "str"),
        (IMAGES.numpy(), "ndarray"),
        ((IMAGES.numpy(), LABELS), "ndarray in a tuple of 2"),
        (IMAGES[0], r"images of the shape \[3, 32, 32\]"),
        ({"img": IMAGES[0]}, r"images of the shape \[3, 32, 32\] in a dict"),
        ((IMAGES.byte(), LABELS), "images of uint8 in a tuple"),
        ((), "no images in a tuple of 0"),
    ],
)
def test_other_batches_are_refused_in_one_line(call: Callable[[Any], Any], batch: Any, found: str) -> None:
    with pytest.raises(ValueError, match=f"^batch: found {found}.*; accepted: images .*pixel_values, image, .*$"):
        call([batch])


def test_labels_are_as_they_come() -> None:
    assert split_batch(IMAGES)[1] is None
    assert split_batch([IMAGES])[1] is None
    assert split_batch({"input": IMAGES, "targets": ["cat"]})[1] == ["cat"]


def test_labels_that_are_no_tensor_are_refused_where_they_are_asked_for() -> None:
    with pytest.raises(ValueError, match="loader: found labels of type list; accepted: images and labels"):
        diffrate.search(small(), [(IMAGES, LABELS.tolist())], share=0.6)
    diffrate.search(small(), [(IMAGES, LABELS.tolist())], share=0.6, loss="distill")


def test_a_model_refuses_an_image_without_its_batch() -> None:
    with pytest.raises(ValueError, match=r"^images: found the shape \[3, 32, 32\]; accepted: \[B, channels, H, W\]$"):
        small().eval()(IMAGES[0])
    with pytest.raises(ValueError, match=r"^images: found 3 channels of uint8; accepted: 3 channels of floats$"):
        small().eval()(IMAGES.byte())
    assert np.isfinite(diffrate.evaluate(small(), [{"image": IMAGES, "label": LABELS}]).loss)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_images_of_other_channels_are_refused(call: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"^images: found 1 channels of float32; accepted: 3 channels of floats$"):
        call([(IMAGES[:, :1], LABELS)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": 0.6, "latency": {}}, "latency: found dict; accepted: a LatencyTable, or none"),
        ({"share": 0.6, "start": "dense"}, "start: found str; accepted: a Schedule, or none"),
        ({"share": "half"}, "share: found 'half'; accepted: a number"),
    ],
)
def test_arguments_of_another_kind_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(diffrate.SearchSettingError, match=f"^{message}$"):
        diffrate.search(small(), [(IMAGES, LABELS)], **given)
