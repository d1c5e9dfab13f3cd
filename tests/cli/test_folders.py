"""`--model FOLDER` in the layout of transformers, and `--text-head`."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diffrate
from cli.data import eval_transform, view_of
from cli.flags import parse_flags
from cli.model import chosen_entry, plain_model, planned, read_weights
from cli.runtime import Processes, Runtime
from diffrate.converting.transformers_vits import DEFAULTS
from tests.cli.test_errors import check
from tests.cli.test_eval import scores
from tests.conftest import Cli, write_image
from tests.folders import NAMES, PROCESSOR, write_folder, write_texts
from tests.library.foreign_models import TRANSFORMERS, foreign, images_for, outputs_of
from tests.library.text_files import run_the_lines_of_the_docs

FAST = ("--num_workers", 0)
SHORT = ("--granularity", 1, "--epochs", 1, "--batch-size", 4, "--search", "gradient")
RUNTIME = Runtime(Processes(), torch.device("cpu"), None, 10, None)


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed: its import fails."""
    for name in ("transformers", "open_clip"):
        monkeypatch.setitem(sys.modules, name, None)


def model_of(*words: object) -> tuple[Any, Any]:
    """The plain model that a command line names, and its weights."""
    settings = parse_flags([*map(str, words), "--eval", "--data-path", "."])
    entry = chosen_entry(settings.model)
    plan = planned(settings, entry, reads_data=False)
    weights = read_weights(settings.model, plan, RUNTIME)
    return plain_model(settings.model, entry, weights, entry.num_classes).eval(), weights


@torch.no_grad()
def assert_gives(model: nn.Module, images: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if name != "timm_wrapper"])
def test_a_folder_gives_what_its_model_gives(name: str, tmp_path: Path) -> None:
    original = foreign(name)
    original.save_pretrained(tmp_path)
    model, weights = model_of("--model", tmp_path)
    images = images_for(model)
    assert_gives(model, images, outputs_of(original, images))
    assert weights.classes is None  # LABEL_0, LABEL_1


@pytest.mark.parametrize("kind", ["vit", "clip", "siglip"])
def test_transformers_reads_the_folders_of_these_tests(kind: str, tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    content = json.loads((write_folder(tmp_path, kind) / "config.json").read_text())
    if kind == "clip":  # the vision tower alone: there is no text tower in the folder
        config = hf.CLIPVisionConfig(**content["vision_config"], projection_dim=16)
        original = hf.CLIPVisionModelWithProjection(config)
        found = original.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
        assert (found.missing_keys, found.unexpected_keys) == ([], ["logit_scale", "text_projection.weight"])
    else:
        original = getattr(hf, content["architectures"][0]).from_pretrained(tmp_path)
    model, _ = model_of("--model", tmp_path)
    images = images_for(model)
    assert_gives(model, images, outputs_of(original.eval(), images))


def test_what_need_not_be_said_is_as_in_transformers() -> None:
    hf = pytest.importorskip("transformers")
    usual = {"clip": hf.CLIPVisionConfig(), "siglip": hf.SiglipVisionConfig(), "siglip2": hf.Siglip2VisionConfig()}
    for family, facts in DEFAULTS.items():
        assert {name: getattr(usual[family], name) for name in facts} == facts


def test_other_sizes_have_the_positions_of_the_model_itself(tmp_path: Path) -> None:
    original = foreign("dinov2_registers_head")
    original.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 48, "width": 64}}))
    model, _ = model_of("--model", tmp_path)  # its images have another size than its configuration
    images = images_for(model)
    assert images.shape[-2:] == (48, 64)
    assert_gives(model, images, outputs_of(original, images))
    model, _ = model_of("--model", tmp_path, "--input-size", 40)
    images = images_for(model)
    assert_gives(model, images, outputs_of(original, images))


def test_the_pooler_of_another_class_is_left_out(tmp_path: Path) -> None:
    expected, _ = model_of("--model", write_folder(tmp_path, "vit"))
    changed(lambda state: state.update({"vit.pooler.dense.weight": torch.ones(32, 32)}))(tmp_path)
    model, _ = model_of("--model", tmp_path)
    images = images_for(model)
    assert_gives(model, images, expected(images))


def test_weights_lie_in_several_files_in_half_precision_or_in_a_pickle(tmp_path: Path) -> None:
    write_folder(tmp_path, "vit")
    whole = load_file(tmp_path / "model.safetensors")
    expected, _ = model_of("--model", tmp_path)
    names = sorted(whole)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: whole[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model.safetensors").unlink()
    model, weights = model_of("--model", tmp_path)
    images = images_for(model)
    assert_gives(model, images, expected(images))
    assert weights.classes == NAMES
    save_file({name: tensor.half() for name, tensor in whole.items()}, tmp_path / "model.safetensors")
    half, _ = model_of("--model", tmp_path)
    torch.testing.assert_close(half(images), expected(images), atol=0.02, rtol=0)
    torch.save(whole, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    pickled, _ = model_of("--model", tmp_path)
    assert_gives(pickled, images, expected(images))


def test_all_modes_run_without_transformers(
    cli: Cli, image_folder: Path, tmp_path: Path, without_transformers: None
) -> None:
    folder, out, found = write_folder(tmp_path / "my vit", "vit"), tmp_path / "out", tmp_path / "found.safetensors"
    flags = ("--model", folder, "--data-path", image_folder, *FAST)
    code, text, err = cli("--eval", *flags)
    assert (code, err) == (0, "")
    dense = scores(text)
    code, text, err = cli(*flags, *SHORT, "--target_flops", "70%", "--output_dir", out, "--save", found)
    assert (code, err) == (0, "")
    said = diffrate.about(found)
    assert (said.classes, said.mean, said.std) == (NAMES, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    assert (said.crop_mode, said.crop_pct, said.interpolation, said.input_size) == (
        "squash",
        1.0,
        "bicubic",
        (3, 32, 32),
    )
    code, text, err = cli("--eval", "--checkpoint", found, "--dense", "--data-path", image_folder, *FAST)
    assert (code, err, scores(text)) == (0, "", dense)
    code, text, err = cli("--eval", *flags, "--resume", out / "checkpoint.pth")
    assert (code, err) == (0, "")
    code, _, err = cli("--visualize", image_folder / "val" / "cat" / "0.jpg", *flags, "--output_dir", out)
    assert (code, err) == (0, "")
    assert set(NAMES) & set((out / "log.txt").read_text().splitlines()[-1].replace('"', " ").split())
    code, _, err = cli("--benchmark", "--model", folder, "--batch-size", 2, "--rounds", 2, "--amp", "off")
    assert (code, err) == (0, "")
    code, _, err = cli("--sensitivity", 4, *flags, "--granularity", 1, "--output_dir", out)
    assert (code, err) == (0, "")
    code, _, err = cli("--baseline", "merge", "--target_flops", "70%", *flags)
    assert (code, err) == (0, "")
    tune = ("--epochs", 1, "--batch-size", 4, "--output_dir", tmp_path / "tuned")
    code, text, err = cli("--finetune", "official", *flags, *tune)
    assert (code, err) == (0, "")
    assert "fresh" not in text
    code, text, err = cli("--eval", *flags, "--checkpoint", tmp_path / "tuned" / "checkpoint.pth")
    assert (code, err) == (0, "")


def test_a_folder_is_exported(cli: Cli, tmp_path: Path) -> None:
    if [int(part) for part in torch.__version__.split(".")[:2]] < [2, 8]:
        pytest.skip("exports need torch 2.8")
    folder, texts = write_folder(tmp_path / "clip", "clip"), write_texts(tmp_path / "texts.safetensors")
    for number, words in enumerate([(), ("--text-head", texts)]):
        code, out, err = cli("--export", tmp_path / f"{number}.pt2", "--model", folder, *words)
        assert (code, err) == (0, ""), out


def test_a_repository_is_read_like_a_folder(
    cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "repository", "vit")

    def download(repo_id: str, filename: str, revision: str | None = None, **options: object) -> str:
        assert (repo_id, revision) == ("somebody/vit", "v2")
        if not (folder / filename).exists():
            raise OSError(f"no {filename}")
        return str(folder / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    flags = ("--data-path", image_folder, *FAST)
    code, out, err = cli("--eval", "--model", "hf-hub:somebody/vit@v2", *flags)
    assert (code, err) == (0, "")
    assert scores(out) == scores(cli("--eval", "--model", folder, *flags)[1])
    (folder / "model.safetensors").unlink()
    check(
        cli("--eval", "--model", "hf-hub:somebody/vit@v2", *flags),
        "--model hf-hub:somebody/vit@v2: found no file model.saf",
    )


def test_labels_of_imagenet_go_by_their_ids(tmp_path: Path) -> None:
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    words = {str(index): info.index_to_description(index) for index in range(1000)}
    write_folder(tmp_path, "vit", id2label={**words, "7": "another word"})
    state = load_file(tmp_path / "model.safetensors")
    state |= {"classifier.weight": torch.randn(1000, 32), "classifier.bias": torch.zeros(1000)}
    save_file(state, tmp_path / "model.safetensors")
    _, weights = model_of("--model", tmp_path)
    assert weights.classes == tuple(info.label_names())


@pytest.mark.parametrize(
    ("processor", "size", "mode", "share"),
    [
        ({"size": {"height": 32, "width": 48}, "do_center_crop": None}, (32, 48), "squash", 1.0),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}, *(
            (32, 32), "center", 0.8
        )),
        ({"size": 40, "crop_size": 32, "do_center_crop": True}, (32, 32), "squash", 0.8),
        ({"size": 40, "crop_size": 32, "do_center_crop": True, "feature_extractor_type": "CLIPFeatureExtractor"}, *(
            (32, 32), "center", 0.8
        )),
        ({"size": {"shortest_edge": 32}}, (32, 32), "center", 1.0),
        ({"do_resize": False, "size": {"height": 99, "width": 99}}, (32, 32), "squash", 1.0),
        ({"size": {"height": 30, "width": 30}, "do_center_crop": False, "crop_size": 224}, (30, 30), "squash", 1.0),
    ],
)  # fmt: skip
def test_how_images_are_resized(processor: dict[str, Any], size: Any, mode: str, share: float, tmp_path: Path) -> None:
    write_folder(tmp_path, "vit", processor)
    entry = chosen_entry(parse_flags(["--eval", "--data-path", ".", "--model", str(tmp_path)]).model)
    assert (entry.input_size, entry.crop_mode, entry.crop_pct) == (size, mode, share)


@pytest.mark.parametrize("kind", ["ViTImageProcessor", "CLIPImageProcessor", "DeiTImageProcessor"])
def test_images_are_those_of_the_processor(kind: str, tmp_path: Path) -> None:
    hf = pytest.importorskip("transformers")
    sized = {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}}
    if kind == "CLIPImageProcessor":
        sized["size"] = {"shortest_edge": 40}
    elif kind == "ViTImageProcessor":
        sized = {"size": {"height": 32, "width": 32}}
    processor = getattr(hf, kind)(**sized)
    processor.save_pretrained(write_folder(tmp_path, "vit", None))
    settings = parse_flags(["--eval", "--data-path", ".", "--model", str(tmp_path)])
    transform = eval_transform(view_of(settings, chosen_entry(settings.model)))
    rows, columns = np.mgrid[:60, :80]
    pixels = np.stack([2 * rows, 3 * columns, 255 - rows - columns], axis=-1) % 256
    image = Image.fromarray(pixels.astype(np.uint8))
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    assert (transform(image) - expected).abs().max() < 4 / 255 / 0.22  # their resizings round differently


@pytest.mark.parametrize("words", [(), ("--text-head", "texts")], ids=["features", "texts"])
def test_features_are_searched_and_tuned(words: tuple[str, ...], cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    """Without texts a model of features has no accuracy, and gets a fresh head; with them it is a classifier."""
    folder, texts = write_folder(tmp_path / "clip", "clip"), write_texts(tmp_path / "texts.safetensors")
    words = tuple(str(texts) if word == "texts" else word for word in words)
    flags = ("--model", folder, "--data-path", image_folder, *FAST, *words)
    code, text, err = cli(*flags, *SHORT, "--target_flops", "70%", "--output_dir", tmp_path / "out")
    assert (code, err) == (0, "")
    assert ("Acc@1" in text) == bool(words)
    assert (f"--text-head {texts}" in text) == bool(words)
    tune = ("--epochs", 1, "--batch-size", 4, "--output_dir", tmp_path / "tuned", "--save", tmp_path / "t.safetensors")
    code, text, err = cli("--finetune", "official", *flags, *tune, *(("--distill",) if words else ()))
    assert (code, err) == (0, "")
    assert ("head.weight, head.bias start fresh" in text) != bool(words)
    tuned = text.splitlines()[-2]
    code, text, err = cli("--eval", "--checkpoint", tmp_path / "t.safetensors", "--data-path", image_folder, *FAST)
    assert (code, err) == (0, "")
    assert text.splitlines()[-1].split("*")[1].strip() in tuned
    if words:
        again = ("--eval", "--checkpoint", tmp_path / "tuned" / "checkpoint.pth", *flags)
        code, kept, err = cli(*again)
        assert (code, err) == (0, "")
        assert "the text head of the checkpoint is kept" in kept
        assert scores(kept) == scores(text)
    else:
        check(cli("--eval", *flags), f"--model {folder}: has no head")
        code, text, err = cli("--baseline", "merge", "--target_flops", "70%", *flags)
        assert (code, err) == (0, "")
        assert "(no head to score with)" in text


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_zero_shot_logits_are_those_of_transformers(
    kind: str, cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the lines of docs/convert.md that write the file."""
    original = foreign(kind)
    original.save_pretrained(tmp_path / "model")
    tokens = torch.randint(3, 99, (3, 6), generator=torch.Generator().manual_seed(5))
    monkeypatch.chdir(tmp_path)
    run_the_lines_of_the_docs("transformers", original, tokens, monkeypatch)
    texts = tmp_path / "texts.safetensors"
    model, weights = model_of("--model", tmp_path / "model", "--text-head", texts)
    images = images_for(model)
    with torch.no_grad():
        expected = original(input_ids=tokens, pixel_values=images).logits_per_image
    assert_gives(model, images, expected)
    assert weights.classes == NAMES
    flags = ("--model", tmp_path / "model", "--text-head", texts, "--data-path", image_folder, *FAST)
    code, text, err = cli("--eval", *flags, "--save", tmp_path / "s.safetensors")
    assert (code, err) == (0, "")
    dense = scores(text)
    saved = diffrate.load(tmp_path / "s.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(saved(images, return_flop=False), expected, atol=1e-5, rtol=0)
    code, text, err = cli("--eval", "--checkpoint", tmp_path / "s.safetensors", "--data-path", image_folder, *FAST)
    assert (code, err, scores(text)) == (0, "", dense)
    code, text, err = cli("--eval", *flags, "--multi_label")
    assert (code, err) == (0, "")
    assert "mAP" in text
    picture = image_folder / "val" / "cat" / "0.jpg"
    code, text, err = cli("--visualize", picture, *flags, "--output_dir", tmp_path / "out")
    assert (code, err) == (0, "")


def changed(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    """What changes the weights of a folder."""

    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return apply


def said(name: str = "config.json", **content: Any) -> Callable[[Path], object]:
    """What changes one of the files of a folder in JSON; None leaves a field out."""

    def apply(folder: Path) -> None:
        before = json.loads((folder / name).read_text()) | content
        (folder / name).write_text(json.dumps({key: value for key, value in before.items() if value is not None}))

    return apply


def written(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


LABELS = {"0": "a", "1": "b"}
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda folder: [file.unlink() for file in folder.iterdir()], "found no config.json in it"),
    "no_json": (written("config.json", "{"), "config.json: cannot be read (Expecting"),
    "a_list": (written("config.json", "[1]"), "config.json: found list; accepted: a JSON object"),
    "unknown_type": (
        said(model_type="swin", architectures=["SwinModel"]),
        "config.json: found the class SwinModel of model_type 'swin'; accepted: BeitForImageClassification, ",
    ),
    "other_type": (said(model_type="clip"), "found the class ViTForImageClassification of model_type 'clip'"),
    "no_class": (said(architectures=None), "config.json: found the class None of model_type 'vit'"),
    "own_code": (said(auto_map={"AutoModel": "own.Model"}), "of model_type 'vit' with code of its own"),
    "activation": (said(hidden_act="mish"), "found config.hidden_act 'mish'; accepted: gelu_pytorch_tanh"),
    "no_field": (said(layer_norm_eps=None), "config.json and its weights: found no layer_norm_eps; accepted: what"),
    "heads": (said(num_attention_heads="four"), "timm builds none for 32 by 32 pixels"),
    "seven_heads": (said(num_attention_heads=7), "timm builds none for 32 by 32 pixels"),
    "size": (said(image_size="big"), "config.image_size: found 'big'; accepted: height and width in pixels"),
    "other_size": (said(image_size=64), "found config.image_size 64; accepted: one of 16 patches"),
    "labels": (said(id2label=LABELS), "config.json: found id2label of 2 labels; accepted: 0 to 2"),
    "no_weights": (lambda folder: (folder / "model.safetensors").unlink(), "found no file model.safetensors"),
    "damaged": (written("model.safetensors", "what"), "model.safetensors: cannot be read ("),
    "pickle": (
        lambda folder: [
            (folder / "model.safetensors").unlink(),
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps(print)),
        ],
        "pytorch_model.bin: cannot be read (",
    ),
    "index": (
        lambda folder: [
            (folder / "model.safetensors").unlink(),
            written("model.safetensors.index.json", '{"weight_map": {"a": "../b.safetensors"}}')(folder),
        ],
        "found no file ../b.safetensors; accepted: model.safetensors or pytorch_model.bin, or model.safetensors.index.",
    ),
    "missing": (
        changed(lambda state: state.pop("vit.encoder.layer.1.intermediate.dense.weight")),
        "found nothing for timm's blocks.1.mlp.fc1.weight; accepted: floats [64, 32]",
    ),
    "no_query": (changed(lambda state: state.pop("vit.encoder.layer.0.attention.attention.query.weight")), "blocks.0"),
    "no_head": (changed(lambda state: state.pop("classifier.weight")), "found no classifier.weight; accepted: one"),
    "shape": (
        changed(lambda state: state.update({"vit.layernorm.weight": torch.ones(31)})),
        "found torch.float32 [31] on cpu for timm's norm.weight; accepted: floats [32]",
    ),
    "integers": (
        changed(lambda state: state.update({"vit.layernorm.weight": torch.ones(32, dtype=torch.int8)})),
        "found torch.int8 [32] on cpu for timm's norm.weight",
    ),
    "float8": (
        changed(lambda state: state.update({"vit.layernorm.weight": torch.ones(32).to(torch.float8_e4m3fn)})),
        "found torch.float8_e4m3fn [32] on cpu for timm's norm.weight",
    ),
    "a_bias": (
        changed(lambda state: state.pop("vit.encoder.layer.1.attention.output.dense.bias")),
        "found nothing for timm's blocks.1.attn.proj.bias; accepted: a bias in all blocks, or in none",
    ),
    "a_query_bias": (
        changed(lambda state: state.pop("vit.encoder.layer.0.attention.attention.query.bias")),
        "found nothing for timm's blocks.0.attn.q.bias; accepted: a bias in all blocks, or in none",
    ),
    "unknown_tensor": (
        changed(lambda state: state.update({"vit.adapter.weight": torch.ones(2)})), "found adapter.weight; accepted: "
    ),
    "beside": (changed(lambda state: state.update({"lm_head.weight": torch.ones(2)})), "found lm_head.weight"),
    "nan": (
        changed(lambda state: state["vit.layernorm.weight"].fill_(torch.nan)),
        "found NaN or infinite values in norm.weight; accepted: finite weights",
    ),
    "processor": (written("preprocessor_config.json", "no"), "preprocessor_config.json: cannot be read"),
    "mean": (said("preprocessor_config.json", image_mean=[1, 2]), "found image_mean [1, 2]; accepted: three numbers"),
    "std": (said("preprocessor_config.json", image_std=[0, 1, 1]), "found image_std [0, 1, 1]; accepted: three"),
    "number": (said("preprocessor_config.json", image_mean=0.5), "found image_mean 0.5; accepted: three numbers"),
    "crop_pct": (said("preprocessor_config.json", crop_pct=0.875), "found crop_pct 0.875; accepted: none"),
    "offset": (said("preprocessor_config.json", rescale_offset=True), "found rescale_offset True; accepted: none"),
    "flipped": (said("preprocessor_config.json", do_flip_channel_order=True), "found do_flip_channel_order True"),
    "levit": (
        said("preprocessor_config.json", image_processor_type="LevitImageProcessor"),
        "found the LevitImageProcessor; accepted: processors that resize to the size that they say",
    ),
    "levit_of_old": (
        said("preprocessor_config.json", image_processor_type=None, feature_extractor_type="LevitFeatureExtractor"),
        "found the LevitFeatureExtractor; accepted: processors",
    ),
    "words": (said("preprocessor_config.json", image_std=["a", "b", "c"]), "preprocessor_config.json: "),
    "edge": (said("preprocessor_config.json", size={"longest_edge": 32}), "found the size {'longest_edge': 32}"),
    "resample": (said("preprocessor_config.json", resample=9), "found resample 9; accepted: 0 to 5, nearest, lanczos"),
    "rescale": (said("preprocessor_config.json", rescale_factor=0.5), "found rescale_factor 0.5; accepted: 1 / 255"),
    "crop": (
        said("preprocessor_config.json", do_center_crop=True, crop_size={"height": 16, "width": 32}),
        "found crop_size [16, 32] of size [32, 32]; accepted: the same share of both sides",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_folders_that_are_refused(case: str, cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    change, expected = REFUSED[case]
    change(write_folder(tmp_path / "model", "vit"))
    result = cli("--eval", "--model", tmp_path / "model", "--data-path", image_folder, *FAST)
    check(result, f"--model {tmp_path / 'model'}: ", expected)


def test_more_of_what_is_refused(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    folder, data = write_folder(tmp_path / "siglip", "siglip"), ("--data-path", image_folder, *FAST)
    changed(lambda state: state.pop("vision_model.head.attention.in_proj_weight"))(folder)
    check(cli("--eval", "--model", folder, *data), "KeyError ('attn_pool.in_proj_weight') while it was read")
    folder = write_folder(tmp_path / "mae", "vit", architectures=["ViTMAEModel"], model_type="vit_mae", mask_ratio=0.75)
    changed(lambda state: [state.pop(f"classifier.{part}") for part in ("weight", "bias")])(folder)
    check(cli("--eval", "--model", folder, *data), "ViTMAEModel: found config.mask_ratio 0.75; accepted: 0, since")


def test_what_is_adapted_is_said(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    processor = {**PROCESSOR, "do_pad": True, "size": {"shortest_edge": 48}}
    folder = write_folder(tmp_path / "model", "vit", processor, hidden_dropout_prob=0.1)
    flags = ("--eval", "--model", folder, "--data-path", image_folder, *FAST)
    code, text, err = cli(*flags)
    assert (code, err) == (0, "")
    assert "preprocessor_config.json: do_pad is left out" in text
    assert "no crop_size; the centre of an image is cut out as a square" in text
    assert "positions interpolated for 48 pixels, from 32" in text
    assert "pos_drop_rate 0.1, proj_drop_rate 0.1 of its configuration left out" in text
    said("preprocessor_config.json", resample=None, image_std=None)(folder)
    code, text, err = cli(*flags)
    assert (code, err) == (0, "")
    assert "preprocessor_config.json: no resample, image_std; as usual for its layout" in text
    (folder / "preprocessor_config.json").unlink()
    code, text, err = cli(*flags)
    assert (code, err) == (0, "")
    assert "no preprocessor_config.json; images as usual for its layout: mean [0.5, 0.5, 0.5]" in text
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": PROCESSOR}))
    entry = chosen_entry(parse_flags(list(map(str, flags))).model)
    assert entry.mean == (0.5, 0.4, 0.3)


def test_a_folder_of_timms_layout_goes_to_timm(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("test_vit", num_classes=3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "test_vit", "num_classes": 3, "pretrained_cfg": {"input_size": [3, 160, 160]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    entry = chosen_entry(parse_flags(["--eval", "--data-path", ".", "--model", str(tmp_path)]).model)
    assert (entry.name, entry.architecture, entry.num_classes) == (f"local-dir:{tmp_path}", "test_vit", 3)


@pytest.mark.parametrize(
    ("model", "width", "expected"),
    [
        ("clip", 12, "found embeddings of 12 channels, and 16 outputs of "),
        ("siglip", 16, "found features of 32 channels; accepted: of an image, of 16 channels as the embeddings"),
        ("vit", 16, "found embeddings of 16 channels, and 3 outputs of "),
        ("vit_deit_tiny_patch16_224", 16, "found embeddings of 16 channels, and 1000 outputs of vit_deit_tiny"),
        ("caformer_s36", 16, "found embeddings of 16 channels, and 1000 outputs of caformer_s36"),
        ("caformer_s36", 1000, "that gives logits; accepted: of an image, of 1000 channels"),
        ("deit_tiny_distilled_patch16_224", 1000, "found a FeatureHead that gives logits"),
    ],
)
def test_texts_of_other_models_are_refused(
    model: str, width: int, expected: str, cli: Cli, image_folder: Path, tmp_path: Path
) -> None:
    texts = write_texts(tmp_path / "texts.safetensors", width)
    name = write_folder(tmp_path / model, model) if model in ("clip", "siglip", "vit") else model
    flags = ("--text-head", texts, "--data-path", image_folder, *FAST)
    check(cli("--eval", "--model", name, *flags), f"--text-head {texts}: ", expected)


def test_more_text_heads_that_are_refused(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    folder, texts = write_folder(tmp_path / "clip", "clip"), write_texts(tmp_path / "texts.safetensors")
    flags = ("--model", folder, "--data-path", image_folder, *FAST)
    check(cli("--eval", *flags, "--text-head", tmp_path / "gone"), f"--text-head {tmp_path / 'gone'}: no such file")
    check(cli("--finetune", *flags, "--text-head", texts), "needs weights to start from; accepted: --finetune official")
    bad = write_texts(tmp_path / "bad.safetensors", names=("cat", "dog"))
    check(
        cli("--eval", *flags, "--text-head", bad), f"--text-head {bad}: found classes 2 names; accepted: a JSON array"
    )
    saved = tmp_path / "saved.safetensors"
    code, _, err = cli("--eval", *flags, "--text-head", texts, "--save", saved)
    assert (code, err) == (0, "")
    again = ("--checkpoint", saved, "--text-head", texts, "--data-path", image_folder)
    check(cli("--eval", *again), f"--text-head {texts}: {saved} has a text head; accepted: no --text-head")
    other = write_texts(tmp_path / "other.safetensors", names=("cat", "dog", "fox"))
    check(cli("--eval", *flags, "--text-head", other), "class emu; accepted: the checkpoint's, cat, dog, fox")


def test_embeddings_of_other_lengths_are_normalised_and_it_says_so(
    cli: Cli, image_folder: Path, tmp_path: Path
) -> None:
    folder, texts = write_folder(tmp_path / "clip", "clip"), write_texts(tmp_path / "texts.safetensors")
    flags = ("--eval", "--model", folder, "--data-path", image_folder, *FAST)
    expected = scores(cli(*flags, "--text-head", texts)[1])
    state = load_file(texts)
    save_file({**state, "embeddings": 3 * state["embeddings"]}, texts, {"classes": json.dumps(NAMES)})
    code, text, err = cli(*flags, "--text-head", texts)
    assert (code, err) == (0, "")
    assert "embeddings of length 3 to 3, made 1" in text
    assert scores(text) == pytest.approx(expected, abs=2e-3)


def test_a_search_goes_on_with_the_same_texts_alone(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    folder, texts = write_folder(tmp_path / "clip", "clip"), write_texts(tmp_path / "texts.safetensors")
    write_image(tmp_path / "in.png", seed=1)
    flags = ("--model", folder, "--data-path", image_folder, *FAST, *SHORT, "--target_flops", "70%")
    out = ("--output_dir", tmp_path / "out")
    code, _, err = cli(*flags, "--text-head", texts, *out)
    assert (code, err) == (0, "")
    result = cli(*flags, *out, "--resume", "auto")
    check(result, f"was made with --text-head {texts}; accepted: None, as in this run")


def test_the_texts_go_on_a_model_of_timm_with_a_projection(tmp_path: Path) -> None:
    """Its CLIP models have it as a head with a bias, of as many outputs."""
    texts = write_texts(tmp_path / "texts.safetensors", 512)
    words = ["--eval", "--data-path", ".", "--model", "vit_base_patch32_clip_224.openai", "--text-head", str(texts)]
    settings = parse_flags(words)
    entry = chosen_entry(settings.model)
    assert (entry.num_classes, entry.headless) == (3, False)
    head = planned(settings, entry, reads_data=False).shapes.head
    assert (head.features.weight.shape, head.weight.shape) == ((512, 768), (3, 512))
