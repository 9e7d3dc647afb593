"""NNCodec in an environment of its own (it needs NumPy 1): code a checkpoint at several step sizes.

    python _nncodec.py checkpoint.safetensors OUT QP [QP ...]

writes OUT/QP.nnc, and OUT/QP.safetensors with what decoding that file gives.  Coding settings are NNCodec's defaults
for a model without data: dependent quantization, parameter optimization, batch norm folding off.
"""

import sys
from pathlib import Path

import torch
from safetensors.numpy import load_file, save_file

try:  # a torchvision that was built for another torch fails to import for want of these two declarations
    torch.ops.torchvision.nms  # noqa: B018
except (AttributeError, RuntimeError):
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from nncodec import nnc


def main() -> None:
    checkpoint, out, *steps = sys.argv[1:]
    tensors = {k: v for k, v in load_file(checkpoint).items() if v.dtype == "float32"}  # it reads no integer scalars
    for step in steps:
        path = Path(out) / f"{step}.nnc"
        nnc.compress(dict(tensors), bitstream_path=str(path), qp=int(step), use_dq=True, param_opt=True, verbose=False)
        decoded = nnc.decompress(str(path), verbose=False)
        save_file(
            {k: decoded[k].reshape(v.shape).astype(v.dtype) for k, v in tensors.items()},
            path.with_suffix(".safetensors"),
        )


if __name__ == "__main__":
    main()
