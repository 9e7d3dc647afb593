"""Other ways from a module to a file (or a compiled module) that runs fast on a CPU, as their own guides have it.

Each takes the model, inputs of one call and calibration inputs, and gives a path that a runtime of ours opens, or a
session.  What a peer cannot do it says by an exception.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smelt.core.runtime import Session
from smelt.formats.openvino import HINT, HINTS, package
from smelt.runtimes._torch import TorchSession

Inputs = tuple[Tensor, ...]
Peer = Callable[[nn.Module, Inputs, Sequence[Inputs], Path], "Path | Session"]


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Exporters print pages."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def onnx_fp32(model: nn.Module, inputs: Inputs, batches: Sequence[Inputs], folder: Path) -> Path:
    path = folder / "fp32.onnx"
    if not path.exists():
        torch.onnx.export(model, inputs, str(path), dynamo=True, external_data=False, verbose=False)
    return path


class _Reader:
    """Calibration inputs by the names of the graph, as ONNX Runtime's quantizer asks for them."""

    def __init__(self, path: Path, batches: Sequence[Inputs]):
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        self.left = iter([{n: x.numpy() for n, x in zip(names, batch, strict=True)} for batch in batches])

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        return next(self.left, None)


def _prepared(model: nn.Module, inputs: Inputs, folder: Path) -> Path:
    """ONNX Runtime's own preparation: constants folded, shapes known."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = folder / "prepared.onnx"
    if not path.exists():
        quant_pre_process(str(onnx_fp32(model, inputs, (), folder)), str(path), skip_symbolic_shape=True)
    return path


def ort_static(model: nn.Module, inputs: Inputs, batches: Sequence[Inputs], folder: Path) -> Path:
    """Unsigned activations: the default of signed ones is 2.5 times slower."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    before, path = _prepared(model, inputs, folder), folder / "ort-static.onnx"
    quantize_static(
        str(before), str(path), _Reader(before, batches), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return path


def ort_dynamic(model: nn.Module, inputs: Inputs, batches: Sequence[Inputs], folder: Path) -> Path:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain, path = onnx.load(str(onnx_fp32(model, inputs, (), folder))), folder / "ort-dynamic.onnx"
    plain.graph.ClearField("value_info")  # what the exporter put there makes its shape inference fail on Gemm
    quantize_dynamic(plain, str(path), weight_type=QuantType.QInt8, per_channel=True)
    return path


def ort_int4(model: nn.Module, inputs: Inputs, batches: Sequence[Inputs], folder: Path) -> Path:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    plain, path = onnx.load(str(onnx_fp32(model, inputs, (), folder))), folder / "ort-int4.onnx"
    quantizer = MatMulNBitsQuantizer(plain, block_size=32, is_symmetric=False, accuracy_level=4)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path), False)
    return path


def _openvino(model: nn.Module, inputs: Inputs) -> Any:
    openvino = package()
    return openvino.convert_model(model, example_input=inputs, input=[tuple(x.shape) for x in inputs])


def openvino_fp32(model: nn.Module, inputs: Inputs, batches: Sequence[Inputs], folder: Path) -> Path:
    openvino = package()
    path = folder / "openvino-fp32.xml"
    openvino.save_model(_openvino(model, inputs), path, compress_to_fp16=False)
    return path


def openvino_bf16(model: nn.Module, inputs: Inputs, batches: Sequence[Inputs], folder: Path) -> Path:
    """What OpenVINO does by itself on processors that have bfloat16."""
    openvino = package()
    made, path = _openvino(model, inputs), folder / "openvino-bf16.xml"
    made.set_rt_info(HINTS["bfloat16"], HINT)
    openvino.save_model(made, path, compress_to_fp16=False)
    return path


def nncf_int8(model: nn.Module, inputs: Inputs, batches: Sequence[Inputs], folder: Path) -> Path:
    """Int8; in bfloat16 what is not, as OpenVINO does by itself."""
    openvino = package()
    import nncf

    attention = any(isinstance(m, nn.LayerNorm) for m in model.modules())
    data = nncf.Dataset(list(batches), lambda batch: [x.numpy() for x in batch])
    kind = nncf.ModelType.TRANSFORMER if attention else None
    made, path = nncf.quantize(_openvino(model, inputs), data, model_type=kind), folder / "nncf.xml"
    made.set_rt_info(HINTS["bfloat16"], HINT)
    openvino.save_model(made, path, compress_to_fp16=False)
    return path


def _nncf_weights(name: str, mode: str, model: nn.Module, inputs: Inputs, folder: Path) -> Path:
    openvino = package()
    import nncf

    settings = {"mode": getattr(nncf.CompressWeightsMode, mode)}
    if "INT4" in mode:
        settings |= {"group_size": 64, "ratio": 1.0}
    made, path = nncf.compress_weights(_openvino(model, inputs), **settings), folder / f"{name}.xml"
    made.set_rt_info(HINTS["bfloat16"], HINT)
    openvino.save_model(made, path, compress_to_fp16=False)
    return path


def nncf_w8(model: nn.Module, inputs: Inputs, batches: Sequence[Inputs], folder: Path) -> Path:
    return _nncf_weights("nncf-w8", "INT8_ASYM", model, inputs, folder)


def nncf_w4(model: nn.Module, inputs: Inputs, batches: Sequence[Inputs], folder: Path) -> Path:
    return _nncf_weights("nncf-w4", "INT4_ASYM", model, inputs, folder)


def pt2e(model: nn.Module, inputs: Inputs, batches: Sequence[Inputs], folder: Path) -> Session:
    """torchao's static int8, compiled by inductor with frozen weights.  Nothing is saved."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(model, inputs).module(), quantizer)
        for batch in batches:
            prepared(*batch)
        made = torch.compile(convert_pt2e(prepared), dynamic=False, options={"freezing": True})
    return TorchSession(made, 1)


def missing(modules: Sequence[str]) -> str | None:
    absent = [name for name in modules if find_spec(name) is None]
    return f"missing: {', '.join(absent)}; pip install -r benchmarks/requirements-deploy.txt" if absent else None


ONNX = ("onnx", "onnxscript", "onnxruntime")
OPENVINO = ("openvino",)
NNCF = ("openvino", "nncf")
FP32: dict[str, tuple[Peer, tuple[str, ...], str]] = {
    "ONNX Runtime": (onnx_fp32, ONNX, "onnxruntime"),
    "OpenVINO": (openvino_fp32, OPENVINO, "openvino"),
}
NARROW: dict[str, tuple[Peer, tuple[str, ...], str]] = {"OpenVINO, bfloat16": (openvino_bf16, OPENVINO, "openvino")}
INT8: dict[str, tuple[Peer, tuple[str, ...], str]] = {
    "ONNX Runtime's quantizer, static": (ort_static, ONNX, "onnxruntime"),
    "ONNX Runtime's quantizer, dynamic": (ort_dynamic, ONNX, "onnxruntime"),
    "ONNX Runtime's quantizer, 4 bits": (ort_int4, (*ONNX, "onnx_ir"), "onnxruntime"),
    "NNCF": (nncf_int8, NNCF, "openvino"),
    "NNCF, weights in 8 bits": (nncf_w8, NNCF, "openvino"),
    "NNCF, weights in 4 bits": (nncf_w4, NNCF, "openvino"),
    "torchao PT2E": (pt2e, ("torchao",), ""),
}
"""Name -> (what makes it, the modules it needs, the runtime that opens what it makes)."""
