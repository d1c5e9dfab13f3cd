"""`diffrate.compile_merging`: the results of eager merging, from one call of compiled code."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch

import diffrate
from diffrate.blocks.block import kept_and_merged
from diffrate.blocks.rules import ReductionRules
from diffrate.blocks.tokens import TokenState
from diffrate.budgets.schedule import Kept
from diffrate.latency import measure
from diffrate.latency.setting import check_table, use_for
from diffrate.running import merging
from diffrate.running.merging import merged_by_code
from diffrate.running.merging_code import LEAST_TORCH, Kind, Run, _made, _name, merging_of
from tests.cli.test_eval import scores
from tests.conftest import Cli
from tests.test_patch import images, patched

PUBLISHED = ReductionRules(prefix=1, speakers=1, spared=1, weigh_by_similarity=True)
OTHER = ReductionRules(prefix=0, speakers=0, spared=1, weigh_by_similarity=False)
NEW_ENOUGH = tuple(map(int, torch.__version__.split(".")[:2])) >= LEAST_TORCH
pytestmark = pytest.mark.skipif(not NEW_ENOUGH, reason="compiled merging needs a newer torch")
COUNTS = [(2, 9, 8, 3), (1, 9, 8, 7), (5, 40, 40, 39), (1, 3, 3, 2), (1, 197, 190, 60), (3, 50, 49, 2)]


@pytest.fixture(autouse=True)
def _kept_for_this_run(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is compiled is there for all processes of this run of tests, and for no other."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared / "compiled"))
    # What is compiled for one thread, as tests run with, is other code than what users run.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def tokens_of(batch: int, tokens: int, dtype: torch.dtype, rules: ReductionRules) -> tuple[TokenState, torch.Tensor]:
    """Tokens that stand for several, and their importance as a block hands it on: a part of a wider tensor."""
    generator = torch.Generator().manual_seed(batch * tokens)
    x = torch.randn(batch, tokens, 24, generator=generator).to(dtype)
    size = torch.randint(1, 4, (batch, tokens), generator=generator).float()
    importance = torch.stack([torch.randperm(tokens, generator=generator).float() for _ in range(batch)])
    return TokenState(x, size), importance[:, rules.prefix :]


def failing(*_: object, **__: object) -> None:
    """In place of what compiles."""
    raise RuntimeError("no compiler\nat all")


def known_of(state: TokenState) -> TokenState:
    """The same tokens, of which everything is followed."""
    return state.placed().remembered()


def assert_alike(found: TokenState | None, expected: TokenState) -> None:
    """All that is known of the tokens."""
    assert found is not None
    for name, value in expected._asdict().items():
        other = getattr(found, name)
        assert (other is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(other, value.expand_as(other), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("rules", "dtype", "followed"), [(PUBLISHED, torch.float32, False), (OTHER, torch.bfloat16, True)], ids=str
)
def test_the_same_as_eager(rules: ReductionRules, dtype: torch.dtype, followed: bool) -> None:
    for batch, tokens, pruned, merged in COUNTS:
        state, importance = tokens_of(batch, tokens, dtype, rules)
        kept = Kept(tokens, pruned, merged)
        for before in (state, state._replace(size=None)):
            before = known_of(before) if followed else before
            expected = kept_and_merged(rules, before, importance, kept)
            assert_alike(merged_by_code(rules, before, importance, kept), expected)


def test_models_of_one_kind_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched("deit").float()
    plain = copy.deepcopy(model)
    calls = []

    def counted(kind: Kind) -> Run:
        calls.append(kind)
        return merging_of(kind)

    monkeypatch.setattr(merging, "merging_of", counted)
    assert diffrate.compile_merging(model) is model
    photographs = images("deit").float()
    with torch.inference_mode():
        expected, found = plain(photographs, return_flop=False), model(photographs, return_flop=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert set(calls) == {Kind(torch.float32, (), 1, 1, True, 2)}
    assert model.rules == plain.rules  # a saved file does not know of it
    assert copy.deepcopy(model).rules.compiled is not None


@pytest.mark.parametrize("family", ["deit", "caformer"])
def test_graphs_of_a_model_do_without(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "merging_of", lambda kind: pytest.fail("was asked"))
    model = diffrate.compile_merging(patched(family).float())
    expected = patched(family).float()(images(family).float(), return_flop=False)
    found = diffrate.plain(model)(images(family).float())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_compiled_code_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "merging_of", lambda kind: pytest.fail("was asked"))
    state, importance = tokens_of(2, 9, torch.float32, PUBLISHED)
    merge = merged_by_code
    assert merge(PUBLISHED, state, importance, Kept(9, 6, 6)) is None, "pruning alone"
    assert merge(PUBLISHED, state, importance, Kept(9, 6, 1)) is None, "nothing to merge into"
    learning = state._replace(x=state.x.clone().requires_grad_())
    assert merge(PUBLISHED, learning, importance, Kept(9, 6, 4)) is None, "gradients"
    searched = state._replace(mask=torch.ones(2, 9))
    assert merge(PUBLISHED, searched, importance, Kept(9, 6, 4)) is None, "a search"


def test_the_command_line_scores_the_same(cli: Cli) -> None:
    words = ("--eval", "--load_compression_rate", "--batch-size", 8, "--num_workers", 0, "--quiet")
    (code, out, err), (again, compiled, _) = (cli(*words, *more) for more in ((), ("--compile_merging",)))
    assert (code, again, err) == (0, 0, "")
    assert scores(compiled) == pytest.approx(scores(out), abs=0.002)


def test_without_a_compiler_one_line_says_so(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", failing)
    merging_of.cache_clear()
    words = ("--eval", "--load_compression_rate", "--batch-size", 8, "--num_workers", 0, "--compile_merging", "--quiet")
    code, _, err = cli(*words)
    assert (code, err) == (
        2,
        "main.py: error: --compile_merging: no compiler; accepted: with a C++ compiler that works\n",
    )


def test_tables_are_of_one_way_to_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched("deit").float()
    for name, value in (("RUNS", (5, 5)), ("WHOLE", ())):
        monkeypatch.setattr(measure, name, value)
    table = diffrate.measure_latency(model, batch_size=1, seconds=0.01)
    compiled = diffrate.compile_merging(copy.deepcopy(model))
    check_table(table, model)
    message = r"^latency: found a table of a model with other mode \(eager\); accepted: eager, merging compiled$"
    with pytest.raises(ValueError, match=message):
        check_table(table, compiled)
    monkeypatch.setattr(merging, "merging_of", lambda kind: pytest.fail("was asked"))
    assert use_for(compiled, 1, torch.float32, True, torch.device("cpu")).mode == "compiled"
    assert use_for(compiled, 1, torch.float32, False, torch.device("cuda")).mode == "eager"
    words = use_for(compiled, 1, torch.float32, False, torch.device("cpu")).words()
    assert words == "batch 1, float32, eager, merging compiled"


def test_a_model_that_is_not_patched_is_refused() -> None:
    with pytest.raises(diffrate.UnsupportedModelError, match="Linear"):
        diffrate.compile_merging(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_nothing_is_left_where_compiling_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", failing)
    kind = Kind(torch.float16, (), 1, 1, True, 1)
    with pytest.raises(diffrate.MergingCompileError, match=r"^compile_merging: no compiler; accepted: with a C"):
        merging_of(kind)
    assert list((tmp_path / "diffrate" / "merging").iterdir()) == []
    damaged = tmp_path / "diffrate" / "merging" / _name(kind)
    damaged.mkdir()
    (damaged / "version").write_text("0")
    with pytest.raises(diffrate.MergingCompileError):  # it is tried again
        merging_of(kind)
    assert not damaged.exists()


def test_an_older_torch_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("diffrate.running.merging_code.LEAST_TORCH", (99, 1))
    kind = Kind(torch.float32, ("place",), 1, 1, True, 1)
    with pytest.raises(diffrate.MergingCompileError, match=r"^compile_merging: needs torch 99\.1; found \d"):
        _made(kind, tmp_path)
    assert not any(tmp_path.iterdir())
