"""`--model`: any name that timm takes, which entry it stands for, and where its weights come from."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.utils import LocalEntryNotFoundError
from safetensors.torch import save_file

import diffrate
import models
from cli.flags import check_paths, parse_flags
from cli.model import chosen_entry
from diffrate.device import shapes_alone
from tests.cli.test_errors import check
from tests.cli.test_eval import scores
from tests.conftest import Cli
from tests.constructions import since

FAST = ("--num_workers", 0)


def read_at(entry: models.ModelEntry, size: models.Size) -> models.Read:
    """The published weights for an input of `size`."""
    with shapes_alone():
        model = models.create(entry, size)
    return models.read_official(entry, model)


@pytest.mark.parametrize("name", models.ZOO)
def test_published_models_keep_their_names_and_recipe(name: str) -> None:
    entry = models.entry_of(name)
    for known in (name, name.replace("_", "-"), *entry.aliases):
        assert models.entry_of(known) is entry
    assert entry.config is None
    assert (entry.crop_pct, entry.crop_mode) == (1.0 if "sample" in name else 0.875, "center")


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("vit_small_patch14_reg4_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m"),
        ("vit_small_patch14_reg4_dinov2", "vit_small_patch14_reg4_dinov2.lvd142m"),
        ("vit-tiny-patch16-224", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
        ("vit_tiny_patch16_224_in21k", "vit_tiny_patch16_224.augreg_in21k"),  # no longer in use
        ("vit_base_patch16_clip_224.openai", "vit_base_patch16_clip_224.openai"),
        ("caformer_s36.sail_in22k_ft_in1k", "caformer_s36.sail_in22k_ft_in1k"),  # the zoo has other weights
        ("deit_small_distilled_patch16_224", "deit_small_distilled_patch16_224.fb_in1k"),
        pytest.param("test_vit_relpos", "test_vit_relpos.untrained", marks=since("1.0.31")),
    ],
)
def test_names_of_timm_stand_for_a_tag(name: str, full: str) -> None:
    entry = models.entry_of(name)
    assert (entry.name, entry.schedule_key) == (full, full)
    assert entry.architecture == full.split(".")[0]


@since("1.0.30")
def test_what_inputs_are_like_comes_from_timms_configuration() -> None:
    dino, clip = models.entry_of("vit_small_patch14_reg4_dinov2"), models.entry_of("vit_base_patch16_clip_384")
    assert (dino.num_classes, dino.input_size, dino.crop_pct) == (0, (518, 518), 1.0)
    assert (clip.crop_mode, clip.mean[0], clip.num_classes) == ("squash", 0.48145466, 1000)
    portrait = models.entry_of("vit_base_patch16_sapiens2")
    assert (portrait.input_size, portrait.interpolation) == ((1024, 768), "bilinear")
    flexible = models.entry_of("naflexvit_base_patch16_gap")
    assert flexible.input_size == (384, 384)
    with shapes_alone():
        assert models.create(flexible, (96, 64)).pretrained_cfg["input_size"] == (3, 96, 64)
        assert models.create(portrait, (512, 384)).patch_embed.img_size == (512, 384)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_smal_patch16_224", ["unknown model; nearest: vit_small_patch16_224, ", "accepted: the names of --list"]),
        ("qwertz", ["unknown model", "accepted: the names of --list-models"]),
        ("timm/vit_tiny", ["unknown model", "accepted: hf-hub:timm/vit_tiny"]),
        ("vit_tiny_patch16_224.mine", ["knows no 'mine' of vit_tiny_patch16_224; accepted: vit_tiny_patch16_224.aug"]),
        ("vit_deit_tiny_patch16_224.fb_in1k", ["accepted: vit_deit_tiny_patch16_224"]),
        ("local-dir:/nowhere", ["cannot read its config.json", "/nowhere"]),
        ("resnet50", ["found ResNet; accepted: "]),
        ("vit_base_patch16_18x2_224", ["blocks.0: found ParallelThingsBlock"]),
        ("best.pth", ["a file of weights is given as --checkpoint best.pth; accepted: the model's name "]),
        ("out/model_best.pth", ["--checkpoint out/model_best.pth"]),
        ("vit_tiny_patch16_224.safetensors", ["or no --model where --save left the file"]),
        ("README.md", ["--checkpoint README.md"]),
        ("test_vit4", ["has no pretrained weights; accepted: a file with --checkpoint"]),
    ],
)
def test_names_that_are_refused(name: str, expected: list[str], cli: Cli, image_folder: Path) -> None:
    result = cli("--eval", "--model", name, "--data-path", image_folder)
    check(result, f"--model {name}", *expected) if name != "test_vit4" else check(result, *expected)


@pytest.mark.parametrize("mode", ["--eval", "--visualize", "--benchmark", "--finetune", "--baseline"])
def test_what_compression_refuses_is_refused_before_anything_is_read(mode: str, cli: Cli, tmp_path: Path) -> None:
    word = {"--visualize": ("figures/chelsea.jpg",), "--baseline": ("merge", "--target_flops", 1)}.get(mode, ())
    unread = tmp_path / "weights.pth"
    unread.write_bytes(b"no checkpoint")
    words = (mode, *word, "--model", "resnet50", "--checkpoint", unread, "--output_dir", tmp_path)
    check(cli(*words), "--model resnet50: found ResNet; accepted: ")


def test_without_a_network_it_says_what_was_tried(
    cli: Cli, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise LocalEntryNotFoundError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", refuse)
    result = cli("--eval", "--model", "vit_tiny_patch16_224", "--data-path", image_folder)
    source = "huggingface.co/timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    check(result, f"tried {source} (no connection, and nothing in the cache)", "HF_HOME", "--checkpoint")
    result = cli("--eval", "--model", "hf-hub:somebody/vit", "--data-path", image_folder)
    check(result, "--model hf-hub:somebody/vit: cannot read its config.json (no connection", "--checkpoint FILE")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository of timm's form, with a model of three classes for oblong images."""
    folder = tmp_path / "repository"
    folder.mkdir()
    model = timm.create_model("test_vit", num_classes=3, img_size=(64, 96))
    save_file(model.state_dict(), folder / "model.safetensors")
    inputs: dict[str, Any] = {"input_size": [3, 64, 96], "crop_pct": 0.8, "crop_mode": "squash", "mean": [0.5] * 3}
    config = {
        "architecture": "test_vit",
        "num_classes": 3,
        "pretrained_cfg": {**inputs, "std": [0.5] * 3, "interpolation": "bilinear", "fixed_input_size": True},
        "model_args": {"img_size": [64, 96]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("source", ["hf-hub:somebody/vit", pytest.param("local-dir", marks=since("1.0.26"))])
def test_repositories_say_all_there_is_to_know(
    source: str, cli: Cli, image_folder: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repo_id: str, filename: str, **options: object) -> str:
        assert repo_id == "somebody/vit"
        return str(repository / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    name = source if source != "local-dir" else f"local-dir:{repository}"
    entry = models.entry_of(name)
    assert (entry.input_size, entry.crop_mode, entry.num_classes) == ((64, 96), "squash", 3)
    assert isinstance(entry.weights, str)
    read = read_at(entry, (64, 96))
    expected = timm.create_model(name, pretrained=True).state_dict()
    torch.testing.assert_close(dict(read.state), dict(expected), rtol=0, atol=0)
    code, out, err = cli("--eval", "--model", name, "--data-path", image_folder, *FAST)
    assert (code, err) == (0, "")
    *_, gflops = scores(out)
    assert gflops > 0


@since("1.0.31")
def test_pretrained_weights_are_those_of_the_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At another size, positions are interpolated from the size that they are for: here of as many patches."""
    state = timm.create_model("test_vit", img_size=160, num_classes=1000).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    asked = set()

    def download(repo_id: str, filename: str, **options: object) -> str:
        asked.add((repo_id, filename))
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    entry = models.entry_of("test_vit")
    read = read_at(entry, entry.input_size)
    assert asked == {("timm/test_vit.r160_in1k", "model.safetensors")}
    assert read.name == "test_vit.r160_in1k"
    torch.testing.assert_close(dict(read.state), state, rtol=0, atol=0)
    oblong = read_at(entry, (320, 80)).state
    assert oblong["pos_embed"].shape == state["pos_embed"].shape
    assert not torch.equal(oblong["pos_embed"], state["pos_embed"])


def names_in(folder: Path) -> set[str]:
    return {json.loads(line)["model"] for line in (folder / "log.txt").read_text().splitlines()}


def test_without_its_weights_a_pretrained_tag_is_not_named(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    data = ("--data-path", image_folder, "--input-size", 64, *FAST)
    file, saved = tmp_path / "a" / "checkpoint.pth", tmp_path / "own.safetensors"
    train = ("--finetune", "--model", "test_vit", *data, "--epochs", 1, "--output_dir", tmp_path / "a")
    assert cli(*train, "--save", saved)[::2] == (0, "")
    assert names_in(tmp_path / "a") == {diffrate.about(saved).name} == {"test_vit"}
    search = ("--target_flops", "70%", "--granularity", 1, "--minutes", 0.01, "--output_dir", tmp_path / "b", *data)
    code, out, err = cli("--model", "test_vit", "--checkpoint", file, *search)
    assert (code, err) == (0, "")
    following = shlex.split(out.split("next: python main.py ")[1].splitlines()[0])
    assert following[following.index("--model") + 1] == "test_vit"
    assert cli(*following, *FAST)[::2] == (0, "")
    # Named in full it is the same model, and schedules are found by any of its names.
    rates = following[following.index("--load_compression_rate") : following.index("--model")]
    for checkpoint in (file, saved):
        words = ("--eval", "--model", "test_vit.r160_in1k", "--checkpoint", checkpoint, *data, *rates)
        assert cli(*words, "--output_dir", tmp_path / "c")[::2] == (0, "")
    assert names_in(tmp_path / "c") == {"test_vit"}
    # What was trained when the tag was named goes on.
    content = torch.load(file, weights_only=True)
    content["flags"]["model"] = "test_vit.r160_in1k"
    torch.save(content, file)
    assert cli(*train, "--resume", "auto")[::2] == (0, "")
    result = cli(*train, "--model", "test_vit2", "--resume", "auto")
    check(result, "made with --model test_vit.r160_in1k; accepted: test_vit2, as")


def test_with_its_weights_the_tag_is_named(
    cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "model.safetensors")
    for place in ("huggingface_hub.hf_hub_download", "timm.models._hub.hf_hub_download"):
        monkeypatch.setattr(place, lambda *args, **options: str(tmp_path / "model.safetensors"))
    words = ("--finetune", "official", "--model", "test_vit", "--data-path", image_folder, "--epochs", 1, *FAST)
    assert cli(*words, "--output_dir", tmp_path / "out")[::2] == (0, "")
    assert names_in(tmp_path / "out") == {"test_vit.r160_in1k"}


def test_a_saved_model_may_have_any_name(tmp_path: Path) -> None:
    file, model = tmp_path / "saved.safetensors", models.create(models.entry_of("test_vit"), 64, num_classes=3)
    diffrate.save(diffrate.patch.vit(model), file, name="a v1.pth")
    settings = parse_flags(["--eval", "--checkpoint", str(file), "--data-path", str(tmp_path)])
    check_paths(settings)
    assert settings.model.name == "a v1.pth"


def test_a_saved_model_is_cropped_as_its_file_says(tmp_path: Path) -> None:
    for architecture, mode in (("test_vit", "center"), ("vit_base_patch16_clip_384.openai_ft_in1k", "squash")):
        entry = replace(models.entry_of(architecture), options={"depth": 3, "embed_dim": 48, "num_heads": 3})
        model = diffrate.patch.vit(models.create(entry, 64, num_classes=3))
        diffrate.save(model, tmp_path / "saved.safetensors", name="mine")
        found = chosen_entry(parse_flags(["--eval", "--checkpoint", str(tmp_path / "saved.safetensors")]).model)
        assert (found.name, found.architecture, found.crop_mode) == ("mine", entry.architecture, mode)
        assert (found.input_size, found.num_classes, found.crop_pct) == ((64, 64), 3, entry.crop_pct)


@pytest.mark.parametrize("name", ["vit_deit_tiny_patch16_224", "caformer_s36", "beit_base_patch16_224"])
def test_shapes_alone_are_those_of_the_model(name: str) -> None:
    """And no draw from the generator is spent on them."""
    entry, state = models.entry_of(name), torch.get_rng_state()
    with shapes_alone():
        found = models.create(entry)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(value.is_meta for value in found.state_dict().values())
    with torch.device("meta"):
        expected = models.create(entry)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (found, expected)]
    assert shapes[0] == shapes[1]
    assert not torch.zeros(2).add_(1).eq(0).any()
