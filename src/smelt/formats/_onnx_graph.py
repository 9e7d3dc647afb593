"""Small tools to build an ONNX graph in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor

MICROSOFT = "com.microsoft"
FLOAT, INT32 = int(ir.DataType.FLOAT), int(ir.DataType.INT32)
LISTED = 3  # names that a note lists at most


class Notes:
    """What the user should know, one line for each reason."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, None]] = {}

    def add(self, reason: str, name: str = "") -> None:
        self._names.setdefault(reason, {})[name] = None

    def lines(self) -> list[str]:
        return [f"{_listed([n for n in names if n])}{reason}" for reason, names in self._names.items()]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{', '.join(names[:LISTED])}{more}: " if names else ""


class Graph:
    """Adds constants and nodes with names that are free.

    The same key and numbers give the same constant.
    """

    def __init__(self, model: ir.Model):
        self.model = model
        self.graph = model.graph
        self._taken = {v.name for node in self.graph for v in node.outputs}
        self._taken |= {v.name for v in self.graph.inputs} | set(self.graph.initializers)
        self._known: dict[str, tuple[np.ndarray, ir.Value]] = {}

    def constant(self, key: str, x: Any, dtype: ir.DataType | None = None) -> ir.Value:
        """An initializer from numbers, an array or a tensor, named `key` if that is free."""
        array = x.detach().cpu().contiguous().numpy() if isinstance(x, Tensor) else np.asarray(x)
        if key in self._known and np.array_equal(self._known[key][0], array):
            return self._known[key][1]
        name = self._free(key)
        value = ir.Value(name=name, const_value=ir.tensor(array.copy(), dtype=dtype, name=name))
        assert value.const_value is not None
        value.shape, value.type = ir.Shape(value.const_value.shape), ir.TensorType(value.const_value.dtype)
        self.graph.register_initializer(value)
        self._known[key] = array, value
        return value

    def small(self, at: ir.Node, key: str, x: Any, bits: int) -> ir.Value:
        """int8 codes; those of 4 bits or less take as many in the file, and are widened when it is loaded."""
        if bits > 4:
            return self.constant(key, x)
        return self.cast(at, self.constant(key, x, ir.DataType.INT4), int(ir.DataType.INT8))

    def has(self, key: str) -> bool:
        return key in self._known

    def numbers(self, *values: int) -> ir.Value:
        """int64 [n]: shapes and axes."""
        return self.constant(f"ints_{'_'.join(map(str, values))}", np.array(values, np.int64))

    def op(
        self, at: ir.Node | None, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> ir.Value:
        """A node of one output before the node `at`, or for None at the end."""
        return self.ops(at, kind, *inputs, domain=domain, **attributes)[0]

    def ops(
        self,
        at: ir.Node | None,
        kind: str,
        *inputs: ir.Value | None,
        domain: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        node = ir.node(kind, inputs, attributes, domain=domain, num_outputs=outputs)
        for value in node.outputs:
            value.name = self._free(f"{kind.lower()}_{len(self._taken)}")
        if domain:
            self.model.opset_imports.setdefault(domain, 1)
        if at is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(at, node)
        made: Sequence[Any] = node.outputs
        return made

    def cast(self, at: ir.Node | None, x: ir.Value, to: int = FLOAT) -> ir.Value:
        return self.op(at, "Cast", x, to=to)

    def after(self, value: ir.Value) -> ir.Node | None:
        """The first node of the graph that may use a value; None: there is none yet."""
        producer = value.producer()
        nodes = list(self.graph)
        place = 0 if producer is None else nodes.index(producer) + 1
        return nodes[place] if place < len(nodes) else None

    def sweep(self) -> None:
        """Remove nodes and constants that nothing uses."""
        outputs = set(self.graph.outputs)
        for node in reversed(list(self.graph)):
            if not any(v.uses() or v in outputs for v in node.outputs):
                self.graph.remove(node, safe=True)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and value not in outputs:
                del self.graph.initializers[name]

    def strip(self) -> None:
        """Forget where in the source nodes come from."""
        for node in self.graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*self.graph.inputs, *self.graph.initializers.values()):
            value.metadata_props.clear()
        self.model.metadata_props.clear()
        self.graph.metadata_props.clear()

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let everything that uses `old` use `new`; an output of the graph keeps its name."""
        if old.is_graph_output():
            if new.producer() is None or new.is_graph_output():
                new = self.op(None, "Identity", new)
            old.name, new.name = self._free(f"{old.name}_inner"), old.name
            new.shape, new.type = old.shape, old.type or ir.TensorType(ir.DataType.FLOAT)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)

    def _free(self, name: str) -> str:
        found, count = name, 0
        while found in self._taken:
            count += 1
            found = f"{name}_{count}"
        self._taken.add(found)
        return found


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a constant; None for anything else."""
    tensor = None if value is None else value.const_value
    return None if tensor is None else tensor.numpy()


def ints_of(node: ir.Node, name: str, default: Sequence[int] = ()) -> list[int]:
    found = node.attributes.get(name)
    return list(default) if found is None else list(found.as_ints())


def int_of(node: ir.Node, name: str, default: int) -> int:
    found = node.attributes.get(name)
    return default if found is None else found.as_int()


def only_user(value: ir.Value) -> ir.Node | None:
    """The node that alone uses a value."""
    users = {node for node, _ in value.uses()}
    return users.pop() if len(users) == 1 and not value.is_graph_output() else None
