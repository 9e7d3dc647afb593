"""Keras 3 files and TensorFlow SavedModels, read and written as LiteRT's `.tflite`; needs TensorFlow."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smelt.core.data import tensors
from smelt.core.errors import DataError, FileError, ModelError, RecipeError, nearest
from smelt.core.named import first_line
from smelt.core.runtime import needs

MODES = ("float32", "float16", "dynamic", "int8")
SUFFIXES = (".keras", ".h5")


def missing() -> str | None:
    """Why nothing can be converted here, with the command that installs what is missing; None: it can."""
    return needs(("tensorflow", "ai_edge_litert"), "keras")


def is_keras(path: str | Path) -> bool:
    """Whether a path looks like what `open_keras` reads."""
    path = Path(path)
    return path.suffix in SUFFIXES or (path / "saved_model.pb").is_file()


class KerasModel(nn.Module):
    """A model of TensorFlow that takes and gives torch tensors.

    names: of its inputs, in order.
    """

    def __init__(self, call: Any, names: Sequence[str], folder: Path):
        super().__init__()
        self.call, self.names, self.folder = call, tuple(names), folder

    def named(self, inputs: Any) -> dict[str, Tensor]:
        """A batch's inputs by their names.  Raises DataError: they are not those of the model."""
        if isinstance(inputs, Mapping):
            given = dict(inputs)
        else:
            flat = list(tensors(inputs))
            given = dict(zip(self.names, flat, strict=False)) if len(flat) == len(self.names) else {}
        if set(given) != set(self.names):
            raise DataError(f"the model takes the inputs {', '.join(self.names)}; a batch does not have just these")
        return given

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = self.call(**{k: _given(x) for k, x in self.named(named or inputs).items()})
        flat = tuple(torch.from_numpy(value.numpy()) for value in found.values())
        return flat[0] if len(flat) == 1 else flat


def _given(x: Tensor) -> Any:
    import tensorflow as tf

    return tf.constant(x.detach().cpu().numpy())


@contextmanager
def open_keras(path: str | Path) -> Iterator[KerasModel]:
    """The model of a `.keras` or `.h5` file or the folder of a SavedModel, ready to run on one thread.

    Raises:
        RecipeError: TensorFlow is missing.
        FileError: no such file, or TensorFlow cannot read it.
    """
    path = Path(path)
    if why := missing():
        raise RecipeError(f"{str(path)!r} cannot be read here: {why}")
    if not path.exists():
        raise FileError(f"no such file: {str(path)!r}")
    if not is_keras(path):
        raise FileError(f"{str(path)!r} is no .keras or .h5 file and no folder of a SavedModel")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            yield _open(path, Path(scratch) / "model")
        except (OSError, ValueError, TypeError, KeyError) as error:
            if isinstance(error, (DataError, ModelError, RecipeError, FileError)):
                raise
            raise FileError(f"{str(path)!r} cannot be read by TensorFlow: {first_line(error)}") from error


def _open(path: Path, folder: Path) -> KerasModel:
    import tensorflow as tf

    if path.suffix in SUFFIXES:
        tf.keras.models.load_model(path, compile=False, safe_mode=True).export(str(folder), verbose=False)
    else:
        folder = path
    loaded = tf.saved_model.load(str(folder))
    if "serving_default" not in loaded.signatures:
        known = ", ".join(loaded.signatures) or "none"
        raise ModelError(f"{str(path)!r} has no signature 'serving_default'; its signatures: {known}")
    call = loaded.signatures["serving_default"]
    model = KerasModel(call, list(call.structured_input_signature[1]), folder)
    model.loaded = loaded  # its variables live as long as it does
    return model.eval()


def tflite(model: KerasModel, mode: str, batches: Sequence[Any] | None = None) -> bytes:
    """The content of a `.tflite` file.

    Args:
        mode: 'float32'; 'float16' weights; 'dynamic': weights of 8 bits, activations rounded at run time; 'int8':
            8 bits throughout, inputs and outputs too, as microcontrollers want.
        batches: inputs to calibrate on (int8).

    Raises:
        RecipeError: no such mode.
        DataError: int8 without batches.
        ModelError: TensorFlow's converter refuses.
    """
    import tensorflow as tf

    if mode not in MODES:
        raise RecipeError(f"mode: no choice {mode!r}{nearest(mode, MODES)}")
    converter = tf.lite.TFLiteConverter.from_saved_model(str(model.folder))
    if mode != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if mode == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if mode == "int8":
        if not batches:
            raise DataError("int8 needs data to calibrate activations on; give data=")
        converter.representative_dataset = lambda: _single(model, batches)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    try:
        content: bytes = converter.convert()
    except Exception as error:  # it raises whatever it likes
        raise ModelError(f"TensorFlow cannot write the model as {mode}: {first_line(error)}") from error
    return content


def _single(model: KerasModel, batches: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """One sample at a time, by the names of the inputs."""
    for inputs in batches:
        named = model.named(inputs)
        for i in range(len(next(iter(named.values())))):
            yield {name: x[i : i + 1].numpy() for name, x in named.items()}
