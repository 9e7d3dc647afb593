"""Opening data by a text: a built-in name, a file, a folder or a function."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from smelt.core import shelf
from smelt.core.data import Batches, Data, check_loader, fingerprint
from smelt.core.errors import DataError, nearest
from smelt.core.named import check_arguments, first_line, function_at, parameters_of, parse_call

HELD_OUT = 0.2
BATCH_SIZE = 128
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
PLAIN = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV")
NAMES = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test",)}

Part = tuple[Tensor, "Tensor | None"]


def open_data(
    spec: str, batch_size: int | None = None, seed: int = 0, size: int | tuple[int, int] | None = None
) -> Data:
    """The data set that a text names.

    Tried in this order:

    - a built-in name, with arguments if wanted: `digits`, `digits(held_out=0.3)`;
    - a `.npz` file: `x_train, y_train, x_test, y_test` (also `train_x, train_y` or `train_images, train_labels`; a part
      named `valid` or `val` likewise), or `x, y` alone.  uint8 arrays are images: scaled to 0..1, [n, h, w] becomes
      [n, 1, h, w] and [n, h, w, c] with c of 1, 3 or 4 becomes [n, c, h, w]; floating arrays become float32 and others
      int64, as they lie.
      Labels: whole numbers become int64, floating ones float32, [n, 1] becomes [n];
    - a folder of images: `root/train/<class>/*` and `root/test/<class>/*` (and `valid` or `val`), or `root/<class>/*`;
      .png .jpg .jpeg .bmp .webp; grey images [n, 1, h, w], or RGB [n, 3, h, w] if any has colours, in 0..1;
    - `module:function` (the current directory first), with arguments if wanted; it returns a `Data`, a pair
      (train, test) of loaders, or a dict of loaders by split; it gets batch_size and seed if it has such parameters.

    Files and folders are held in memory, and without a test part a seeded, stratified fifth of the training part
    becomes the test.

    Args:
        batch_size: None = what the data set has by default (128 for files and folders).
        seed: of the order of training and of what is held out.
        size: pixels, a side or (height, width), to which the images of a folder are scaled.

    Raises:
        DataError: naming the text, and what would be right.
    """
    if batch_size is not None and batch_size < 1:
        raise DataError(f"{spec!r}: batch_size is {batch_size}; it takes a whole number from 1")
    name, arguments = (spec, {}) if Path(spec).exists() else parse_call(spec, DataError)
    path = Path(name)
    known = shelf.names("data")
    if size is not None and (name in known or not path.is_dir()):
        raise DataError(f"{spec!r}: size is for a folder of images only")
    if name in known:
        return _call(shelf.module("data", name).load, spec, arguments, batch_size, seed)
    if path.is_file() and path.suffix == ".npz":
        return _batches(spec, _npz(path), (), batch_size, seed)
    if path.is_dir():
        return _batches(spec, *_folder(path, size), batch_size, seed)
    if path.exists():
        raise DataError(f"{spec!r} is neither a .npz file nor a folder of images")
    if ":" in name and not name.endswith(".npz"):
        return _call(function_at(name, DataError), spec, arguments, batch_size, seed)
    if path.suffix or len(path.parts) > 1:
        raise DataError(f"no such file or folder: {spec!r}")
    raise DataError(f"no data set {name!r}{nearest(name, known)}; or give a .npz file, a folder or module:function")


def _call(function: Any, spec: str, arguments: dict[str, Any], batch_size: int | None, seed: int) -> Data:
    takes = parameters_of(function)
    given = dict(arguments)
    if takes is not None and "seed" in takes:
        given.setdefault("seed", seed)
    if batch_size is not None:
        if takes is not None and "batch_size" not in takes:
            raise DataError(f"{spec!r} takes no batch_size; give the function such a parameter")
        given["batch_size"] = batch_size
    check_arguments(function, given, spec, DataError)
    try:
        made = function(**given)
    except DataError as error:
        raise DataError(f"{spec!r}: {error}") from error
    except Exception as error:
        raise DataError(f"{spec!r} failed: {type(error).__name__}: {first_line(error)}") from error
    return _data(made, spec)


def _data(made: Any, spec: str) -> Data:
    """A `Data` from what a function returned."""
    if isinstance(made, Mapping):
        train, valid, test = (next((made[n] for n in names if n in made), None) for names in NAMES.values())
        foreign = set(made) - {n for names in NAMES.values() for n in names}
        if foreign:
            raise DataError(f"{spec!r} returns a split {min(map(str, foreign))!r}; splits are train, valid and test")
        made = Data(train, valid, test, name=spec)
    elif isinstance(made, (tuple, list)) and len(made) == 2:
        made = Data(train=made[0], test=made[1], name=spec)
    elif not isinstance(made, Data):
        raise DataError(
            f"{spec!r} returns a {type(made).__name__}; it must be a Data, a pair (train, test) or a dict of loaders"
        )
    data: Data = made
    splits = data.splits()
    if not splits:
        raise DataError(f"{spec!r} returns no split; it must have train, valid or test")
    for split, loader in splits.items():
        check_loader(loader, f"{spec!r}, split {split!r}")
    if data.fingerprint is None:
        data.fingerprint = fingerprint(splits)
    return data


def _batches(spec: str, found: dict[str, Part], classes: tuple[str, ...], batch_size: int | None, seed: int) -> Data:
    splits: dict[str, Batches] = {}
    try:
        for split, (x, y) in found.items():
            splits[split] = Batches(x, y, batch_size or BATCH_SIZE, shuffle=split == "train", seed=seed)
            if not len(x):
                raise DataError(f"the {split} part is empty")
        if "test" not in splits:
            splits["train"], splits["test"] = splits["train"].split(HELD_OUT, seed)
    except DataError as error:
        raise DataError(f"{spec!r}: {error}") from None
    return Data(**splits, name=Path(spec).stem, fingerprint=fingerprint(splits), classes=classes)


def _npz(path: Path) -> dict[str, Part]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, BadZipFile, zlib.error) as error:
        raise DataError(f"{str(path)!r} cannot be read as a .npz of plain arrays: {first_line(error)}") from None
    found: dict[str, Part] = {}
    for split, names in NAMES.items():
        pairs = [(form.format("x", n), form.format("y", n)) for n in names for form in ("{0}_{1}", "{1}_{0}")]
        pairs += [(f"{n}_images", f"{n}_labels") for n in names]
        pairs += [("x", "y")] if split == "train" else []
        for x, y in pairs:
            if x in arrays:
                labels = _labels(arrays[y], f"{str(path)!r}: {y}") if y in arrays else None
                found[split] = _inputs(arrays[x], f"{str(path)!r}: {x}"), labels
                break
    if not found.keys() & {"train", "test"}:
        keys = ", ".join(arrays) or "nothing"
        raise DataError(f"{str(path)!r} holds {keys}; it needs x_train, y_train, x_test and y_test, or x and y")
    return found


def _inputs(array: np.ndarray[Any, Any], where: str) -> Tensor:
    if array.dtype == np.uint8:
        if array.ndim == 3:
            array = array[:, None]
        elif array.ndim == 4 and array.shape[3] in (1, 3, 4):
            array = array.transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(array)).to(torch.float32).div_(255)
    return _numbers(array, where)


def _labels(array: np.ndarray[Any, Any], where: str) -> Tensor:
    return _numbers(array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array, where)


def _numbers(array: np.ndarray[Any, Any], where: str) -> Tensor:
    if array.dtype.kind not in "fiub":
        raise DataError(f"{where} has dtype {array.dtype}; it takes numbers (uint8 images, floats or whole numbers)")
    floating = array.dtype.kind == "f"
    if floating and not np.isfinite(array).all():
        raise DataError(f"{where} holds {int((~np.isfinite(array)).sum())} NaN or infinite values; data must be finite")
    return torch.from_numpy(array.astype(np.float32 if floating else np.int64))


def _folder(root: Path, size: int | tuple[int, int] | None) -> tuple[dict[str, Part], tuple[str, ...]]:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise DataError(f"{str(root)!r}: a folder of images needs Pillow: pip install pillow ({error})") from None
    layout = {s: root / n for s, names in NAMES.items() for n in names if (root / n).is_dir()}
    if not layout.keys() & {"train", "test"}:
        layout = {"train": root}
    main = layout.get("train", layout.get("test", root))
    classes = tuple(sorted(p.name for p in main.iterdir() if p.is_dir() and not p.name.startswith(".")))
    if not classes:
        raise DataError(f"{str(root)!r} has no class folders; it needs root/train/<class>/*.png or root/<class>/*.png")
    files: list[tuple[str, int, Path]] = []
    for split, folder in layout.items():
        for own in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
            if own.name not in classes:
                raise DataError(f"{str(own)!r}: the class is not in {main.name}{nearest(own.name, classes)}")
            inside = sorted(p for p in own.rglob("*") if p.suffix.lower() in IMAGES)
            if not inside:
                raise DataError(f"{str(own)!r} holds no images; it takes {' '.join(IMAGES)}")
            files += [(split, classes.index(own.name), p) for p in inside]
    pixels = _pixels([p for _, _, p in files], size)
    labels = torch.tensor([label for _, label, _ in files])
    rows = {split: torch.tensor([s == split for s, _, _ in files], dtype=torch.bool) for split in layout}
    return {split: (pixels[chosen], labels[chosen]) for split, chosen in rows.items()}, classes


def _pixels(files: list[Path], size: int | tuple[int, int] | None) -> Tensor:
    """float32 [n, c, h, w] in 0..1."""
    from PIL import Image

    wanted = (size, size) if isinstance(size, int) else size
    images: list[np.ndarray[Any, Any]] = []
    for path in files:
        try:
            with Image.open(path) as image:
                if image.mode not in PLAIN:
                    raise ValueError(f"its mode is {image.mode}; it takes 8 bits per channel")
                plain = image.convert("L" if image.mode in ("1", "L") else "RGB")
                if wanted is not None:
                    plain = plain.resize((wanted[1], wanted[0]), Image.Resampling.BILINEAR)
                array = np.asarray(plain)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{str(path)!r} cannot be read as an image: {first_line(error)}") from None
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        if images and array.shape[1:] != images[0].shape[1:]:
            found, first = ("x".join(map(str, a.shape[1:])) for a in (array, images[0]))
            raise DataError(f"{str(path)!r} has {found} pixels (height x width), the first image {first}; give size=")
        images.append(array)
    channels = max(a.shape[0] for a in images)
    stacked = np.stack([np.repeat(a, channels // a.shape[0], axis=0) for a in images])
    return torch.from_numpy(stacked).to(torch.float32).div_(255)
