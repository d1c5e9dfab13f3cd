"""Towers of language models: compressed, they give fewer tokens, and the text has as many places for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffrate
from tests.library.foreign_models import SIDE, foreign, images_for, of_transformers, outputs_of, varied

IMAGE_TOKEN = 98
_DEEP = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
_VISION = _DEEP | {"image_size": SIDE, "patch_size": 8}
KEPT = 7  # tokens of a CLIP that are left of 17


def llava(family: str, strategy: str) -> Any:
    """A small language model with a tower, random weights."""
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = getattr(hf, f"{family}VisionConfig")(**_VISION)
    text = hf.LlamaConfig(**_DEEP, num_key_value_heads=4, vocab_size=99)
    options = {"image_token_index": IMAGE_TOKEN, "vision_feature_select_strategy": strategy}
    config = hf.LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-2, **options)
    return varied(hf.LlavaForConditionalGeneration(config)).eval()


def asked(images: torch.Tensor, places: int) -> dict[str, Any]:
    """A batch of prompts with so many places for each image's tokens."""
    words = torch.tensor([[1, 5, *[IMAGE_TOKEN] * places, 7, 8]] * len(images))
    return {"input_ids": words, "pixel_values": images, "attention_mask": torch.ones_like(words)}


@pytest.mark.parametrize(("family", "strategy"), [("CLIP", "default"), ("CLIP", "full"), ("Siglip", "full")])
def test_a_language_model_reads_as_many_tokens_as_the_schedule_leaves(family: str, strategy: str) -> None:
    model = llava(family, strategy)
    original = model.model.vision_tower
    tower = diffrate.patch.vit(diffrate.convert(original, layer=-2), 1, 1)
    images, class_tokens = images_for(tower), int(family == "CLIP")
    dropped = int(strategy == "default")  # by the language model itself
    dense = model(**asked(images, 16 + class_tokens - dropped)).logits
    model.model.vision_tower = diffrate.as_transformers(tower, like=original, grid=False)
    torch.testing.assert_close(model(**asked(images, 16 + class_tokens - dropped)).logits, dense, atol=1e-5, rtol=0)

    tower.set_kept_num([15, 12, KEPT + 1], [14, 11, KEPT])
    few = asked(images, KEPT - dropped)
    answers = model.generate(**few, max_new_tokens=3, do_sample=False)
    assert answers.shape == (2, few["input_ids"].shape[1] + 3)
    logits = model(**few).logits
    assert logits.shape[1] == few["input_ids"].shape[1]
    projected = model.model.multi_modal_projector(tower.forward_tokens(images).x[:, dropped:])
    embedded = model.get_input_embeddings()(few["input_ids"])
    places = few["input_ids"] == IMAGE_TOKEN
    embedded[places] = projected.flatten(0, 1)
    expected = model.lm_head(model.model.language_model(inputs_embeds=embedded).last_hidden_state)
    torch.testing.assert_close(logits, expected)
    with pytest.raises(Exception, match=r"[Ii]mage features and image tokens do not match"):
        model(**asked(images, KEPT - dropped + 1))


def test_a_tower_is_searched_by_the_features_that_are_read() -> None:
    model = llava("CLIP", "default")
    original = model.model.vision_tower
    tower = diffrate.patch.vit(diffrate.convert(original, layer=-2), 1, 1)
    images = images_for(tower, count=4)
    read = original(images, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(tower.features_at(images, tower.dense_schedule()), read[:, 1:], atol=1e-5, rtol=0)
    options: dict[str, Any] = {"share": 0.7, "method": "calibrated", "images": 4, "work": 30}
    found = diffrate.search(tower, [images], loss="tokens", **options)
    assert found.flops < 0.75 * tower.flops_at(tower.dense_schedule())
    left = tower.forward_tokens(images).x.shape[1]
    assert left == min(found.schedule.merge)
    outputs = diffrate.as_transformers(tower, like=original, grid=False)(images, output_hidden_states=True)
    assert [None if part is None else part.shape[1] for part in outputs.hidden_states] == [
        17,
        *(kept.merged for kept in tower.counts_at(found.schedule)),
        None,
    ]
    assert (outputs.last_hidden_state, outputs.pooler_output) == (None, None)
    torch.testing.assert_close(outputs.origin, tower.forward_tokens(images).origin)


def test_the_processor_of_llava_makes_as_many_places() -> None:
    hf = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "USER": 1, "<image>": IMAGE_TOKEN}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    options: dict[str, Any] = {"unk_token": "<unk>", "model_input_names": ["input_ids", "attention_mask"]}
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=["<image>"], **options)
    images = hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = hf.LlavaProcessor(
        images, fast, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    model = llava("CLIP", "default")
    tower = diffrate.patch.vit(diffrate.convert(model.model.vision_tower, layer=-2), 1, 1)
    tower.set_kept_num([15, 12, KEPT + 1], [14, 11, KEPT])
    model.model.vision_tower = diffrate.as_transformers(tower, like=model.model.vision_tower, grid=False)
    rows, columns = tower.token_grid
    processor.num_additional_image_tokens = min(tower.schedule.merge) - rows * columns
    given = processor(images=torch.rand(3, 40, 40), text="USER <image>", return_tensors="pt", do_rescale=False)
    assert int((given["input_ids"] == IMAGE_TOKEN).sum()) == KEPT - 1
    assert model.generate(**given, max_new_tokens=2, do_sample=False).shape == (1, given["input_ids"].shape[1] + 2)


@pytest.mark.parametrize(
    "name", ["clip_vision", "siglip_vision", "vit_pooler", "beit_shared", "dinov3", "clip_projection"]
)
def test_hidden_states_are_those_of_the_class(name: str) -> None:
    model = foreign(name, torch.float64)
    patched = diffrate.patch.vit(diffrate.convert(model), 1, 1)
    images = images_for(patched, torch.float64)
    expected = model(images, output_hidden_states=True).hidden_states
    for grid in (True, False):
        found = diffrate.as_transformers(patched, model, grid=grid)(images, output_hidden_states=True).hidden_states
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=0)
    patched.set_kept_num(*[[expected[0].shape[1] - 4] * 3] * 2)
    at_grid, left = (
        diffrate.as_transformers(patched, model, grid=grid)(images, output_hidden_states=True) for grid in (True, False)
    )
    assert {part.shape for part in at_grid.hidden_states} == {expected[0].shape}
    assert left.hidden_states[2].shape[1] == left.last_hidden_state.shape[1] == expected[0].shape[1] - 4
    assert left.origin.shape == expected[0].shape[:2]


def test_layers_that_there_are_not_are_refused() -> None:
    model = of_transformers("CLIPVisionModel", "CLIPVisionConfig") if pytest.importorskip("transformers") else None
    assert model is not None
    for layer in (0, 4, -5):
        with pytest.raises(diffrate.UnsupportedModelError, match=f"found {layer} for CLIPV.*; accepted: 1 to 3, or -3"):
            diffrate.convert(model, layer=layer)
    with pytest.raises(diffrate.UnsupportedModelError, match=r"found -2 for DINOv3ViTModel; accepted: None"):
        diffrate.convert(foreign("dinov3"), layer=-2)
    with pytest.raises(diffrate.UnsupportedModelError, match=r"found -2 for TimmWrapper.*; accepted: None"):
        diffrate.convert(foreign("timm_wrapper"), layer=-2)
    cut = diffrate.patch.vit(diffrate.convert(foreign("clip"), layer=-2))
    with pytest.raises(diffrate.UnsupportedModelError, match=r"found 2 blocks; accepted: 3, as CLIPModel has"):
        diffrate.as_transformers(cut, foreign("clip"))
    back = diffrate.as_transformers(cut, foreign("clip_vision"), grid=None)
    with pytest.raises(ValueError, match="output_hidden_states: found one; accepted: none"):
        back(images_for(cut), output_hidden_states=True)
    torchvision = diffrate.patch.vit(diffrate.convert(foreign("torchvision"), layer=-2))
    assert outputs_of(torchvision, images_for(torchvision)).shape == (2, 32)
