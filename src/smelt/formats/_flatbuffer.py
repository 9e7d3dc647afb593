"""A `.tflite` file that is read, changed and written: narrower codes, blocks, integer ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smelt.formats._affine import Grid

BLOCK = 32  # blocks of 4-bit codes are multiples of so many
HYBRID = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")  # kernels that take codes beside floating inputs
VERSIONS = {"QUANTIZE": 1, "DEQUANTIZE": 5, "RESHAPE": 1, "SLICE": 1, "TRANSPOSE": 1}  # that do what is asked of them


class File:
    """The model of a flatbuffer, as objects of its schema."""

    def __init__(self, content: bytes):
        from ai_edge_litert import schema_py_generated as schema
        from ai_edge_litert.tools import flatbuffer_utils as tools

        self.schema: Any = schema
        self.tools: Any = tools
        self.model: Any = tools.read_model_from_bytearray(bytearray(content))
        kinds = vars(schema.BuiltinOperator)
        self.names = {value: name for name, value in kinds.items() if isinstance(value, int)}

    def content(self) -> bytes:
        for graph in self.model.subgraphs:  # names of what is inside, which nobody reads, are longer than small weights
            ends = {int(i) for side in (graph.inputs, graph.outputs) for i in side}
            for at, tensor in enumerate(graph.tensors):
                tensor.name = tensor.name if at in ends else b""
        used = {tensor.buffer for graph in self.model.subgraphs for tensor in graph.tensors}
        used |= {entry.buffer for entry in self.model.metadata or ()}
        for at, buffer in enumerate(self.model.buffers):
            if at not in used:
                buffer.data = None
        return bytes(self.tools.convert_object_to_bytearray(self.model))

    def operations(self) -> Iterator[tuple[Any, Any, str]]:
        """(subgraph, operation, 'CONV_2D')"""
        for graph in self.model.subgraphs:
            for operation in graph.operators or ():
                code = self.model.operatorCodes[operation.opcodeIndex]
                yield graph, operation, self.names.get(max(code.builtinCode, code.deprecatedBuiltinCode), "CUSTOM")

    def tensors(self, operation: Any) -> list[int]:
        return [
            int(i) for side in (operation.inputs, operation.outputs) for i in (() if side is None else side) if i >= 0
        ]

    def floating(self) -> list[str]:
        """Names of the operations that have a floating tensor, each once."""
        kinds = self.schema.TensorType
        wide = (kinds.FLOAT32, kinds.FLOAT16, kinds.FLOAT64, kinds.BFLOAT16)
        found = [
            name
            for graph, operation, name in self.operations()
            if any(graph.tensors[i].type in wide for i in self.tensors(operation))
        ]
        return list(dict.fromkeys(found))

    def narrow(self) -> None:
        """Weights of linear layers and convolutions whose int8 codes need no more than 4 bits take 4 bits each."""
        kinds = self.schema.TensorType
        users: dict[tuple[int, int], list[str]] = {}
        graphs = list(self.model.subgraphs)
        for graph, operation, name in self.operations():
            for place, i in enumerate(operation.inputs):
                users.setdefault((graphs.index(graph), int(i)), []).append(f"{name} {place}")
        for (at, i), names in users.items():
            if i < 0 or any(name not in ("FULLY_CONNECTED 1", "CONV_2D 1") for name in names):
                continue
            tensor = graphs[at].tensors[i]
            if tensor.type != kinds.INT8 or not (data := self._data(tensor)):
                continue
            codes = np.frombuffer(data, np.int8)
            if codes.min() >= -8 and codes.max() <= 7:
                tensor.buffer, tensor.type = self._buffer(_nibbles(codes)), kinds.INT4

    def store(self, grid: Grid, shape: torch.Size) -> bool:
        """Let constants with the values of a grid be its codes; whether there were any.

        Kernels that take codes beside floating inputs get them: those with a scale per row, and in linear layers those
        of 4 bits with a scale per block.  Before all others the codes are taken back to values, once.
        """
        dense = ((grid.codes - grid.spread(grid.zero)) * grid.spread(grid.scale)).float()
        found = False
        for layout in _layouts(shape):
            wanted = dense.reshape(shape).permute(layout).contiguous().numpy().tobytes()
            for graph in self.model.subgraphs:
                for at, tensor in enumerate(list(graph.tensors)):
                    if tensor.type == self.schema.TensorType.FLOAT32 and self._data(tensor) == wanted:
                        self._exchange(graph, at, grid, shape, layout)
                        found = True
        return found

    def _exchange(self, graph: Any, at: int, grid: Grid, shape: torch.Size, layout: tuple[int, ...]) -> None:
        users = [(operation, name) for owner, operation, name in self.operations() if owner is graph]
        users = [(operation, name) for operation, name in users if at in list(operation.inputs)]
        takes = [operation for operation, name in users if self._takes(graph, operation, name, at, grid)]
        several, made = grid.scale.shape[1] > 1, None
        if takes:
            made = self._blocks(graph, at, grid) if several else self._rows(graph, at, grid, shape, layout)
            for operation in takes:
                operation.inputs = [made if int(i) == at else int(i) for i in operation.inputs]
        if len(takes) == len(users):
            graph.tensors[at].buffer = 0  # nothing uses it
        elif several or made is None:
            self._back(graph, at, grid, shape, layout)
        else:
            self._run_first(graph, at, [("DEQUANTIZE", [], [])], made)

    def _takes(self, graph: Any, operation: Any, name: str, at: int, grid: Grid) -> bool:
        if len(operation.inputs) < 2 or int(operation.inputs[1]) != at or bool(grid.zero.any()):
            return False
        entering = graph.tensors[operation.inputs[0]]
        if entering.type != self.schema.TensorType.FLOAT32 or self._data(entering):
            return False
        low, high = (int(n) for n in grid.codes.aminmax())
        if grid.scale.shape[1] > 1:
            return name == "FULLY_CONNECTED" and grid.run % BLOCK == 0 and -8 <= low <= high <= 7
        return name in HYBRID and -128 <= low <= high <= 127

    def _rows(self, graph: Any, at: int, grid: Grid, shape: torch.Size, layout: tuple[int, ...]) -> int:
        old = graph.tensors[at]
        made = self._tensor(graph, list(old.shape), self.schema.TensorType.INT8)
        made.buffer = self._buffer(grid.codes.to(torch.int8).reshape(shape).permute(layout).contiguous().numpy())
        made.quantization = self._scales(grid.scale, grid.zero, _channels(old, layout))
        return len(graph.tensors) - 1

    def _blocks(self, graph: Any, at: int, grid: Grid) -> int:
        old, kinds = graph.tensors[at], self.schema.TensorType
        scales = self._tensor(graph, list(grid.scale.shape), kinds.FLOAT16)
        scales.buffer = self._buffer(grid.scale.half().numpy())
        details = self.schema.BlockwiseQuantizationT()
        details.scales, details.zeroPoints, details.blockSize = len(graph.tensors) - 1, -1, grid.run
        made = self._tensor(graph, list(old.shape), kinds.INT4)
        made.buffer = self._buffer(_nibbles(grid.codes.numpy()))
        made.quantization = self.schema.QuantizationParametersT()
        made.quantization.detailsType = self.schema.QuantizationDetails.BlockwiseQuantization
        made.quantization.details = details
        return len(graph.tensors) - 1

    def _back(self, graph: Any, at: int, grid: Grid, shape: torch.Size, layout: tuple[int, ...]) -> None:
        """Codes -> DEQUANTIZE -> where a row has several scales, moves into place -> the tensor that was a constant."""
        old = graph.tensors[at]
        final = [int(n) for n in old.shape]
        if grid.scale.shape[1] > 1:
            rows, scale, zero = _groups(grid)
            steps: list[tuple[str, list[int], list[Any]]] = [("DEQUANTIZE", list(rows.shape), [])]
            count, columns = grid.codes.shape
            if rows.numel() > grid.codes.numel():
                width = rows.numel() // count
                steps.append(("RESHAPE", [count, width], [[count, width]]))
                steps.append(("SLICE", [count, columns], [[0, 0], [count, columns]]))
            if layout != tuple(range(len(shape))):
                steps.append(("RESHAPE", list(shape), [list(shape)]))
                steps.append(("TRANSPOSE", [shape[i] for i in layout], [layout]))
            if steps[-1][1] != final:
                steps.append(("RESHAPE", final, [final]))
            dimension = 0
        else:
            rows, scale, zero = grid.codes.reshape(shape).permute(layout).reshape(final), grid.scale, grid.zero
            steps, dimension = [("DEQUANTIZE", final, [])], _channels(old, layout)
        move = 128 if int(rows.max()) > 127 else 0
        codes = self._tensor(graph, list(rows.shape), self.schema.TensorType.INT8)
        codes.buffer = self._buffer((rows - move).to(torch.int8).contiguous().numpy())
        codes.quantization = self._scales(scale, zero - move, dimension)
        self._run_first(graph, at, steps, len(graph.tensors) - 1)

    def _run_first(self, graph: Any, at: int, steps: list[tuple[str, list[int], list[Any]]], source: int) -> None:
        """Let a tensor be what operations make of `source`, one after the other: (name, shape of its output, constants
        that it takes)."""
        made: list[Any] = []
        for name, size, given in steps:
            constants = [self._constant(graph, values) for values in given]
            target = at
            if len(made) < len(steps) - 1:
                self._tensor(graph, size, self.schema.TensorType.FLOAT32)
                target = len(graph.tensors) - 1
            made.append(self._operation(name, [source, *constants], target))
            source = target
        graph.tensors[at].buffer = 0
        graph.operators = [*made, *graph.operators]

    def _constant(self, graph: Any, values: Any) -> int:
        made = self._tensor(graph, [len(values)], self.schema.TensorType.INT32)
        made.buffer = self._buffer(np.array(values, np.int32))
        return len(graph.tensors) - 1

    def _operation(self, name: str, inputs: list[int], output: int) -> Any:
        value = getattr(self.schema.BuiltinOperator, name)
        codes = self.model.operatorCodes
        at = next(
            (i for i, code in enumerate(codes) if max(code.builtinCode, code.deprecatedBuiltinCode) == value), None
        )
        if at is None:
            made = self.schema.OperatorCodeT()
            made.builtinCode, made.deprecatedBuiltinCode, made.version = value, min(value, 127), VERSIONS[name]
            codes.append(made)
            at = len(codes) - 1
        codes[at].version = max(codes[at].version, VERSIONS[name])
        operation = self.schema.OperatorT()
        operation.opcodeIndex, operation.inputs, operation.outputs = at, inputs, [output]
        return operation

    def _tensor(self, graph: Any, shape: list[int], kind: int) -> Any:
        made = self.schema.TensorT()
        made.shape, made.type, made.quantization = shape, kind, None
        graph.tensors.append(made)
        return made

    def _scales(self, scale: Tensor, zero: Tensor, dimension: int) -> Any:
        made = self.schema.QuantizationParametersT()
        made.scale = scale.float().flatten().numpy()
        made.zeroPoint = zero.round().to(torch.int64).flatten().numpy()
        made.quantizedDimension = dimension
        return made

    def _data(self, tensor: Any) -> bytes:
        data = self.model.buffers[tensor.buffer].data
        return b"" if data is None else bytes(data)

    def _buffer(self, values: np.ndarray) -> int:
        made = self.schema.BufferT()
        made.data, made.offset, made.size = values.reshape(-1).view(np.uint8), 0, 0
        self.model.buffers.append(made)
        return len(self.model.buffers) - 1

    def integer_ends(self) -> None:
        """Take out the roundings at the inputs and outputs: the file takes and gives their codes."""
        for at, graph in enumerate(self.model.subgraphs):
            moved: dict[int, int] = {}
            kept = []
            for _, operation, name in [o for o in self.operations() if o[0] is graph]:
                source, target = int(operation.inputs[0]), int(operation.outputs[0])
                if name == "QUANTIZE" and source in graph.inputs:
                    moved[source] = target
                elif name == "DEQUANTIZE" and target in graph.outputs:
                    moved[target] = source
                else:
                    kept.append(operation)
            graph.operators = kept
            self._move(at, moved, moved)

    def floating_ends(self) -> None:
        """Round at the inputs and outputs that are codes: the file takes and gives values.  Converters leave that
        out."""
        for at, graph in enumerate(self.model.subgraphs):
            inputs = {int(i): self._values_of(graph, int(i)) for i in graph.inputs if self._coded(graph, int(i))}
            outputs = {int(i): self._values_of(graph, int(i)) for i in graph.outputs if self._coded(graph, int(i))}
            first = [self._operation("QUANTIZE", [values], codes) for codes, values in inputs.items()]
            last = [self._operation("DEQUANTIZE", [codes], values) for codes, values in outputs.items()]
            graph.operators = [*first, *graph.operators, *last]
            self._move(at, inputs, outputs)

    def _coded(self, graph: Any, at: int) -> bool:
        tensor = graph.tensors[at]
        scaled = tensor.quantization is not None and tensor.quantization.scale is not None
        return scaled and tensor.type == self.schema.TensorType.INT8

    def _values_of(self, graph: Any, at: int) -> int:
        """A floating tensor of the same shape and name."""
        codes = graph.tensors[at]
        made = self._tensor(graph, list(codes.shape), self.schema.TensorType.FLOAT32)
        made.name, codes.name = codes.name, b""
        return len(graph.tensors) - 1

    def _move(self, at: int, inputs: dict[int, int], outputs: dict[int, int]) -> None:
        """Let other tensors be the inputs and outputs."""
        graph = self.model.subgraphs[at]
        graph.inputs = [inputs.get(int(i), int(i)) for i in graph.inputs]
        graph.outputs = [outputs.get(int(i), int(i)) for i in graph.outputs]
        for signature in self.model.signatureDefs or ():
            if signature.subgraphIndex == at:
                for side, moved in ((signature.inputs, inputs), (signature.outputs, outputs)):
                    for entry in side:
                        entry.tensorIndex = moved.get(int(entry.tensorIndex), int(entry.tensorIndex))


def _layouts(shape: torch.Size) -> list[tuple[int, ...]]:
    """Orders of the dimensions in which a weight may lie in a file: as it is, channels last, of each channel alone."""
    order = tuple(range(len(shape)))
    return [order] if len(shape) < 3 else [(0, *order[2:], 1), (1, *order[2:], 0), order]


def _channels(tensor: Any, layout: tuple[int, ...]) -> int:
    """The dimension of a constant in the file that was dimension 0."""
    return 0 if layout[0] == 0 else len(tensor.shape) - 1


def _groups(grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [groups, size], scale and zero of each; the last group of a row is filled up where it is shorter."""
    runs = grid.scale.shape[1]
    new = (grid.scale[:, 1:] != grid.scale[:, :-1]) | (grid.zero[:, 1:] != grid.zero[:, :-1])
    step = math.gcd(*(int(i) + 1 for i in new.any(0).nonzero())) or runs
    size = step * grid.run
    short = -grid.codes.shape[1] % size
    codes = torch.nn.functional.pad(grid.codes, (0, short)).reshape(-1, size)
    return codes, grid.scale[:, ::step].reshape(-1), grid.zero[:, ::step].reshape(-1)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """Two codes in a byte, the first in the lower half."""
    flat = codes.reshape(-1).astype(np.uint8) & 15
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return flat[::2] | flat[1::2] << 4
