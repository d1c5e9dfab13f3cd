"""`diffrate.compile_merging`: the results of eager merging, from one call of compiled code."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import diffrate
from diffrate.blocks.block import kept_and_merged
from diffrate.blocks.rules import ReductionRules
from diffrate.blocks.tokens import TokenState
from diffrate.budgets.schedule import Kept
from diffrate.running import merging
from diffrate.running.merging import CompiledMerging, merging_of
from tests.test_patch import images, patched

PUBLISHED = ReductionRules(prefix=1, speakers=1, spared=1, weigh_by_similarity=True)
OTHER = ReductionRules(prefix=0, speakers=0, spared=1, weigh_by_similarity=False)
COUNTS = [(2, 9, 8, 3), (1, 9, 8, 7), (5, 40, 40, 39), (1, 3, 3, 2), (1, 197, 190, 60), (3, 50, 49, 2)]


@pytest.fixture(autouse=True)
def _kept_for_this_run(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is compiled is there for all processes of this run of tests, and for no other."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp().parent / "compiled"))


def tokens_of(batch: int, tokens: int, dtype: torch.dtype, rules: ReductionRules) -> tuple[TokenState, torch.Tensor]:
    """Tokens that stand for several, and their importance as a block hands it on: a part of a wider tensor."""
    generator = torch.Generator().manual_seed(batch * tokens)
    x = torch.randn(batch, tokens, 24, generator=generator).to(dtype)
    size = torch.randint(1, 4, (batch, tokens), generator=generator).float()
    importance = torch.stack([torch.randperm(tokens, generator=generator).float() for _ in range(batch)])
    return TokenState(x, size), importance[:, rules.prefix :]


@pytest.mark.parametrize(
    ("rules", "dtype", "placed"), [(PUBLISHED, torch.float32, False), (OTHER, torch.bfloat16, True)], ids=str
)
def test_the_same_as_eager(rules: ReductionRules, dtype: torch.dtype, placed: bool) -> None:
    for batch, tokens, pruned, merged in COUNTS:
        state, importance = tokens_of(batch, tokens, dtype, rules)
        kept = Kept(tokens, pruned, merged)
        for before in (state, state._replace(size=None)):
            before = before.placed() if placed else before
            expected = kept_and_merged(rules, before, importance, kept)
            found = CompiledMerging()(rules, before, importance, kept)
            assert found is not None
            torch.testing.assert_close(found.x, expected.x)
            torch.testing.assert_close(found.size, expected.size)
            assert (found.place is None) == (expected.place is None) == (not placed)
            if placed:
                torch.testing.assert_close(found.place, expected.place)


def test_models_of_one_kind_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched("deit").float()
    plain = copy.deepcopy(model)
    calls = []

    def counted(*kind: object) -> merging.Run:
        calls.append(kind)
        return merging_of(*kind)

    monkeypatch.setattr(merging, "merging_of", counted)
    assert diffrate.compile_merging(model) is model
    photographs = images("deit").float()
    with torch.inference_mode():
        expected, found = plain(photographs, return_flop=False), model(photographs, return_flop=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert set(calls) == {(torch.float32, torch.float32, False, 1, 1, True)}
    assert model.rules == plain.rules  # a saved file does not know of it
    assert copy.deepcopy(model).rules.compiled is not None


def test_what_compiled_code_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "merging_of", lambda *kind: pytest.fail("was asked"))
    state, importance = tokens_of(2, 9, torch.float32, PUBLISHED)
    merge = CompiledMerging()
    assert merge(PUBLISHED, state, importance, Kept(9, 6, 6)) is None, "pruning alone"
    assert merge(PUBLISHED, state, importance, Kept(9, 6, 1)) is None, "nothing to merge into"
    assert merge(PUBLISHED, state.traced(), importance, Kept(9, 6, 4)) is None, "tokens that are followed"
    learning = state._replace(x=state.x.clone().requires_grad_())
    assert merge(PUBLISHED, learning, importance, Kept(9, 6, 4)) is None, "gradients"
    many = TokenState(torch.zeros(1, 9, 1).expand(merging.FEW_ELEMENTS // 9 + 1, 9, 1))
    assert merge(PUBLISHED, many, torch.zeros(len(many.x), 8), Kept(9, 6, 4)) is None, "many images"


def test_a_model_that_is_not_patched_is_refused() -> None:
    with pytest.raises(diffrate.UnsupportedModelError, match="Linear"):
        diffrate.compile_merging(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_nothing_is_left_where_compiling_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(diffrate.MergingCompileError, match=r"^compile_merging: no compiler; accepted: with a C"):
        merging_of(torch.float16, torch.float32, False, 1, 1, True)
    assert list((tmp_path / "diffrate" / "merging").iterdir()) == []
