"""Values that a flag takes and values that it does not: one line, exit code 2, before anything is begun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import diffrate
import engine
from tests.cli.test_errors import check
from tests.cli.test_eval import scores
from tests.cli.test_finetune import PLAIN
from tests.cli.test_search import KEY, MODEL, words
from tests.conftest import Cli

HUGE = "99999999999999999999"
# What the CPU and the GPU say; the longer message goes on for lines.
NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has a total capacity of\n1 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: can't allocate memory: 9 bytes."),
    MemoryError(),
)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        *(
            (("--device", name), [f"--device {name}: ", "not supported; accepted: auto, cpu, cuda"])
            for name in ("mps", "xpu")
        ),
        *((("--device", name), [f"--device {name}: "]) for name in ("meta", "mkldnn", "cpu:3", "cuda:x", "GPU", "")),
        (("--batch-size", HUGE), [f"--batch-size: found {HUGE}; accepted: from 1 to 2147483647"]),
        (("--batch-size", "-4"), ["--batch-size: found -4"]),
        (("--batch-size", "8.5"), ["--batch-size", "8.5"]),
        (("--print-freq", HUGE), ["--print-freq: found"]),
        (("--input-size", "100000"), ["--input-size: found 100000; accepted: from 1 to 8192"]),
        (("--input-size", "0"), ["--input-size: found 0"]),
        (("--crop-pct", "1e-9"), ["--crop-pct 1e-09: accepted: 0.00171 to 1 at 28 pixels"]),
        (("--crop-pct", "0"), ["--crop-pct: found 0"]),
        (("--crop-pct", "87.5"), ["--crop-pct: found 87.5; accepted: above 0 to 1"]),
        (("--num_workers", "1000"), ["--num_workers 1000: accepted: 0 to "]),
        (("--num_workers", "-1"), ["--num_workers: found -1"]),
        (("--seed", "0x10"), ["--seed", "0x10"]),
        (("--output_dir", "/dev/null/out"), ["--output_dir /dev/null/out: "]),
        (("--checkpoint", "."), ["checkpoint .: no such file"]),
        (
            ("--checkpoint", "~nobody-here/a.pth"),
            ["--checkpoint: found ~nobody-here/a.pth; accepted: the folder of a user"],
        ),
        (("--data-path", "~nobody-here", "--model", MODEL), ["--data-path: found ~nobody-here"]),
        (("--checkpoint", "file:///a.pth"), ["no such file"]),
        (("--compression_rate_file", "."), ["--compression_rate_file needs --load_compression_rate"]),
        (("--load_compression_rate", "--compression_rate_file", "."), [".: cannot be read"]),
        (("--load_compression_rate", "--target_flops", "0.0169", "0.0242"), ["--target_flops: found 2 targets"]),
        (("--load_compression_rate", "--target_flops", "2,9"), ["found 2,9; accepted: GFLOPs, or a share such as 50%"]),
        (("--load_compression_rate", "--target_flops", "50%"), ["no --target_flops 0.02415; accepted: 0.0169, "]),
        (("--load_compression_rate", "--granularity", "0"), ["--granularity: found 0"]),
        (("digits",), ["unrecognized arguments: digits"]),
        (("--model", "vit_sample_patch4_28", "--model"), ["--model: expected one argument"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_evaluation(flags: tuple[str, ...], expected: list[str], cli: Cli) -> None:
    workers = () if "--num_workers" in flags else ("--num_workers", 0)
    check(cli("--eval", *flags, *workers), *expected)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--target_flops", "0%"), "--target_flops: found 0%; accepted: above 0% to 100%"),
        (("--target_flops", "150%"), "--target_flops: found 150%; accepted: above 0% to 100%"),
        (("--target_flops", "abc%"), "--target_flops: found abc%; accepted: GFLOPs, or a share such as 50%"),
        (("--target_flops", "%"), "--target_flops: found %; accepted: GFLOPs"),
        (("--target_flops", "nan%"), "--target_flops: found nan%"),
        (("--target_flops", "1%"), "--target_flops 0.0004831 GFLOPs: accepted: 0.003403 to 0.0483"),
        (("--target_flops", "2.4G"), "--target_flops: found 2.4G; accepted: GFLOPs"),
        (("--target_flops", "1e400"), "--target_flops: found 1e400"),
        (("--target_flops", "50%", "0.02", "50.0%"), "--target_flops 50% 0.02 50%: accepted: each once"),
        (
            ("--target_flops", "0.025", "--scale_compression_rate"),
            "--scale_compression_rate goes with a schedule to load",
        ),
        (("--target_flops", "0.025", "--arch-lr", "1e38"), "--arch-lr: found 1e38; accepted: above 0 to 1e+30"),
        (
            ("--target_flops", "0.025", "--flops_weight", "1e40"),
            "--flops_weight: found 1e40; accepted: from 0 to 1e+30",
        ),
        (("--target_flops", "0.025", "--smoothing", "1"), "--smoothing 1: accepted: from 0 to below 1"),
        (("--target_flops", "0.025", "--drop-path", "1.5"), "--drop-path: found 1.5"),
        (("--target_flops", "0.025", "--epochs", "0"), "--epochs: found 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_search(flags: tuple[str, ...], expected: str, cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    base = words(image_folder, tmp_path / "out")
    at = base.index("--target_flops")
    check(cli(*base[:at], *base[at + 2 :], *flags), expected)
    assert not (tmp_path / "out" / "checkpoint.pth").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--smoothing", "1"), "--smoothing 1: accepted: from 0 to below 1"),
        (("--opt", "sgd", "--momentum", "0"), "--opt sgd: Nesterov momentum requires a momentum"),
        (("--opt", "adahessian"), "--opt adahessian: unknown to timm, or of second order; accepted: "),
        (("--opt", ""), "--opt : unknown to timm"),
        (("--lr", "1e31"), "--lr: found 1e31; accepted: above 0 to 1e+30"),
        (("--lr", "0"), "--lr: found 0; accepted: above 0"),
        (("--weight-decay", "-0.1"), "--weight-decay: found -0.1"),
        (("--aa", "rand-m1e9"), "--aa rand-m1e9: "),
        (("--aa", "v9"), "--aa v9: Unknown AA policy v9"),
        (("--color-jitter", "1e300"), "--color-jitter: found 1e300"),
        (("--epochs", HUGE), "--epochs: found"),
        (("--clip-grad", "0"), "--clip-grad: found 0; accepted: above 0"),
        (("--sched", "warm"), "--sched: invalid choice: 'warm'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_training(flags: tuple[str, ...], expected: str, cli: Cli, image_folder: Path, tmp_path: Path) -> None:
    check(cli(*PLAIN, "--data-path", image_folder, "--output_dir", tmp_path / "out", *flags), expected)
    assert not (tmp_path / "out" / "checkpoint.pth").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="they run on a GPU, where their packages are installed")
@pytest.mark.parametrize("name", ["fusedadam", "bnbadam"])
def test_optimizers_of_a_gpu(name: str, cli: Cli, image_folder: Path) -> None:
    check(cli(*PLAIN, "--data-path", image_folder, "--opt", name), f"--opt {name}: CUDA required for ")


@pytest.mark.parametrize("size", [1, 2])
def test_inputs_smaller_than_a_convolution(size: int, cli: Cli, image_folder: Path) -> None:
    flags = ("--eval", "--model", "caformer_s36", "--checkpoint", "scratch", "--data-path", image_folder)
    check(cli(*flags, "--num_workers", 0, "--input-size", size), f"--input-size {size}: accepted: from 3")


def test_a_batch_larger_than_the_data_is_the_data(cli: Cli, image_folder: Path) -> None:
    flags = ("--eval", "--model", MODEL, "--checkpoint", "scratch", "--data-path", image_folder, "--num_workers", 0)
    largest = cli(*flags, "--batch-size", 2**31 - 1)
    assert (largest[0], largest[2]) == (0, "")
    assert scores(largest[1]) == scores(cli(*flags)[1])


@pytest.mark.parametrize(("share", "key", "gflops"), [("50%", "0.02415", 0.024), ("100%", "0.0483", 0.048)])
def test_a_share_names_its_schedule(
    share: str, key: str, gflops: float, cli: Cli, image_folder: Path, tmp_path: Path
) -> None:
    """The file is named by the GFLOPs that the share comes to, and the share finds them again."""
    base = words(image_folder, tmp_path, "--epochs", 1)
    base[base.index("0.025")] = share
    code, text, err = cli(*base)
    assert (code, err) == (0, "")
    file = tmp_path / "compression_rate.json"
    assert list(json.loads(file.read_text())[KEY]) == [key]
    assert f"--target_flops {key}" in text.split("next: ")[1]
    flags = ("--eval", "--model", MODEL, "--checkpoint", "scratch", "--data-path", image_folder, "--num_workers", 0)
    loaded = [
        cli(*flags, "--load_compression_rate", "--compression_rate_file", file, "--target_flops", target)
        for target in (share, key)
    ]
    assert [(code, err) for code, _, err in loaded] == [(0, "")] * 2
    assert scores(loaded[0][1]) == scores(loaded[1][1])
    assert scores(loaded[0][1])[3] == gflops


@pytest.mark.parametrize("error", NO_MEMORY, ids=["GPU", "CPU", "Python"])
@pytest.mark.parametrize("mode", ["eval", "search", "finetune"])
def test_no_memory(
    mode: str, error: Exception, cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise error

    owner, name = {
        "eval": (diffrate.CompressedModel, "forward"),
        "search": (diffrate.CompressedModel, "forward"),
        "finetune": (engine, "_train_step"),
    }[mode]
    monkeypatch.setattr(owner, name, fails)
    commands = {
        "eval": (
            "--eval",
            "--model",
            MODEL,
            "--checkpoint",
            "scratch",
            "--data-path",
            image_folder,
            "--num_workers",
            0,
        ),
        "search": words(image_folder, tmp_path / "out"),
        "finetune": (*PLAIN, "--data-path", image_folder, "--output_dir", tmp_path / "out"),
    }
    check(cli(*commands[mode]), "out of memory; accepted: a smaller --batch-size or --input-size")
