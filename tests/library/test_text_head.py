"""`diffrate.text_head`: classes of CLIP and SigLIP from their texts' embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

import diffrate
from diffrate.files.text_head import read_texts
from tests.folders import NAMES, write_texts
from tests.library.foreign_models import foreign, images_for, outputs_of
from tests.library.saved_models import assert_same, scheduled
from tests.library.text_files import run_the_lines_of_the_docs

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}


def small(**options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SMALL, **options).eval()


@torch.no_grad()
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("outputs", [0, 16], ids=["pooled", "projected"])
def test_logits_are_scaled_cosines(outputs: int, sigmoid: bool, tmp_path: Path) -> None:
    more = {"logit_bias": torch.tensor([-3.0])} if sigmoid else {}
    texts = write_texts(tmp_path / "texts.safetensors", outputs or 32, **more)
    model = small(num_classes=outputs)
    images = images_for(model)
    features = F.normalize(model(images).double(), dim=-1)
    rows = read_texts(texts).embeddings.double()
    expected = features @ rows.T * torch.tensor(2.0).double().exp() - (3.0 if sigmoid else 0.0)
    assert diffrate.text_head(model, texts) == NAMES
    torch.testing.assert_close(model(images).double(), expected, atol=1e-5, rtol=0)
    patched = diffrate.patch.vit(model, 1, 1)
    patched.schedule = patched.dense_schedule()
    torch.testing.assert_close(patched(images)[0].double(), expected, atol=1e-5, rtol=0)
    assert patched.has_head()
    assert patched.num_classes == 3


@pytest.mark.parametrize("outputs", [0, 16], ids=["pooled", "projected"])
def test_it_is_saved_loaded_searched_and_scored(outputs: int, tmp_path: Path) -> None:
    """On a model that is patched already, and in half precision."""
    texts = write_texts(tmp_path / "texts.safetensors", outputs or 32, logit_bias=torch.tensor(-1.0))
    model = scheduled(diffrate.patch.vit(small(num_classes=outputs), 1, 1))
    before = model.flops()
    classes = diffrate.text_head(model, texts)
    assert model.flops() == before + 3 * (outputs or 32)
    diffrate.save(model, tmp_path / "saved.safetensors", classes=classes)
    assert_same(diffrate.load(tmp_path / "saved.safetensors"), model)
    assert diffrate.about(tmp_path / "saved.safetensors").classes == NAMES
    images = images_for(model, count=4)
    batches = [(images, torch.tensor([0, 1, 2, 0]))]
    assert diffrate.evaluate(model, batches).images == 4
    assert diffrate.evaluate(model, batches, multi_label=True).mean_average_precision is not None
    found = diffrate.search(model, [images], share=0.7, epochs=1, loss="distill", multi_label=True)
    assert found.flops < model.flops_at(model.dense_schedule())
    diffrate.save(model.to(torch.bfloat16), tmp_path / "half.safetensors")
    assert diffrate.load(tmp_path / "half.safetensors").head.weight.dtype == torch.bfloat16


def test_other_texts_take_the_place_of_the_first_and_another_head_of_both(tmp_path: Path) -> None:
    model = diffrate.patch.vit(small(num_classes=16), 1, 1)
    diffrate.text_head(model, write_texts(tmp_path / "texts.safetensors"))
    other = write_texts(tmp_path / "other.safetensors", names=("fox", "gnu", "hen"), logit_scale=torch.tensor(1.0))
    assert diffrate.text_head(model, other) == ("fox", "gnu", "hen")
    assert model.head.logit_scale == 1
    model.reset_classifier(5)
    diffrate.save(model, tmp_path / "saved.safetensors")
    assert "text_width" not in diffrate.about(tmp_path / "saved.safetensors").arguments


def test_converted_models_take_texts_and_do_not_go_back(tmp_path: Path) -> None:
    """Nothing of the model that it was made of has logits for texts: three are as many as its features here."""
    original = foreign("clip")
    texts = write_texts(tmp_path / "texts.safetensors", 16)
    model = diffrate.patch.vit(diffrate.convert(original), 1, 1)
    images = images_for(model)
    expected = F.normalize(outputs_of(original, images), dim=-1) @ read_texts(texts).embeddings.T
    diffrate.text_head(model, texts)
    model.schedule = model.dense_schedule()
    with torch.no_grad():
        torch.testing.assert_close(model(images)[0] / torch.tensor(2.0).exp(), expected, atol=1e-5, rtol=0)
    with pytest.raises(diffrate.UnsupportedModelError, match="found 3 outputs of 32 channels by a text head; accepted"):
        diffrate.as_transformers(model, original)


def test_open_clip_makes_such_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = foreign("open_clip_quick")
    tokens = torch.randint(1, 99, (3, 8), generator=torch.Generator().manual_seed(5))
    monkeypatch.chdir(tmp_path)
    run_the_lines_of_the_docs("open_clip", model, tokens, monkeypatch)
    converted = diffrate.convert(model)
    images = images_for(converted)
    diffrate.text_head(converted, tmp_path / "texts.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(converted(images), model.get_logits(images, tokens)[0], atol=1e-5, rtol=0)


def _rows(change: Callable[[Tensor], Any]) -> Tensor:
    rows = torch.eye(3, 16)
    change(rows)
    return rows


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"logit_scale": None}, r"found embeddings; accepted: embeddings, logit_scale, and for SigLIP logit_bias"),
        ({"embeddings": None}, r"found logit_scale; accepted: embeddings, logit_scale, and"),
        ({"other": torch.ones(2)}, r"found embeddings, logit_scale, other; accepted"),
        ({"embeddings": torch.ones(16)}, r"found embeddings torch.float32 \[16\]; accepted: floats \[classes"),
        ({"embeddings": torch.ones(1, 16)}, r"found embeddings torch.float32 \[1, 16\]"),
        ({"embeddings": torch.ones(3, 16, dtype=torch.int64)}, r"found embeddings torch.int64 \[3, 16\]"),
        ({"embeddings": torch.ones(3, 0)}, r"found embeddings\[0\] of length 0; accepted: a number above 0"),
        ({"embeddings": _rows(lambda rows: rows[1].zero_())}, r"found embeddings\[1\] of length 0"),
        ({"embeddings": _rows(lambda rows: rows[2].fill_(torch.nan))}, r"found embeddings\[2\] of length nan"),
        ({"embeddings": _rows(lambda rows: rows[0].fill_(torch.inf))}, r"found embeddings\[0\] of length inf"),
        ({"logit_scale": torch.tensor(100.0)}, r"found logit_scale \[100.0\]; accepted: one number, a natural log"),
        ({"logit_scale": torch.tensor(torch.nan)}, r"found logit_scale \[nan\]"),
        ({"logit_scale": torch.ones(2)}, r"found logit_scale \[1.0, 1.0\]"),
        ({"logit_bias": torch.tensor(torch.inf)}, r"found logit_bias \[inf\]; accepted: one number"),
        ({"names": None}, r"found classes None; accepted: a JSON array of 3 different names, one per row"),
        ({"names": "cat, dog"}, r"found classes 'cat, dog'; accepted: a JSON array"),
        ({"names": ("cat", "dog")}, r"found classes 2 names"),
        ({"names": ("cat", "dog", "cat")}, r"found classes 'cat' twice"),
    ],
)  # fmt: skip
def test_files_that_are_refused(texts: dict[str, Any], expected: str, tmp_path: Path) -> None:
    model, path = small(num_classes=16), tmp_path / "texts.safetensors"
    before = model.head
    write_texts(path, **texts)
    with pytest.raises(diffrate.SavedModelError, match=expected) as caught:
        diffrate.text_head(model, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert model.head is before


def test_what_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("cat dog emu")
    for path, expected in ((tmp_path / "texts", "accepted: safetensors"), (tmp_path / "gone", "cannot be read")):
        with pytest.raises(diffrate.SavedModelError, match=expected):
            diffrate.text_head(small(num_classes=0), path)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: small(num_classes=10), "found a Linear that gives logits; accepted: of an image, of 16 channels"),
        (lambda: small(num_classes=0), "found features of 32 channels; accepted: of an image, of 16 channels"),
        (lambda: small(num_classes=0, global_pool=""), "found features of every position"),
        (lambda: timm.create_model("caformer_s18", num_classes=16), "that gives logits"),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224", num_classes=16), "that gives logits"),
        (lambda: torch.nn.Linear(2, 2), "found a NoneType that gives logits"),
    ],
)  # fmt: skip
def test_models_without_such_features_are_refused(model: Callable[[], Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(diffrate.UnsupportedModelError, match=expected):
        diffrate.text_head(model(), write_texts(tmp_path / "texts.safetensors"))
