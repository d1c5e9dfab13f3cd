"""Pictures of merged and pruned tokens, from origins alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import diffrate
from diffrate.pictures import PALETTE, PRUNED, Groups, color_of, draw_groups, group_colors, origin_groups
from tests.test_patch import images, patched

PATCH = 4


@st.composite
def origins(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[int, int]]:
    """Origins of the patches of a grid, square or not."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    token = st.integers(PRUNED, max(1, rows * columns // 2))
    flat = draw(st.lists(token, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(flat), (rows, columns)


def picture_of(groups: Groups, brightness: int = 128) -> np.ndarray:
    image = Image.new("RGB", (groups.shape[1] * PATCH, groups.shape[0] * PATCH), (brightness,) * 3)
    return np.asarray(draw_groups(image, groups))


def inner(picture: np.ndarray, row: int, column: int) -> tuple[int, ...]:
    """A pixel of a patch that neither line nor hatching covers."""
    return tuple(picture[row * PATCH + 1, column * PATCH].tolist())


@given(origins())
def test_each_patch_is_in_one_group_or_pruned(case: tuple[torch.Tensor, tuple[int, int]]) -> None:
    origin, grid = case
    groups = origin_groups(origin, grid)
    assert groups.shape == grid
    assert np.array_equal(groups.ravel() == PRUNED, origin.numpy() == PRUNED)
    kept = set(origin.tolist()) - {PRUNED}
    assert set(groups.ravel().tolist()) - {PRUNED} == set(range(len(kept)))
    same = origin[:, None] == origin[None]
    assert np.array_equal(groups.ravel()[:, None] == groups.ravel()[None], same.numpy())


@given(origins())
def test_neighbours_never_share_a_color(case: tuple[torch.Tensor, tuple[int, int]]) -> None:
    groups = origin_groups(*case)
    colors = np.array([*group_colors(groups), PRUNED])[groups]
    for first, second, one, other in (
        (groups[:-1], groups[1:], colors[:-1], colors[1:]),
        (groups[:, :-1], groups[:, 1:], colors[:, :-1], colors[:, 1:]),
    ):
        assert ((first == second) == (one == other)).all()


def test_color_numbers_are_colors_of_their_own() -> None:
    colors = {tuple(np.round(color_of(number)).astype(int).tolist()) for number in range(5 * len(PALETTE))}
    assert len(colors) == 5 * len(PALETTE)
    assert all(0 <= value <= 255 for color in colors for value in color)


@given(origins())
def test_the_picture_is_the_same_every_time(case: tuple[torch.Tensor, tuple[int, int]]) -> None:
    groups = origin_groups(*case)
    assert np.array_equal(picture_of(groups), picture_of(groups))


def test_regions_singles_and_pruned_look_different() -> None:
    groups = np.array([[0, 0, 1], [PRUNED, 2, 2]])
    picture = picture_of(groups)
    assert picture.shape == (2 * PATCH, 3 * PATCH, 3)
    assert inner(picture, 0, 0) == inner(picture, 0, 1) != inner(picture, 1, 1)
    assert inner(picture, 0, 2) == (128, 128, 128)  # stands for itself: the image
    assert max(inner(picture, 1, 0)) < 64
    border = picture[:, 2 * PATCH - 1]
    assert (border[:PATCH] == 255).all()


def test_nothing_removed_shows_every_patch_alone() -> None:
    groups = origin_groups(torch.arange(6), (2, 3))
    assert groups.tolist() == [[0, 1, 2], [3, 4, 5]]
    picture = picture_of(groups)
    assert {inner(picture, row, column) for row in range(2) for column in range(3)} == {(128, 128, 128)}


def test_all_pruned_is_dark() -> None:
    assert picture_of(np.full((3, 2), PRUNED)).max() < 128


@pytest.mark.parametrize("family", ["deit", "mae", "caformer"])
def test_groups_are_the_kept_tokens_of_a_model(family: str) -> None:
    model = patched(family)
    state = model.forward_tokens(images(family, 1))
    assert state.origin is not None
    has_class_token = family != "caformer"
    patches = state.origin[0, has_class_token:]
    side = int(len(patches) ** 0.5)
    groups = origin_groups(patches, (side, side))
    assert groups.max() + 1 == state.x.shape[1] - has_class_token


def test_the_published_form_draws_the_same() -> None:
    """A matrix of kept tokens by input tokens, and origins, with and without the batch of one."""
    origin = torch.tensor([0, 1, 1, PRUNED, 2])
    matrix = torch.stack([origin == token for token in range(3)]).float()[None]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    pictures = [diffrate.make_visualization(image, form, 4, True) for form in (matrix, origin, origin[None])]
    assert pictures[0].size == (8, 8)
    assert all(picture.tobytes() == pictures[0].tobytes() for picture in pictures)
    assert pictures[0].tobytes() != image.tobytes()


def test_grids_need_not_be_square() -> None:
    origin = torch.tensor([0, 1, 1, 2, 2, 2])
    wide = diffrate.make_visualization(Image.new("RGB", (48, 32)), origin, 16, class_token=False)
    assert wide.size == (48, 32)


@pytest.mark.parametrize(
    ("size", "source", "expected"),
    [
        ((32, 32), torch.arange(5), "4 patches; accepted: 5"),
        ((48, 32), torch.arange(4), "6 patches; accepted: 4"),
        ((32, 32), torch.zeros(2, 4), "source of"),
    ],
)
def test_what_does_not_belong_together_is_refused(size: tuple[int, int], source: torch.Tensor, expected: str) -> None:
    with pytest.raises(diffrate.VisualizationError, match=expected):
        diffrate.make_visualization(Image.new("RGB", size), source, 16, class_token=False)


@pytest.mark.parametrize(
    ("image", "seen"),
    [
        (Image.fromarray(np.full((32, 32), 20_000, np.uint16)), 78),
        (Image.fromarray(np.full((32, 32), 0.3, np.float32)), 76),
        (Image.new("RGBA", (32, 32), (0, 0, 0, 0)), 255),
    ],
    ids=["16 bits", "floats", "transparent"],
)
def test_pixels_of_other_modes_are_scaled(image: Image.Image, seen: int) -> None:
    drawn = diffrate.make_visualization(image, torch.arange(4), 16, class_token=False)
    assert drawn.getpixel((8, 8)) == (seen,) * 3
    with pytest.raises(
        diffrate.VisualizationError, match=r"^image: found integers from 70000 to 70000; accepted: 8 or"
    ):
        diffrate.make_visualization(Image.new("I", (32, 32), 70_000), torch.arange(4), 16, class_token=False)


@pytest.mark.parametrize(
    ("image", "source"), [("photo.png", torch.arange(4)), (Image.new("RGB", (32, 32)), [0, 1, 2, 3])]
)
def test_other_types_are_refused(image: object, source: object) -> None:
    with pytest.raises(diffrate.VisualizationError, match="accepted: a PIL image and a tensor"):
        diffrate.make_visualization(image, source, 16, class_token=False)  # type: ignore[reportArgumentType]
