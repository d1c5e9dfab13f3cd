"""Weights of any family, in timm's layouts and in official ones: as timm's own loader reads them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import diffrate
import models
from diffrate.device import shapes_alone
from models import ModelEntry, Read, Size
from models.weights import WRAPPERS
from tests.cli.test_errors import check
from tests.conftest import Cli
from tests.constructions import lacking

State = dict[str, Tensor]
# A model of each family, and of each way in which timm tells how weights of another size are interpolated.
NAMES = (
    *("vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "flexivit_small", "vit_base_patch16_siglip_224"),
    *("deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"),
    *("vit_small_patch16_dinov3", "vit_relpos_small_patch16_224", "naflexvit_base_patch16_gap"),
)


def small(name: str) -> ModelEntry:
    """The entry of a model with two blocks, and no wider than a small one."""
    entry = models.entry_of(name)
    narrow = {"embed_dim": 192, "num_heads": 3} if "base" in name else {}
    return replace(entry, options={**entry.options, "depth": 2, **narrow})


def weights_of(entry: ModelEntry, size: Size | None = None, **options: Any) -> State:
    """Random weights of the entry's model, none of them a constant that many tensors share."""
    torch.manual_seed(0)
    state = models.create(entry, size, **options).state_dict()
    return {key: torch.randn_like(value) if value.is_floating_point() else value for key, value in state.items()}


def loaded_by_timm(entry: ModelEntry, state: State, size: Size) -> nn.Module:
    """The model at another size, as timm loads `state` into it."""
    overlay = {"state_dict": state, "hf_hub_id": None, "url": None, "custom_load": False}
    args: dict[str, Any] = {} if "naflex" in entry.architecture else {"img_size": size}
    if not lacking("1.0.31"):
        args["pretrained_model_args"] = {"img_size": entry.input_size}  # where `state` comes from
    return timm.create_model(
        entry.architecture,
        pretrained=True,
        pretrained_cfg=dict(entry.config or {}),
        pretrained_cfg_overlay=overlay,
        **{**entry.options, **args},
    )


def read_from(entry: ModelEntry, file: Path, size: Size, made_at: Size | None = None) -> Read:
    """What a file holds for the entry's model at another size."""
    with shapes_alone():
        model = models.create(entry, size)
    return models.read_file(str(file), model, size, entry.input_size, made_at)


def loaded_by_us(entry: ModelEntry, file: Path, size: Size) -> nn.Module:
    read = read_from(entry, file, size)
    model = models.create(entry, size)
    assert models.fit_state(model, read.state, read.name).reinitialized == ()
    return model


def same(model: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")  # of torch, on timm's own loader
@pytest.mark.parametrize("name", NAMES)
def test_weights_at_another_size_are_those_of_timms_loader(name: str, tmp_path: Path) -> None:
    entry = small(name)
    state = weights_of(entry)
    torch.save(state, tmp_path / "weights.pth")
    patch = 14 if "patch14" in name else 16
    for size in ((8 * patch, 6 * patch), entry.input_size):
        same(loaded_by_us(entry, tmp_path / "weights.pth", size), loaded_by_timm(entry, state, size))


def test_positions_of_as_many_patches_in_another_shape_are_of_the_size_asked_for(tmp_path: Path) -> None:
    """16 by 4 patches of a model for 8 by 8: what was trained at this size is no square one's."""
    entry = small("vit_tiny_patch16_224")
    entry = replace(entry, input_size=(128, 128))
    state = weights_of(entry, (256, 64))
    torch.save(state, tmp_path / "oblong.pth")
    assert torch.equal(loaded_by_us(entry, tmp_path / "oblong.pth", (256, 64)).pos_embed, state["pos_embed"])
    if lacking("1.0.31"):
        refused = r"oblong\.pth: positions for 128 by 128 pixels at 256 by 64 need timm 1\.0\.31; found "
        with pytest.raises(models.CheckpointError, match=refused):
            read_from(entry, tmp_path / "oblong.pth", (256, 64), made_at=(128, 128))
        return
    read = read_from(entry, tmp_path / "oblong.pth", (256, 64), made_at=(128, 128))
    assert not torch.equal(read.state["pos_embed"], state["pos_embed"])


def deit3(state: State) -> State:
    return {re.sub(r"ls(\d)\.gamma", r"gamma_\1", key): value for key, value in state.items()}


def dinov2(state: State) -> State:
    """With registers that positions are not added to, and a class token that they are."""
    return {
        **{key: value for key, value in state.items() if key not in ("reg_token", "pos_embed")},
        "register_tokens": state["reg_token"],
        "pos_embed": torch.cat([torch.zeros_like(state["cls_token"]), state["pos_embed"]], 1),
        "mask_token": torch.zeros(1, 384),
    }


def clip(state: State) -> State:
    """OpenAI's names; the head is a projection without bias."""
    names = {
        r"^patch_embed\.proj": "conv1",
        r"^norm_pre": "ln_pre",
        r"^norm\.": "ln_post.",
        r"norm(\d)": r"ln_\1",
        r"^blocks\.": "transformer.resblocks.",
        r"attn\.qkv\.": "attn.in_proj_",
        r"attn\.proj": "attn.out_proj",
        r"mlp\.fc1": "mlp.c_fc",
        r"mlp\.fc2": "mlp.c_proj",
    }
    found = {"visual.proj": state["head.weight"].T.contiguous()}
    for key, value in state.items():
        for pattern, replacement in names.items():
            key = re.sub(pattern, replacement, key)
        if not key.startswith("head."):
            found[f"visual.{key}"] = value
    found["visual.class_embedding"] = found.pop("visual.cls_token")[0, 0]
    found["visual.positional_embedding"] = found.pop("visual.pos_embed")[0]
    return {**found, "logit_scale": torch.ones(())}


def beit(state: State) -> dict[str, Any]:
    return {"module": {**state, "blocks.0.attn.relative_position_index": torch.zeros(197, 197, dtype=torch.long)}}


def eva02(state: State) -> State:
    names = {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.fc2": "mlp.w3", "mlp.norm": "mlp.ffn_ln"}
    found = dict(state)
    for ours, theirs in names.items():
        found = {key.replace(ours, theirs): value for key, value in found.items()}
    return {**found, "rope.freqs_cos": torch.zeros(256, 64)}


def ijepa(state: State) -> dict[str, Any]:
    return {"encoder": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("deit3_small_patch16_224", deit3),
        ("vit_small_patch14_reg4_dinov2", dinov2),
        ("vit_base_patch32_clip_224.openai", clip),
        ("beit_base_patch16_224", beit),
        ("eva02_tiny_patch14_224", eva02),
        ("vit_tiny_patch16_224", ijepa),
    ],
)
def test_official_layouts_load(name: str, layout: Any, tmp_path: Path) -> None:
    entry = small(name)
    state = weights_of(entry)
    if layout is clip:
        state["head.bias"].zero_()
    torch.save(layout(state), tmp_path / "official.pth")
    read = read_from(entry, tmp_path / "official.pth", entry.input_size)
    assert models.head_classes(read.state) == (entry.num_classes or None)
    model = models.create(entry)
    models.fit_state(model, read.state, read.name)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    bare = models.create(entry)
    models.load_weights(bare, tmp_path / "official.pth")
    same(bare, model)


def google(state: State, heads: int) -> dict[str, Any]:
    """The arrays of an archive of Google's for a ViT with a class token."""
    arrays = {key: value.numpy() for key, value in state.items()}
    width = arrays["cls_token"].shape[-1]
    found = {
        "cls": arrays["cls_token"],
        "embedding/kernel": arrays["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": arrays["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": arrays["pos_embed"],
        "Transformer/encoder_norm/scale": arrays["norm.weight"],
        "Transformer/encoder_norm/bias": arrays["norm.bias"],
        "head/kernel": arrays["head.weight"].T,
        "head/bias": arrays["head.bias"],
    }
    for block in range(2):
        ours, theirs = f"blocks.{block}.", f"Transformer/encoderblock_{block}/"
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for norm, number in ((0, 1), (2, 2)):
            found[f"{theirs}LayerNorm_{norm}/scale"] = arrays[f"{ours}norm{number}.weight"]
            found[f"{theirs}LayerNorm_{norm}/bias"] = arrays[f"{ours}norm{number}.bias"]
        weights, biases = (np.split(arrays[f"{ours}attn.qkv.{kind}"], 3) for kind in ("weight", "bias"))
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            found[f"{attention}{name}/kernel"] = weight.T.reshape(width, heads, -1)
            found[f"{attention}{name}/bias"] = bias.reshape(heads, -1)
        found[f"{attention}out/kernel"] = arrays[f"{ours}attn.proj.weight"].T.reshape(heads, -1, width)
        found[f"{attention}out/bias"] = arrays[f"{ours}attn.proj.bias"]
        for layer in range(2):
            found[f"{theirs}MlpBlock_3/Dense_{layer}/kernel"] = arrays[f"{ours}mlp.fc{layer + 1}.weight"].T
            found[f"{theirs}MlpBlock_3/Dense_{layer}/bias"] = arrays[f"{ours}mlp.fc{layer + 1}.bias"]
    return found


def test_archives_of_numpy_load(tmp_path: Path) -> None:
    entry, file = small("vit_tiny_patch16_224"), tmp_path / "google.npz"
    state = weights_of(entry, num_classes=7)
    np.savez(file, **google(state, heads=3))
    read = read_from(entry, file, entry.input_size)
    assert models.head_classes(read.state) == 7
    torch.testing.assert_close(dict(read.state), state, rtol=0, atol=0)
    oblong = read_from(entry, file, (128, 384)).state["pos_embed"]
    assert oblong.shape == (1, 8 * 24 + 1, 192)
    model = models.create(entry)
    fresh = model.head.weight.clone()
    report = models.load_weights(model, file)
    assert report.reinitialized == ("head.weight", "head.bias")
    assert torch.equal(model.head.weight, fresh)
    assert torch.equal(model.norm.weight, state["norm.weight"])


def test_archives_that_are_none_or_of_others_are_named(tmp_path: Path) -> None:
    entry, file = small("vit_tiny_patch16_224"), tmp_path / "google.npz"
    arrays = google(weights_of(entry), heads=3)
    np.savez(file, **{name: value for name, value in arrays.items() if "encoderblock_1" not in name})
    with pytest.raises(models.CheckpointError, match=f"{file}: cannot be read into VisionTransformer"):
        read_from(entry, file, entry.input_size)
    file.write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(models.CheckpointError, match=f"{file}: found no NumPy archive; accepted: one of numpy.savez"):
        read_from(entry, file, entry.input_size)
    with pytest.raises(models.CheckpointError, match="no such file"):
        read_from(entry, tmp_path / "gone.npz", entry.input_size)
    with pytest.raises(models.CheckpointError, match=r"timm's Eva reads no \.npz files"):
        read_from(small("eva02_tiny_patch14_224"), file, (224, 224))
    # Mean pooling has a norm of its own, for which such files have no numbers; older timm looks for the other norm.
    refused = r"no numbers for fc_norm\.weight|'Identity' object has no attribute 'weight'"
    np.savez(file, **arrays)
    pooled = replace(entry, options={**entry.options, "global_pool": "avg"})
    with pytest.raises(models.CheckpointError, match=refused):
        read_from(pooled, file, entry.input_size)


def test_both_heads_of_a_distilled_model_start_fresh(tmp_path: Path) -> None:
    entry = small("deit_tiny_distilled_patch16_224")
    torch.save(weights_of(entry, num_classes=5), tmp_path / "five.pth")
    model = models.create(entry, num_classes=7)
    report = models.load_weights(model, tmp_path / "five.pth")
    assert report.reinitialized == ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
    assert "the head has another number of classes" in report.notes[0]


def test_tensors_without_a_head_leave_a_fresh_one_where_that_is_asked_for(tmp_path: Path) -> None:
    entry = small("vit_tiny_patch16_224")
    torch.save(weights_of(entry, num_classes=0), tmp_path / "bare.pth")
    read = read_from(entry, tmp_path / "bare.pth", entry.input_size)
    with pytest.raises(models.CheckpointError, match=r"head\.weight expected \[1000, 192\] found nothing"):
        models.fit_state(models.create(entry), read.state, read.name)
    report = models.fit_state(models.create(entry), read.state, read.name, fresh_head=True)
    assert report.reinitialized == ("head.weight", "head.bias")
    assert "there is no head; head.weight, head.bias start fresh" in report.notes[0]


def test_a_pooling_that_the_model_has_not_is_left_out(tmp_path: Path) -> None:
    """Files of SigLIP have one that the variants with mean pooling are built without."""
    full, mean = small("vit_base_patch16_siglip_224"), small("vit_base_patch16_siglip_gap_224")
    state = weights_of(full)
    torch.save(state, tmp_path / "siglip.pth")
    model = loaded_by_us(mean, tmp_path / "siglip.pth", (64, 64))
    assert torch.equal(model.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"])
    notes = models.load_weights(models.create(mean), tmp_path / "siglip.pth").notes
    assert notes == (f"{tmp_path / 'siglip.pth'}: the pooling attn_pool.* is left out, which the model has not",)


def test_weights_of_another_family_are_refused(tmp_path: Path) -> None:
    torch.save(weights_of(small("beit_base_patch16_224")), tmp_path / "beit.pth")
    entry = small("eva02_tiny_patch14_224")
    model = models.create(entry)
    with pytest.raises(models.CheckpointError, match="does not fit the model"):
        models.load_weights(model, tmp_path / "beit.pth")


def test_patched_models_load_with_what_is_theirs(tmp_path: Path) -> None:
    entry = replace(small("vit_tiny_patch16_224"), options={"depth": 4})
    state = weights_of(entry)
    torch.save({**state, "compression._extra_state": torch.ones(2, 4, dtype=torch.int64)}, tmp_path / "ours.pth")
    plain = models.create(entry)
    models.load_weights(plain, tmp_path / "ours.pth")
    patched = diffrate.patch.vit(models.create(entry))
    torch.save(state, tmp_path / "theirs.pth")
    models.load_weights(patched, tmp_path / "theirs.pth")
    assert torch.equal(patched.blocks[3].mlp.fc1.weight, plain.blocks[3].mlp.fc1.weight)


def eight(entry: ModelEntry) -> ModelEntry:
    return replace(entry, options={**entry.options, "patch_size": 8})


@pytest.mark.parametrize("layout", [dict, clip])
def test_weights_for_other_patches_are_refused_with_a_model_that_fits(layout: Any, tmp_path: Path) -> None:
    entry, file = small("vit_small_patch16_224"), tmp_path / "eight.pth"
    torch.save(layout(weights_of(eight(entry))), file)
    refused = rf"{file} does not fit the model: it is for patches of 8 by 8 pixels; accepted: of 16 by 16, or --model "
    with pytest.raises(models.CheckpointError, match=f"{refused}vit_small_patch8_224$"):
        read_from(entry, file, entry.input_size)
    model = models.create(entry)
    before = model.norm.weight.clone()
    with pytest.raises(models.CheckpointError, match=refused):
        models.load_weights(model, file)
    assert torch.equal(model.norm.weight, before)


def test_archives_for_other_patches_are_refused(tmp_path: Path) -> None:
    entry, file = small("vit_tiny_patch16_224"), tmp_path / "eight.npz"
    np.savez(file, **google(weights_of(eight(entry)), heads=3))
    with pytest.raises(models.CheckpointError, match=r"for patches of 8 by 8 pixels; accepted: of 16 by 16$"):
        read_from(entry, file, entry.input_size)


def test_models_of_any_patches_take_others(tmp_path: Path) -> None:
    entry, file = small("flexivit_small"), tmp_path / "eight.pth"
    torch.save(weights_of(eight(entry)), file)
    assert loaded_by_us(entry, file, entry.input_size).patch_embed.proj.weight.shape[2:] == (16, 16)


@pytest.mark.parametrize("name", NAMES)
def test_positions_that_are_interpolated_are_said(name: str, tmp_path: Path) -> None:
    entry, file = small(name), tmp_path / "weights.pth"
    torch.save(weights_of(entry), file)
    assert read_from(entry, file, entry.input_size).notes == ()
    patch = 14 if "patch14" in name else 16
    said = [note for note in read_from(entry, file, (8 * patch, 6 * patch)).notes if "positions" in note]
    computed = ("dinov3", "relpos", "naflexvit")  # positions, from the input's size
    assert len(said) == (not any(word in name for word in computed)), said


def test_official_positions_of_clip_are_not_called_interpolated(tmp_path: Path) -> None:
    entry, file = small("vit_base_patch32_clip_224.openai"), tmp_path / "clip.pth"
    torch.save(clip(weights_of(entry)), file)
    assert read_from(entry, file, entry.input_size).notes == ()


def test_the_library_says_what_it_adapts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry, file = small("vit_tiny_patch16_224"), tmp_path / "both.pth"
    state = weights_of(entry)
    torch.save({"model": state, "model_ema": state, "epoch": 3}, file)
    with caplog.at_level("INFO"):
        report = models.load_weights(models.create(entry, 64, num_classes=5), file)
    assert report.notes == (
        f"{file}: the head has another number of classes; head.weight, head.bias start fresh",
        f"{file}: weights read from 'model_ema', not 'model'",
        f"{file}: positions resampled, pos_embed [1, 197, 192] to [1, 17, 192]",
    )
    logged = [record.message for record in caplog.records if not record.name.startswith("timm")]
    assert logged == list(report.notes)
    np.savez(tmp_path / "google.npz", **google(state, heads=3))
    notes = models.load_weights(models.create(entry, 64), tmp_path / "google.npz").notes
    assert notes == (f"{tmp_path / 'google.npz'}: positions resampled, [1, 197, 192] to [1, 17, 192]",)


def test_the_command_line_says_what_it_adapts_and_refuses_other_patches(
    cli: Cli, image_folder: Path, tmp_path: Path
) -> None:
    name, file = "vit_tiny_patch16_224", tmp_path / "mine.pth"
    words = ("--eval", "--model", name, "--checkpoint", file, "--data-path", image_folder, "--num_workers", 0)
    torch.save({"state_dict": timm.create_model(name, num_classes=3).state_dict()}, file)
    code, out, err = cli(*words, "--input-size", 64)
    assert (code, err) == (0, "")
    assert f"{file}: weights read from 'state_dict'\n" in out
    assert f"{file}: positions resampled, pos_embed [1, 197, 192] to [1, 17, 192]\n" in out
    assert "resampled" not in cli(*words)[1]
    torch.save(timm.create_model(name, num_classes=3, patch_size=8).state_dict(), file)
    for more in ((), ("--input-size", 112)):  # with as many patches, too
        check(cli(*words, *more), f"checkpoint {file} does not fit the model: it is for patches of 8 by 8 pixels")


@pytest.mark.parametrize("word", WRAPPERS)
def test_the_dictionary_that_is_read_is_said(word: str, tmp_path: Path) -> None:
    entry, file = small("vit_tiny_patch16_224"), tmp_path / "wrapped.pth"
    torch.save({word: weights_of(entry), "optimizer": {}}, file)
    assert read_from(entry, file, entry.input_size).notes == (f"{file}: weights read from '{word}'",)
