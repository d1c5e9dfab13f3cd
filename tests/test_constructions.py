"""Every construction of timm's ViTs, small: compressed it is what timm's own blocks compute on the tokens left."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffrate
from diffrate.blocks.reduction import Mean
from diffrate.patch.timm_families import PLAIN
from tests.constructions import CONSTRUCTIONS, build, images_for, since, size_of
from tests.tiny_models import dense

EXACT = {"atol": 1e-9, "rtol": 0.0}
# One of each way in which tokens carry what they need.
CARRYING = (
    "class_token",
    "no_class_token",
    "registers",
    "rope",
    "rope_dinov3",
    "rope_mixed",
    "relative_table",
    "relative_network",
)
# One of each class of timm's and of each way to attend, place and pool, that a graph is traced through. The plain ViT
# with a class token is in `test_rules.py`.
GRAPHS = tuple(
    name
    for name in (
        *("registers", "distilled", "attention_pool", "differential", "swiglu", "post_norm", "hybrid", "rope_mixed"),
        *("rope", "rope_fewer_keys", "relative_table", "relative_shared_network", "naflex_rope"),
    )
    if name in CONSTRUCTIONS
)


def patched(name: str, **options: Any) -> diffrate.CompressedModel:
    return diffrate.patch.vit(build(name, **options), 1, 1, size_of(name))


def reduced(name: str, prune: tuple[float, ...], merge: tuple[float, ...], **options: Any) -> diffrate.CompressedModel:
    """Patched, and told to keep these shares of the patch tokens in its blocks."""
    model = patched(name, **options)
    space = model.compression.space
    prefix, patches = space.prefix, space.limits[0] - space.prefix
    model.set_kept_num(*([prefix + round(share * patches) for share in row] for row in (prune, merge)))
    return model


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_fresh_from_patching_all_is_timms(name: str) -> None:
    plain, images = build(name), images_for(name)
    logits, features = plain(images), plain.forward_features(images)
    middle = plain.forward_intermediates(images, indices=[1, 3], norm=True)
    model = patched(name)
    assert model.compression.current() == model.dense_schedule()
    torch.testing.assert_close(model(images, return_flop=False), logits, **EXACT)
    torch.testing.assert_close(model.forward_features(images), features, **EXACT)
    torch.testing.assert_close(model.forward_intermediates(images, indices=[1, 3], norm=True), middle, **EXACT)


@pytest.mark.parametrize("name", ["registers", "no_class_token", "oblong", "naflex"])
def test_intermediates_come_in_every_form_of_timms(name: str) -> None:
    plain, images = build(name), images_for(name)
    model = dense(patched(name))
    forms: list[dict[str, Any]] = [
        {"output_fmt": "NLC", "return_prefix_tokens": name == "registers"},
        {"indices": 1, "intermediates_only": True},
        {"indices": [0, 1], "stop_early": True, "return_prefix_tokens": name == "registers"},
    ]
    if name != "oblong":
        forms.append({"indices": [2], "output_dict": True, "return_prefix_tokens": True})
    for form in forms:
        expected = plain.forward_intermediates(images, **form)
        torch.testing.assert_close(model.forward_intermediates(images, **form), expected, **EXACT)
    for wrong, message in (({"output_fmt": "NHWC"}, "output_fmt: found 'NHWC'"), ({"is_causal": True}, "is_causal")):
        with pytest.raises(ValueError, match=message):
            model.forward_intermediates(images, **wrong)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("class_token", (64, 64), "input_size: found 64 x 64; accepted: 32 x 32, which the model is built for"),
        ("dynamic_size", (8, 8), "input_size: found 8 x 8; accepted: 2 patches at least"),
        ("dynamic_size", (36, 32), "input_size: found 36 x 32; accepted: multiples of 8 x 8, a patch's sides"),
        ("naflex", (3, 3), "input_size: found 3 x 3; accepted: 2 patches at least"),
        ("naflex", "32", "input_size: found '32'; accepted: height and width in pixels, or a side"),
        ("naflex", (32, 0), r"input_size: found \(32, 0\); accepted: height and width in pixels, or a side"),
    ],
)
def test_sizes_that_a_model_cannot_take_are_refused(name: str, size: Any, message: str) -> None:
    model = build(name)
    with pytest.raises(diffrate.UnsupportedModelError, match=message):
        diffrate.patch.vit(model, 1, 1, size)
    assert not isinstance(model, diffrate.CompressedModel)
    assert not hasattr(model, "compression")


def test_a_size_that_patches_do_not_tile_is_taken_where_the_model_is_built_for_it(tmp_path: Path) -> None:
    """As timm's ViT-So400m of patches of 14 at 384 pixels, which drops what is left over; also from a file."""
    model = diffrate.patch.vit(build("class_token", img_size=36), 1, 1, (36, 36))
    assert model.token_grid == (4, 4)
    diffrate.save(model, tmp_path / "model.safetensors")
    assert diffrate.load(tmp_path / "model.safetensors").image_size == (36, 36)


@pytest.mark.parametrize("size", [32, [32, 32], (40, 24)])
def test_models_of_any_size_take_one(size: Any) -> None:
    model = diffrate.patch.vit(build("naflex"), 1, 1, size)
    height, width = model.image_size
    assert model(torch.zeros(1, 3, height, width, dtype=torch.float64), return_flop=False).isfinite().all()
    with pytest.raises(ValueError, match="tokens; accepted"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"images: found dict; accepted: a tensor \[B, channels, H, W\]"):
        model({"patches": None})


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_costs_are_those_of_torchs_counter(name: str) -> None:
    """But for the prefix tokens, which no stem embeds: as published they are counted with the patches."""
    model = dense(patched(name))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.classify(model.run_blocks(model.enter(images_for(name, 1)))[-1])
    stem = getattr(model, "patch_embed", None) or model.embeds
    beside = model.num_prefix_tokens * stem.proj.weight.numel() if hasattr(stem, "proj") else 0
    beside = 0 if "hybrid" in name else beside
    assert model.flops() - beside == counter.get_total_flops() // 2


def test_a_graph_is_traced_of_every_class_that_is_patched() -> None:
    assert {type(build(name)) for name in GRAPHS} == set(PLAIN)


@pytest.mark.parametrize("name", GRAPHS)
def test_one_graph_gives_the_same_logits(name: str) -> None:
    """Of three blocks, since tracing takes most of a second for each."""
    options = {"depth": 3} | ({"num_kv_heads": (4, 2, 4)} if name == "rope_fewer_keys" else {})
    model, images = reduced(name, (1, 0.75, 0.6), (1, 0.7, 0.5), **options), images_for(name)
    torch.compiler.reset()
    graph = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(graph(images, return_flop=False), model(images, return_flop=False), **EXACT)


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_pruning_alone_is_timms_blocks_on_the_tokens_left(name: str) -> None:
    """Block 1 prunes: its MLP and all later blocks see the tokens that are left, at their own positions."""
    model, images = reduced(name, (1, 0.5, 0.5, 0.5), (1, 0.5, 0.5, 0.5)), images_for(name, 1)
    states = model.forward_blocks(images)
    kept = places_of(states[1].origin)
    x = TimmBlock(model, 1).attend(states[0].x)[:, kept]
    x = TimmBlock(model, 1).mlp(x)
    torch.testing.assert_close(states[1].x, x, **EXACT)
    for index in (2, 3):
        x = TimmBlock(model, index, kept).run(x)
        torch.testing.assert_close(states[index].x, x, **EXACT)


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_search_agrees_with_dropping_tokens_for_real(name: str) -> None:
    """Masked, with hard counts: block 1 prunes, the last block that may merges. Sizes that are weighed by
    similarity are clamped in search, as published, which poolings see: here they are not weighed."""
    model = patched(name)
    model.train_to_search()
    model.rule = replace(model.rule, mean=Mean())
    patches, last = model.compression.patches, model.compression.space.searchable[-1]
    with torch.no_grad():
        for (block, kind), rate in zip(model.compression.space.choices, model.arch_parameters(), strict=True):
            kept = {(1, "prune"): patches - 5, (last, "merge"): patches - 9}.get((block, kind), patches)
            rate.fill_(0)
            rate[patches - kept] = 60
    images = images_for(name)
    masked = model(images, return_flop=False)
    dropped = model.eval()(images, return_flop=False)
    torch.testing.assert_close(masked, dropped, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_search_has_gradients_and_its_cost_is_that_of_its_counts(name: str) -> None:
    model = patched(name).train()
    model.compression.requires_grad_(True)
    logits, flops = model(images_for(name))
    (logits.square().sum() + flops / 1e9).backward()
    for rate in model.arch_parameters():
        assert rate.grad is not None
        assert rate.grad.isfinite().all()
        assert rate.grad.abs().max() > 0
    assert flops.item() == pytest.approx(model.flops_at(model.compression.expected_schedule()), rel=1e-6)


def test_a_search_leaves_batch_norms_as_they_are() -> None:
    """Their statistics are frozen like weights; a plain training mode would move them."""
    model = patched("hybrid_batch_norm")
    before = copy.deepcopy(model.state_dict())
    images = images_for("hybrid_batch_norm")
    space = model.compression.space
    fewest = model.flops_at(space.schedule([space.least] * 2 * len(space.searchable)))
    target = (fewest + model.flops_at(space.dense())) / 2  # the stem has most of the cost
    diffrate.search(model, [(images, torch.tensor([0, 1]))], target_flops=target, steps=1)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if not key.startswith("compression."))
    model.train_to_search()
    assert model.training


@pytest.mark.parametrize(
    "name",
    [
        "rope_dinov3",
        "rope_fewer_keys",
        pytest.param("naflex_rope", marks=since("1.0.31")),
    ],
)
def test_a_search_turns_by_the_angles_of_evaluation(name: str) -> None:
    """timm shifts them in training where the model says so."""
    model = patched(name)
    shifted = copy.deepcopy(model).train()
    for rope in (model.rope, shifted.rope):
        rope.shift_coords, rope.aug_active = 0.5, True
    model.train_to_search()
    images = images_for(name)
    first, again = (model(images, return_flop=False) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(shifted(images, return_flop=False), first)


def test_without_a_head_labels_are_of_no_use() -> None:
    model = patched("rope_dinov3", num_classes=0)
    batches = [(images_for("rope_dinov3"), torch.tensor([0, 1]))]
    with pytest.raises(
        diffrate.UnsupportedModelError, match="found a model without a head; accepted: one with classes"
    ):
        diffrate.search(model, batches, share=0.5)
    with pytest.raises(
        diffrate.UnsupportedModelError, match="found a model without a head; accepted: one with classes"
    ):
        diffrate.evaluate(model, batches)
    with pytest.raises(diffrate.UnsupportedModelError, match="accepted: one with classes and a pooling"):
        diffrate.search(patched("no_pool"), batches, share=0.8)
    model.head = nn.Linear(48, 5).double()  # one made by hand, of which timm knows nothing
    assert diffrate.evaluate(model, batches).images == 2
    assert diffrate.benchmark(model, batch_size=1, dtype=torch.float64, rounds=1).compressed_gflops > 0


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_prefix_tokens_stay_and_nothing_is_merged_into_them(name: str) -> None:
    model, images = reduced(name, (1, 1, 0.9, 0.3), (1, 0.6, 0.4, 0.25)), images_for(name)
    prefix, limits = model.compression.space.prefix, model.compression.space.limits
    for state, merged in zip(model.forward_blocks(images), model.get_kept_num()[1], strict=True):
        assert state.x.shape[1] == merged
        assert state.origin is not None
        for origin in state.origin:
            assert origin[:prefix].tolist() == list(range(prefix))
            assert not ((origin[prefix:] >= 0) & (origin[prefix:] < prefix)).any()
            assert set(origin.tolist()) - {-1} == set(range(merged))
    assert model(images, return_flop=False).isfinite().all()
    assert model.forward_features(images).shape[1] == limits[0]


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_the_fewest_tokens_still_see_the_image(name: str) -> None:
    model = patched(name)
    least, limit = model.compression.space.least, model.compression.space.limits[0]
    model.set_kept_num([limit, least, least, least], [limit, least, least, least])
    first, second = model(images_for(name), return_flop=False)
    assert first.isfinite().all()
    assert not torch.allclose(first, second)  # they still say something of the image
    if least > 1:
        with pytest.raises(diffrate.ScheduleError, match=f"accepted: {least} to {limit}"):
            model.set_kept_num([limit] * 4, [limit, limit, limit, least - 1])


@pytest.mark.parametrize("name", CARRYING)
def test_copies_and_states_give_the_same_logits(name: str) -> None:
    """Each construction's state goes into a file and back in `library/test_saving_constructions.py`."""
    model, images = reduced(name, (1, 0.75, 0.6, 0.5), (1, 0.7, 0.5, 0.4)), images_for(name)
    logits = model(images, return_flop=False)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(images, return_flop=False), logits)
    other = patched(name, num_classes=5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images, return_flop=False), logits)


@pytest.mark.parametrize("name", CARRYING)
def test_merged_tokens_keep_the_place_of_their_destination(name: str) -> None:
    """Of the tokens that one stands for, the most important kept its place, and it is the first in the order."""
    model, images = reduced(name, (1, 1, 1, 1), (1, 0.5, 0.5, 0.5)), images_for(name, 1)
    entry = model.enter(images)
    before, after = model.run_blocks(entry._replace(state=entry.state.traced().placed()))[:2]
    assert after.place is not None
    assert after.origin is not None
    for token, place in enumerate(after.place[0].tolist()):
        assert after.origin[0, place] == token
    assert before.place is not None
    assert before.place.flatten().tolist() == list(range(before.x.shape[1]))


@pytest.mark.parametrize("name", CARRYING)
def test_a_pruned_position_keeps_what_its_token_last_was(name: str) -> None:
    """At the full grid: block 1 prunes after its attention, and all that later blocks do is not for those tokens."""
    model, images = reduced(name, (1, 0.5, 0.5, 0.5), (1, 0.5, 0.5, 0.5)), images_for(name, 1)
    states = model.forward_blocks(images)
    assert states[1].origin is not None
    gone = states[1].origin[0] < 0
    last = TimmBlock(model, 1).attend(states[0].x)
    features = model.forward_features(images)
    torch.testing.assert_close(features[:, gone], model.norm(last)[:, gone], **EXACT)
    torch.testing.assert_close(features[:, ~gone], model.norm(standing(states[-1]))[:, ~gone], **EXACT)


def test_a_size_is_weighed_by_every_pooling() -> None:
    """Two equal tokens, and one that counts for two, give the same."""
    from diffrate.blocks.tokens import TokenState
    from diffrate.patch.features import pooled

    for name in ("no_class_token", "avgmax", "max", "attention_pool"):
        model = build(name)
        x = torch.randn(1, 5, 48, dtype=torch.float64)
        twice = TokenState(torch.cat([x, x[:, 4:]], dim=1))
        weighed = TokenState(x, torch.tensor([[1.0, 1, 1, 1, 2]], dtype=torch.float64))
        torch.testing.assert_close(pooled(model, weighed, 0), pooled(model, twice, 0))


def test_importance_of_a_distilled_model_is_the_mean_of_its_two_tokens() -> None:
    from diffrate.blocks.attention import Heads, first_tokens_attention

    heads = Heads(*torch.randn(3, 2, 3, 7, 4, dtype=torch.float64), 0.5)
    weights = (heads.query @ heads.key.transpose(-2, -1) * 0.5).softmax(-1).mean(1)
    torch.testing.assert_close(first_tokens_attention(heads, None, 2), weights[:, :2].mean(1))


def test_importance_without_a_class_token_is_the_attention_received(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether all maps are made at once or a few images at a time."""
    from diffrate.blocks import attention

    heads = attention.Heads(*torch.randn(3, 5, 3, 7, 4, dtype=torch.float64), 0.5)
    bias = torch.randn(5, 1, 1, 7, dtype=torch.float64)
    weights = (heads.query @ heads.key.transpose(-2, -1) * 0.5 + bias).softmax(-1)
    for elements in (1, 300, 10**6):
        monkeypatch.setattr(attention, "CACHED_ELEMENTS", elements)
        mixed, importance = attention.attend_and_rank(heads, bias, 0.0, 0)
        torch.testing.assert_close(importance, weights.sum((1, 2)))
        torch.testing.assert_close(mixed, weights @ heads.value)


class TimmBlock:
    """timm's own block number `index` of `model`, on the input positions in `kept` alone."""

    def __init__(self, model: Any, index: int, kept: Tensor | None = None) -> None:
        self.block = copy.deepcopy(model.blocks[index])
        tokens = model.compression.space.limits[0]
        kept = torch.arange(tokens) if kept is None else kept
        prefix = model.num_prefix_tokens
        self.options: dict[str, Any] = {}
        if getattr(model, "rope", None) is not None:
            rope = model.rope.get_embed(shape=list(model.token_grid))
            rope = rope[index] if rope.ndim == 4 else rope
            self.options["rope"] = rope[..., kept[prefix:] - prefix, :]
        if getattr(model, "rel_pos_bias", None) is not None:
            self.options["shared_rel_pos_bias"] = model.rel_pos_bias()[:, kept][:, :, kept][None]
        if getattr(model, "shared_rel_pos", None) is not None:
            self.options["shared_rel_pos"] = model.shared_rel_pos.get_bias()[:, :, kept][:, :, :, kept]
        self._narrow(self.block.attn, kept)

    def _narrow(self, attention: Any, kept: Tensor) -> None:
        """Give an attention with a bias of its own that of the kept positions."""
        if getattr(attention, "rel_pos", None) is not None:
            whole = type(attention.rel_pos).get_bias(attention.rel_pos)
            attention.rel_pos.get_bias = lambda: whole[:, :, kept][:, :, :, kept]
        if getattr(attention, "relative_position_bias_table", None) is not None:
            whole = type(attention)._get_rel_pos_bias(attention)
            attention._get_rel_pos_bias = lambda: whole[:, :, kept][:, :, :, kept]

    def run(self, x: Tensor) -> Tensor:
        """The whole block."""
        return self.block(x, **self.options)

    def attend(self, x: Tensor) -> Tensor:
        """The block without its MLP: silenced, it adds nothing."""
        block = copy.copy(self.block)
        block._modules = {**self.block._modules, "mlp": Silent()}
        if not isinstance(self.block._modules.get("norm2"), nn.Identity) and is_post_norm(self.block):
            block._modules["norm2"] = nn.Identity()
        return block(x, **self.options)

    def mlp(self, x: Tensor) -> Tensor:
        """The block without its attention."""
        block = copy.copy(self.block)
        block._modules = {**self.block._modules, "attn": Silent()}
        if is_post_norm(self.block):
            block._modules["norm1"] = nn.Identity()
        return block(x, **self.options)


class Silent(nn.Module):
    """Adds nothing, whatever it is given."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return torch.zeros_like(x)


def is_post_norm(block: nn.Module) -> bool:
    """Whether norms come after attention and MLP: they would make something of nothing."""
    return "Post" in type(block).__name__


def standing(state: diffrate.TokenState) -> Tensor:
    """Features of the token that stands for each input position, for one image; any where none does."""
    assert state.origin is not None
    return state.x[:, state.origin[0].clamp(min=0)]


def places_of(origin: Tensor | None) -> Tensor:
    """The input positions that stand for themselves, in the order of the tokens, for one image without merging."""
    assert origin is not None
    order = origin[0].argsort()
    return order[(origin[0] < 0).sum() :]
