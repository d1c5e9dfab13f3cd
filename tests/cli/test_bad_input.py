"""Bad input, as one table: a line that names flag or file, value and what is accepted, and exit code 2; or the right
result. Nothing runs, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

import engine
from cli.data import View, crop_view, eval_transform
from datasets import load_image
from diffrate.searching.checkpoint import Task
from sample import MODEL
from tests import hostile_files
from tests.cli.test_errors import check
from tests.conftest import Cli, write_image
from tests.tiny_models import saved_file

NO_TENSORS = "cannot be read, cut short or not a checkpoint"
OBJECTS = "accepted: JSON, an object of models, each an object of targets"
PACKED = "accepted: up to twice as many"


class Row(NamedTuple):
    """Words of a command line after those of its group, and what its one line holds; None where it is to succeed.

    `@` stands for the folder with all files, `%` for an empty one.
    """

    words: str
    said: str | None


CHECKPOINTS = [  # after --checkpoint @/
    Row("empty.pth", NO_TENSORS),
    Row("empty.npz", "found no NumPy archive; accepted: one of numpy.savez"),
    Row("empty.safetensors", NO_TENSORS),
    Row("text.pth", NO_TENSORS),
    Row("text.npz", "found no NumPy archive"),
    Row("text.safetensors", NO_TENSORS),
    Row("text.jpg", NO_TENSORS),
    Row("folder.pth", "no such file"),
    Row("folder.safetensors", "no such file"),
    Row("gone.pth", "no such file"),
    Row("runs.pth", "(not plain tensors); accepted: a file of torch.save with plain tensors"),
    Row("runs_bare.pth", "(not plain tensors)"),
    Row("runs.npz", "cannot be read into CompressedVisionTransformer"),
    Row("none.pth", "found no tensors; accepted: a state dict, alone or under 'model'"),
    Row("list.pth", "found no tensors"),
    Row("numbers.pth", "found no tensors"),
    Row("wrapped_numbers.pth", "does not fit the model: found a.b, ...; accepted: cls_token, "),
    Row("recursive.pth", "found 'model' in itself; accepted: a state dict"),
    Row("sparse.pth", "head.weight: found a sparse tensor; accepted: one with all its numbers"),
    Row("repeated.pth", "head.weight: found a tensor of [100000, 100000]; accepted: one with all its numbers"),
    Row("scalar.pth", "has no head"),
    Row("nothing.pth", "has no head"),
    Row("whole.pth", "head.weight: found torch.int64; accepted: floats of 16 bits or more"),
    Row("space.pth", "(not plain tensors)"),
    Row("bomb.pth", PACKED),
    Row("bomb.npz", PACKED),
    Row("longest.safetensors", NO_TENSORS),
    Row("negative.safetensors", NO_TENSORS),
    Row("no_json.safetensors", NO_TENSORS),
    Row("overlap.safetensors", NO_TENSORS),
    Row("before.safetensors", NO_TENSORS),
    Row("beyond.safetensors", NO_TENSORS),
    Row("larger.safetensors", NO_TENSORS),
    Row("deep.safetensors", NO_TENSORS),
]
RATES = [  # after --load_compression_rate --target_flops 0.02 --compression_rate_file @/
    Row("good.json", None),
    Row("a ä ☃.json", None),
    Row("text_arrays.json", None),
    Row("more_fields.json", None),
    Row("gone.json", "cannot be read (No such file or directory)"),
    Row("folder.json", "cannot be read (Is a directory)"),
    Row("empty.json", f"cannot be read (Expecting value: line 1 column 1 (char 0)); {OBJECTS}"),
    Row("text.json", "cannot be read (Expecting value: line 1 column 1"),
    Row("zeros.json", "cannot be read (Expecting value: line 1 column 1"),
    Row("large.json", "found 100,000,000 bytes; accepted: up to 4,194,304"),
    Row("utf16.json", f"0: invalid start byte); {OBJECTS}"),
    Row("deep.json", f"cannot be read (nested too deeply); {OBJECTS}"),
    Row("deep_objects.json", "nested too deeply"),
    Row("array.json", OBJECTS),
    Row("null.json", OBJECTS),
    Row("list_of_targets.json", OBJECTS),
    Row("no_models.json", "no schedules for ViT-Sample; accepted: nothing, it is empty"),
    Row("no_targets.json", "ViT-Sample is empty"),
    Row("other_model.json", "no schedules for ViT-Sample; accepted: Other"),
    Row("word.json", "ViT-Sample has no --target_flops 0.02; accepted: two"),
    Row("steers.json", r"accepted: \x1b[31mred\nmain.py: all is well"),
    Row("twice_a_model.json", "found 'ViT-Sample' twice in an object"),
    Row("twice_a_target.json", "found '0.02' twice in an object"),
    Row("twice_a_field.json", "found 'merge_kept_num' twice in an object"),
    Row("twice_in_other_digits.json", "found 0.02 and 0.020; accepted: one schedule for a target"),
    Row("list_of_counts.json", "merge_kept_num: found none; accepted: an array of counts"),
    Row("nan.json", "merge_kept_num[0]: found nan; accepted: whole numbers"),
    Row("infinite.json", "merge_kept_num[0]: found inf; accepted: whole numbers"),
    Row("zero.json", "merge_kept_num[0]: found 0; accepted: 1 to 50"),
    Row("underscore.json", "Expecting ',' delimiter: line 1 column 93"),
    Row("digits.json", "found a number of 5000 digits"),
    Row("digits_in_text.json", "merge_kept_num: found '[999"),
    Row("deep_in_text.json", "merge_kept_num: found '[[["),
    Row("truth.json", "merge_kept_num[0]: found True"),
    Row("texts.json", "merge_kept_num[0]: found '50'"),
    Row("object.json", "merge_kept_num[0]: found 'a'"),
    Row("blocks.json", "prune_kept_num: found 12 counts; accepted: 8, one per block"),
    Row("tokens.json", "made for 197 tokens; accepted: 50 tokens"),
    Row("tokens.json --scale_compression_rate", None),
    Row("tokens_below.json", "tokens: found -1; accepted: a whole number from 2"),
    Row("tokens_half.json", "tokens: found 50.0; accepted: a whole number from 2"),
    Row("no_rule.json", "rules: found 'magic'; accepted: one of published, "),
    Row("rules.json", "rules: found \"[['tome'], "),
]
EVALUATIONS = [
    Row("--batch-size 1_0", "--batch-size: found 1_0; accepted: from 1 to 2147483647, in plain digits"),
    Row("--batch-size ٣", "--batch-size: found ٣; accepted: from 1"),
    Row("--batch-size nan", "--batch-size: invalid whole number value: 'nan'"),
    Row("--batch-size -0", "--batch-size: found -0; accepted: from 1"),
    Row("--seed 1_0", "--seed: found 1_0"),
    Row("--seed -1", "--seed: found -1; accepted: from 0 to 4294967295"),
    Row("--crop-pct 0_1", "--crop-pct: found 0_1"),
    Row("--crop-pct 1e999", "--crop-pct: found 1e999; accepted: above 0 to 1"),
    Row("--crop-pct -0.0", "--crop-pct: found -0.0; accepted: above 0 to 1"),
    Row("--input-size 2_8", "--input-size: found 2_8"),
    Row("--input-size 28 28 28", "--input-size: found 3 numbers; accepted: a side, or rows and columns"),
    Row("--input-size 28 30", "--input-size 28 30: accepted: a multiple of 4"),
    Row("--num_workers 1e999", "--num_workers: invalid whole number value: '1e999'"),
    Row("--device cuda:99999999999", "--device cuda:99999999999: unknown or not supported; accepted: auto"),
    Row("--device a\nb", r"--device a\nb: unknown"),
    Row("--amp \x1b[31m", "--amp: invalid choice: '\\x1b[31m'"),
    Row("--load_compression_rate --target_flops 0.0_2", "--target_flops: found 0.0_2; accepted: GFLOPs"),
    Row("--load_compression_rate --target_flops 2_0%", "--target_flops: found 2_0%"),
    Row("--load_compression_rate --target_flops 1e999", "--target_flops: found 1e999; accepted: above 0"),
    Row("--load_compression_rate --target_flops -0.0", "--target_flops: found -0.0; accepted: above 0"),
    Row("--load_compression_rate --dense", "--dense keeps all tokens; accepted: "),
    Row("--output_dir @/text.jpg", "--output_dir @/text.jpg: File exists; accepted: a folder that can be made"),
    Row("--output_dir @/text.jpg/below", "--output_dir @/text.jpg/below: Not a directory; accepted: a folder"),
    Row("--output_dir /proc/below", "--output_dir /proc/below: No such file or directory; accepted: a folder"),
    Row("--save ", "--save: found an empty name; accepted: a path"),
    Row("--save %/x.pth", "--save %/x.pth: accepted: a name that ends in .safetensors"),
    Row("--save @/folder.safetensors", "found a folder; accepted: the name of a file"),
    Row("--save /nowhere/x.safetensors", "no folder /nowhere"),
    Row("--save /proc/x.safetensors", "/proc/x.safetensors: cannot be written"),
    Row("--resume @/runs.pth", "cannot be read (not plain tensors); accepted: the checkpoint of a search"),
    Row("--resume @/space.pth", "cannot be read (not plain tensors)"),
    Row("--resume @/bomb.pth", PACKED),
    Row("--resume @/empty.pth", "cannot be read (EOFError)"),
    Row("--resume @/folder.pth", "cannot be read (Is a directory)"),
    Row("--resume @/list.pth", "found the checkpoint of another kind (list); accepted: of a search"),
    Row("--resume ", "--resume: found an empty name; accepted: a path"),
    Row("--resume auto", "--resume auto needs --output_dir"),
    Row("--resume auto --output_dir %/out", "--resume auto: no checkpoint.pth in --output_dir %/out"),
    Row("--latency_batch 4", "--latency_batch goes with --target_speedup"),
    Row("--blocks 1", "--blocks goes with --visualize"),
    Row("--export-normalize", "--export-normalize goes with --export"),
    Row("--distill", "--distill goes with --finetune"),
    Row("--rule tome", "--rule goes with a search and --baseline"),
]
OTHER = [  # of any mode
    Row("--eval --model @/text.pth", "--model @/text.pth: a file of weights is given as --checkpoint @/text.pth"),
    Row("--eval --model a\nb", r"--model a\nb: unknown model"),
    Row("--eval --data-path @ --checkpoint @/nowhere.pth", "checkpoint @/nowhere.pth: no such file"),
    Row("--eval --model ../x", "--model ../x: unknown model; accepted: hf-hub:../x"),
    Row("--eval --data-path @ --model hf-hub:../../x", "--model hf-hub:../../x: cannot read its config.json (Repo id"),
    Row("--eval --data-path @ --model local-dir:@", "--model local-dir:@: cannot read its config.json"),
    Row("--eval --checkpoint http://", "checkpoint http://: found no file; accepted: a URL that ends in a file's name"),
    Row(
        "--eval --checkpoint http://[::1/x.pth",
        "checkpoint http://[::1/x.pth: Invalid IPv6 URL; accepted: a URL that ends in a file's name",
    ),
    Row("--eval --checkpoint file:///x.pth", "checkpoint file:///x.pth: no such file"),
    Row(f"--eval --data-path @/text.jpg --model {MODEL}", "--data-path @/text.jpg: no such folder"),
    Row(f"--eval --data-path @/no_pictures --model {MODEL}", "no folder val/; accepted: train/ and val/"),
    Row("--eval --data-set SAMPLE --data-path @", "--model is needed with --data-path"),
    Row("--plot ", "--plot: found an empty name"),
    Row("--plot @/text.jpg", "--plot @/text.jpg: no such folder"),
    Row("--plot @/pictures", "nothing to draw; accepted: the output folder of a run"),
    Row("--plot @/deep_log", "log.txt: line 1: nested too deeply; accepted: a JSON object a line"),
    Row("--plot @/digits_log", "log.txt: line 1: found a number of 5000 digits; accepted: a JSON object"),
    Row("--plot @/list_log", "log.txt: line 1: accepted: a JSON object a line"),
    Row("--plot @/field_log", "no figures for accuracy.png (KeyError('gflops')); accepted: logs as a run left"),
    Row("--export ", "--export: found an empty name"),
    Row("--export %/x.txt", "--export %/x.txt: found the suffix '.txt'; accepted: .onnx, .pt2, .xml"),
    Row("--benchmark @/empty.pt2", "@/empty.pt2: torch cannot read it"),
    Row("--benchmark @/text.pt2", "@/text.pt2: torch cannot read it"),
    Row("--benchmark @/folder.pt2", "@/folder.pt2: found a folder; accepted: an exported file"),
    Row("--benchmark eval --rounds 1_0", "--rounds: found 1_0"),
    Row("--benchmark dance", "found dance; accepted: one of eval, "),
    Row("--baseline both --target_flops 100", "target_flops"),
    Row("--baseline both --target_speedup nan", "--target_speedup: found nan"),
    Row("--baseline both --target_latency 1e999", "--target_latency: found 1e999"),
    Row("--baseline both --target_flops 0.02 --target_speedup 2", "found several; accepted: one of them"),
    Row("--sensitivity 1_0", "--sensitivity: found 1_0"),
    Row("--target_flops 50% --output_dir %/out --resume @/runs.pth", "--resume @/runs.pth: cannot be read (not plain"),
    Row("--target_flops 50% 50.0%", "--target_flops 50% 50%: accepted: each once"),
    Row("--target_flops 20% 30% --save %/x.safetensors", "--save: found 2 targets; accepted: one"),
    Row("--arch-lr 1_0", "--arch-lr: found 1_0"),
    Row("--finetune --output_dir %/out --resume @/runs.pth", "cannot be read (not plain tensors); accepted: the chec"),
    Row("--finetune --output_dir %/out --resume @/list.pth", "found a checkpoint of another kind (list); accepted"),
    Row("--finetune --aa rand-m٣", "--aa rand-m٣: found 'm٣'; accepted: a name and a number"),
    Row("--finetune --aa \x07", r"--aa \x07: Unknown AA policy \x07; accepted: a policy of timm, or none"),
    Row("--finetune --affine 1e999 0 0", "--affine inf 0.0 0.0: accepted: 0 to 180, 0 to 1, 0 to below 1"),
    Row("--finetune --lr 1e-0_5", "--lr: found 1e-0_5"),
]
VISUALIZED = [
    Row("", "--visualize: found an empty name"),
    Row("@/folder.jpg", "image @/folder.jpg: cannot be read (Is a directory); accepted: a whole image file"),
    Row("@/empty.jpg", "image @/empty.jpg: cannot be read"),
    Row("@/text.jpg", "image @/text.jpg: cannot be read (cannot identify image file"),
    Row("@/no_pictures/cut.jpg", "image @/no_pictures/cut.jpg: cannot be read"),
    Row("@/no_pictures/bomb.png", "Image size (3600000000 pixels) exceeds limit"),
    Row("@/pictures/grey.png --blocks 99", "--blocks 99: accepted: 0 to 7"),
    Row("@/pictures/grey.png --blocks 1_0", "--blocks: found 1_0"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of `tests/hostile_files.py`, and data of two classes."""
    folder = tmp_path_factory.mktemp("files")
    hostile_files.make_weights(folder, folder / "RAN")
    for make in (hostile_files.make_headers, hostile_files.make_rates, hostile_files.make_pictures):
        make(folder)
    hostile_files.make_logs(folder)
    for number in range(4):
        for split in ("train", "val"):
            write_image(folder / "data" / split / "ab"[number % 2] / f"{number}.png", seed=number)
    return folder


@pytest.fixture
def run(cli: Cli, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Run rows, in an empty folder that stays as good as empty."""
    monkeypatch.chdir(tmp_path)
    before = sorted(files.rglob("*"))

    def of(row: Row, *before: str) -> None:
        def filled(text: str) -> str:
            return text.replace("@", str(files)).replace("%/", f"{tmp_path}/")

        words = [filled(word) for word in (*before, *row.words.split(" "))]
        result = cli(*words)
        if row.said is None:
            assert (result[0], result[2]) == (0, "")
        else:
            check(result, filled(row.said))

    yield of
    assert sorted(files.rglob("*")) == before  # nothing ran, nothing was written beside what was read
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {"log_rank0.txt"}


SAMPLE = ("--eval", "--num_workers", "0")
OWN = (*SAMPLE, "--model", MODEL, "--data-path", "@/data", "--checkpoint", "scratch")


def names(rows: list[Row]) -> dict[str, object]:
    return {"argnames": "row", "argvalues": rows, "ids": [ascii(row.words) for row in rows]}


@pytest.mark.parametrize(**names(CHECKPOINTS))
def test_checkpoints(row: Row, run) -> None:
    run(Row(f"@/{row.words}", row.said), *OWN[:-1])


@pytest.mark.parametrize(**names(RATES))
def test_schedules(row: Row, run) -> None:
    name, *others = row.words.split(" --")
    flags = ("--load_compression_rate", "--target_flops", "0.02", *(f"--{flag}" for flag in others))
    run(Row("--quiet", row.said), *OWN, *flags, "--compression_rate_file", f"@/{name}")


@pytest.mark.parametrize(**names(EVALUATIONS))
def test_evaluations(row: Row, run) -> None:
    run(row, *OWN)


@pytest.mark.parametrize(**names(OTHER))
def test_other_modes(row: Row, run) -> None:
    run(row)


@pytest.mark.parametrize(**names(VISUALIZED))
def test_visualized(row: Row, run) -> None:
    run(Row(f"--visualize {row.words}", row.said))


def test_pictures_of_every_kind(files: Path) -> None:
    """Also far longer than wide: those are cut before they are made larger, which would take gigabytes."""
    view = View(28, 0.9)
    for picture in (files / "pictures").iterdir():
        assert eval_transform(view)(load_image(picture)).shape == (3, 28, 28)
    wide = load_image(files / "pictures" / "wide.png")
    assert crop_view(wide, view, 448).size == (448, 448)
    assert eval_transform(view).transforms[0](wide).size == (96, 3)
    assert eval_transform(view).transforms[0](Image.new("RGB", (64, 2))).size == (64, 2)


def test_names_that_are_formulas_to_matplotlib(files: Path, cli: Cli, tmp_path: Path) -> None:
    picture = next(path for path in (files / "pictures").iterdir() if "$" in path.name)
    flags = ("--model", MODEL, "--data-path", files / "data", "--checkpoint", "scratch", "--output_dir", tmp_path)
    result = cli("--visualize", picture, *flags, "--blocks", 0)
    assert (result[0], result[2]) == (0, "")
    assert (tmp_path / f"{picture.stem}_tokens.png").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB, a file of 60 KB on it."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if not made or made.returncode:
        pytest.skip("no right to mount a file system")
    (folder / "large").write_bytes(bytes(60_000))
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--eval --save %/x.safetensors", "%/x.safetensors: cannot be written"),
        ("--export %/x.pt2", "%/x.pt2: cannot be written"),
        ("--target_flops 0.025 --epochs 1 --output_dir %/out", "No space left on device"),
        ("--finetune --epochs 1 --output_dir %/out", "No space left on device"),
        ("--visualize @/pictures/grey.png --output_dir %/out", "No space left on device"),
    ],
)
def test_a_full_disk(words: str, said: str, cli: Cli, files: Path, small_disk: Path) -> None:
    flags = ("--model", MODEL, "--data-path", files / "data", "--checkpoint", "scratch", "--num_workers", 0)
    if "--finetune" in words:
        flags = (*flags, "--no-repeated-aug", "--mixup", 0, "--cutmix", 0)
    if "--export" in words:
        pytest.importorskip("torch", minversion="2.8", reason="which writes such files")
        flags = ("--checkpoint", saved_file(files / "data" / "small.safetensors"))
    given = [word.replace("%", str(small_disk)).replace("@", str(files)) for word in words.split(" ")]
    check(cli(*given, *flags), said.replace("%", str(small_disk)))
    left = {path.name for path in small_disk.rglob("*") if path.is_file()}
    assert left <= {"large", "log_rank0.txt", "log.txt", "search_steps.txt", "search_work.txt"}


def test_a_folder_that_cannot_be_written(cli: Cli, files: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    flags = ("--model", MODEL, "--data-path", files / "data", "--checkpoint", "scratch", "--num_workers", 0)
    for words, said in (
        (("--eval", "--output_dir", small_disk), f"--output_dir {small_disk}: cannot be written"),
        (("--eval", "--output_dir", small_disk / "out"), f"--output_dir {small_disk}/out: Read-only file system"),
        (("--eval", "--save", small_disk / "x.safetensors"), f"{small_disk}/x.safetensors: cannot be written"),
        (("--plot", small_disk), f"--plot {small_disk}: cannot be written"),
    ):
        check(cli(*words, *(flags if words[0] != "--plot" else ())), said)


@pytest.mark.parametrize("mode", ["search", "finetune"])
def test_an_output_folder_that_goes(
    mode: str, cli: Cli, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a run writes to it: one line that names what could not be written."""
    owner, original = {"search": (Task, Task.save), "finetune": (engine.Training, engine.Training.save)}[mode]

    def save(*args: object, **options: object) -> None:
        original(*args, **options)
        shutil.rmtree(tmp_path / "out")

    monkeypatch.setattr(owner, "save", save)
    monkeypatch.setattr(engine, "SAVE_SECONDS", -1.0)
    flags = ("--model", MODEL, "--data-path", files / "data", "--checkpoint", "scratch", "--num_workers", 0)
    if mode == "search":
        flags = (*flags, "--target_flops", 0.025, "--epochs", 2)
    else:
        flags = ("--finetune", *flags, "--epochs", 2, "--no-repeated-aug", "--mixup", 0, "--cutmix", 0)
    check(cli(*flags, "--output_dir", tmp_path / "out"), f"{tmp_path}/out/", ": No such file or directory")


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("--load_compression_rate --compression_rate_file %/a.json", "a.json"),
        ("--resume %/a.pth", "a.pth"),
        ("--resume %/zero.pth", "zero.pth"),
        ("--checkpoint %/a.safetensors", "a.safetensors"),
        ("--visualize %/a.png --output_dir %/out", "a.png"),
        ("--target_speedup 1.2 --latency_file %/a.json --output_dir %/out", "a.json"),
        ("--output_dir %", "holds a pipe, a"),
        ("--plot %/logs", "log.txt"),
    ],
)
def test_pipes_and_devices_are_not_waited_for(words: str, name: str, cli: Cli, files: Path, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for pipe in ("a.json", "a.pth", "a.safetensors", "a.png", "logs/log.txt"):
        os.mkfifo(tmp_path / pipe)
    (tmp_path / "zero.pth").symlink_to("/dev/zero")
    given = ["--model", MODEL, "--checkpoint", "scratch", "--data-path", files / "data", "--num_workers", 0]
    given = ["--eval", *given] if words.split()[0] in ("--load_compression_rate", "--resume", "--output_dir") else given
    given = ["--eval", "--num_workers", 0] if "--checkpoint" in words else [] if "--plot" in words else given
    check(cli(*given, *words.replace("%", str(tmp_path)).split(" ")), name)
