"""Keras 3 files and SavedModels become `.tflite`, measured before and after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from smelt.core.data import Data
from smelt.core.errors import DataError, FileError, RecipeError
from smelt.formats import keras as keras_format
from smelt.formats._flatbuffer import File


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Data]:
    """A small network for the digits: its `.keras` file, its SavedModel, and the data."""
    if why := keras_format.missing():
        pytest.fail(why)
    import tensorflow as tf
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = (digits.images / 16).astype("float32")[..., None], digits.target
    tf.keras.utils.set_random_seed(0)
    layers = tf.keras.layers
    model: Any = tf.keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same"),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.MaxPool2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )
    model.compile(tf.keras.optimizers.Adam(5e-3), tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images[:1400], labels[:1400], epochs=4, batch_size=64, verbose=0)
    folder = tmp_path_factory.mktemp("keras")
    model.save(folder / "m.keras")
    model.export(str(folder / "saved"), verbose=False)

    def split(low: int, high: int) -> list[Any]:
        return [(torch.tensor(images[i : i + 50]), torch.tensor(labels[i : i + 50])) for i in range(low, high, 50)]

    return folder / "m.keras", folder / "saved", Data(train=split(0, 300), test=split(1400, 1750))


@pytest.mark.parametrize(("mode", "share"), [("float16", 0.53), ("dynamic", 0.29), ("int8", 0.29)])
def test_before_and_after(trained: Any, mode: str, share: float, tmp_path: Path) -> None:
    from smelt.convert import convert

    path, saved, data = trained
    plain = convert(path, tmp_path / "plain.tflite", mode="float32")
    report = convert(path, tmp_path / "m.tflite", data=data, mode=mode)
    assert report.value("accuracy", 0) > 90
    assert abs(report.value("accuracy", 0) - report.value("accuracy", 1)) < 1
    assert report.value("output error") < 0.05
    assert report.value("file") == (tmp_path / "m.tflite").stat().st_size < share * plain.value("file")
    again = convert(saved, tmp_path / "s.tflite", data=data, mode=mode)
    assert abs(again.value("file") - report.value("file")) < 500
    assert {row.measure for row in report} == {"file", "accuracy", "latency", "output error"}
    if mode == "int8":
        assert not File((tmp_path / "m.tflite").read_bytes()).floating()


def test_errors(trained: Any, tmp_path: Path) -> None:
    from smelt.convert import convert

    path, _, _ = trained
    with pytest.raises(RecipeError, match="did you mean 'int8'"):
        convert(path, tmp_path / "m.tflite", mode="int")
    with pytest.raises(DataError, match="int8 needs data"):
        convert(path, tmp_path / "m.tflite")
    (tmp_path / "bad.keras").write_bytes(b"PK nothing")
    with pytest.raises(FileError, match="cannot be read by TensorFlow"):
        convert(tmp_path / "bad.keras", tmp_path / "m.tflite", mode="dynamic")
    assert not (tmp_path / "m.tflite").exists()
