"""Names and paths in files of others: nothing steers a terminal, forges a line or leaves its folder."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import numpy as np
import pytest

import diffrate
import models
from datasets import DataError, build_dataset
from diffrate.files.runtimes import load_exported
from diffrate.hub import ANSWER, answers
from tests.cli.test_errors import check
from tests.conftest import Cli, write_image
from tests.tiny_models import saved_file

STEERS = "\x1b]0;mine\x07\x1b[31mred\nmain.py: all is well"


def test_names_of_classes(cli: Cli, tmp_path: Path) -> None:
    """On the terminal, in the log, and in the picture, where dollars are no formula."""
    plain, file, picture = tmp_path / "plain.safetensors", tmp_path / "a.safetensors", tmp_path / "a.png"
    diffrate.save(diffrate.load(saved_file(plain)), file, classes=[STEERS, r"$\frac$ $x$", "a\u202eb"])
    write_image(picture, seed=0)
    code, out, err = cli("--visualize", picture, "--checkpoint", file, "--output_dir", tmp_path / "out")
    assert (code, err) == (0, "")
    log = (tmp_path / "out" / "log_rank0.txt").read_text()
    assert (tmp_path / "out" / "a.png").exists()
    for text in (out, log):
        assert all(part.isprintable() or part == "\n" for part in text)
        assert all(line.startswith("[2") for line in text.splitlines())


@pytest.mark.parametrize("name", ["../../a.jpg", "/etc/a.jpg", "below/../../../a.jpg"])
def test_an_index_with_a_path_out_of_its_folder(name: str, tmp_path: Path) -> None:
    index = {"categories": [{"id": 1, "name": "a"}], "annotations": [{"image_id": 1, "category_id": 1}]}
    (tmp_path / "val2018.json").write_text(json.dumps({**index, "images": [{"id": 1, "file_name": name}]}))
    with pytest.raises(DataError, match=r"val2018\.json: not an iNaturalist index .* outside of its folder"):
        build_dataset("INAT", tmp_path, "val", lambda image: image)


@pytest.mark.parametrize("location", ["../secret", "/ABSOLUTE", "x/../../secret", "link"])
def test_an_onnx_file_with_weights_out_of_its_folder(location: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", minversion="1.24", reason="from which on it looks at these paths")
    onnx = pytest.importorskip("onnx")
    (tmp_path / "secret").write_bytes(np.zeros(4, dtype=np.float32).tobytes())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    weight = onnx.TensorProto(name="w", data_type=1, dims=[4], data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location.replace("/ABSOLUTE", str(tmp_path / "secret")))
    ends = [onnx.helper.make_tensor_value_info(name, 1, [4]) for name in ("images", "logits")]
    node = onnx.helper.make_node("Add", ["images", "w"], ["logits"])
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    file = tmp_path / "in" / "a.onnx"
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    file.write_bytes(made.SerializeToString())
    with pytest.raises(diffrate.ExportError, match="onnxruntime cannot read it"):
        load_exported(file)


def test_servers_that_do_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where looking their name up takes for ever, and where a proxy is in between."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        port = listening.getsockname()[1]
        assert not answers(f"http://localhost:{port}/a")
        listening.listen()
        assert answers(f"http://localhost:{port}/a")
        monkeypatch.setenv("https_proxy", f"localhost:{port}")
        assert answers("https://nowhere.invalid/a")
    monkeypatch.delenv("https_proxy")

    def never(*_: object, **__: object) -> None:
        time.sleep(ANSWER + 1)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", never)
    start = time.monotonic()
    assert not answers("https://nowhere.invalid/a")
    assert ANSWER <= time.monotonic() - start < ANSWER + 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "hf-hub:a/b"), "cannot read its config.json (no connection, and nothing in the cache)"),
        (("--model", "vit_deit_tiny_patch16_224"), "(no answer from dl.fbaipublicfiles.com)"),
        (("--model", "vit_tiny_patch16_224.augreg_in21k"), "no connection, and nothing in the cache"),
        (
            ("--model", "vit_deit_tiny_patch16_224", "--checkpoint", "http://a.invalid/b.pth"),
            "no answer from a.invalid",
        ),
    ],
)
@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network(
    offline: bool, words: tuple[str, ...], said: str, cli: Cli, image_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    """No request of the hub's, which tries again for half a minute; its cache is looked at."""
    asked: list[str] = []
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    for place in ("diffrate.hub.answers", "models.weights.answers"):
        monkeypatch.setattr(place, lambda url: bool(asked.append(url)))
    start = time.monotonic()
    check(cli("--eval", *words, "--data-path", image_folder), said)
    assert time.monotonic() - start < 5
    assert not (offline and any("huggingface" in url for url in asked))


def test_names_alone_ask_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server is asked for what timm knows by itself."""

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError(f"asked for {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert models.entry_of("vit_tiny_patch16_224").architecture == "vit_tiny_patch16_224"
    assert models.create(models.entry_of("deit3_small_patch16_224"), 32).num_classes == 1000
