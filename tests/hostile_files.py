"""Files that are no files of ours, damaged ones, and some that would run code or take all memory."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

TEXT = "hello, no file of this kind\n"
DEEP = 100_000  # brackets
COUNTS = [50, *[40] * 7]  # of the sample's blocks
PICTURES = {  # of any kind that Pillow writes
    "grey.png": ("L", (40, 40)),
    "palette.png": ("P", (40, 40)),
    "alpha.png": ("RGBA", (40, 40)),
    "grey_alpha.png": ("LA", (40, 40)),
    "cmyk.jpg": ("CMYK", (40, 40)),
    "sixteen.png": ("I;16", (40, 40)),
    "bits.png": ("1", (40, 40)),
    "one.png": ("RGB", (1, 1)),
    "wide.png": ("L", (20_000, 3)),
    "tall.png": ("L", (3, 20_000)),
    "a ä ☃ $x$ $.png": ("RGB", (40, 40)),
}


class Runs:
    """What pickle calls a shell for, which leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def make_weights(folder: Path, marker: Path) -> None:
    """Checkpoints: others, damaged, hostile. Those that run code would leave `marker`."""
    for suffix in ("pth", "npz", "safetensors", "onnx", "pt2", "xml", "json", "jpg"):
        (folder / f"empty.{suffix}").write_bytes(b"")
        (folder / f"text.{suffix}").write_text(TEXT)
        (folder / f"folder.{suffix}").mkdir()
    torch.save({"model": Runs(marker)}, folder / "runs.pth")
    (folder / "runs_bare.pth").write_bytes(pickle.dumps(Runs(marker)))
    np.savez(folder / "runs.npz", **{"head/bias": np.array([Runs(marker)], dtype=object)})
    head = torch.zeros(10, 96)
    recursive: dict[str, Any] = {}
    recursive["model"] = recursive
    contents = {
        "none": None,
        "list": [1, 2],
        "numbers": {1: head},
        "wrapped_numbers": {"model": {1: head, "a.b": head}},
        "recursive": recursive,
        "sparse": {"head.weight": head.to_sparse()},
        "scalar": {"head.weight": torch.tensor(1.0)},
        "nothing": {"head.weight": torch.zeros(0)},
        "whole": {"head.weight": head.long()},
        "repeated": {"head.weight": torch.zeros(1).expand(100_000, 100_000)},
    }
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pth")
    makes_space = b"\x80\x02cbuiltins\nbytearray\nJ" + struct.pack("<i", 2**31 - 1) + b"\x85R."
    (folder / "space.pth").write_bytes(makes_space)
    packed = BytesIO()
    torch.save({"head.weight": head}, packed)
    with zipfile.ZipFile(packed) as plain, zipfile.ZipFile(folder / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in plain.namelist():
            archive.writestr(name, bytes(10_000_000) if "/data/" in name else plain.read(name))
    np.savez_compressed(folder / "bomb.npz", **{"head/bias": np.zeros(2_500_000, dtype=np.float32)})


def make_headers(folder: Path) -> None:
    """Safetensors whose headers lie."""

    def write(name: str, header: bytes, body: int = 0, length: int | None = None) -> None:
        size = len(header) if length is None else length
        (folder / f"{name}.safetensors").write_bytes(struct.pack("<Q", size % 2**64) + header + bytes(body))

    def of(**tensors: list[int]) -> bytes:
        return json.dumps({n: {"dtype": "F32", "shape": [2], "data_offsets": at} for n, at in tensors.items()}).encode()

    write("longest", b"{}", length=2**60)
    write("negative", b"{}", length=-1)
    write("no_json", b"no json")
    write("overlap", of(a=[0, 8], b=[4, 12]), 12)
    write("before", of(a=[-8, 0]), 8)
    write("beyond", of(a=[0, 2**50]), 8)
    write("larger", b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,8]}}', 8)
    write("deep", b'{"__metadata__":' + b"[" * DEEP + b"]" * DEEP + b"}")
    deep_entry = json.dumps({"__metadata__": {"format": "diffrate 1", "arguments": "[" * DEEP}}).encode()
    write("deep_entry", deep_entry)


def make_rates(folder: Path) -> None:
    """Files of schedules for the sample at 0.02 GFLOPs, most of them wrong in one thing."""
    good = {"prune_kept_num": COUNTS, "merge_kept_num": COUNTS}

    def write(name: str, text: str | bytes) -> None:
        (folder / f"{name}.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    def rates(name: str, **fields: Any) -> None:
        write(name, json.dumps({"ViT-Sample": {"0.02": {**good, **fields}}}))

    rates("good")
    rates("a ä ☃")
    rates("text_arrays", prune_kept_num=str(COUNTS), merge_kept_num=str(COUNTS))
    rates("more_fields", color="red")
    rates("nan", merge_kept_num=[float("nan")] * 8)
    rates("truth", merge_kept_num=[True] * 8)
    rates("texts", merge_kept_num=["50"] * 8)
    rates("object", merge_kept_num={"a": 1})
    rates("digits_in_text", merge_kept_num=f"[{'9' * 5000}]")
    rates("deep_in_text", merge_kept_num="[" * DEEP)
    rates("blocks", prune_kept_num=[50] * 12, merge_kept_num=[50] * 12)
    rates("tokens", tokens=197)
    rates("tokens_below", tokens=-1)
    rates("tokens_half", tokens=50.0)
    rates("no_rule", rules="magic")
    rates("rules", rules=[["tome"]] * 8)
    whole, counts = json.dumps(good), json.dumps(COUNTS)
    of_target = '{"ViT-Sample":{"0.02":%s}}'
    write("twice_a_model", f'{{"ViT-Sample":{{"0.02":{whole}}},"ViT-Sample":{{}}}}')
    write("twice_a_target", f'{{"ViT-Sample":{{"0.02":{whole},"0.02":{whole}}}}}')
    write("twice_in_other_digits", f'{{"ViT-Sample":{{"0.02":{whole},"0.020":{whole}}}}}')
    write("twice_a_field", of_target % (whole[:-1] + f',"merge_kept_num":{counts}}}'))
    for name, number in (("infinite", "1e999"), ("zero", "-0"), ("underscore", "5_0"), ("digits", "9" * 5000)):
        write(name, of_target % f'{{"prune_kept_num":{counts},"merge_kept_num":[{number},1,1,1,1,1,1,1]}}')
    write("deep", "[" * DEEP + "]" * DEEP)
    write("deep_objects", '{"a":' * DEEP + "1" + "}" * DEEP)
    write("array", "[1]")
    write("null", "null")
    write("no_models", "{}")
    write("no_targets", '{"ViT-Sample":{}}')
    write("list_of_targets", '{"ViT-Sample":[1]}')
    write("list_of_counts", '{"ViT-Sample":{"0.02":[1]}}')
    write("other_model", '{"Other":{"1":{}}}')
    write("word", f'{{"ViT-Sample":{{"two":{whole}}}}}')
    write("steers", json.dumps({"\x1b[31mred\nmain.py: all is well": {"1": {}}}))
    write("zeros", bytes(100))
    write("utf16", of_target.encode("utf-16"))
    with (folder / "large.json").open("wb") as file:
        file.truncate(100_000_000)  # takes no space on disk


def make_pictures(folder: Path) -> None:
    """Pictures of all kinds in `pictures/`, and what is none in `no_pictures/`."""
    good, bad = folder / "pictures", folder / "no_pictures"
    good.mkdir()
    bad.mkdir()
    for name, (mode, size) in PICTURES.items():
        Image.new(mode, size, 1).save(good / name)
    file = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file, "JPEG")
    (bad / "cut.jpg").write_bytes(file.getvalue()[:300])
    side = 60_000

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    bomb = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(side))) + chunk(b"IEND", b"")
    (bad / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bomb)


def make_logs(folder: Path) -> None:
    """Output folders whose logs no run left."""
    for name, text in (
        ("deep_log", "[" * DEEP),
        ("digits_log", '{"mode":"eval","gflops":%s}' % ("9" * 5000)),
        ("list_log", "[1]"),
        ("field_log", '{"mode":"eval","model":"x"}'),
    ):
        (folder / name).mkdir()
        (folder / name / "log.txt").write_text(text)
