"""What a model's outputs are called, for people."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from timm.data import ImageNetInfo

import models
from build import eval_dataset
from datasets import IMAGENET_CLASSES
from models.zoo import SAMPLE_MODEL


def class_names(args: Namespace, entry: models.ModelEntry, outputs: int) -> Sequence[str]:
    """A name for each of `outputs`: ImageNet's words, else the data's classes, else numbers.

    Raises:
        DataError: the data that the flags name are not there.
    """
    if outputs == IMAGENET_CLASSES:
        info = ImageNetInfo()
        return [info.index_to_description(index).split(",")[0] for index in range(outputs)]
    if args.data_path is not None or entry.name == SAMPLE_MODEL:
        classes = eval_dataset(args, entry, None).classes
        if len(classes) == outputs:
            return list(classes)
    return [f"class {index}" for index in range(outputs)]
