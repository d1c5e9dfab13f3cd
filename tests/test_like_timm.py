"""What timm's models can be told works on patched ones, or is refused by name: nothing is passed over."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import PatchDropout
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

import diffrate
from cli.runtime import leave_group
from diffrate.patch.parts import complete
from tests.constructions import build, images_for, size_of
from tests.test_constructions import GRAPHS

KW = {"img_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 5}


def plain(**options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**KW, **options}).eval()


def reduced(model: Any = None, **options: Any) -> Any:
    model = diffrate.patch.vit(plain() if model is None else model, **options)
    model.set_kept_num([17, 14, 10, 8], [17, 12, 9, 6])
    return model


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "traced_at", "run_at"),
    [*((name, 1, 5) for name in GRAPHS), ("no_class_token", 3, 1), ("rope", 3, 1), ("naflex", 3, 1)],
)
def test_a_trace_is_for_batches_of_any_size(name: str, traced_at: int, run_at: int) -> None:
    model = diffrate.patch.vit(build(name), input_size=size_of(name))
    tokens, least = model.compression.space.limits[0], model.compression.space.least
    counts = [max(least, round(share * tokens)) for share in (1, 0.7, 0.5, 0.4)]
    model.set_kept_num(counts, [max(least, count - 1) if index else count for index, count in enumerate(counts)])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on what a trace fixes, and on its age
        traced = torch.jit.trace(model, images_for(name, traced_at), check_trace=False)
        found = traced(images_for(name, run_at))[0]
    torch.testing.assert_close(found, model(images_for(name, run_at))[0], rtol=0, atol=1e-9)


def test_distributed_training_at_fixed_counts_goes_on_after_a_step(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(reduced().train())
        for _ in range(3):
            nn.functional.cross_entropy(model(images())[0], torch.arange(5)).backward()
    finally:
        leave_group()


def test_rates_learn_only_while_they_say_the_counts() -> None:
    model = reduced()
    assert not any(rate.requires_grad for rate in model.arch_parameters())
    weights = {*model.parameters()}.difference(model.arch_parameters())
    for wanted in (False, True):  # as of a head that is trained alone first
        assert model.requires_grad_(wanted) is model
        assert all(weight.requires_grad is wanted for weight in weights)
        assert not any(rate.requires_grad for rate in model.arch_parameters())
    model.compression.schedule = None
    assert all(rate.requires_grad for rate in model.arch_parameters())
    for wanted in (False, True):
        model.requires_grad_(wanted)
        assert all(rate.requires_grad is wanted for rate in model.arch_parameters())


@pytest.mark.parametrize("search", [False, True])
def test_checkpointing_keeps_less_and_gives_the_same_gradients(search: bool) -> None:
    def gradients(recomputes: bool) -> tuple[int, list[Tensor]]:
        model, kept = reduced().train(), 0
        if search:
            model.compression.schedule = None
        model.set_grad_checkpointing(recomputes)

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits, flops = model(images())
        (logits.square().sum() + (flops / 1e9 if search else 0)).backward()
        return kept, [weight.grad for weight in model.parameters() if weight.grad is not None]

    (less, ours), (more, theirs) = gradients(True), gradients(False)
    assert less < more / 2
    torch.testing.assert_close(ours, theirs)


def test_checkpointing_of_a_caformer() -> None:
    model = diffrate.patch.caformer(timm.create_model("caformer_s18"), input_size=64)
    third, fourth = len(model.stages[2].blocks), len(model.stages[3].blocks)
    model.train().set_kept_num(None, [16, *[9] * (third - 1), *[4] * fourth])
    model.set_grad_checkpointing(True)
    entered = []
    mlp = model.stages[2].blocks[1].mlp
    mlp.register_forward_pre_hook(lambda module, given: entered.append(given[0].shape[1]))
    model(torch.randn(2, 3, 64, 64), return_flop=False).sum().backward()
    assert entered == [9, 9]  # once more for the backward pass
    assert mlp.fc1.weight.grad is not None


def test_hooks_see_blocks_attentions_and_maps() -> None:
    model, seen = reduced(), {}
    expected = model(images())[0]

    def see(name: str) -> Callable[..., None]:
        return lambda module, given, left: seen.update({name: (module, given[0].shape, left.shape)})

    block = model.blocks[1]
    for name, module in {"block": block, "attn": block.attn, "map": block.attn.attn_drop}.items():
        module.register_forward_hook(see(name))
    last = []
    model.blocks[-1].register_forward_hook(lambda module, given, left: last.append(left))
    torch.testing.assert_close(model(images())[0], expected)
    assert seen["block"] == (block, (5, 17, 48), (5, 12, 48))
    assert seen["attn"] == (block.attn, (5, 17, 48), (5, 17, 48))
    assert seen["map"] == (block.attn.attn_drop, (5, 3, 17, 17), (5, 3, 17, 17))
    assert last[0].shape == (5, 6, 48)  # all that are left, though the class token alone is read


def test_hooks_may_change_what_passes_and_see_gradients() -> None:
    model, gradients = reduced(), []
    whole = model(images())[0]
    handle = model.blocks[2].register_forward_hook(lambda module, given, left: 2 * left)
    assert not torch.allclose(model(images())[0], whole)
    handle.remove()
    torch.testing.assert_close(model(images())[0], whole)
    model.blocks[0].register_full_backward_hook(lambda module, given, left: gradients.append(left[0].shape))
    model(images())[0].sum().backward()
    assert gradients == [(5, 17, 48)]


@pytest.mark.parametrize("search", [False, True])
def test_hooks_of_all_modules_see_blocks_attentions_and_poolings(search: bool) -> None:
    model, seen = reduced(_attention_pool()), []
    if search:
        model.train().compression.schedule = None
    whole = model(images())[0]
    entering = register_module_forward_pre_hook(lambda module, given: seen.append((type(module), "enters")))
    leaving = register_module_forward_hook(lambda module, given, left: seen.append((type(module), "leaves")))
    try:
        torch.testing.assert_close(model(images())[0], whole, rtol=0, atol=0)
    finally:
        entering.remove()
        leaving.remove()
    kinds = [type(part) for part in (model.blocks[0], model.blocks[0].attn, model.attn_pool)]
    counts = [seen.count((kind, where)) for kind in kinds for where in ("enters", "leaves")]
    assert counts == [4, 4, 4, 4, 1, 1]
    told = len(seen)
    model(images())
    assert len(seen) == told


def test_counters_of_operations_see_what_there_is_without_them() -> None:
    """Of the last block, whose class token alone is read."""
    model = reduced()
    with FlopCounterMode(display=False) as counter:
        model(images(1))
    left = []
    hook = register_module_forward_hook(
        lambda module, given, output: left.append(output.shape[1]) if module is model.blocks[-1] else None
    )
    try:
        model(images(1))
    finally:
        hook.remove()
    assert left == [1]
    assert counter.get_total_flops() < 2 * model.flops()


def _attention_pool() -> Any:
    return plain(global_pool="map")


def _class_and_mean() -> Any:
    model = plain(global_pool="map", pool_include_prefix=True)
    complete(model, class_and_mean=True)
    return model


@pytest.mark.parametrize("make", [_attention_pool, _class_and_mean])
def test_hooks_of_a_pooling_see_and_change_what_passes(make: Callable[[], Any]) -> None:
    model, seen = reduced(make()), []
    whole = model(images())[0]
    model.attn_pool.register_forward_hook(lambda module, given, left: seen.append((given[0].shape, left.shape)))
    torch.testing.assert_close(model(images())[0], whole)
    assert seen == [((5, 5 if make is _attention_pool else 6, 48), (5, model.head.in_features))]
    model.attn_pool.register_forward_hook(lambda module, given, left: 2 * left)
    assert not torch.allclose(model(images())[0], whole)


@pytest.mark.parametrize("make", [_attention_pool, _class_and_mean])
def test_another_pooling_is_refused(make: Callable[[], Any]) -> None:
    for dense, call in ((True, diffrate.patch.vit), (False, lambda model: model(images()))):
        for change, found in (
            (lambda model: setattr(model.attn_pool, "forward", abs), "attn_pool: found another forward; "),
            (lambda model: setattr(model, "attn_pool", nn.Flatten()), "found attn_pool=Flatten; "),
        ):
            model = make() if dense else reduced(make())
            change(model)
            with pytest.raises(diffrate.UnsupportedModelError, match=rf"^{found}accepted: "):
                call(model)


def test_hooks_in_a_search() -> None:
    model, seen = reduced().train(), []
    model.compression.schedule = None
    model.blocks[1].register_forward_hook(lambda module, given, left: seen.append(left.shape))
    model(images())
    assert seen == [(5, 17, 48)]  # sources stay beside their destinations
    model.blocks[1].attn.attn_drop.register_forward_hook(lambda *_: None)
    with pytest.raises(diffrate.UnsupportedModelError, match="attn_drop: found hooks; accepted"):
        model(images())


def test_another_head_and_pooling_after_patching() -> None:
    model, expected = reduced(), plain()
    model.reset_classifier(7, "avg")
    expected.reset_classifier(7, "avg")
    fresh = diffrate.patch.vit(expected)
    fresh.set_kept_num(*model.get_kept_num())
    fresh.load_state_dict(model.state_dict())
    assert model.flops() == fresh.flops()
    assert model.compression.space == fresh.compression.space
    torch.testing.assert_close(model(images())[0], fresh(images())[0])


def _methods(block: Any) -> None:
    block.forward = lambda tokens, **_: tokens


def _attention(block: Any) -> None:
    block.attn.forward = lambda tokens, **_: tokens


def _kind(block: Any) -> None:
    block.attn = nn.Identity()


def _dropout(block: Any) -> None:
    block.attn.attn_drop = nn.AlphaDropout()


@pytest.mark.parametrize("change", [_methods, _attention, _kind, _dropout])
def test_what_would_be_passed_over_is_refused_when_patched(change: Callable[[Any], None]) -> None:
    model = plain()
    change(model.blocks[2])
    with pytest.raises(diffrate.UnsupportedModelError, match=r"^blocks\.2.*: found .*; accepted: "):
        diffrate.patch.vit(model)
    assert type(model).__module__.startswith("timm")


def test_a_replaced_forward_of_the_model_is_refused() -> None:
    model = plain()
    model.forward_features = lambda images: images
    with pytest.raises(diffrate.UnsupportedModelError, match="model: found another forward_features; accepted"):
        diffrate.patch.vit(model)


def test_a_forward_replaced_in_the_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain()
    monkeypatch.setattr(type(model.blocks[0].attn), "forward", lambda self, x, **_: x)
    with pytest.raises(diffrate.UnsupportedModelError, match=r"blocks\.0\.attn: found another forward"):
        diffrate.patch.vit(model)


@pytest.mark.parametrize("change", [_methods, _attention, _kind])
def test_what_would_be_passed_over_is_refused_at_the_next_pass(change: Callable[[Any], None]) -> None:
    model = reduced()
    change(model.blocks[2])
    with pytest.raises(diffrate.UnsupportedModelError, match=r"^blocks\.2.*: found .*; accepted: "):
        model(images())


@pytest.mark.parametrize("name", ["forward_features", "forward_head", "pool"])
def test_methods_that_are_never_called_are_refused_at_the_next_pass(name: str) -> None:
    model = reduced()
    model.train = lambda mode=True: model  # as of a model that is to stay as it is
    model(images())
    setattr(model, name, lambda tokens, **_: tokens)
    with pytest.raises(diffrate.UnsupportedModelError, match=f"^model: found another {name}; accepted: "):
        model(images())


@pytest.mark.parametrize("name", ["forward", "forward_features", "forward_head", "pool"])
@pytest.mark.parametrize("make", [plain, reduced])
def test_methods_replaced_in_the_class_of_the_model_are_refused(
    make: Callable[[], Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    monkeypatch.setattr(VisionTransformer, name, lambda self, tokens, **_: tokens)
    with pytest.raises(diffrate.UnsupportedModelError, match=f"^model: found another {name}; accepted: "):
        model(images()) if make is reduced else diffrate.patch.vit(model)


def test_parts_around_the_blocks_are_refused_at_the_next_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reduced()
    model.patch_drop = PatchDropout(0.9)
    with pytest.raises(diffrate.UnsupportedModelError, match=r"^found patch_drop; accepted: "):
        model(images())
    model = reduced()
    model.blocks.forward = lambda tokens: tokens
    with pytest.raises(diffrate.UnsupportedModelError, match=r"^blocks: found another forward; accepted: "):
        model(images())
    model = reduced()
    monkeypatch.setattr(type(model.blocks[0].attn), "forward", lambda self, tokens, **_: tokens)
    with pytest.raises(diffrate.UnsupportedModelError, match=r"^blocks\.0\.attn: found another forward; accepted: "):
        model(images())


def test_parts_around_the_blocks_of_a_caformer_are_refused_at_the_next_pass() -> None:
    for change, found in (
        (lambda model: setattr(model.stages[3], "forward", abs), "blocks: found another forward; "),
        (lambda model: model.stages.register_forward_hook(lambda *_: None), "blocks: found hooks of their container; "),
        (lambda model: setattr(model, "forward_features", abs), "model: found another forward_features; "),
    ):
        model = diffrate.patch.caformer(timm.create_model("caformer_s18").eval(), input_size=64)
        change(model)
        with pytest.raises(diffrate.UnsupportedModelError, match=rf"^{found}accepted: "):
            model(torch.randn(1, 3, 64, 64))


def test_an_mlp_of_another_cost_is_refused_at_the_next_pass() -> None:
    model = reduced()
    model.blocks[2].mlp = copy.deepcopy(model.blocks[2].mlp)  # as one in a wrapper, it costs the same
    copy.deepcopy(model)(images())
    model.blocks[2].mlp = nn.Identity()
    with pytest.raises(diffrate.UnsupportedModelError, match=r"^blocks\.2\.mlp: found 0 weights .*; accepted: \d+, "):
        model(images())


def test_fewer_blocks_and_other_sizes_are_refused() -> None:
    model = reduced()
    for call in (lambda: model.prune_intermediate_layers(2), lambda: model.set_input_size(img_size=64)):
        with pytest.raises(diffrate.UnsupportedModelError, match="found a patched model; accepted"):
            call()
    model.blocks = model.blocks[:3]
    with pytest.raises(diffrate.UnsupportedModelError, match="blocks: found 3; accepted: 4"):
        model(images())
    model = reduced()
    model.blocks.register_forward_hook(lambda *_: None)
    with pytest.raises(diffrate.UnsupportedModelError, match="container"):
        model(images())


def test_logits_alone_inside_other_modules(tmp_path: Any) -> None:
    model = reduced(return_flop=False)
    diffrate.save(model, tmp_path / "model.safetensors")
    expected = model(images())
    loaded = diffrate.load(tmp_path / "model.safetensors")
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        torch.testing.assert_close(nn.Sequential(each, nn.Softmax(-1))(images()), expected.softmax(-1))
    logits, flops = model(images(), return_flop=True)
    assert flops == model.flops()
    torch.testing.assert_close(logits, expected)
    assert diffrate.about(tmp_path / "model.safetensors").return_flop is False


class Adapter(nn.Module):
    """A low-rank update beside a linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", ["class_token", "relative_table", "eva"])
def test_an_adapter_of_the_projection_counts(name: str) -> None:
    model = diffrate.patch.vit(build(name).float())
    before = model(images_for(name).float())[0]
    model.blocks[1].attn.qkv = Adapter(model.blocks[1].attn.qkv)
    assert not torch.allclose(model(images_for(name).float())[0], before)


def quantized(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on the age of its quantization
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)


def test_quantized_linear_layers() -> None:
    model = reduced()
    torch.testing.assert_close(quantized(model)(images())[0], model(images())[0], rtol=0, atol=0.2)


@pytest.mark.parametrize("name", ["attn.qkv", "attn.proj", "mlp.fc2"])
def test_layers_of_unknown_cost_are_refused_when_patched_and_welcome_after(name: str) -> None:
    where, _, layer = name.partition(".")
    model, dense = reduced(), plain()
    for each in (model, dense):
        part = getattr(each.blocks[1], where)
        setattr(part, layer, Adapter(getattr(part, layer)))
    flops = model.flops()
    model(images())
    model.reset_classifier(KW["num_classes"])
    assert model.flops() == flops
    for each, first in ((dense, f"blocks.1.{name}: found tests."), (quantized(plain()), "blocks.0.attn.qkv: found t")):
        with pytest.raises(diffrate.UnsupportedModelError, match=rf"^{first}.*; accepted: torch\.nn\.Linear"):
            diffrate.patch.vit(each)


def test_inference_mode_and_data_parallel() -> None:
    model = reduced()
    expected = model(images())[0]
    with torch.inference_mode():
        torch.testing.assert_close(model(images())[0], expected)
    torch.testing.assert_close(nn.DataParallel(model)(images())[0], expected)
