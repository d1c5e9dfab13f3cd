"""Saved models: the same logits after a round trip, headers that say what is inside, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv
from torch import Tensor, nn

import diffrate
from diffrate.blocks.reduction import Mean
from diffrate.files import save as files
from diffrate.files.header import About, SavedModelError, about
from diffrate.files.save import load, save
from diffrate.patch.base import CompressedModel
from diffrate.patch.caformer import caformer
from diffrate.patch.timm_families import vit
from tests.constructions import since
from tests.library.saved_models import assert_same, logits, needs_arguments, refusal, scheduled

TINY = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
FAMILIES = ("deit", "mae", "caformer")
CAFORMER_CLASSES = 5
default_cfgs = generate_default_cfgs({"caformer_of_tests": {"input_size": (3, 64, 64), "crop_pct": 0.9}})


@register_model
def caformer_of_tests(pretrained: bool = False, **options: Any) -> MetaFormer:
    """timm's own CAFormers take no other depths and widths, and the smallest has 26 million weights."""
    own = {
        "depths": [1, 1, 4, 1],
        "dims": [16, 32, 64, 96],
        "token_mixers": [SepConv, SepConv, Attention, Attention],
        "norm_layers": [LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
        "num_classes": CAFORMER_CLASSES,
    }
    return build_model_with_cfg(MetaFormer, "caformer_of_tests", pretrained, **{**own, **options})


def plain(family: str, **options: Any) -> nn.Module:
    """A small timm model with weights that matter: no norm, scale or bias is at its start."""
    torch.manual_seed(0)
    if family == "caformer":
        model = timm.create_model("caformer_of_tests", **options)
    else:
        pool = {"deit": "token", "mae": "avg"}[family]
        model = timm.create_model("vit_tiny_patch16_224", **{**TINY, "global_pool": pool, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def patched(family: str, **options: Any) -> CompressedModel:
    """A small compressed model that removes tokens."""
    return scheduled(vit(plain(family, **options).eval()))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.fixture
def saved(path: Path) -> Path:
    """A file with a small DeiT."""
    save(patched("deit"), path, name="tiny", classes=["a", "b", "c", "d", "e"])
    return path


def rewrite(
    path: Path, header: Mapping[str, str | None] | None = None, tensors: Mapping[str, Tensor | None] | None = None
) -> None:
    """Change entries of the header and tensors of a saved file; None removes one."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    changed = {**metadata, **(header or {})}
    state = {**load_file(path), **(tensors or {})}
    save_file(
        {name: tensor for name, tensor in state.items() if tensor is not None},
        path,
        {name: text for name, text in changed.items() if text is not None},
    )


def read_or_refused(act: Callable[[], object]) -> None:
    """Whether `act` succeeds does not matter; where it does not, it says so in one line."""
    try:
        act()
    except SavedModelError as error:
        lines = str(error).splitlines()
    else:
        return
    assert len(lines) == 1


# Round trips


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_logits_are_the_same_to_the_last_bit(path: Path, family: str, dtype: torch.dtype) -> None:
    model = patched(family).to(dtype)
    save(model, path)
    assert_same(load(path), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_search_is_saved_with_the_counts_of_its_rates(path: Path, family: str) -> None:
    model = vit(plain(family).train(), prune_granularity=2, merge_granularity=3)
    with torch.no_grad():
        for rate in model.arch_parameters():
            rate.normal_(generator=torch.Generator().manual_seed(2))
    counts = model.get_kept_num()
    save(model, path)
    assert model.training
    assert model.compression.schedule is None
    assert all(rate.requires_grad for rate in model.arch_parameters())
    loaded = load(path)
    assert loaded.compression.schedule is not None
    assert loaded.get_kept_num() == counts
    assert_same(loaded, model)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("deit", {"init_values": 0.1, "qk_norm": True}),
        ("deit", {"num_classes": 0}),
        ("deit", {"num_classes": 1000, "in_chans": 1}),
        ("deit", {"img_size": (32, 48), "drop_path_rate": 0.1, "drop_rate": 0.2}),
        ("mae", {"fc_norm": False}),
        ("mae", {"final_norm": False, "pre_norm": True}),
        ("caformer", {"num_classes": 3, "depths": [1, 2, 3, 2], "mlp_bias": True}),
        ("caformer", {"layer_scale_init_values": [None, 0.1, None, 0.1], "drop_path_rate": 0.2}),
    ],
    ids=str,
)
@needs_arguments
def test_other_structures_come_back(path: Path, family: str, options: dict[str, Any]) -> None:
    model = patched(family, **options)
    save(model, path)
    assert_same(load(path), model)


@st.composite
def vit_options(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments that timm's ViT can be built with and that compression handles."""
    heads = draw(st.integers(1, 3))
    return {
        "img_size": draw(st.sampled_from([8, 12, (8, 16)])),
        "patch_size": draw(st.sampled_from([2, 4])),
        "embed_dim": heads * draw(st.sampled_from([8, 14, 16])),
        "num_heads": heads,
        "depth": draw(st.integers(3, 4)),
        "num_classes": draw(st.sampled_from([0, 1, 7, 1000])),
        "in_chans": draw(st.sampled_from([1, 3])),
        "global_pool": draw(st.sampled_from(["token", "avg"])),
        "mlp_ratio": draw(st.sampled_from([1.5, 2.7, 4.0])),
        "init_values": draw(st.sampled_from([None, 1e-5, 0.1])),
        "drop_path_rate": draw(st.sampled_from([0.0, 0.1])),
        "proj_drop_rate": draw(st.sampled_from([0.0, 0.1])),
        **{
            name: draw(st.booleans())
            for name in ("qkv_bias", "qk_norm", "scale_attn_norm", "proj_bias", "no_embed_class", "pre_norm", "fc_norm")
        },
    }


def drop_path_rates(model: Any) -> list[float]:
    return [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]


@needs_arguments
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options=vit_options(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_arguments_come_back(path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = scheduled(vit(timm.create_model("vit_tiny_patch16_224", **options).to(dtype)))
    save(model, path)
    loaded = load(path)
    assert_same(loaded, model)
    assert drop_path_rates(loaded) == pytest.approx(drop_path_rates(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_caformer_of_timm_at_another_size(path: Path, dtype: torch.dtype) -> None:
    model = scheduled(caformer(timm.create_model("caformer_s18", num_classes=7), input_size=64)).to(dtype)
    save(model, path)
    assert about(path).input_size == (3, 64, 64)
    assert about(path).arguments == {"num_classes": 7}
    assert_same(load(path), model)


@needs_arguments
def test_a_head_that_was_reset_and_a_size_that_was_changed(path: Path) -> None:
    dense: Any = plain("deit")
    dense.reset_classifier(9, global_pool="avg")
    dense.set_input_size(img_size=(16, 24))
    model = scheduled(vit(dense))
    save(model, path)
    assert about(path).input_size == (3, 16, 24)
    assert_same(load(path), model)


def test_saving_twice_gives_the_same_model(tmp_path: Path) -> None:
    model = patched("mae")
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save(model, first, name="twice")
    loaded = load(first)
    save(loaded, second, name="twice")
    assert about(first) == about(second)
    assert_same(load(second), model)


def test_frozen_weights_and_tied_tensors(path: Path) -> None:
    model: Any = patched("deit")
    model.requires_grad_(False)
    model.blocks[1].mlp.fc1.bias = model.blocks[0].mlp.fc1.bias
    save(model, path)
    loaded = load(path)
    assert torch.equal(logits(loaded), logits(model))
    rates = set(loaded.arch_parameters())  # of counts that are set, and so frozen
    assert all(parameter.requires_grad == (parameter not in rates) for parameter in loaded.parameters())


def test_buffers_that_the_constructor_computes_come_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_table(*words: Any, **options: Any) -> nn.Module:
        model = create(*words, **options)
        model.register_buffer("table", torch.arange(6.0).reshape(2, 3), persistent=False)
        return model

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", with_table)
    model: Any = patched("deit")
    model.table += 1
    save(model, path)
    loaded: Any = load(path)
    assert torch.equal(loaded.table, model.table)
    assert "table" not in loaded.state_dict()


def test_a_loaded_model_trains_and_moves_on_without_its_file(saved: Path) -> None:
    model = load(saved)
    before = logits(model)
    saved.write_bytes(b"something else")
    assert torch.equal(logits(model), before)
    model.train()(torch.randn(2, 3, 32, 32), return_flop=False).sum().backward()
    assert next(model.parameters()).grad is not None


def test_no_generator_is_drawn_from(path: Path) -> None:
    model = patched("deit")
    state = torch.random.get_rng_state()
    save(model, path)
    load(path)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_given_device_is_where_tensors_are(saved: Path) -> None:
    model = load(saved, device=torch.device("meta"))
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_from_a_gpu_and_back(path: Path) -> None:
    model = patched("deit")
    expected = logits(model)
    save(model.cuda(), path)
    assert torch.equal(logits(load(path)), expected)
    assert next(load(path, device="cuda").parameters()).is_cuda


def test_a_file_of_an_earlier_version() -> None:
    """Written on that day, when arguments were read off the parts of two classes of timm's alone."""
    path = Path(__file__).parent / "saved_2026-11-23.safetensors"
    said, model = about(path), load(path)
    assert (said.name, said.classes, said.input_size) == ("earlier", ("a", "b", "c"), (3, 12, 16))
    assert said.arguments["fc_norm"] is False
    assert model.get_kept_num() == ([13, 11, 8], [13, 9, 6])
    assert model.compression.granularity == {"prune": 2, "merge": 3}
    written = [[0.136987, 0.072178, 0.130196], [-0.086229, -0.003434, 0.123430]]
    torch.testing.assert_close(logits(model.float()), torch.tensor(written), atol=1e-5, rtol=0)


# The header


def test_the_header_is_for_anyone_to_read(saved: Path) -> None:
    with safe_open(saved, "np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "diffrate 1"
    assert metadata["architecture"] == "vit_tiny_patch16_224"
    shown = {"global_pool": "token", "num_heads": 3} | json.loads(metadata["arguments"])  # timm's own
    assert shown == {**TINY, "global_pool": "token"}
    assert json.loads(metadata["merge_kept_num"]) == [65, 57, 52]
    assert json.loads(metadata["prune_kept_num"]) == [65, 60, 55]
    assert metadata["tokens"] == "65"
    assert metadata["name"] == "tiny"
    assert json.loads(metadata["classes"]) == list("abcde")


def test_about_a_file(saved: Path) -> None:
    said = about(str(saved))
    model = load(saved)
    assert said.architecture == "vit_tiny_patch16_224"
    assert said.input_size == (3, 32, 32)
    assert said.num_classes == 5
    assert (said.mean, said.std, said.interpolation, said.crop_pct) == ((0.5,) * 3, (0.5,) * 3, "bicubic", 0.9)
    assert said.schedule == model.compression.schedule
    assert said.schedule.tokens == 65
    assert said.granularity == (4, 4)
    assert said.gflops == model.flops() / 1e9
    assert said.versions == {
        "diffrate": diffrate.__version__,
        "timm": timm.__version__,
        "torch": str(torch.__version__),
    }
    assert said.name == "tiny"
    assert said.classes == ("a", "b", "c", "d", "e")
    assert About.from_metadata(said.to_metadata()) == said


def test_preprocessing_comes_from_the_model_and_goes_back(path: Path) -> None:
    model: Any = patched("caformer")
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "crop_pct": 1.0, "interpolation": "box"}
    save(model, path)
    said, loaded = about(path), load(path)
    assert (said.mean, said.crop_pct, said.interpolation, said.name, said.classes) == (
        (0.1, 0.2, 0.3),
        1.0,
        "box",
        None,
        None,
    )
    config: Any = loaded.pretrained_cfg
    assert (config["mean"], config["crop_pct"], config["interpolation"]) == ((0.1, 0.2, 0.3), 1.0, "box")
    assert (config["input_size"], config["num_classes"]) == ((3, 64, 64), CAFORMER_CLASSES)


def test_headers_are_read_without_torch(saved: Path) -> None:
    code = f"""
import sys
from diffrate.files.header import about
assert about({str(saved)!r}).name == "tiny"
assert not sys.modules.keys() & {{"torch", "timm", "PIL"}}
"""
    root = Path(diffrate.__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


BAD_HEADERS: list[tuple[str, str | None, str]] = [
    ("format", None, "accepted: 'diffrate 1'"),
    ("format", "diffrate 2", "found 'diffrate 2'; accepted: 'diffrate 1'"),
    ("format", "pt", "found 'pt'"),
    ("architecture", None, "found none; accepted: the name of a timm model"),
    ("architecture", "two\nlines", r"found 'two\nlines'"),
    ("architecture", "hf-hub:someone/something", "accepted: the name of a timm model"),
    ("arguments", "{", "found '{'"),
    ("arguments", "[]", "an object of numbers"),
    ("arguments", '{"img_size": {"a": 1}}', "an object of numbers"),
    ("arguments", '{"mlp_ratio": NaN}', "an object of numbers"),
    ("arguments", "[" * 100_000, "an object of numbers"),
    ("num_classes", None, "found none; accepted: a whole number from 0"),
    ("num_classes", "-5", "found '-5'; accepted: a whole number from 0"),
    ("num_classes", "true", "a whole number"),
    ("num_classes", "9" * 5000, "a whole number"),
    ("input_size", "[3, 32]", "channels, height and width"),
    ("input_size", "[3, 32, 0]", "channels, height and width"),
    ("input_size", "[3, 32, 1000000000000000000]", "whole numbers from 1 to 65536"),
    ("mean", "[0.5, 0.5]", "found '[0.5, 0.5]'; accepted: 3 numbers"),
    ("mean", "[0.5, 0.5, NaN]", "an array of numbers"),
    ("std", "[0.5, 0.5, 0]", "numbers above 0"),
    ("std", "[0.5]", "3 numbers"),
    ("interpolation", "fancy", "found 'fancy'; accepted: one of nearest, "),
    ("crop_pct", "0", "a number above 0"),
    ("crop_pct", "1e999", "a number above 0"),
    ("prune_kept_num", "[65, 65]", "prune_kept_num: found 2 counts; accepted: 3"),
    ("prune_kept_num", "7", "an array of whole numbers"),
    ("merge_kept_num", None, "found none; accepted: an array of whole numbers"),
    ("merge_kept_num", "[65, 0, 1]", "an array of whole numbers from 1"),
    ("merge_kept_num", "[65, 66, 1]", "merge_kept_num[1]: found 66; accepted: 1 to 65"),
    ("tokens", "1.5", "a whole number from 1"),
    ("granularity", "[4]", "two whole numbers"),
    ("granularity", "[4, 0]", "two whole numbers"),
    ("gflops", "-1", "a number from 0"),
    ("gflops", '"much"', "a number from 0"),
    ("versions", "[]", "an object of texts"),
    ("versions", '{"torch": 2}', "an object of texts"),
    ("name", "", "a line of text"),
    ("classes", '["a"]', "classes: found 1 names; accepted: 5, one per output"),
    ("classes", '"abcde"', "an array of texts"),
    ("classes", "[1, 2, 3, 4, 5]", "an array of texts"),
]


@pytest.mark.parametrize(("field", "text", "part"), BAD_HEADERS, ids=lambda value: str(value)[:20])
def test_bad_headers_are_refused(saved: Path, field: str, text: str | None, part: str) -> None:
    rewrite(saved, {field: text})
    for read in (about, load):
        message = refusal(lambda read=read: read(saved))
        assert message.startswith(f"{saved}: {field}")
        assert part in message
        assert len(message) < len(str(saved)) + 250


def test_arguments_that_timm_is_not_to_get_are_refused(saved: Path) -> None:
    """Some would make it fetch or read other files."""
    rewrite(saved, {"arguments": '{"checkpoint_path": "a.pth"}'})
    for read in (about, load):
        message = refusal(lambda read=read: read(saved))
        assert message.startswith(f"{saved}: arguments: found 'checkpoint_path'; accepted: act_layer, attn_drop_rate, ")


# Headers that are well formed, of models that cannot be built or do not fit the tensors.
UNFIT_HEADERS = [
    ("architecture", "vit_of_tomorrow", "architecture: found 'vit_of_tomorrow'; accepted: a model of timm"),
    ("architecture", "resnet18", "found {"),
    ("arguments", '{"num_heads": 5}', "builds vit_tiny_patch16_224 with"),
    ("arguments", '{"depth": 1000000000000}', "found depth 1000000000000; accepted: from 1 to"),
    ("arguments", '{"depth": 0}', "found depth 0"),
    ("arguments", '{"depth": "three"}', "builds vit_tiny_patch16_224 with"),
    pytest.param(
        *("arguments", '{"global_pool": "prr"}', "found global_pool='prr'; accepted: global_pool of ''"),
        marks=since("1.0.26"),
    ),
    ("arguments", "{}", "input_size: found 32 x 32; accepted: 224 x 224, which the model is built for"),
    ("num_classes", "6", "num_classes: found 6; accepted: 5"),
    ("input_size", "[1, 32, 32]", "input_size: found (1, 32, 32); accepted: (3, 32, 32)"),
    ("input_size", "[3, 64, 48]", "input_size: found 64 x 48; accepted: 32 x 32, which the model is built for"),
    ("prune_kept_num", None, "prune_kept_num: found none; accepted: 3 counts"),
    ("prune_kept_num", "[65, 61, 55]", "compression._extra_state: found"),
    ("tokens", "66", "made for 66 tokens; accepted: 65"),
    ("granularity", "[4, 5]", "compression.merge1: found floating [16]; accepted: floating [13]"),
]


@pytest.mark.parametrize(("field", "text", "part"), UNFIT_HEADERS, ids=lambda value: str(value)[:20])
def test_headers_that_do_not_fit_are_refused(saved: Path, field: str, text: str | None, part: str) -> None:
    rewrite(saved, {field: text, "classes": None})
    about(saved)
    message = refusal(lambda: load(saved))
    assert message.startswith(f"{saved}: ")
    assert part in message


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["qk_norm", "img_size", "patch_size", "embed_dim", "mlp_ratio", "in_chans", "num_heads"]),
    value=st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=3),
        st.lists(st.integers(-2, 50), min_size=1, max_size=3),
    ),
)
def test_any_argument_is_loaded_or_refused(tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "model.safetensors"
    if not path.exists():
        save(patched("deit"), path)
    changed = path.with_name("changed.safetensors")
    changed.write_bytes(path.read_bytes())
    rewrite(changed, {"arguments": json.dumps(about(path).arguments | {name: value})})
    read_or_refused(lambda: load(changed))


BAD_TENSORS: list[tuple[str, Tensor | None, str]] = [
    ("head.weight", torch.zeros(6, 48), "head.weight: found floating [6, 48]; accepted: floating [5, 48]"),
    ("head.weight", None, "head.weight: found nothing; accepted: floating [5, 48]"),
    ("head.weight", torch.zeros(5, 48, dtype=torch.int32), "found torch.int32 [5, 48]"),
    ("head.scale", torch.zeros(5), "head.scale: found floating [5]; accepted: nothing"),
    ("compression.prune1", None, "compression.prune1: found nothing"),
    ("compression._extra_state", None, "compression._extra_state: found nothing"),
    ("compression._extra_state", torch.zeros(2, 3), "found floating [2, 3]; accepted: torch.int64 [2, 3]"),
    ("compression._extra_state", torch.zeros(2, 3, dtype=torch.int64), "as in the header"),
]


@pytest.mark.parametrize(("name", "tensor", "part"), BAD_TENSORS, ids=lambda value: str(value)[:20])
def test_tensors_that_do_not_fit_are_refused(saved: Path, name: str, tensor: Tensor | None, part: str) -> None:
    rewrite(saved, tensors={name: tensor})
    message = refusal(lambda: load(saved))
    assert message.startswith(f"{saved}: {name}")
    assert part in message


# Files


@pytest.mark.parametrize("read", [about, load])
def test_files_that_are_not_there(tmp_path: Path, read: Callable[[Path], object]) -> None:
    assert "found no such file" in refusal(lambda: read(tmp_path / "none.safetensors"))
    assert "found a folder" in refusal(lambda: read(tmp_path))


@pytest.mark.parametrize("read", [about, load])
@pytest.mark.parametrize("content", [b"", b"junk" * 100, struct.pack("<Q", 2**40), struct.pack("<Q", 10) + b"[" * 10])
def test_files_of_another_kind(path: Path, read: Callable[[Path], object], content: bytes) -> None:
    path.write_bytes(content)
    assert refusal(lambda: read(path)).startswith(f"{path}: cannot be read (")


@pytest.mark.parametrize("read", [about, load])
def test_safetensors_of_somebody_else(path: Path, read: Callable[[Path], object]) -> None:
    for metadata in (None, {}, {"format": "pt"}):
        save_file({"weight": torch.zeros(3)}, path, metadata)
        assert refusal(lambda: read(path)).startswith(f"{path}: format: found ")


def test_files_cut_off_or_damaged(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:length])
        refusal(lambda: about(saved))
        refusal(lambda: load(saved))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 3000), byte=st.integers(0, 255))
def test_a_damaged_header_is_read_or_refused(tmp_path: Path, place: int, byte: int) -> None:
    path = tmp_path / "model.safetensors"
    if not path.exists():
        save(patched("deit"), path)
    content = bytearray(path.read_bytes())
    content[place] = byte
    damaged = path.with_name("damaged.safetensors")
    damaged.write_bytes(content)
    read_or_refused(lambda: about(damaged))
    read_or_refused(lambda: load(damaged))


def failing_write(error: BaseException) -> Callable[..., None]:
    """A writer that fails in the middle."""

    def write(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise error

    return write


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SavedModelError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["full", "stopped"],
)
def test_half_a_file_never_appears(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type[BaseException]
) -> None:
    before = saved.read_bytes()
    monkeypatch.setattr(files, "save_file", failing_write(error))
    model = patched("mae")
    for path in (saved, saved.with_name("new.safetensors")):
        with pytest.raises(raised):
            save(model, path)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_link_and_permissions_stay(path: Path) -> None:
    """A new file has those of any other, by the umask; one that is written anew keeps its own, where a link leads."""
    model, plain, link = patched("deit"), path.with_name("plain"), path.with_name("link.safetensors")
    plain.touch()
    save(model, path)
    assert path.stat().st_mode == plain.stat().st_mode
    path.write_bytes(b"")
    path.chmod(0o600)
    link.symlink_to(path)
    save(model, link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
    diffrate.load(path)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    model = patched("deit")
    (tmp_path / "file").touch()
    assert "(No such file or directory)" in refusal(lambda: save(model, tmp_path / "none" / "model.safetensors"))
    assert "(Not a directory)" in refusal(lambda: save(model, tmp_path / "file" / "model.safetensors"))
    assert "found a folder; accepted: the name of a file" in refusal(lambda: save(model, tmp_path))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "(Permission denied)" in refusal(lambda: save(patched("deit"), tmp_path / "model.safetensors"))


# Models that cannot be saved


def test_models_that_are_not_patched(path: Path) -> None:
    message = refusal(lambda: save(plain("deit"), path))  # pyright: ignore[reportArgumentType]
    assert message == "found VisionTransformer; accepted: a model that diffrate.patch has patched"


def test_models_that_timm_did_not_make(path: Path) -> None:
    dense: Any = plain("deit")
    del dense.pretrained_cfg
    model = scheduled(vit(dense))
    message = refusal(lambda: save(model, path))
    assert message == (
        "found a VisionTransformer without the name of its architecture; accepted: a model made by timm.create_model"
    )


def another_norm(model: Any) -> None:
    model.blocks[1].norm1 = nn.LayerNorm(48, eps=1e-3)


def another_activation(model: Any) -> None:
    model.blocks[2].mlp.act = nn.ReLU()


def another_head(model: Any) -> None:
    model.head = nn.Sequential(nn.Linear(48, 8), nn.Linear(8, 5))


def fewer_heads(model: Any) -> None:
    model.blocks[1].attn.num_heads = 1


def one_part_more(model: Any) -> None:
    model.register_buffer("calls", torch.zeros(3))


def another_rule(model: Any) -> None:
    model.rule = replace(model.rule, mean=Mean())


def fewer_blocks(model: Any) -> None:
    model.stages[2].blocks = model.stages[2].blocks[:-1]


WHOLE = "diffrate.patch.timm_families.CompressedVisionTransformer()"
ACTIVATION = "torch.nn.modules.activation.GELU(approximate='none')"


def a_hook_on_a_block(model: Any) -> None:
    model.blocks[0].register_forward_hook(lambda part, given, left: left * 0.5)


def a_hook_before_a_part_that_passes_on(model: Any) -> None:
    model.norm_pre.register_forward_pre_hook(lambda part, given: given[0] + 1)


def a_hook_on_the_model(model: Any) -> None:
    model.register_forward_hook(lambda part, given, left: left)


def another_forward(model: Any) -> None:
    model.blocks[0].mlp.act.forward = lambda x: x


def another_method(model: Any) -> None:
    model._pos_embed = lambda x: x


@pytest.mark.parametrize(
    ("family", "change", "start"),
    [
        ("deit", another_norm, "blocks.1.norm1: found torch.nn.modules.normalization.LayerNorm((48,), eps=0.001"),
        ("deit", another_activation, "blocks.2.mlp.act: found torch.nn.modules.activation.ReLU()"),
        ("deit", another_head, "head: found torch.nn.modules.container.Sequential()"),
        ("deit", fewer_heads, "blocks.1.attn.num_heads: found 1; accepted: 3, as timm "),
        ("deit", one_part_more, "calls: found [3]; accepted: nothing"),
        ("deit", another_rule, "rule: found ReductionRule("),
        ("deit", a_hook_on_a_block, "blocks.0: found timm.models.vision_transformer.Block(), with forward hooks; "),
        ("deit", a_hook_before_a_part_that_passes_on, "norm_pre: found Identity(), with forward hooks; "),
        ("deit", a_hook_on_the_model, f"model: found {WHOLE}, with forward hooks; "),
        ("deit", another_forward, f"blocks.0.mlp.act: found {ACTIVATION}, with another forward; accepted: "),
        ("deit", another_method, f"model: found {WHOLE}, with another _pos_embed; "),
        ("caformer", fewer_blocks, "stages.2.blocks.3: found nothing; accepted: timm.models.metaformer."),
    ],
)
def test_parts_that_no_argument_stands_for(path: Path, family: str, change: Callable[[Any], None], start: str) -> None:
    model = patched(family)
    change(model)
    assert refusal(lambda: save(model, path)).startswith(start)
    assert not path.exists()


def test_hooks_that_were_removed_and_methods_that_change_no_logits(path: Path) -> None:
    model: Any = patched("deit")
    hook = model.blocks[0].register_forward_hook(lambda part, given, left: None)
    expected = logits(model)
    hook.remove()
    model.train = lambda mode=True: model  # as of a model that is to stay as it is
    save(model, path)
    assert torch.equal(logits(load(path)), expected)


def test_forward_of_the_class_that_was_put_back(path: Path) -> None:
    """As accelerate's `unwrap_model` does after mixed precision."""
    model: Any = patched("deit")
    expected = logits(model)
    model.forward = MethodType(type(model).forward, model)
    save(model, path)
    assert torch.equal(logits(load(path)), expected)
    model.forward = MethodType(type(model).forward, patched("deit"))
    assert refusal(lambda: save(model, path)).startswith(f"model: found {WHOLE}, with another forward; ")


@pytest.mark.parametrize("classes", [["a"], "abcde", [1, 2, 3, 4, 5]], ids=str)
def test_classes_that_are_not_one_name_per_output(path: Path, classes: Any) -> None:
    assert refusal(lambda: save(patched("deit"), path, classes=classes)).startswith("classes: found ")


@pytest.mark.parametrize("name", ["", "two\nlines", "\ud800"])
def test_names_that_are_no_line(path: Path, name: str) -> None:
    assert refusal(lambda: save(patched("deit"), path, name=name)).endswith("accepted: a line of text")


@pytest.mark.parametrize(
    "config", [{"mean": (0.5, 0.5)}, {"std": None}, {"crop_pct": object()}], ids=["mean", "std", "crop_pct"]
)
def test_preprocessing_that_makes_no_sense(path: Path, config: dict[str, Any]) -> None:
    model: Any = patched("deit")
    model.pretrained_cfg = model.pretrained_cfg | config
    assert refusal(lambda: save(model, path)).startswith(f"{next(iter(config))}: found ")


# Any family


@pytest.mark.parametrize(
    ("family", "kind"), [("deit", "VisionTransformer"), ("mae", "VisionTransformer"), ("caformer", "Caformer")]
)
def test_vit_finds_the_family(family: str, kind: str) -> None:
    model = vit(plain(family), 2, 3)
    assert type(model).__name__ == f"Compressed{kind}"
    assert model.compression.granularity == {"prune": 2, "merge": 3}


def test_vit_takes_224_pixels_where_nothing_is_said() -> None:
    dense: Any = plain("caformer")
    del dense.pretrained_cfg
    assert vit(dense).token_grid == (14, 14)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(2, 2), "found Linear; accepted: a model of timm not yet patched, Beit, Eva, MetaFormer, "),
        (lambda: patched("deit"), "found CompressedVisionTransformer; accepted: a model of timm not yet patched, "),
        pytest.param(
            *(lambda: plain("deit", global_pool="prr"), "found global_pool='prr'; accepted: global_pool of ''"),
            marks=since("1.0.26"),
        ),
    ],
)
def test_vit_refuses_what_no_family_handles(model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(diffrate.UnsupportedModelError) as caught:
        vit(model())
    assert str(caught.value).startswith(message)


# The hub


@pytest.mark.parametrize(
    ("reference", "asked"),
    [
        ("hf-hub:user/name", ("user/name", "model.safetensors", None)),
        ("hf-hub:user/name@v1.0", ("user/name", "model.safetensors", "v1.0")),
        ("hf-hub:user/name@refs/pr/1", ("user/name", "model.safetensors", "refs/pr/1")),
        ("hf-hub:user/name/file.safetensors", ("user/name", "file.safetensors", None)),
        ("hf-hub:user/name/folder/file.safetensors@main", ("user/name", "folder/file.safetensors", "main")),
    ],
)
def test_models_come_from_the_hub(
    saved: Path, monkeypatch: pytest.MonkeyPatch, reference: str, asked: tuple[str, str, str | None]
) -> None:
    def download(repository: str, file: str, revision: str | None) -> str:
        assert (repository, file, revision) == asked
        return str(saved)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert_same(load(reference), load(saved))


def test_what_the_hub_cannot_give_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise ConnectionError("no route\nto the host\n\nat all")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    message = refusal(lambda: load("hf-hub:user/name"))
    assert message == "hf-hub:user/name: cannot download model.safetensors (no route)"


@pytest.mark.parametrize("reference", ["hf-hub:", "hf-hub:name", "hf-hub:user/name/", "hf-hub:user/name@"])
def test_references_of_another_form(reference: str) -> None:
    assert refusal(lambda: load(reference)).startswith(f"found {reference!r}; accepted: hf-hub:USER/NAME")
