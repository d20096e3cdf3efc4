"""The classes that a conditional network of pictures is given, made of labels."""

from collections.abc import Sequence

import numpy as np

from dtrak_jax.checks import alike
from dtrak_jax.data import Dataset
from dtrak_jax.models import ModelConfig


def class_numbers(names: Sequence[str]) -> dict[str, int]:
    """Returns the class of each label: the number that it is, or its position.

    A label is the number itself where all labels are numbers, and otherwise its position
    in the list of the source's labels, which of a folder is sorted, as in torchvision.

    Raises:
      ValueError: two labels are one number.
    """
    if all(map(str.isdecimal, names)):
        numbers = {name: int(name) for name in names}
        first = {number: name for name, number in reversed(numbers.items())}
        for name, number in numbers.items():
            if first[number] != name:
                raise ValueError(
                    f"the labels {first[number]!r} and {name!r} are both class {number}; "
                    "write them alike, or name one otherwise."
                )
        return numbers
    return {name: number for number, name in enumerate(names)}


def classes_of(
    labels: Sequence[str], names: Sequence[str], model: ModelConfig, what: str
) -> np.ndarray:
    """Returns the classes of labels, int32 [n].

    Args:
      labels: the label of each example.
      names: all labels of the training images' source.
      what: the examples' name in an error.

    Raises:
      ValueError: a label is not one of the training images', or its class none of the
        network's.
    """
    numbers = class_numbers(names)
    for label in sorted(set(map(str, labels))):
        if label not in numbers:
            near = alike(label, numbers)
            hint = f" Did you mean {near}?" if near else ""
            raise ValueError(
                f"{what} have the label {label!r}, which is none of the training "
                f"images': {', '.join(numbers)}.{hint}"
            )
        count = model.num_class_embeds
        if model.class_embed_type is None and numbers[label] >= count:
            raise ValueError(
                f"{what} have the label {label!r}, which is class {numbers[label]}; the "
                f"model has the classes 0 to {count - 1} (model.num_class_embeds)."
            )
    return np.array([numbers[label] for label in labels], np.int32)


def label_names_of(examples: Dataset, what: str) -> list[str]:
    """Returns the label of each example.

    Raises:
      ValueError: there are no labels.
    """
    if examples.labels is None:
        raise ValueError(
            f"the model is given classes, but {what} have no labels: name a CSV with a "
            "column `label`."
        )
    return [examples.label_names[label] for label in examples.labels]
