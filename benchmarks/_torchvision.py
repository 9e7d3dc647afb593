"""torchvision beside a torch that it was not built for: `prepare()` before the first import of it.

The wheels of the registry are CUDA builds.  Beside a CPU build of torch their compiled operators do not load, and then
`import torchvision` itself fails, because its Python side registers shape functions for operators that nobody declared
("operator torchvision::nms does not exist"); timm, transformers and torch-pruning fail with it.  Declaring them is
enough for everything but detection, whose operators stay without an implementation.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

# The operators that torchvision's Python side refers to when it is imported.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []


def prepare() -> bool:
    """Declare the operators if torchvision is installed and its own do not load; whether they had to be declared."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or _declared:
        return bool(_declared)
    for path in Path(spec.origin or "").parent.glob("_C*"):
        try:
            torch.ops.load_library(str(path))
            return False
        except OSError:
            pass
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    _declared.append(library)  # the operators live as long as it does
    return True
