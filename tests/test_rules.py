"""Rules by name: which tokens go and into which others, against loops; the same in search; in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import diffrate
from diffrate.blocks.rules import NAMED
from diffrate.blocks.tokens import TokenState
from diffrate.schedule import (
    RULE_NAMES,
    RULES,
    Kept,
    Schedule,
    ScheduleError,
    find_schedule,
    make_schedule,
    save_schedule,
)
from tests.tiny_models import IMAGE_SIZE, plain

PRUNE, MERGE = (65, 60, 50, 40, 30, 20), (65, 50, 30, 12, 11, 9)  # in one block more than half go
EXACT = {"atol": 1e-9, "rtol": 0.0}


def model_of(name: str = "deit") -> diffrate.CompressedModel:
    return diffrate.patch.vit(plain(name).double().eval())


def images(count: int = 3, side: int = 32) -> Tensor:
    return torch.randn(count, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_each_rule_has_one_row_in_both_tables() -> None:
    assert list(NAMED) == list(RULES)
    published = model_of().rule
    for name, work in RULES.items():
        rule = NAMED[name](published, 3 / 6)
        assert rule.pairing.ranks(Kept(9, 9, 7)) == work.ranks, name
        assert (rule.importance.queries == 0) == work.received, name
        assert (type(rule.pairing) is not type(published.pairing)) == (work.halves or work.free), name
    assert NAMED["published"](published, 3 / 6) is published


def halves_by_loop(x: Tensor, size: Tensor, importance: Tensor, going: int, prefix: int, name: str) -> Tensor:
    """One image `[N, C]`: the features that are left, in any order."""
    patches = list(range(prefix, len(x)))
    if name in ("minor_into_major", "received_halves"):
        patches.sort(key=lambda token: -importance[token])
        half = len(patches) - len(patches) // 2
        targets, sources = patches[:half], patches[half:]
    else:
        targets, sources = patches[::2], patches[1::2]
    aversion = {"similar_less_important": 0.2, "received_halves": 0.1}.get(name, 0.0)
    ranked = []
    for source in sources:
        cosines = [torch.cosine_similarity(x[source], x[target], dim=0).item() for target in targets]
        best = max(range(len(targets)), key=cosines.__getitem__)
        relative = importance[source] / importance[prefix:].mean()
        ranked.append((cosines[best] - aversion * relative.item(), source, targets[best]))
    gone = {source: target for _, source, target in sorted(ranked, reverse=True)[:going]}
    rows = []
    for token in range(len(x)):
        if token in gone:
            continue
        parts = [token, *(source for source, target in gone.items() if target == token)]
        weights = torch.ones_like(size[parts]) if name == "received_halves" else size[parts]
        rows.append((weights[:, None] * x[parts]).sum(0) / weights.sum())
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["similar", "similar_less_important", "minor_into_major", "received_halves"])
@pytest.mark.parametrize("batch", [1, 3])
def test_halves_merge_as_a_loop_says(name: str, batch: int) -> None:
    generator, model = torch.Generator().manual_seed(0), model_of()
    x = torch.randn(batch, 17, 8, dtype=torch.float64, generator=generator)
    size = torch.randint(1, 5, (batch, 17), generator=generator).double()
    importance = torch.rand(batch, 17, dtype=torch.float64, generator=generator)
    rule = NAMED[name](model.rule, 1 / 6)
    kept = Kept(17, 17, 11)
    state = TokenState(x, size).traced()
    left = rule.pairing.reduce(state, importance, None, kept, 1, rule.mean)  # type: ignore[arg-type]
    for image in range(batch):
        expected = halves_by_loop(x[image], size[image], importance[image], 6, 1, name)
        found = left.x[image]
        assert torch.cdist(found, expected).min(dim=1).values.max() < 1e-9
        assert torch.equal(found[0], x[image, 0])
    if name != "received_halves":  # sizes add up
        torch.testing.assert_close(left.sizes().sum(1), size.sum(1))


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, "deit") for name in RULE_NAMES if name != "random"),  # differs from pass to pass
        *(("received_halves", "mae"), ("similar", "caformer"), ("received_halves", "caformer")),
    ],
)
def test_a_model_runs_by_each_rule_and_images_do_not_meet(name: str, family: str) -> None:
    model = model_of(family)
    limits, space = model.compression.space.limits, model.compression.space
    counts = [max(space.least, round(limit * (1 - 0.15 * block))) for block, limit in enumerate(limits)]
    merge = [count if block in space.searchable else limits[block] for block, count in enumerate(counts)]
    model.schedule = make_schedule(limits if space.prunes else None, merge, name)
    batch = images(side=IMAGE_SIZE[family])
    together = model(batch, return_flop=False)
    torch.testing.assert_close(together, torch.cat([model(one, return_flop=False) for one in batch.split(1)]), **EXACT)
    dense = model.outputs_at(batch, model.dense_schedule())
    assert 1e-6 < (together - dense).abs().max() < 10
    state = model.forward_tokens(batch)
    origin, kept = state.origin, merge[max(space.searchable)]
    assert origin is not None
    assert state.x.shape[1] == kept
    # All merge; of half of the patches at most by `pitome`, none by `sliced`.
    assert (origin >= 0).all() or name in ("pitome", "sliced")
    if name not in ("published", "valued", "received", "received_halves"):  # sizes add up
        counted = torch.stack([(origin == token).sum(1) for token in range(kept)], dim=1)
        torch.testing.assert_close(state.sizes(), counted.double())


@pytest.mark.parametrize("name", [name for name in RULE_NAMES if name not in ("random", "pitome", "sliced")])
def test_a_search_sees_what_fixed_counts_will_do(name: str) -> None:
    """With masks, at the counts that the rates expect; the published rule has quirks there, and its own tests."""
    model = model_of()
    schedule = make_schedule(PRUNE, MERGE, name)
    model.compression.space = model.compression.space.ruled(name)
    model.compression.set_granularity(1, 1)
    model.compression.start_at(schedule)
    assert model.compression.expected_schedule() == schedule
    batch = images()
    with torch.no_grad():
        masked, _ = model.search_step(batch)
        fixed = model.outputs_at(batch, schedule)
    close = 1e-4 if RULES[name].halves and name != "received_halves" else 0.5
    torch.testing.assert_close(masked, fixed, atol=close, rtol=0)


def test_rates_learn_by_a_rule_that_is_given() -> None:
    model, batch = diffrate.patch.vit(plain("deit")), images(8).float()
    before = [rate.detach().clone() for rate in model.arch_parameters()]
    options = {"share": 0.7, "loss": "distill", "budget": "held", "rule": "similar_less_important"}
    found = diffrate.search(model, [(batch, torch.zeros(8, dtype=torch.long))] * 6, **options)
    assert found.schedule.rules == ("similar_less_important",) * 6
    assert model.compression.space.rules is None
    assert any(not torch.equal(rate, old) for rate, old in zip(model.arch_parameters(), before, strict=True))


RULED = ("published", "published", "similar", "received", "minor_into_major", "similar")


def test_rules_are_written_and_read(tmp_path: Path) -> None:
    rates = tmp_path / "rates.json"
    for target, rules in ((1.0, "similar"), (2.0, RULED), (3.0, None)):
        save_schedule(rates, "A", target, make_schedule(PRUNE, MERGE, rules))
        assert find_schedule(rates, "A", target) == make_schedule(PRUNE, MERGE, rules)
    assert '"rules": "similar"' in rates.read_text()
    assert rates.read_text().count("rules") == 2
    assert make_schedule(PRUNE, MERGE, "published") == Schedule(PRUNE, MERGE)
    for wrong in ("best", ("similar",), 3, ["similar"] * 5 + [[]]):
        with pytest.raises(ScheduleError, match=r"^rules: found .*; accepted: one of published, "):
            make_schedule(PRUNE, MERGE, wrong)  # type: ignore[arg-type]


def test_rules_go_with_the_model(tmp_path: Path) -> None:
    model, batch = model_of(), images()
    model.schedule = make_schedule(PRUNE, MERGE, RULED)
    expected = model(batch, return_flop=False)
    other = model_of()
    other.load_state_dict(model.state_dict())
    assert other.schedule == model.schedule
    diffrate.save(model, tmp_path / "model.safetensors")
    for again in (other, diffrate.load(tmp_path / "model.safetensors")):
        assert again.schedule.rules == RULED
        assert torch.equal(again(batch, return_flop=False), expected)
    model.set_kept_num(PRUNE, MERGE)
    assert model.schedule.rules is None
    for wrong in (("tome",) * 5, ("best",) * 6):
        with pytest.raises(ScheduleError, match=r"^rules: found .*, or 6 of them$"):
            model.check(Schedule(PRUNE, MERGE, rules=wrong))
    with pytest.raises(ValueError, match="rules in the state dict: found"):
        model.compression.set_extra_state(torch.tensor([PRUNE, MERGE, [99] * 6]))


def test_one_compiled_graph_runs_all_rules() -> None:
    """Every part of which a rule is made: tracing a block takes a second."""
    rules = ("published", "valued", "received", "received_halves", "tome", "pitome", "sliced")
    model = diffrate.patch.vit(plain("deit", depth=len(rules)).eval())
    counts = [65 - 6 * block for block in range(len(rules))]
    model.schedule = make_schedule([min(65, count + 2) for count in counts], counts, rules)
    compiled, batch = torch.compile(model, fullgraph=True, backend="eager"), images().float()
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(batch, return_flop=False), model(batch, return_flop=False), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("batch", [1, 3])
def test_slicing_keeps_the_first_tokens_as_they_are(batch: int) -> None:
    """It is what all rules' speed is compared with: views alone, and no attention row."""
    rule, kept = NAMED["sliced"](model_of().rule, 0.5), Kept(17, 15, 11)
    state = TokenState(torch.randn(batch, 17, 8)).traced()
    left = rule.reduced(state, (None, None), kept)  # type: ignore[arg-type]
    assert left.x.data_ptr() == state.x.data_ptr()
    assert torch.equal(left.x, state.x[:, :11])
    assert left.size is None
    assert left.origin is not None
    assert left.origin.tolist() == [[*range(11), *([-1] * 6)]] * batch


def test_no_search_goes_by_slicing() -> None:
    with pytest.raises(diffrate.SearchSettingError, match="rule: found 'sliced'"):
        diffrate.search(model_of(), [images().float()], share=0.5, method="calibrated", rule="sliced")
