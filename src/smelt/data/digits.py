"""Handwritten digits of scikit-learn: 1797 grey images of 8x8 pixels, ten classes; no download.

Source: the test part of E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998
(https://archive.ics.uci.edu/dataset/80), as `sklearn.datasets.load_digits` embeds it.
"""

from __future__ import annotations

import torch

from smelt.core.data import Batches, Data, fingerprint
from smelt.core.errors import DataError


def load(batch_size: int = 64, seed: int = 0, held_out: float = 0.5) -> Data:
    """Images float32 [n, 1, 8, 8] in 0..1, labels int64 [n]; 898 for training and 899 for the test by default.

    Args:
        batch_size: of both splits.
        seed: of the stratified split and of the order of training.
        held_out: share of the test.

    Raises:
        DataError: scikit-learn is not installed, or a share that leaves a split empty.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(f"the data set 'digits' needs scikit-learn: pip install scikit-learn ({error})") from None
    raw = load_digits()
    images = torch.from_numpy(raw.images).to(torch.float32).div_(16).unsqueeze(1)
    labels = torch.from_numpy(raw.target).to(torch.int64)
    train, test = Batches(images, labels, batch_size, shuffle=True, seed=seed).split(held_out, seed)
    mark = fingerprint({"train": train, "test": test})
    return Data(train, None, test, name="digits", fingerprint=mark, classes=tuple(map(str, range(10))))
