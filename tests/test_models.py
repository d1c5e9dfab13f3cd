"""The zoo, the checkpoint reader, and downloads that fail."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import diffrate
import models
from diffrate.device import shapes_alone
from tests import recipe_weights
from tests.tiny_models import FAMILIES, GOLDEN, official_state, original_caformer_shapes, plain


def same(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("name", models.ZOO)
def test_every_name_builds_through_timm(name: str) -> None:
    with shapes_alone():
        model = timm.create_model(name)
    assert model.num_classes == models.entry_of(name).num_classes


def test_dashes_and_underscores_name_the_same_model() -> None:
    assert models.entry_of("caformer-s36") is models.entry_of("caformer_s36")


def test_the_original_caformer_names_are_right() -> None:
    layout = json.loads((GOLDEN / "caformer_tiny_layout.json").read_text())
    assert original_caformer_shapes(plain("caformer")) == {name: tuple(shape) for name, shape in layout.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "layout", ["official", "bare", "timm", "safetensors", "ours", "averaged", "parallel", "swa", "ema"]
)
def test_every_layout_loads(family: str, layout: str, tmp_path: Path) -> None:
    expected = plain(family)
    torch.save(official_state(family, torch.float32), tmp_path / "official.pth")
    models.load_weights(expected, tmp_path / "official.pth")
    state = expected.state_dict()
    file = tmp_path / "weights.pth"
    if layout == "safetensors":
        file = tmp_path / "weights.safetensors"
        save_file(state, file)
    else:
        noise = {name: torch.zeros_like(value) for name, value in state.items()}
        kept = {"compression._extra_state": torch.ones(2, 6, dtype=torch.int64)}
        content = {
            "official": {**official_state(family, torch.float32), **({} if family == "caformer" else {"epoch": 3})},
            "bare": official_state(family, torch.float32).get("model", official_state(family, torch.float32)),
            "timm": {"state_dict": state, "args": argparse.Namespace(lr=1.0)},
            "ours": {"model": {**state, **kept}, "kept": ([65] * 6, [65] * 6), "acc1": 90.0},
            "averaged": {"model": noise, "model_ema": state, "state_dict_ema": {}},
            "parallel": {"model": {f"module.{name}": value for name, value in state.items()}},
            "swa": {"n_averaged": torch.tensor(3), **{f"module.{name}": value for name, value in state.items()}},
            "ema": {"state_dict": noise, "ema": state},
        }
        torch.save(content[layout], file)
    loaded = plain(family)
    report = models.load_weights(loaded, file)
    assert same(loaded, expected)
    assert report.reinitialized == ()


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: value.to(dtype) for name, value in plain("deit").state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(models.CheckpointError, match=f"cls_token: found {dtype}; accepted: floats of 16 bits or more"):
        models.load_weights(plain("deit"), tmp_path / "weights.pth")


@pytest.mark.parametrize("family", FAMILIES)
def test_another_class_count_starts_a_fresh_head_and_says_so(family: str, tmp_path: Path) -> None:
    torch.save(official_state(family, torch.float32), tmp_path / "ten.pth")
    model = plain(family, num_classes=7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = models.load_weights(model, tmp_path / "ten.pth")
    assert len(report.reinitialized) == 2
    assert "the head has another number of classes" in report.notes[0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name in report.reinitialized), name


def test_position_embeddings_follow_the_input_size(tmp_path: Path) -> None:
    torch.save(official_state("deit", torch.float32), tmp_path / "small.pth")
    model = plain("deit", img_size=48)
    models.load_weights(model, tmp_path / "small.pth")
    assert model.pos_embed.shape == (1, 145, 48)
    assert model(torch.zeros(1, 3, 48, 48)).isfinite().all()
    official = official_state("deit", torch.float32)["model"]["pos_embed"]
    torch.testing.assert_close(model.pos_embed[:, 0], official[:, 0])  # the class token's stays
    torch.testing.assert_close(model.pos_embed[:, 1:].mean(), official[:, 1:].mean(), atol=0.01, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_that_does_not_fit_names_keys_and_shapes(family: str, tmp_path: Path) -> None:
    state = official_state(family, torch.float32)
    tensors = state.get("model", state)
    name = "head.fc1.weight" if family == "caformer" else "blocks.1.mlp.fc1.weight"
    tensors[name] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(models.CheckpointError) as caught:
        models.load_weights(plain(family), tmp_path / "wrong.pth")
    message = str(caught.value)
    assert "found [3, 3]" in message
    assert "expected [" in message
    assert str(tmp_path / "wrong.pth") in message
    assert "\n" not in message


def test_missing_and_unexpected_keys_are_named(tmp_path: Path) -> None:
    tensors = official_state("deit", torch.float32)["model"]
    del tensors["norm.bias"]
    tensors["dist_token"] = torch.zeros(1, 1, 48)
    torch.save(tensors, tmp_path / "distilled.pth")
    with pytest.raises(models.CheckpointError) as caught:
        models.load_weights(plain("deit"), tmp_path / "distilled.pth")
    assert "norm.bias expected [48] found nothing" in str(caught.value)
    assert "dist_token expected nothing found [1, 1, 48]" in str(caught.value)


def test_a_failed_load_changes_nothing(tmp_path: Path) -> None:
    tensors = official_state("deit", torch.float32)["model"]
    del tensors["norm.bias"]
    torch.save(tensors, tmp_path / "part.pth")
    model, twin = plain("deit"), plain("deit")
    twin.load_state_dict(model.state_dict())
    with pytest.raises(models.CheckpointError):
        models.load_weights(model, tmp_path / "part.pth")
    assert same(model, twin)


def test_a_vit_file_in_a_caformer_names_a_key(tmp_path: Path) -> None:
    torch.save(official_state("deit", torch.float32), tmp_path / "vit.pth")
    with pytest.raises(models.CheckpointError, match="does not fit"):
        models.load_weights(plain("caformer"), tmp_path / "vit.pth")


class _Code:
    """A pickle of this would run code when read without `weights_only`."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("this must never run",))


@pytest.mark.parametrize("kind", ["cut short", "text", "empty", "code", "no tensors", "safetensors cut short"])
def test_unreadable_files_are_named(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / ("bad.safetensors" if "safetensors" in kind else "bad.pth")
    if kind == "cut short":
        torch.save(official_state("deit"), file)
        file.write_bytes(file.read_bytes()[:5000])
    elif kind == "safetensors cut short":
        save_file(plain("deit").state_dict(), file)
        file.write_bytes(file.read_bytes()[:5000])
    elif kind == "code":
        torch.save({"model": _Code()}, file)
    elif kind == "no tensors":
        torch.save({"epoch": 3}, file)
    else:
        file.write_text("<html>not found</html>" if kind == "text" else "")
    with pytest.raises(models.CheckpointError) as caught:
        models.load_weights(plain("deit"), file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "never run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in models.ZOO if "sample" not in name])
def test_a_failed_download_says_what_and_where(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("models.weights.answers", lambda _: True)
    entry = models.entry_of(name)
    with pytest.raises(models.CheckpointError) as caught:
        models.official_file(entry)
    message = str(caught.value)
    assert "no route to host" in message
    assert "http" in message or "huggingface.co/" in message
    assert str(tmp_path / "hub" / "checkpoints" / entry.weights.file) in message
    assert "--checkpoint" in message


def test_a_file_put_by_hand_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / "caformer_s36.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"")
    assert models.official_file(models.entry_of("caformer_s36")) == place


def test_downloads_check_the_hash_in_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = tmp_path / "deit_tiny_patch16_224-a1311bcf.pth"
    source.write_bytes(b"something else")
    with pytest.raises(models.CheckpointError, match="invalid hash value"):
        models.fetch(source.as_uri())
    assert list((tmp_path / "hub" / "checkpoints").iterdir()) == []


def test_a_url_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = tmp_path / "mine.pth"
    torch.save(official_state("deit", torch.float32), source)
    first = models.fetch(source.as_uri())
    source.unlink()
    assert models.fetch("https://example.org/mine.pth") == first
    models.load_weights(plain("deit"), "https://example.org/mine.pth")


def test_patched_models_load_too(tmp_path: Path) -> None:
    torch.save(official_state("mae", torch.float32), tmp_path / "mae.pth")
    model = diffrate.patch.mae(plain("mae"))
    models.load_weights(model, tmp_path / "mae.pth")
    expected = recipe_weights.tensor("fc_norm.weight", (48,)).float()
    torch.testing.assert_close(model.fc_norm.weight.detach(), expected)


@pytest.mark.parametrize("prefix", ["model.", "backbone.", "model.timm_model."])
def test_a_prefix_that_all_names_share_is_left_out(prefix: str, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "prefixed.pth")
    fresh = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5)
    models.load_weights(fresh, tmp_path / "prefixed.pth")
    torch.testing.assert_close(fresh.state_dict(), model.state_dict())


def test_names_of_another_model_are_shown(tmp_path: Path) -> None:
    torch.save({"a.x": torch.ones(1), "b.y": torch.ones(1), "c.z": torch.ones(1)}, tmp_path / "other.pth")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5)
    with pytest.raises(models.CheckpointError, match=r"found a\.x, b\.y, c\.z, .*accepted: cls"):
        models.load_weights(model, tmp_path / "other.pth")
