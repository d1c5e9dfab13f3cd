"""Models of other libraries: the same as models of timm, compressed, kept in files, and back in their library."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import diffrate
from tests.constructions import since
from tests.library.foreign_models import (
    OTHERS,
    ROWS,
    TRANSFORMERS,
    foreign,
    images_for,
    inputs_of,
    of_transformers,
    outputs_of,
    two_towers,
)
from tests.library.saved_models import assert_same, scheduled

BACK = [name for name in TRANSFORMERS if name not in ("mae_unmasked", "timm_wrapper")]
CLASSIFIERS = ["vit", "deit", "beit", "dinov2", "clip_head", "siglip_head", "siglip2_head"]
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-9}


def compressed(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The model of a layout, and the same patched, at counts that remove tokens."""
    model = foreign(name, dtype)
    return model, scheduled(diffrate.patch.vit(diffrate.convert(model), 1, 1))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", [*TRANSFORMERS, *OTHERS])
def test_it_computes_the_same(name: str, dtype: torch.dtype) -> None:
    model = foreign(name, dtype)
    before = copy.deepcopy(model.state_dict())
    converted = diffrate.convert(model)
    images = images_for(converted, dtype)
    expected = outputs_of(model, images)
    assert type(converted).__module__.startswith("timm.")
    assert expected.std() > 0.05
    torch.testing.assert_close(converted(images), expected, atol=TOLERANCES[dtype], rtol=0)
    diffrate.patch.vit(converted, 1, 1)
    converted.schedule = converted.dense_schedule()
    torch.testing.assert_close(converted(images)[0], expected, atol=TOLERANCES[dtype], rtol=0)
    for parameter in converted.parameters():  # copies
        parameter.data.zero_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", [*TRANSFORMERS, *OTHERS])
def test_it_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    _, model = compressed(name)
    diffrate.save(model, tmp_path / "saved.safetensors")
    assert_same(diffrate.load(tmp_path / "saved.safetensors"), model)


@pytest.mark.parametrize("row", ROWS)
def test_every_class_is_searched(row: str) -> None:
    original = foreign(ROWS[row])
    assert type(original).__name__ == row.split()[-1]
    model = diffrate.patch.vit(diffrate.convert(original), 1, 1)
    images = images_for(model, count=4)
    found = diffrate.search(model, [images], share=0.7, method="calibrated", images=4, work=12)
    assert found.flops == model.flops() < 0.75 * model.flops_at(model.dense_schedule())
    assert model.schedule == found.schedule


@pytest.fixture(scope="module")
def exported_parts() -> set[tuple[str, str]]:
    """What was exported already: parts by their names, without numbers of blocks and sizes."""
    return set()


@pytest.mark.slow
@since("2.8", "torch")
@pytest.mark.parametrize("row", ROWS)
def test_every_class_is_exported(row: str, exported_parts: set[tuple[str, str]], tmp_path: Path) -> None:
    """For torch, whose graphs the other writers start from, and which takes a fifth of the time. Of the fewest
    blocks. All but the last let tokens go: what it takes was chosen twice, or once where it reads the class token.
    A class without a part that no other had before is a model of timm that was exported already."""
    plain = diffrate.convert(foreign(ROWS[row]))
    del plain.blocks[2 if plain.global_pool == "token" else 3 :]
    model = diffrate.patch.vit(plain, 1, 1)
    tokens = model.compression.space.limits[0]
    left = [tokens - 4 * block - 3 for block in range(len(model.blocks) - 1)]
    model.set_kept_num([*(count + 1 for count in left), left[-1]], [*left, left[-1]])
    own = {"read": type(model.read), "prefix": model.num_prefix_tokens, "pooling": model.global_pool}
    own |= {name: type(module) for name, module in model.named_modules()} | dict.fromkeys(model.state_dict())
    parts = {(re.sub(r"\d+", "", name), str(part)) for name, part in own.items()}
    if not parts <= exported_parts:
        assert diffrate.export(model, tmp_path / "model.pt2").agreement.difference < 1e-4
    exported_parts |= parts


def test_the_table_in_the_documentation_is_what_is_tested() -> None:
    """Each class is in one row, and each row says what the tests of all its classes hold."""
    text = (Path(__file__).parents[2] / "docs" / "convert.md").read_text()
    rows = [line.split("|")[1:-1] for line in text.partition("| class |")[2].partition("\n\n")[0].splitlines()[2:]]
    names: list[str] = []
    for classes, _, searched, exported, back in rows:
        library = classes.partition(":")[0].strip() + " " if ":" in classes else ""
        found = [library + name for name in re.findall(r"`(\w+)`", classes) if name[0].isupper()]
        assert (searched.strip(), exported.strip()) == ("yes", "yes")
        assert all((ROWS[name] in BACK) == bool(back.strip()) for name in found)
        names += found
    assert sorted(names) == sorted(ROWS)


def test_a_search_by_gradient_runs_on_a_classifier_of_both_pooled_parts() -> None:
    model = diffrate.patch.vit(diffrate.convert(foreign("dinov2")), 1, 1)
    images = images_for(model, count=4)
    found = diffrate.search(model, [images] * 2, share=0.7, epochs=1, loss="distill")
    assert torch.isfinite(model(images)[0]).all()
    assert found.flops < model.flops_at(model.dense_schedule())


@pytest.mark.parametrize("training", [True, False])
def test_mode_precision_and_rates_of_training_are_kept(training: bool) -> None:
    model = (
        VisionTransformer(32, 8, 3, 4, 32, 64, dropout=0.1, attention_dropout=0.2).to(torch.bfloat16).train(training)
    )
    converted = diffrate.convert(model)
    assert converted.training is training
    assert {tensor.dtype for tensor in converted.parameters()} == {torch.bfloat16}
    block = converted.blocks[1]
    assert (converted.pos_drop.p, block.attn.attn_drop.p, block.mlp.drop1.p, block.mlp.drop2.p) == (0.1, 0.2, 0.1, 0.1)


def test_it_draws_nothing_from_the_generator() -> None:
    model = foreign("torchvision")
    before = torch.get_rng_state()
    diffrate.convert(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_rates_of_transformers_are_kept() -> None:
    pytest.importorskip("transformers")
    options = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2, "image_size": 32, "patch_size": 8}
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, **options}
    vit = diffrate.convert(of_transformers("ViTModel", "ViTConfig", small, intermediate_size=64))
    block = vit.blocks[0]
    rates = (vit.pos_drop, block.attn.attn_drop, block.attn.proj_drop, block.mlp.drop1, block.mlp.drop2)
    assert [dropout.p for dropout in rates] == [0.1, 0.2, 0.1, 0.0, 0.1]
    dino = diffrate.convert(of_transformers("Dinov2Model", "Dinov2Config", small, drop_path_rate=0.3))
    assert [block.drop_path1.drop_prob for block in dino.blocks] == [0.3] * 3


@pytest.mark.parametrize(
    "name", ["vit", "deit_teacher", "dinov2_registers", "dinov3", "clip_projection", "siglip_vision"]
)
def test_images_of_another_size_have_the_positions_of_the_model_itself(name: str) -> None:
    model = foreign(name)
    converted = diffrate.convert(model, input_size=(48, 64))
    images = images_for(converted)
    assert images.shape[-2:] == (48, 64)
    options = {} if name.startswith("dino") else {"interpolate_pos_encoding": True}
    torch.testing.assert_close(converted(images), outputs_of(model, images, **options), atol=1e-5, rtol=0)


def test_other_sizes_are_refused_where_the_model_has_one() -> None:
    with pytest.raises(diffrate.UnsupportedModelError, match=r"VisionTransformer: found input_size \[48, 48\]"):
        diffrate.convert(foreign("torchvision"), input_size=48)
    with pytest.raises(diffrate.UnsupportedModelError, match="found input_size 48x48; accepted: 32x32"):
        diffrate.convert(foreign("beit"), input_size=48)


class Derived(VisionTransformer):
    """A class that changes nothing of how images are seen."""


class Changed(VisionTransformer):
    """A class with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Other logits."""
        return -super().forward(x)


def _torchvision(kind: type = VisionTransformer, **options: Any) -> nn.Module:
    return kind(32, 8, 3, 4, 32, 64, num_classes=5, **options)


def test_a_derived_class_with_the_same_forward_is_read() -> None:
    model = _torchvision(Derived).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(diffrate.convert(model)(images), model(images))


def _with_a_part_beside() -> nn.Module:
    model: Any = _torchvision()
    model.encoder.layers[1].adapter = nn.Linear(2, 2)
    return model


def _with_two_epsilons() -> nn.Module:
    model: Any = _torchvision()
    model.encoder.ln.eps = 0.1
    return model


def _without_a_bias() -> nn.Module:
    model: Any = _torchvision()
    model.encoder.layers[1].mlp[0].bias = None
    return model


def _with_an_activation() -> nn.Module:
    model: Any = _torchvision()
    model.encoder.layers[1].mlp[1] = nn.ReLU()
    return model


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def _with_another_layer() -> nn.Module:
    model: Any = _torchvision()
    layers = model.encoder.layers[1].mlp
    layers[0] = Doubled(layers[0].in_features, layers[0].out_features)
    return model


def _with_a_hook() -> nn.Module:
    model: Any = _torchvision()
    model.encoder.layers[1].register_forward_hook(lambda block, given, found: 2 * found)
    return model


def _normed(model: Any) -> nn.Module:
    nn.utils.parametrizations.weight_norm(model.heads.head)
    return model


def _with_a_forward() -> nn.Module:
    model: Any = _torchvision()
    model.encoder.layers[1].forward = lambda x: x
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another layer": (
        _with_another_layer,
        r"found a .*Doubled at encoder.layers.encoder_layer_1.mlp.0; accepted: parts",
    ),
    "a hook": (_with_a_hook, r"found a forward hook at encoder.layers.encoder_layer_1; accepted: parts of .*hooks"),
    "parametrized weights": (
        lambda: _normed(_torchvision()),
        r"found a .*ParametrizedLinear at heads.head; accepted: parts",
    ),
    "a forward of its own": (_with_a_forward, r"found another forward at encoder.layers.encoder_layer_1; accepted"),
    "another forward": (lambda: _torchvision(Changed), "Changed"),
    "no model": (lambda: nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear; accepted: .*ViTModel"),
    "timm's": (lambda: timm.create_model("test_vit"), "found timm's VisionTransformer; accepted: .*diffrate.patch.vit"),
    "another head": (
        lambda: _torchvision(representation_size=8),
        "found heads of Sequential; accepted: Linear, or",
    ),
    "an adapter": (_with_a_part_beside, r"found blocks\.1\.adapter\.weight, .*; accepted: parts"),
    "a bias that one block lacks": (
        _without_a_bias,
        r"of torchvision: found nothing for timm's blocks\.1\.mlp\.fc1\.bias; accepted: a bias",
    ),
    "another activation": (_with_an_activation, "found the activation .*ReLU; accepted: GELU, QuickGELU, one in all"),
    "two epsilons": (_with_two_epsilons, r"epsilon \[1e-06, 0\.1\]; accepted"),
}
REFUSED_OF_TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "masking": (
        lambda: of_transformers("ViTMAEModel", "ViTMAEConfig"),
        "ViTMAEModel: found config.mask_ratio 0.75; accepted: 0",
    ),
    "activation": (
        lambda: of_transformers("ViTModel", "ViTConfig", hidden_act="mish"),
        "ViTModel: found config.hidden_act 'mish'; accepted: .*gelu",
    ),
    "activation of BEiT": (
        lambda: of_transformers("BeitModel", "BeitConfig", hidden_act="relu"),
        "BeitModel: found config.hidden_act 'relu'; accepted: gelu",
    ),
    "pooler": (
        lambda: of_transformers("ViTModel", "ViTConfig", pooler_act="relu"),
        "ViTModel: found config.pooler_act 'relu'; accepted: tanh",
    ),
    "tables of oblong images": (
        lambda: of_transformers("BeitModel", "BeitConfig", image_size=(32, 48), use_relative_position_bias=True),
        r"BeitModel: found config.image_size \(32, 48\); accepted: a square, with relative positions",
    ),
    "another task": (lambda: of_transformers("ViTForMaskedImageModeling", "ViTConfig"), "ViTForMaskedImageModeling"),
    "another model": (lambda: of_transformers("ViTMSNModel", "ViTMSNConfig"), "ViTMSNModel; accepted"),
    "no pooling": (
        lambda: of_transformers("BeitModel", "BeitConfig", made_with={"add_pooling_layer": False}),
        "found config.use_mean_pooling True; accepted: False",
    ),
}


@pytest.mark.parametrize("reason", [*REFUSED, *REFUSED_OF_TRANSFORMERS])
def test_what_timm_cannot_express_is_refused_by_name(reason: str) -> None:
    if reason in REFUSED_OF_TRANSFORMERS:
        pytest.importorskip("transformers")
    make, message = (REFUSED | REFUSED_OF_TRANSFORMERS)[reason]
    with pytest.raises(diffrate.UnsupportedModelError, match=message) as caught:
        diffrate.convert(make())
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attentional_pool": True, "attn_pooler_heads": 4}, "found the pooling 'AttentionalPooler'; accepted: 'tok'"),
        ({"pool_type": "none"}, "found the pooling 'none'"),
        ({"patch_dropout": 0.5}, "found patch_dropout 0.5; accepted: 0"),
        ({"block_type": "custom", "qk_norm": True}, r"found blocks\.0\.attn\.ln_q\.weight"),
    ],
)
def test_towers_of_open_clip_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    tower = open_clip.transformer.VisionTransformer(32, 8, 32, 3, 4, 2.0, output_dim=16, **options)
    with pytest.raises(diffrate.UnsupportedModelError, match=message):
        diffrate.convert(tower)


# Back in transformers


@pytest.mark.parametrize("name", BACK)
def test_back_in_its_library_it_gives_what_the_model_gives(name: str) -> None:
    model = foreign(name, torch.float64)
    patched = diffrate.patch.vit(diffrate.convert(model), 1, 1)
    back = diffrate.as_transformers(patched, model)
    inputs = inputs_of(model, images_for(patched, torch.float64))
    if name in ("clip", "siglip", "siglip2"):
        inputs["input_ids"] = torch.randint(3, 99, (2, 6))
        back, model = back.float(), model.float()  # masks of text are no doubles
        inputs["pixel_values"] = inputs["pixel_values"].float()
    assert isinstance(back, type(model))
    assert back.config is model.config
    with torch.no_grad():
        expected, found = model(**inputs), back(**inputs)
        assert type(found) is type(expected)
        for key, value in expected.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(
                    found[key], value, atol=1e-5 if value.dtype == torch.float32 else 1e-9, rtol=0
                )
        assert [type(part) for part in back(**inputs, return_dict=False)] == [
            type(part) for part in model(**inputs, return_dict=False)
        ]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_loss_is_that_of_the_class(name: str) -> None:
    model = foreign(name)
    patched = diffrate.patch.vit(diffrate.convert(model), 1, 1)
    inputs, labels = inputs_of(model, images_for(patched)), torch.tensor([1, 0])
    back = diffrate.as_transformers(patched, model)
    torch.testing.assert_close(back(**inputs, labels=labels).loss, model(**inputs, labels=labels).loss)


@pytest.mark.parametrize("name", [CLASSIFIERS[0], "clip"])
def test_what_goes_back_pickles_and_says_who_keeps_it(name: str, tmp_path: Path) -> None:
    model, patched = compressed(name)
    back, images = diffrate.as_transformers(patched, model), images_for(patched)
    again = pickle.loads(pickle.dumps(back))
    tower, copied = (getattr(each, "vision_model", each) for each in (back, again))
    assert isinstance(copied, type(getattr(model, "vision_model", model)))
    with torch.no_grad():
        for found, expected in zip(copied(images).values(), tower(images).values(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.warns(UserWarning, match=r"from_pretrained does not read .*: keep it by diffrate\.save"):
        tower.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["dinov3", "siglip_vision", "clip_vision", "beit_shared"])
def test_the_last_hidden_state_is_of_the_grid_or_of_what_is_left(name: str) -> None:
    model, patched = compressed(name, torch.float64)
    inputs = inputs_of(model, images_for(patched, torch.float64))
    dense = model(**inputs).last_hidden_state
    whole, left, none = (diffrate.as_transformers(patched, model, grid=grid)(**inputs) for grid in (True, False, None))
    state = patched.forward_tokens(inputs["pixel_values"])
    features = state.x if name == "clip_vision" else patched.norm(state.x)
    assert whole.last_hidden_state.shape == dense.shape
    torch.testing.assert_close(left.last_hidden_state, features)
    if name != "clip_vision":
        torch.testing.assert_close(whole.last_hidden_state, patched.forward_features(inputs["pixel_values"]))
    assert none.last_hidden_state is None
    for found in (whole, left, none):
        torch.testing.assert_close(found.pooler_output, patched(inputs["pixel_values"])[0])


def test_the_vision_tower_of_clip_is_exchanged() -> None:
    pytest.importorskip("transformers")
    clip: Any = two_towers("CLIPModel", "CLIP", projection_dim=16).eval()
    tower = diffrate.patch.vit(diffrate.convert(clip.vision_model), 1, 1)
    inputs = {"pixel_values": images_for(tower), "input_ids": torch.randint(3, 99, (2, 6))}
    expected = clip(**inputs)
    scheduled(tower)
    copied = diffrate.as_transformers(tower, clip)(**inputs)
    torch.testing.assert_close(clip(**inputs).logits_per_image, expected.logits_per_image)  # it is as it was
    clip.vision_model = diffrate.as_transformers(tower, clip.vision_model)
    exchanged = clip(**inputs)
    torch.testing.assert_close(exchanged.text_embeds, expected.text_embeds)
    torch.testing.assert_close(exchanged.logits_per_image, copied.logits_per_image)
    assert not torch.equal(exchanged.image_embeds, expected.image_embeds)


def test_a_pipeline_runs_it() -> None:
    hf = pytest.importorskip("transformers")
    model, patched = compressed("vit")
    processor = hf.ViTImageProcessor(size={"height": 32, "width": 32})
    back = diffrate.as_transformers(patched, model)
    classify = hf.pipeline("image-classification", model=back, image_processor=processor, device="cpu")
    photograph = Image.new("RGB", (40, 40), (200, 30, 90))
    found = {row["label"]: row["score"] for row in classify(photograph, top_k=5)}
    logits = patched(processor(photograph, return_tensors="pt")["pixel_values"])[0].detach()
    assert found == pytest.approx(
        {f"LABEL_{i}": float(share) for i, share in enumerate(logits.softmax(-1)[0])}, abs=1e-5
    )


class _Pictures(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "pixel_values": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index)),
            "labels": index % 5,
        }


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_trains_it(tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model, patched = compressed("vit")
    before, schedule = patched.blocks[0].attn.qkv.weight.clone(), patched.schedule
    options: dict[str, Any] = {"remove_unused_columns": False, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    told = hf.TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=4, **options)
    trainer = hf.Trainer(
        diffrate.as_transformers(patched, model), told, train_dataset=_Pictures(), eval_dataset=_Pictures()
    )
    assert trainer.train().training_loss > 0
    assert trainer.evaluate()["eval_loss"] > 0
    assert not torch.equal(patched.blocks[0].attn.qkv.weight, before)
    assert patched.schedule == schedule


def test_what_does_not_belong_together_is_refused() -> None:
    pytest.importorskip("transformers")
    model, patched = compressed("vit")
    for given, like, message in (
        (diffrate.convert(model), model, "accepted: a model after diffrate.patch.vit"),
        (patched, nn.Linear(2, 2), "like: found Linear; accepted: .*ViTModel"),
        (patched, foreign("mae_unmasked"), "like: found ViTMAEModel"),
        (patched, foreign("vit_oblong"), "compressed: found 5 outputs of 32 channels; accepted: 2 of 32, as ViTFor"),
        (patched, foreign("vit_pooler"), "found 5 outputs of 32 channels; accepted: 24 of 32, as ViTModel has"),
        (patched, foreign("clip"), "found 5 outputs of 32 channels; accepted: 16 or 0 of 32, as CLIPModel has"),
        (patched, foreign("deit_teacher"), "found 5 outputs of 32 channels; accepted: 5 of 32 by two"),
    ):
        with pytest.raises(diffrate.UnsupportedModelError, match=message):
            diffrate.as_transformers(given, like)
    back = diffrate.as_transformers(patched, model)
    with pytest.raises(ValueError, match="output_hidden_states: found one; accepted: none"):
        back(images_for(patched), output_hidden_states=True)
    _, fixed = compressed("siglip2_vision")
    back, inputs = (
        diffrate.as_transformers(fixed, foreign("siglip2_vision")),
        inputs_of(foreign("siglip2_vision"), images_for(fixed)),
    )
    with pytest.raises(ValueError, match=r"spatial_shapes: found \[\[2, 8\], \[2, 8\]\]; accepted: \[4, 4\]"):
        back(**inputs | {"spatial_shapes": torch.tensor([[2, 8], [2, 8]])})
