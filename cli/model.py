"""From settings to the model: which one it is, with its weights, and at its kept counts.

A model is built twice: as shapes, which are enough to refuse what does not fit before weights are downloaded, to find
schedules and to convert weights; and with its weights.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import ImageNetInfo
from torch import nn

import diffrate
import models
from cli.data import eval_dataset, input_size_of
from cli.results import use_searched
from cli.runtime import Runtime, local_main_first
from cli.schedules import chosen_schedule, fit_tokens
from cli.settings import FROM_SCRATCH, OFFICIAL, ModelSettings, Settings, size_words
from datasets import IMAGENET_CLASSES, DataError, LabelledDataset, data_root, has_validation
from diffrate.atomic import first_line
from diffrate.blocks.rates import schedule_of
from diffrate.budget import SHARE
from diffrate.converting.convert import completed
from diffrate.converting.folder import Folder, open_folder
from diffrate.device import FixedBatch, compile_model, shapes_alone
from diffrate.files.header import about, is_saved_model, timms_and_own
from diffrate.files.text_head import read_texts
from diffrate.hub import HUB
from diffrate.patch.parts import complete
from diffrate.schedule import ScheduleError
from engine import flags_in
from models.weights import downloading
from models.zoo import ModelEntry, find
from sample import MODEL as SAMPLE_MODEL
from utils import UsageError

MOST = 0.9  # of ImageNet's words, which are spelled in several ways
log = logging.getLogger(__name__)


class Plan(NamedTuple):
    """What is known before any weights are: which model, its patched shapes, and the schedule that the flags name.

    schedule: None for none, and for a share of the dense model, which depends on the classes.
    """

    entry: ModelEntry
    shapes: diffrate.CompressedModel
    schedule: diffrate.Schedule | None


class Weights(NamedTuple):
    """What a checkpoint holds: tensors under timm's names, None for fresh ones; its name for messages; the kept counts
    that it was saved or trained at; the names of its outputs; whether these are features, and no logits."""

    state: models.StateDict | None
    name: str
    schedule: diffrate.Schedule | None = None
    classes: tuple[str, ...] | None = None
    features: bool = False

    @property
    def head(self) -> int | None:
        """The number of classes of its head, None where there is none."""
        return None if self.state is None else models.head_classes(self.state)

    @property
    def headless(self) -> bool:
        """Whether they are no classifier's: there is nothing to compare labels with."""
        return self.state is not None and (self.head is None or self.features)


def chosen_entry(settings: ModelSettings) -> ModelEntry:
    """The model that `--model` names, or that a file of `--save` says it holds.

    A pretrained tag of timm's is in its name where these are the weights.

    Raises:
        UnknownModelError, UsageError: there is no such model, or the two say different things; or the file's images
            are none that the command line reads.
    """
    entry = _entry_without_texts(settings)
    return entry if settings.text_head is None else _with_texts(entry, settings)


def _entry_without_texts(settings: ModelSettings) -> ModelEntry:
    assert settings.name is not None, "flags make sure of a name"
    if not is_saved_model(settings.checkpoint):
        entry = named_entry(settings.name)
        return entry if settings.checkpoint == OFFICIAL else replace(entry, name=models.bare_name(entry.name))
    saved = about(settings.checkpoint)
    name, asked = saved.name or saved.architecture, settings.name
    same = asked in (name, saved.architecture)
    if not same and models.bare_name(named_entry(asked).name) != models.bare_name(name):
        raise UsageError(f"--model {asked}: {settings.checkpoint} holds {name}; accepted: {name}, or no --model")
    channels, *size = saved.input_size
    if channels != 3:
        found = list(saved.input_size)
        raise UsageError(f"{name}: the file's input_size is {found}; accepted here: images of 3 channels")
    published = find(name)
    if published is None:
        key = name
        with suppress(models.UnknownModelError):  # schedules are filed by names of timm's with their tags
            key = models.full_name(name)
        published = ModelEntry(name, saved.architecture, key, weights=None)
    inputs = {field.name: getattr(saved, field.name) for field in fields(ModelEntry) if hasattr(saved, field.name)}
    inputs |= {"name": published.name, "input_size": tuple(size), "config": None}
    given, own = timms_and_own(saved.arguments)
    return replace(published, **inputs, options=given, complete=complete, own=own)


def named_entry(name: str) -> ModelEntry:
    """The model that a name stands for, or a folder or repository in the layout of transformers or timm.

    Raises:
        UnknownModelError, UsageError: there is no such model, or what lies there cannot be read.
    """
    try:
        return models.entry_of(name)
    except models.UnknownModelError:
        try:
            with _fetching(name):
                folder = open_folder(name)
                if folder is not None and "architecture" not in folder.config:
                    return _entry_of_folder(str(Path(name)) if Path(name).is_dir() else name, folder)
        except diffrate.UnsupportedModelError as error:
            raise UsageError(f"--model {name}: {error}") from error
        if folder is None or not Path(name).is_dir():
            raise
    return models.entry_of(f"local-dir:{name}")


def _entry_of_folder(name: str, folder: Folder) -> ModelEntry:
    """The entry of a model of transformers."""
    plan = folder.plan(shapes=True)
    size, facts, _ = folder.inputs(plan)
    given, own = timms_and_own({name: value for name, value in plan.arguments.items() if not name.endswith("_rate")})
    num_classes = given.pop("num_classes")
    if not (num_classes == 0 or "feature_head" in own):
        folder.classes(num_classes)  # refused before anything else is read
    return ModelEntry(
        name=name,
        architecture=plan.architecture,
        schedule_key=name,
        weights=folder,
        options={key: value for key, value in given.items() if key not in ("in_chans", "img_size")},
        num_classes=num_classes,
        input_size=size,
        complete=complete,
        own=own,
        **facts,
    )


def _with_texts(entry: ModelEntry, settings: ModelSettings) -> ModelEntry:
    """`entry` with the classes of `--text-head`, on the features that it has."""
    said = f"--text-head {settings.text_head}"
    if entry.own.get("text_width") is not None:
        raise UsageError(f"{said}: {settings.checkpoint} has a text head; accepted: no --text-head")
    try:
        texts = read_texts(settings.text_head or "")
    except diffrate.SavedModelError as error:
        raise UsageError(f"--text-head {error}") from error
    width, outputs = texts.embeddings.shape[1], entry.num_classes
    if outputs not in (0, width):
        found = f"found embeddings of {width} channels, and {outputs} outputs of {entry.name}"
        raise UsageError(f"{said}: {found}; accepted: a model of CLIP or SigLIP with as many of both")
    own: dict[str, Any] = {"text_width": width, "text_sigmoid": texts.logit_bias is not None}
    if outputs:  # timm's CLIP models have their projection as a head
        own["feature_head"] = entry.own.get("feature_head") or "none"
    return replace(entry, num_classes=len(texts.classes), complete=complete, own={**entry.own, **own})


def planned(settings: Settings, entry: ModelEntry, reads_data: bool = True) -> Plan:
    """The model's shapes and its schedule: where the data are there that the mode reads, before any weights are.

    Raises:
        DataError, ScheduleError, UsageError: the data folder or the schedule is not there or does not fit, or
            compression does not take this model.
    """
    if reads_data:
        data_root(settings.data.data_set, settings.data.path)
    shapes = meta_model(settings.model, entry)
    # What a share means depends on the classes.
    shared = any(target.kind == SHARE for target in settings.model.targets)
    return Plan(entry, shapes, None if shared else chosen_schedule(settings.model, entry, shapes))


def meta_model(settings: ModelSettings, entry: ModelEntry) -> diffrate.CompressedModel:
    """The patched model without memory for its weights: shapes are enough to cost it.

    Raises:
        InputSizeError, UsageError: the input's size does not fit, or compression does not take this model.
    """
    rows, columns = input_size_of(settings, entry)
    with shapes_alone():
        try:
            model = models.create(entry, (rows, columns))
        except models.InputSizeError:
            raise
        except diffrate.UnsupportedModelError as error:
            raise UsageError(f"--text-head {settings.text_head}: {error}") from error
        except Exception as error:  # for whatever reason timm has
            raise UsageError(
                f"--model {settings.name}: timm builds none for {rows} by {columns} pixels ({first_line(error)})"
            ) from error
        return patched(model, settings)


def patched(model: nn.Module, settings: ModelSettings) -> diffrate.CompressedModel:
    """Patch `model` in place, ready to search.

    Raises:
        UsageError: compression does not take this model.
        RateError: a granularity that leaves no choice.
    """
    try:
        return diffrate.patch.vit(model, settings.granularity, settings.granularity)
    except diffrate.UnsupportedModelError as error:
        raise UsageError(f"--model {settings.name}: {error}") from error


def read_weights(settings: ModelSettings, plan: Plan, runtime: Runtime) -> Weights:
    """What `--checkpoint` names, with the texts of `--text-head`."""
    source, entry = settings.checkpoint, plan.entry
    if source == FROM_SCRATCH:
        return Weights(None, FROM_SCRATCH)
    header, made_at = None, None  # rows and columns of the images that the weights were trained on, if known
    if is_saved_model(source):
        header, made_at = about(source), entry.input_size
    elif (flags := flags_in(source)) is not None:
        size = flags.get("input_size") or entry.input_size
        made_at = (size, size) if isinstance(size, int) else (size[0], size[1])
    with local_main_first(runtime.processes):  # one download for all processes of a machine
        if source == OFFICIAL and isinstance(entry.weights, Folder):
            return _read_folder(settings, plan, entry.weights, runtime)
        if source == OFFICIAL:
            read = models.read_official(entry, plan.shapes, runtime.bar)
        else:
            size = input_size_of(settings, entry)
            read = models.read_file(source, plan.shapes, size, entry.input_size, made_at, runtime.bar)
    for note in read.notes:
        log.info(note)
    state, classes = _headed(read.state, settings)
    if header is None:
        return Weights(state, read.name, _trained_at(read, settings, plan, made_at), classes, entry.features)
    return Weights(state, read.name, header.schedule, classes or header.classes, entry.features)


def _read_folder(settings: ModelSettings, plan: Plan, folder: Folder, runtime: Runtime) -> Weights:
    """The weights of a model of transformers, positions interpolated for other sizes as it does itself."""
    entry, shapes = plan.entry, plan.shapes.state_dict()
    try:
        with _fetching(entry.name, runtime.bar):
            usual, size = folder.plan(shapes=True), input_size_of(settings, entry)
            made, (_, _, notes) = folder.plan(size), folder.inputs(usual)
            classes = None if entry.headless or settings.text_head else folder.classes(entry.num_classes)
        made.state, words = _headed(made.state, settings)
        expected = {name: tensor for name, tensor in shapes.items() if not name.startswith("compression.")}
        state = completed(made, expected, made.kind)
        wrong = [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]
        if wrong:
            raise diffrate.UnsupportedModelError(
                f"found NaN or infinite values in {wrong[0]}; accepted: finite weights"
            )
    except diffrate.UnsupportedModelError as error:
        raise UsageError(f"--model {entry.name}: {error}") from error
    rates = [f"{name} {rate:g}" for name, rate in made.arguments.items() if name.endswith("_rate")]
    if rates:
        notes.append(f"{entry.name}: {', '.join(rates)} of its configuration left out; --drop-path is for training")
    if usual.arguments["img_size"] != list(size):
        own = size_words(tuple(usual.arguments["img_size"]))
        notes.append(f"{entry.name}: positions interpolated for {size_words(size)} pixels, from {own}")
    for note in notes:
        log.info(note)
    return Weights(state, entry.name, None, words or _as_ids(classes), entry.features)


def _fetching(name: str, bar: bool = True) -> AbstractContextManager[None]:
    """Where files are read, that may have to be downloaded."""
    return downloading(name, bar) if name.startswith(HUB) else nullcontext()


def _headed(state: models.StateDict, settings: ModelSettings) -> tuple[models.StateDict, tuple[str, ...] | None]:
    """`state` with the texts of `--text-head`, and their names; as it is where it holds a text head, or none is asked
    for."""
    if settings.text_head is None:
        return state, None
    texts = read_texts(settings.text_head)
    if "head.logit_scale" in state:
        log.info("%s: the text head of the checkpoint is kept", settings.text_head)
        return state, _as_ids(texts.classes)
    for note in texts.notes:
        log.info(note)
    inner = {f"head.features.{part}": state[f"head.{part}"] for part in ("weight", "bias") if f"head.{part}" in state}
    if inner:
        inner.setdefault("head.features.bias", torch.zeros(len(inner["head.features.weight"])))
    rest = {name: tensor for name, tensor in state.items() if name not in ("head.weight", "head.bias")}
    return rest | inner | texts.state, _as_ids(texts.classes)


def _as_ids(classes: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """ImageNet's ids, which folders of its images have, where `classes` are its words for them."""
    info = ImageNetInfo()
    if classes is None or len(classes) != IMAGENET_CLASSES:
        return classes
    words = [info.index_to_description(index).split(",")[0].lower() for index in range(IMAGENET_CLASSES)]
    same = sum(name.split(",")[0].lower() == word for name, word in zip(classes, words, strict=True))
    return tuple(info.label_names()) if same >= MOST * IMAGENET_CLASSES else classes


def plain_model(
    settings: ModelSettings, entry: ModelEntry, weights: Weights, classes: int, **options: Any
) -> nn.Module:
    """The plain timm model with `weights`, and as many classes as they have, if any; fresh ones with `classes`."""
    outputs = classes if weights.state is None else weights.head or 0
    model = models.create(entry, input_size_of(settings, entry), num_classes=outputs, **options)
    if weights.state is not None:
        for note in models.fit_state(model, weights.state, weights.name).notes:
            log.info(note)
    return model


def compressed(model: nn.Module, settings: ModelSettings, plan: Plan, weights: Weights) -> diffrate.CompressedModel:
    """`model`, patched in place if it is not, at the schedule of the flags, else of its weights, else dense."""
    if not isinstance(model, diffrate.CompressedModel):
        model = patched(model, settings)
    schedule, held = plan.schedule or chosen_schedule(settings, plan.entry, model), weights.schedule
    if schedule is None and held is not None and not settings.dense and not _is_dense(held, model):
        schedule, where = fit_tokens(held, model) if settings.scale else held, f"checkpoint {weights.name}: "
        model.check(schedule, where)  # before its cost, which needs one that fits
        gflops = model.flops_at(schedule) / 1e9
        log.info("%sat the kept counts that it holds, %.3f GFLOPs; --dense for all tokens", where, gflops)
    model.schedule = schedule or model.dense_schedule()
    return model


def trained_model(
    settings: Settings, runtime: Runtime, entry: ModelEntry | None = None, labelled: bool = True, **options: Any
) -> tuple[Plan, nn.Module, Weights, LabelledDataset | None]:
    """The plain model with the weights that the flags name, and what it was and is evaluated on, which may be None
    where nobody needs it `labelled`; `options` go to timm's constructor.

    Raises:
        UsageError: there is no head, or the digits that ship do not fit it.
    """
    entry = entry or chosen_entry(settings.model)
    plan, digits = planned(settings, entry), settings.data.path is None and entry.name != SAMPLE_MODEL
    if labelled and entry.headless and settings.model.checkpoint == OFFICIAL:
        raise _no_head(entry.name)  # before anything is downloaded
    if digits and not labelled:
        raise UsageError(f"--data-path is needed: the digits that ship do not fit {entry.name}")
    weights, val = read_weights(settings.model, plan, runtime), None
    if labelled and weights.headless:
        raise _no_head(f"{entry.name}, checkpoint {weights.name}")
    headless = entry.headless if weights.state is None else weights.headless
    if labelled or (not headless and has_validation(settings.data.data_set, settings.data.path)):
        try:
            val = eval_dataset(settings, entry, weights.head, weights.classes)
        except DataError as error:
            if digits:
                said = f"--data-path is needed: the digits that ship do not fit {entry.name} ({error})"
                raise UsageError(said) from error
            if labelled:
                raise
            log.info("no accuracy: %s", error)
    outputs = entry.num_classes if val is None else len(val.classes)
    return plan, plain_model(settings.model, entry, weights, outputs, **options), weights, val


def named_model(
    settings: Settings, entry: ModelEntry, runtime: Runtime
) -> tuple[diffrate.CompressedModel, Sequence[str] | None]:
    """The model that the flags name at its kept counts, of modes that need no labels, and words for its outputs: the
    weights' classes, else ImageNet's words, or the data's classes; None where unknown."""
    plan = planned(settings, entry, reads_data=False)
    weights = read_weights(settings.model, plan, runtime)
    model = compressed(plain_model(settings.model, entry, weights, entry.num_classes), settings.model, plan, weights)
    use_searched(model, settings, entry, runtime)
    model, outputs, info = model.to(runtime.device), model.num_classes, ImageNetInfo()
    if not outputs or entry.features:
        return model, []
    if weights.classes is not None and set(weights.classes) != set(info.label_names()):
        return model, weights.classes
    if outputs == IMAGENET_CLASSES:
        return model, [info.index_to_description(index).split(",")[0] for index in range(outputs)]
    if settings.data.path is not None or entry.name == SAMPLE_MODEL:
        return model, output_names(eval_dataset(settings, entry), outputs)
    return model, None


def for_inference(
    model: diffrate.CompressedModel, compiled: bool, batch_size: int, runtime: Runtime
) -> tuple[nn.Module, Runtime]:
    """`model` on the device of `runtime` as it is to run, and the runtime that goes with it.

    On a CPU the weights themselves take the precision of `--amp`, in place: autocast would go back to
    float32 between layers. Elsewhere autocast it is, as published.
    """
    model = model.to(runtime.device)
    if runtime.amp is not None and runtime.device.type == "cpu":
        model = model.to(runtime.amp)
        runtime = replace(runtime, amp=None, dtype=runtime.amp)
    return (FixedBatch(compile_model(model), batch_size) if compiled else model), runtime


def output_names(data: LabelledDataset, outputs: int, weights: Weights | None = None) -> Sequence[str] | None:
    """The names of a model's `outputs`: its weights' own, else the classes of its data."""
    if weights is not None and weights.classes is not None and len(weights.classes) == outputs:
        return weights.classes
    return list(data.classes) if len(data.classes) == outputs else None


def _trained_at(
    read: models.Read, settings: ModelSettings, plan: Plan, made_at: models.Size | None
) -> diffrate.Schedule | None:
    """The kept counts among a checkpoint's tensors, if any, with the number of input tokens that they are for, if that
    is known."""
    held, limits = read.found.get("compression._extra_state"), plan.shapes.compression.space.limits
    if held is None or held.numel() == 0:
        return None
    try:
        schedule = schedule_of(held, plan.shapes.compression.space)
    except (ScheduleError, ValueError) as error:
        raise ScheduleError(f"checkpoint {read.name}: {error}") from error
    if made_at is not None:
        if made_at != input_size_of(settings, plan.entry):
            limits = meta_model(replace(settings, input_size=made_at), plan.entry).compression.space.limits
        return replace(schedule, tokens=limits[0])
    theirs, ours = read.found.get("pos_embed"), dict(plan.shapes.named_parameters()).get("pos_embed")
    if theirs is None or ours is None:
        return schedule
    # Some models add positions to class and register tokens, too, and some do not.
    return replace(schedule, tokens=theirs.shape[1] + limits[0] - ours.shape[1])


def _is_dense(schedule: diffrate.Schedule, model: diffrate.CompressedModel) -> bool:
    """Whether it removes nothing, in a model of as many tokens as it was made for."""
    blocks = len(model.compressible_blocks())
    tokens = schedule.tokens or model.compression.space.limits[0]
    return {*schedule.merge[:blocks], *(schedule.prune or ())[:blocks]} <= {tokens}


def _no_head(name: str) -> UsageError:
    return UsageError(
        f"--model {name}: has no head, and so no classes to compare with labels; accepted: --checkpoint FILE with a "
        f"head, such as --finetune {OFFICIAL} leaves"
    )
