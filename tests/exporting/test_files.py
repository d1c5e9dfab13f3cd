"""Exported files answer as the live model does at every batch size, compressed, and say what they are."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import diffrate
from diffrate.files import export as exporting
from diffrate.files import runtimes as files
from diffrate.files.export import Exported, compare
from diffrate.files.graph import Normalization
from diffrate.files.header import TARGETS
from diffrate.files.runtimes import Loaded, load_exported
from diffrate.schedule import make_schedule
from tests.exporting.table import differences
from tests.tiny_models import IMAGE_SIZE, TOKENS, dense, plain

pytest.importorskip("onnxruntime", reason="needs requirements-export.txt")
pytest.importorskip("openvino", reason="needs requirements-export.txt")
EXACT = {"atol": 1e-4, "rtol": 0.0}
SUFFIXES = tuple(TARGETS)
DEPTHS = {"deit": 2, "caformer": 3}  # the fewest: exporters take seconds for each block
# Every part of which a rule is made, but slices: `test_rules.py` has one graph of all rules.
RULES = ("published", "valued", "received", "received_halves", "tome", "pitome")
NAMES = tuple(f"digit {index}" for index in range(10))
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def small(family: str) -> diffrate.CompressedModel:
    """A compressed model of the family, which prunes and merges."""
    torch.manual_seed(0)
    depth = DEPTHS[family]
    shallow: dict[str, Any] = {"depths": (1, 1, depth, 1)} if family == "caformer" else {"depth": depth}
    model = getattr(diffrate.patch, family)(plain(family, **shallow), 1, 1).eval().requires_grad_(False)
    for parameter in model.parameters():  # as fresh weights are, tokens hardly matter to the logits
        parameter.add_(0.05 * torch.randn_like(parameter))
    tokens = TOKENS[family]
    kept = [tokens - step * tokens // 8 for step in range(1, depth + 1)]
    if family == "caformer":
        model.set_kept_num(None, [*kept, 49])
    else:
        model.set_kept_num([min(tokens, count + 4) for count in kept], kept)
    return model


def images_for(family: str, count: int) -> Tensor:
    side = IMAGE_SIZE[family]
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))


@pytest.fixture(scope="module")
def model() -> diffrate.CompressedModel:
    return small("deit")


@pytest.fixture(scope="module")
def by_each_rule() -> diffrate.CompressedModel:
    """A model of which each block removes tokens by another rule, and the first has the other GELU."""
    torch.manual_seed(0)
    whole: Any = plain("deit", depth=len(RULES))
    whole.blocks[0].mlp.act = nn.GELU("tanh")
    model = diffrate.patch.deit(whole, 1, 1).eval().requires_grad_(False)
    counts = [65 - 6 * block for block in range(len(RULES))]
    model.schedule = make_schedule([min(65, count + 2) for count in counts], counts, RULES)
    return model


@pytest.fixture(scope="module")
def program(by_each_rule: diffrate.CompressedModel) -> ExportedProgram:
    return exporting.traced(by_each_rule, torch.float32, Normalization(MEAN, STD))


@pytest.fixture(scope="module", params=SUFFIXES)
def made(
    request: pytest.FixtureRequest,
    program: ExportedProgram,
    by_each_rule: diffrate.CompressedModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Exported:
    """Files of each kind of that model, which normalise images themselves, from one trace."""
    path = tmp_path_factory.mktemp("made") / f"model{request.param}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "traced", lambda *_: program)
        said = {"name": "mine", "classes": NAMES, "mean": MEAN, "std": STD}
        return diffrate.export(by_each_rule, path, normalize=True, **said)


@pytest.fixture(scope="module")
def loaded(made: Exported) -> Loaded:
    """The file, ready to run."""
    return load_exported(made.path)


def normalized(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def test_the_file_of_a_caformer_answers_as_the_model_at_every_batch_size(tmp_path: Path) -> None:
    live = small("caformer")
    file = diffrate.export(live, tmp_path / "model.onnx")
    assert file.agreement.difference < 1e-4
    assert file.agreement.top1 == 1
    run = load_exported(file.path).logits
    for count in (1, 3, 8):
        images = images_for("caformer", count)
        torch.testing.assert_close(run(images), live(images, return_flop=False), **EXACT)


@pytest.mark.parametrize(("name", "suffix"), [("relative_table", ".onnx"), ("naflex_attention_pool", ".xml")])
def test_files_of_a_construction_answer_as_the_model(name: str, suffix: str, tmp_path: Path) -> None:
    """Of each way in which tokens carry what they need; `table.py` beside has all constructions."""
    ((_, found),) = differences(name, tmp_path, (suffix,), depth=3)  # the fewest
    assert not isinstance(found, str), found
    assert found < 1e-4


def test_each_rule_does_the_same_in_a_file(
    by_each_rule: diffrate.CompressedModel, made: Exported, loaded: Loaded
) -> None:
    """At every batch size. What the schedule takes away, no file computes: answers are those of no other schedule."""
    assert made.agreement.difference < 1e-4
    assert made.agreement.top1 == 1
    run, whole = loaded.logits, dense(copy.deepcopy(by_each_rule))
    for count in (1, 3, 8):
        images = images_for("deit", count)
        found, taken = run(images), normalized(images)
        torch.testing.assert_close(found, by_each_rule(taken, return_flop=False), **EXACT)
        assert (found - whole(taken, return_flop=False)).abs().max() > 1e-3


def test_a_file_says_what_it_is(by_each_rule: diffrate.CompressedModel, made: Exported, loaded: Loaded) -> None:
    said = loaded.metadata
    assert said == made.metadata
    assert (said.model, said.classes, said.mean, said.std) == ("mine", NAMES, MEAN, STD)
    assert said.schedule == by_each_rule.schedule
    assert said.gflops * 1e9 == by_each_rule.flops()
    assert (said.input_size, said.normalizes, said.precision) == ((3, 32, 32), True, "float32")
    assert set(said.versions) == {"diffrate", "timm", "torch"}


def test_attention_is_one_operator_and_sees_fewer_tokens_with_large_weights_beside_the_file(
    model: diffrate.CompressedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx

    path = tmp_path / "model.onnx"
    monkeypatch.setattr(files, "LARGEST", 1000)
    diffrate.export(model, path, opset=23)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    images = images_for("deit", 3)
    torch.testing.assert_close(load_exported(path).logits(images), model(images, return_flop=False), **EXACT)
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    shapes = {value.name: [side.dim_value for side in value.type.tensor_type.shape.dim] for value in graph.value_info}
    attention = [node for node in graph.node if node.op_type == "Attention"]
    entering = [65, *model.get_kept_num()[1][:-1]]
    assert [shapes[node.input[1]][1] for node in attention] == entering[-1:]  # before, importance is read off the map


@pytest.mark.parametrize("made", [".onnx"], indirect=True)
def test_onnxruntime_has_kernels_for_what_opset_18_spells_out(made: Exported, tmp_path: Path) -> None:
    """Keys are not copied a second time for the scores, and no pass over them is the scale's or a bias of GELU's."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(made.path, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "run.onnx").graph.node
    assert {node.domain for node in onnx.load(made.path).graph.node} == {""}
    kernels = [node.op_type for node in nodes]
    assert (kernels.count("BiasGelu"), kernels.count("FastGelu")) == (len(RULES) - 1, 1)
    products = [
        {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        for node in nodes
        if node.op_type == "FusedMatMul"
    ]
    assert len([one for one in products if one["alpha"] != 1 and one["transB"] == 1]) == len(RULES)


def test_a_merge_without_its_sums_is_refused(
    model: diffrate.CompressedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exporter that drops a reduction, as of scatters with a mean, leaves a graph that runs, and no file."""

    def broken(*traced: Any) -> Any:
        program = exporting_traced(*traced)
        for node in list(program.graph.nodes):
            if node.target in (torch.ops.aten.scatter_add.default, torch.ops.aten.baddbmm.default):
                node.replace_all_uses_with(node.args[0])
        program.graph_module.recompile()
        return program

    exporting_traced = exporting.traced
    monkeypatch.setattr(exporting, "traced", broken)
    with pytest.raises(diffrate.ExportError, match=r"not written: largest difference .* \(limit 1e-03\)"):
        diffrate.export(model, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_batch_size_that_is_baked_in_is_refused(
    model: diffrate.CompressedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frozen(live: Any, dtype: torch.dtype, normalization: Any) -> Any:
        from diffrate.files.graph import Logits

        return torch.export.export(Logits(live, dtype, normalization).eval(), (torch.zeros(2, 3, 32, 32),))

    monkeypatch.setattr(exporting, "traced", frozen)
    with pytest.raises(diffrate.ExportError):
        diffrate.export(model, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("suffix", "dtype", "rule"), [(".onnx", "float16", "received"), (".xml", "bfloat16", "published")]
)
def test_half_precision_halves_the_weights(
    model: diffrate.CompressedModel, suffix: str, dtype: str, rule: str, tmp_path: Path
) -> None:
    """Rules that go by lengths of values take these in float32."""
    import onnx

    model, (prune, merge) = copy.deepcopy(model), model.get_kept_num()
    model.schedule = make_schedule(prune, merge, rule)
    half = diffrate.export(model, tmp_path / f"half{suffix}", dtype=getattr(torch, dtype))
    assert half.agreement.difference <= half.agreement.limit
    if suffix == ".onnx":
        size = sum(len(tensor.raw_data) for tensor in onnx.load(half.path).graph.initializer)
    else:
        size = half.path.with_suffix(".bin").stat().st_size
    assert 0.9 < size / (2 * sum(parameter.numel() for parameter in model.parameters())) < 1.2


def test_weights_beside_an_earlier_file_go_with_it(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).write_text("old")
    with files.whole_files(path) as scratch:
        scratch.write_text("new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("model.onnx", "new")]


def test_a_plain_module_pickles_compiles_exports_and_loads_with_torch_alone(
    model: diffrate.CompressedModel, tmp_path: Path
) -> None:
    module, images = diffrate.plain(model), images_for("deit", 5)
    expected = model(images, return_flop=False)
    torch.save(module, tmp_path / "plain.pt")
    torch.save((images, expected), tmp_path / "case.pt")
    code = (
        "import sys, torch\n"
        "module = torch.load('plain.pt', weights_only=False)\n"
        "images, expected = torch.load('case.pt')\n"
        "torch.testing.assert_close(module(images), expected, atol=1e-5, rtol=0)\n"
        "assert not {'timm', 'diffrate'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
    assert isinstance(module, nn.Module)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(images), expected, **EXACT)
    again = torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(again.module()(images[:3]), expected[:3], **EXACT)


def test_images_that_are_given_are_compared_on_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = small("deit").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    agreement = diffrate.export(model, tmp_path / "a.pt2", images=images_for("deit", 13)).agreement
    assert (agreement.images, agreement.source, agreement.ties) == (13, "given", 0)
    assert "of 13 given images" in agreement.line()
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for images in (images_for("deit", 1), torch.zeros(3, 3, 28, 32), torch.zeros(3, 3, 32, 32).double()):
        with pytest.raises(diffrate.ExportError, match=r"images: found .*; accepted: \[N, 3, 32, 32\] in"):
            diffrate.export(model, tmp_path / "b.pt2", images=images)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]


def test_images_on_which_the_last_bits_decide_are_counted_apart() -> None:
    """A file may answer there as the live model does for the next image, and nowhere else otherwise."""

    def live(images: Tensor) -> Tensor:
        return (images.mean((1, 2, 3))[:, None] > 0.5).float() * torch.tensor([0.3, 0.0])

    def file(images: Tensor) -> Tensor:
        return live(images + 1e-7) + 1e-5

    images = torch.full((9, 1, 2, 2), 0.25)
    images[4] = 0.5
    found = compare(file, live, images, "float32", "given")
    assert (found.images, found.ties, found.tied) == (9, 1, pytest.approx(0.3, abs=1e-4))
    assert found.difference == pytest.approx(1e-5, abs=1e-6)
    assert found.line().endswith("; up to 3.0e-01 on 1 whose tokens nearly tie")
    wrong = compare(lambda batch: file(batch) + 0.1 * (batch[:, 0, 0, 0] > 0.4)[:, None], live, images, "float32", "")
    assert (wrong.ties, wrong.difference > wrong.limit) == (0, True)


def test_what_is_no_compressed_model_is_refused(tmp_path: Path) -> None:
    for call in (lambda: diffrate.export(plain("deit"), tmp_path / "a.pt2"), lambda: diffrate.plain(plain("deit"))):
        with pytest.raises(
            diffrate.ExportError, match=r"found VisionTransformer; accepted: a model that diffrate\.patch"
        ):
            call()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_of_others_are_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    with pytest.raises(diffrate.ExportError, match="found no such file"):
        load_exported(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(diffrate.ExportError, match="cannot read it"):
        load_exported(path)
