"""The lines of docs/convert.md that write embeddings of texts, run on small models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

PAGE = Path(__file__).parent.parent.parent / "docs" / "convert.md"


def run_the_lines_of_the_docs(library: str, model: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write `texts.safetensors` in the working directory, for three classes whose texts are the `tokens`."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "texts.safetensors" in block and library in block)
    module = pytest.importorskip(library)
    if library == "transformers":
        tokenizer = lambda texts, **_: {"input_ids": tokens[: len(texts)]}  # noqa: E731
        for name, made in (("AutoModel", model), ("AutoTokenizer", tokenizer)):
            monkeypatch.setattr(getattr(module, name), "from_pretrained", lambda _, made=made: made)
    else:
        monkeypatch.setattr(module, "create_model_and_transforms", lambda *_, **__: (model, None, None))
        monkeypatch.setattr(module, "get_tokenizer", lambda _: lambda texts: tokens[: len(texts)])
    exec(block, {})
