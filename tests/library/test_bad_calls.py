"""Calls of the library that make no sense: an error of one line, as documented, and the model as it was before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import nn

import diffrate
from tests.hostile_files import Runs

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 3}
LABELS = torch.tensor([0, 1])
GRADIENT: dict[str, Any] = {"share": 0.9, "epochs": 1}
CALIBRATED: dict[str, Any] = {"share": 0.6, "method": "calibrated"}


OF_GRADIENT = {"criterion": nn.L1Loss(), "mixup": max, "callback": print, "learning_rate": 1.0, "epochs": 9, "steps": 2}
OF_CALIBRATED = {"calibration": [], "images": 9, "work": 9.0, "trials": diffrate.CalibrationObserver()}


def images(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(*(shape or (2, 3, 32, 32)), **options)


GOOD = [(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)), LABELS) for seed in (0, 1)]


class Breaks:
    """A loader that raises at its second batch."""

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Any]:
        yield images(), LABELS
        raise OSError("the disk is gone")


def plain(**options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**SIZES, **options})


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Models that stay as they are: patched, at a schedule, partly frozen, partly in training; and others."""
    model = diffrate.patch.vit(plain(), 1, 1)
    model.set_kept_num([17, 12], [17, 9])
    model.blocks[0].eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    another = plain()
    another.__class__ = type("Mine", (type(another),), {})
    return {
        "model": model,
        "plain": plain(),
        "headless": diffrate.patch.vit(plain(num_classes=0), 1, 1),
        "on meta": diffrate.patch.vit(plain(), 1, 1).to("meta"),
        "linear": nn.Linear(2, 2),
        "wrapped": nn.Sequential(plain()),
        "pairs inside": nn.Sequential(diffrate.patch.vit(plain(), 1, 1)),
        "of another class": another,
    }


class Call(NamedTuple):
    """A call of a model and a folder, the error that it ends in, and what that says."""

    of: str
    call: Callable[[Any, Path], object]
    error: type[Exception]
    said: str


def evaluate(*batches: Any, **options: Any) -> Callable[[Any, Path], object]:
    return lambda model, _: diffrate.evaluate(model, list(batches), **options)


def search(loader: Any = GOOD, **options: Any) -> Callable[[Any, Path], object]:
    return lambda model, _: diffrate.search(model, loader, **options)


def counts(prune: Any, merge: Any = (17, 9)) -> Callable[[Any, Path], object]:
    return lambda model, _: model.set_kept_num(prune, merge)


def patch(*granularity: Any, **options: Any) -> Callable[[Any, Path], object]:
    return lambda model, _: diffrate.patch.vit(model, *granularity, **options)


def saved(path: str = "x.safetensors", **options: Any) -> Callable[[Any, Path], object]:
    return lambda model, folder: diffrate.save(model, folder / path, **options)


def loaded_counts(value: int) -> Callable[[Any, Path], object]:
    """A state dict whose counts are all `value`."""

    def call(model: Any, _: Path) -> None:
        kept = {"compression._extra_state": torch.full((2, 2), value)}
        model.load_state_dict(model.state_dict() | kept)

    return call


UNPATCHED = "accepted: a model of timm not yet patched"
PATCHED = "accepted: a model after diffrate.patch.vit"
BATCH = "accepted: images [B, channels, H, W] of floats"
unsupported, schedule_error, settings_error = (
    diffrate.UnsupportedModelError,
    diffrate.ScheduleError,
    diffrate.SearchSettingError,
)
CALLS = [
    Call("model", patch(), unsupported, f"found CompressedVisionTransformer; {UNPATCHED}"),
    Call("of another class", patch(), unsupported, f"found Mine; {UNPATCHED}"),
    Call("linear", patch(), unsupported, f"found Linear; {UNPATCHED}"),
    Call("wrapped", patch(), unsupported, f"found Sequential; {UNPATCHED}"),
    Call("plain", lambda *_: diffrate.patch.vit("vit"), unsupported, f"found str; {UNPATCHED}"),
    Call("plain", lambda *_: diffrate.patch.vit(type(plain())), unsupported, f"found type; {UNPATCHED}"),
    Call("plain", patch(0, 1), diffrate.RateError, "granularity: found 0; accepted: from 1 to 16"),
    Call("plain", patch(1.5, 1), diffrate.RateError, "granularity: found 1.5; accepted: from 1 to 16"),
    Call("plain", patch("4", 1), diffrate.RateError, "granularity: found 4; accepted"),
    Call("plain", patch(1, 1, input_size=(30, 30)), unsupported, "input_size: found 30 x 30; accepted: 32 x 32"),
    Call("model", lambda model, _: setattr(model, "schedule", None), schedule_error, "schedule: found NoneType"),
    Call("model", lambda model, _: setattr(model, "schedule", ((17, 9), (17, 9))), schedule_error, "found tuple"),
    Call("model", lambda model, _: diffrate.attention_maps(model, images(), [17, 9]), schedule_error, "found list"),
    Call("plain", lambda model, _: diffrate.attention_maps(model, images()), unsupported, "found VisionTransformer; "),
    Call("model", lambda model, _: diffrate.attention_maps(model, images(3, 32, 32)), ValueError, "[3, 32, 32]"),
    Call("model", lambda model, _: diffrate.text_head(model, __file__), diffrate.SavedModelError, "cannot be read"),
    Call("model", lambda model, _: diffrate.convert(model, layer=1), unsupported, "found diffrate.patch"),
    Call("model", counts([17], [17]), schedule_error, "prune_kept_num: found 1 counts; accepted: 2, one per block"),
    Call("model", counts([17, 0]), schedule_error, "prune_kept_num[1]: found 0; accepted: 1 to 17"),
    Call("model", counts([17, -1]), schedule_error, "prune_kept_num[1]: found -1; accepted: 1 to 17"),
    Call("model", counts([17, 18]), schedule_error, "prune_kept_num[1]: found 18; accepted: 1 to 17"),
    Call("model", counts([17, 9.0]), schedule_error, "prune_kept_num[1]: found 9.0; accepted: whole numbers"),
    Call("model", counts([17, float("nan")]), schedule_error, "prune_kept_num[1]: found nan; accepted"),
    Call("model", counts(torch.tensor([17.0, 9.0])), schedule_error, "prune_kept_num[0]: found tensor(17.)"),
    Call("model", counts(None), schedule_error, "prune_kept_num: found none; accepted: 2 counts"),
    Call("model", counts(17), schedule_error, "prune_kept_num: found 17; accepted: an array of counts"),
    Call("model", lambda model, _: model.flops_at("dense"), schedule_error, "schedule: found str; accepted: a Sch"),
    Call("model", lambda model, _: model.flops_at(diffrate.Schedule((5,), (5,))), schedule_error, "found 1 counts"),
    *(
        Call("model", lambda model, _, schedule=schedule: model.flops_at(schedule), schedule_error, f"schedule: {said}")
        for schedule, said in (
            (diffrate.Schedule((17, 0), (17, 0)), "prune_kept_num[1]: found 0; accepted: 1 to 17"),
            (diffrate.Schedule((17, 99), (17, 9)), "prune_kept_num[1]: found 99; accepted: 1 to 17"),
            (diffrate.Schedule((17, 9), (17, -5)), "merge_kept_num[1]: found -5; accepted: 1 to 17"),
            (diffrate.Schedule((9,) * 9, (9,) * 9), "prune_kept_num: found 9 counts; accepted: 2, one per block"),
            (diffrate.Schedule((17, 9), (17, 9), 197), "made for 197 tokens; accepted: 17 tokens"),
        )
    ),
    *(
        Call(
            "model", loaded_counts(value), schedule_error, f"kept counts in the state dict: {name}[0]: found {value}; "
        )
        for name, value in (("prune_kept_num", 99), ("prune_kept_num", 0), ("prune_kept_num", -3))
    ),
    Call("model", lambda model, _: model(images(dtype=torch.int64)), ValueError, "images: found 3 channels of int64"),
    Call("model", lambda model, _: model(images(dtype=torch.float64)), RuntimeError, "Input type (double)"),
    Call("model", lambda model, _: model(images(device="meta")), RuntimeError, "meta"),
    Call("model", lambda model, _: model(images(3, 32, 32)), ValueError, "images: found the shape [3, 32, 32]"),
    Call("model", lambda model, _: model(images(2, 3, 40, 40)), ValueError, "images of [40, 40] make [5, 5] tokens"),
    Call("model", lambda model, _: model(images(2, 1, 32, 32)), ValueError, "images: found 1 channels of float32"),
    Call("model", lambda model, _: model(None), TypeError, "images: found NoneType; accepted: a tensor"),
    Call("model", lambda model, _: model(images().numpy()), TypeError, "images: found ndarray; accepted: a tensor"),
    Call("model", lambda model, _: diffrate.evaluate(model, 5), ValueError, "loader: found int; accepted: a DataL"),
    Call("model", evaluate(), ValueError, "loader: found no batch"),
    Call("model", lambda model, _: diffrate.evaluate(model, iter(())), ValueError, "loader: found no batch"),
    Call("model", lambda model, _: diffrate.evaluate(model, Breaks()), OSError, "the disk is gone"),
    Call("model", evaluate("abc"), ValueError, f"batch: found str; {BATCH}"),
    Call("model", evaluate({"x": 1}), ValueError, "batch: found no images in a dict with the names 'x'"),
    Call("model", evaluate((images(dtype=torch.uint8), LABELS)), ValueError, "batch: found images of uint8"),
    Call("model", evaluate((images(2, 3, 40, 40), LABELS)), ValueError, "images of [40, 40] make [5, 5] tokens"),
    Call("model", evaluate((images(0, 3, 32, 32), LABELS[:0])), ValueError, "loader: found no batch"),
    Call("model", evaluate(images()), diffrate.ScoresError, "labels: found none; accepted: class indices [2]"),
    Call("model", evaluate((images(), LABELS.float())), diffrate.ScoresError, "labels: found float32 [2]"),
    Call("model", evaluate((images(), LABELS + 5)), diffrate.ScoresError, "labels: found 5; accepted"),
    Call("model", evaluate((images(), LABELS - 5)), diffrate.ScoresError, "labels: found -5; accepted"),
    Call("model", evaluate((images(), LABELS[:1])), diffrate.ScoresError, "labels: found int64 [1]"),
    Call("model", evaluate(*GOOD, device="cuda:99"), ValueError, "device: found 'cuda:99' ("),
    Call("model", evaluate(*GOOD, device="abacus"), ValueError, "device: found 'abacus' ("),
    Call("model", evaluate(*GOOD, device="meta"), ValueError, "device: found 'meta' (it computes nothing); accepted"),
    Call("model", evaluate(*GOOD, precision="bf16"), ValueError, "precision: found 'bf16'; accepted: torch.bfloat16"),
    Call("model", evaluate(*GOOD, precision=torch.int8), ValueError, "precision: found torch.int8; accepted"),
    Call("plain", lambda *_: diffrate.evaluate("model", GOOD), TypeError, "model: found str; accepted: a torch.nn"),
    Call("headless", evaluate(*GOOD), unsupported, "found a model without a head; accepted: one with classes"),
    Call(
        "pairs inside", evaluate(*GOOD), diffrate.ScoresError, "outputs: found a tuple; accepted: logits [B, K]; from"
    ),
    Call("on meta", evaluate(*GOOD), ValueError, "model: found weights without storage, on the device meta"),
    Call("plain", search(**CALIBRATED), unsupported, f"found VisionTransformer; {PATCHED}"),
    Call("headless", search(**GRADIENT), unsupported, "found a model without a head"),
    Call("on meta", search(**CALIBRATED), ValueError, "model: found weights without storage"),
    Call("model", search(3, **CALIBRATED), ValueError, "loader: found int; accepted: a DataLoader"),
    Call("model", search([], **CALIBRATED), ValueError, "loader: found 0 images; accepted: from 2"),
    Call("model", search([], **GRADIENT), settings_error, "loader: found no batch"),
    Call("model", search(Breaks(), **CALIBRATED), OSError, "the disk is gone"),
    Call("model", search(Breaks(), **GRADIENT), OSError, "the disk is gone"),
    Call("model", search(speed=2), TypeError, "speed: no option of a search; accepted: target_flops, "),
    Call("model", search(), settings_error, "target_latency: found none; accepted: one of them"),
    Call("model", search(share=0.5, target_flops=1e9), settings_error, "found target_flops, share; accepted: one"),
    Call("model", search(share=float("nan")), settings_error, "share: found nan; accepted: above 0 to 1"),
    Call("model", search(share="50%"), settings_error, "share: found '50%'; accepted: a number"),
    Call("model", search(target_flops=1.0), diffrate.BudgetError, "target_flops 1e-09 GFLOPs: accepted: "),
    Call("model", search(share=0.9, epochs=0), settings_error, "epochs: found 0; accepted: from 1"),
    Call("model", search(share=0.9, method="magic"), settings_error, "method: found 'magic'; accepted: gradient"),
    Call("model", search(share=0.9, loss="magic"), settings_error, "loss: found 'magic'; accepted: labels"),
    Call("model", search(share=0.9, start="dense"), settings_error, "start: found str; accepted: a Schedule"),
    Call("model", search(settings={"share": 0.9}), TypeError, "settings: found dict; accepted: SearchSettings"),
    Call("model", search(callback=5, **GRADIENT), TypeError, "callback: found int; accepted: a function, or none"),
    Call("model", search(criterion=5, **GRADIENT), TypeError, "criterion: found int; accepted: a function, or none"),
    *(
        Call(
            "model", search(**options, **other), settings_error, f"{name}: found with the method {method!r}; accepted: "
        )
        for method, other, given in (("calibrated", CALIBRATED, OF_GRADIENT), ("gradient", GRADIENT, OF_CALIBRATED))
        for name, options in ((name, {name: value}) for name, value in given.items())
    ),
    Call("model", search(val=5, **CALIBRATED), ValueError, "loader: found int"),
    Call("model", search(device="abacus", **CALIBRATED), ValueError, "device: found 'abacus'"),
    Call("model", search([(images(), LABELS + 7)], **GRADIENT), diffrate.ScoresError, "labels: found 7; accepted"),
    Call("model", search([images()], **GRADIENT), ValueError, "loader: found images alone; accepted: images and lab"),
    Call("model", search([(images() / 0, LABELS)], **GRADIENT), diffrate.NonFiniteLossError, "the loss is nan at"),
    Call("model", search([images() / 0], **CALIBRATED), diffrate.NonFiniteLossError, "the loss is nan on the"),
    Call("model", search(checkpoint="/nowhere/x.pth", **GRADIENT), settings_error, "checkpoint: found /nowhere/x.pth"),
    Call("model", search(resume="/nowhere/x.pth", **GRADIENT), diffrate.SearchCheckpointError, "cannot be read"),
    Call(
        "model",
        lambda model, folder: diffrate.search(model, GOOD, resume=hostile(folder), **GRADIENT),
        diffrate.SearchCheckpointError,
        "runs.pth: cannot be read (not plain tensors); accepted: the checkpoint of a search",
    ),
    Call("plain", lambda model, _: diffrate.sensitivity(model, GOOD), unsupported, PATCHED),
    Call("model", lambda model, _: diffrate.sensitivity(model, []), ValueError, "loader: found no batch"),
    Call("plain", saved(), diffrate.SavedModelError, "accepted: a model that diffrate.patch has patched"),
    Call("on meta", saved(), diffrate.SavedModelError, "found weights without storage, on the device meta"),
    Call("model", saved("."), diffrate.SavedModelError, "found a folder; accepted: the name of a file"),
    Call("model", saved("gone/x.safetensors"), diffrate.SavedModelError, "cannot be written (No such file"),
    Call("model", saved(classes=["a"]), diffrate.SavedModelError, "classes: found 1 names; accepted: 3"),
    Call("model", saved(classes=[1, 2, 3]), diffrate.SavedModelError, "classes: found '[1, 2, 3]'"),
    Call("model", saved(name=5), diffrate.SavedModelError, "name: found 5; accepted: a line of text"),
    Call("model", saved(name="a\nb"), diffrate.SavedModelError, r"name: found 'a\nb'; accepted: a line of text"),
    Call("plain", lambda _, folder: diffrate.load(folder), diffrate.SavedModelError, "found a folder"),
    Call("plain", lambda *_: diffrate.load("hf-hub:x"), diffrate.SavedModelError, "accepted: hf-hub:USER/NAME"),
    Call("model", lambda model, _: diffrate.export(model, "x.bin"), diffrate.ExportError, "found the suffix '.bin'"),
    Call("on meta", lambda model, _: diffrate.plain(model), diffrate.ExportError, "weights without storage"),
    Call("model", lambda model, _: diffrate.benchmark(model, 0), ValueError, "batch_size: found 0; accepted: from 1"),
    Call("model", lambda model, _: diffrate.benchmark(model, 1.5), ValueError, "batch_size: found 1.5; accepted"),
    Call("model", lambda model, _: diffrate.benchmark(model, 1, torch.int8), ValueError, "dtype: found torch.int8"),
    Call("model", lambda model, _: diffrate.measure_latency(model, 0), ValueError, "batch_size: found 0"),
    Call("plain", lambda model, _: diffrate.convert(model), unsupported, "found timm's VisionTransformer; accepted"),
    Call("plain", lambda *_: diffrate.scale_schedule(None, [1], [1], 1), schedule_error, "schedule: found NoneType"),
    Call(
        "plain",
        lambda *_: diffrate.scale_schedule(diffrate.Schedule((5, 5), (5, 5)), [9], [9], 1),
        schedule_error,
        "found 1 counts; accepted: 2, one per block",
    ),
]


def hostile(folder: Path) -> Path:
    torch.save({"mode": "search", "model": Runs(folder / "RAN")}, folder / "runs.pth")
    return folder / "runs.pth"


def state_of(model: nn.Module) -> Any:
    compression = getattr(model, "compression", None)
    schedule = None if compression is None else compression.schedule
    modes = [module.training for module in model.modules()]
    learning = [parameter.requires_grad for parameter in model.parameters()]
    kinds = [type(module) for module in model.modules()]
    return deepcopy(model.state_dict()), (schedule, modes, learning, kinds, compression)


@pytest.mark.parametrize("row", CALLS, ids=[f"{row.of}: {row.said[:40]}" for row in CALLS])
def test_calls(row: Call, models: dict[str, Any], tmp_path: Path) -> None:
    model = models[row.of]
    tensors, others = state_of(model)
    with pytest.raises(row.error) as caught:
        row.call(model, tmp_path)
    assert row.said in str(caught.value)
    if row.error is not RuntimeError:  # torch's own
        assert "\n" not in str(caught.value)
    now, others_now = state_of(model)
    assert others_now == others
    assert now.keys() == tensors.keys()
    assert all(value.is_meta or torch.equal(value, now[name]) for name, value in tensors.items())
    assert {path.name for path in tmp_path.iterdir()} <= {"runs.pth"}


@pytest.mark.parametrize("of", ["half", "frozen"])
def test_frozen_models_and_those_in_half_precision(of: str) -> None:
    """They are searched as others are, and stay so."""
    model = diffrate.patch.vit(plain(depth=3), 1, 1)
    with pytest.raises(ValueError, match="loader: found no batch"):
        diffrate.search(model, GOOD, val=[], **GRADIENT)
    model = model.bfloat16() if of == "half" else model.requires_grad_(False)
    weights = {name: value for name, value in model.named_parameters() if not name.startswith("compression")}
    before = {name: (value.clone(), value.dtype, value.requires_grad) for name, value in weights.items()}
    found = diffrate.search(model, GOOD, **GRADIENT)
    assert model.schedule == found.schedule
    for name, value in weights.items():
        assert (value.dtype, value.requires_grad) == before[name][1:]
        assert torch.equal(value, before[name][0])
    assert diffrate.evaluate(model, GOOD).images == 4
