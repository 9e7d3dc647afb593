"""An open `.smelt` file: what it says, and its tensors one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smelt.core.edit import Edit, Keep, Members, from_plain
from smelt.core.encoded import Encoded, awaken, numel
from smelt.core.errors import FileError, ModelError, nearest
from smelt.core.job import check_device
from smelt.core.named import first_line
from smelt.formats._container import Container, to_bytes
from smelt.formats._meta import Node, Reader, Resting, brief, pairs
from smelt.formats._slice import Slice
from smelt.formats.safetensors import Origin, name_of
from smelt.forms.entropy import Entropy, opened
from smelt.native.stream import UNCOUNTED, Stream

# A file with n bytes of leaves may claim at most 2^24 + 2^14 n elements (a pruned tensor takes few bytes).
ELEMENTS, ELEMENTS_PER_BYTE = 1 << 24, 1 << 14

KEYS: dict[str, type] = {
    **{"builder": str, "arguments": dict, "edits": list, "tensors": list, "activations": list},
    **{"recipe": object, "report": object, "origin": dict, "kernels": dict},
}
PIECE = 1 << 24  # bytes
FRAMEWORKS = {"pt": "pt", "torch": "pt", "np": "np", "numpy": "np"}


class File:
    """Its meta is read and judged at once; a leaf's checksum is checked when it is first read.

    Tensors lie on the mapped file where they can; writing to them does not change it.  While it is open the file
    may be replaced, as `save` does, but not be cut off or written over in place.

    `keys`, `offset_keys`, `metadata`, `get_tensor` and `get_slice` are those of safetensors' `safe_open`.

    Args:
        own: give tensors memory of their own.
        framework, device: of what `get_tensor` and `get_slice` give: "pt" (PyTorch) or "np" (NumPy).
        threads: how many decode; 0: as many as there are cores.

    Raises:
        FileError: no file, a foreign, damaged or newer one.
        ModelError: no such framework or device.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        own: bool = False,
        framework: str = "pt",
        device: str | int | torch.device = "cpu",
        threads: int = 0,
    ):
        if framework not in FRAMEWORKS:
            raise ModelError(f"framework {framework!r}; there is {', '.join(FRAMEWORKS)}")
        self._numpy = FRAMEWORKS[framework] == "np"
        self._device = as_device(device)
        self.threads = threads
        self._container = Container(path)
        self._own = own
        self._reader = reader = Reader()
        self._roots: dict[str, Node | int] = {}
        self._spans: dict[str, range] = {}
        self._leaves: dict[int, Tensor] = {}
        self._nodes: dict[Node, Encoded] = {}
        self._streams: dict[int, Stream] = {}
        self._memo: dict[int, Any] = {}
        with self.blame("damaged"):
            self._meta = _judged(self._container.meta)
        for name, data in self._pairs().items():
            with self.blame(f"damaged: tensor {brief(name)}"):
                begin = len(reader.slots)
                self._roots[name] = reader.part(data)
                self._spans[name] = range(begin, len(reader.slots))
        with self.blame("damaged"):
            self.activations = [Resting.read(data, reader) for data in self._meta.get("activations", [])]
            self._container.place(reader.slots, reader.sealed)
            self.most = ELEMENTS + ELEMENTS_PER_BYTE * self.leaf_bytes
            reader.check(self.most)
            if sum(reader.slot(root).numel for root in self._roots.values()) > self.most:
                raise FileError("it claims implausibly many elements")

    def _pairs(self) -> dict[str, Any]:
        with self.blame("damaged"):
            return pairs(self._meta.get("tensors", []))

    def error(self, text: str) -> FileError:
        return self._container.error(text)

    @contextmanager
    def blame(self, where: str) -> Iterator[None]:
        """Whatever goes wrong within is a FileError that names the file and `where`."""
        try:
            yield
        except FileError as error:
            raise self.error(f"{where}: {error}") from None
        except Exception as error:
            raise self.error(f"{where}: {type(error).__name__}: {first_line(error)}") from error

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; tensors that lie on it keep it mapped."""
        self._container.close()
        self._leaves, self._nodes, self._memo, self._streams = {}, {}, {}, {}

    @property
    def path(self) -> Path:
        return self._container.path

    @property
    def version(self) -> int:
        return self._container.version

    @property
    def builder(self) -> str | None:
        """A name on the shelf `models/`, or 'module:function'."""
        return self._meta.get("builder")

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self._meta.get("arguments", {}))

    @property
    def edits(self) -> list[Edit]:
        return self.read_edits(ELEMENTS)

    @property
    def recipe(self) -> Any:
        return self._meta.get("recipe")

    @property
    def report(self) -> Any:
        return self._meta.get("report")

    @property
    def kernels(self) -> dict[str, Any]:
        """What was measured of kernels for its layers (formats/torch.py)."""
        return dict(self._meta.get("kernels", {}))

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self._container.nbytes

    @property
    def leaf_bytes(self) -> int:
        return sum(slot.nbytes for slot in self._reader.slots)

    @property
    def packed(self) -> bool:
        """Whether it stands for another file, of which `origin` tells."""
        return "origin" in self._meta

    @cached_property
    def origin(self) -> Origin:
        """The checkpoint that it was packed from.  Raises FileError for a file that is not packed, or not so."""
        if not self.packed:
            raise self.error("it is no packed checkpoint: smelt pack did not write it")
        with self.blame("damaged: its origin"):
            origin = Origin.read(self._meta["origin"])
            sizes = {name: self._reader.slot(root).nbytes for name, root in self._roots.items()}
            if sizes != {entry.name: entry.nbytes for entry in origin.header.entries}:
                raise FileError("it has other tensors than the file")
            return origin

    def names(self) -> list[str]:
        return list(self._roots)

    def keys(self) -> list[str]:
        """The names, sorted."""
        return sorted(self._roots)

    def offset_keys(self) -> list[str]:
        """The names as the tensors lie in the file."""
        return list(self._roots)

    def metadata(self) -> dict[str, str] | None:
        """The `__metadata__` of the checkpoint that was packed."""
        return self.origin.header.metadata if self.packed else None

    def get_tensor(self, name: str) -> Any:
        """The dense tensor, decoded; an array for framework "np"."""
        return self._given(self.dense_rows(name))

    def get_slice(self, name: str) -> Slice:
        """The tensor, to be indexed; of a packed one only the chunks that hold the wanted rows are decoded."""
        shape, dtype = self.shape(name), name_of(self.dtype(name))
        return Slice(shape, dtype, lambda begin, end: self.dense_rows(name, begin, end), self._given)

    def _given(self, tensor: Tensor) -> Any:
        if not self._numpy:
            return tensor.to(self._device)
        try:
            return tensor.numpy()
        except TypeError:
            raise self.error(f"NumPy has no {tensor.dtype}; open it with framework='pt'") from None

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._reader.slot(self._root(name)).shape)

    def numel(self, name: str) -> int:
        return self._reader.slot(self._root(name)).numel

    def dtype(self, name: str) -> torch.dtype:
        return self._reader.slot(self._root(name)).dtype

    def rest_bytes(self, name: str) -> int:
        """Bytes of a tensor's leaves in the file; a shared leaf counts for the first tensor that has it."""
        self._root(name)
        return sum(self._reader.slots[i].nbytes for i in self._spans[name])

    def stored(self, name: str) -> str:
        """The tree of a tensor as it lies in the file, in words; nothing is read for it."""
        root = self._root(name)
        return str(root) if isinstance(root, Node) else "dense"

    def forms(self, name: str) -> list[str]:
        """The forms of that tree, from the top down."""
        root = self._root(name)
        return list(root.forms()) if isinstance(root, Node) else []

    def resting(self, name: str) -> Tensor | Encoded:
        """The tensor as it lies in the file."""
        with self.blame(f"damaged: tensor {name!r}"):
            return self._part(self._root(name))

    def encoded(self, name: str) -> Tensor | Encoded:
        """The tensor as it is in memory: a tree, or a plain tensor."""
        resting = self.resting(name)
        with self.blame(f"tensor {name!r} cannot be decoded"):
            awake = awaken(resting, self._memo)
            if awake.shape != resting.shape or awake.dtype != resting.dtype:
                raise FileError(f"it awakens as {list(awake.shape)} {awake.dtype}")
            return awake

    def tensor(self, name: str) -> Tensor:
        """The dense tensor."""
        return self.dense(name, self.encoded(name))

    def dense(self, name: str, awake: Tensor | Encoded) -> Tensor:
        """The dense tensor of what `encoded(name)` gave."""
        if isinstance(awake, Tensor):
            return awake
        with self.blame(f"tensor {name!r} cannot be decoded"):
            dense = awake.decode()
            if dense.shape != awake.shape:
                raise FileError(f"it decodes to {list(dense.shape)}")
            return dense

    def dense_rows(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Elements [begin, end) along the first dimension of the dense tensor, without decoding more than needed."""
        shape = self.shape(name)
        whole = begin == 0 and end in (None, shape[0] if shape else 1)
        coded = self._coded(name)
        if coded is None:
            tensor = self.tensor(name)
            return tensor if whole else tensor[begin:end]
        rows = shape if whole else torch.Size([(end or 0) - begin, *shape[1:]])
        out = torch.empty(rows, dtype=self.dtype(name))
        self._decode(name, coded, out.reshape(-1), begin * numel(shape[1:]))
        return out

    def straight(self, name: str) -> bool:
        """Whether the dense tensor is a stream by itself, so that `read_into` can decode it in place."""
        return self._coded(name) is not None

    def read_into(self, name: str, out: Tensor) -> None:
        """Decode a tensor that is `straight` into memory of its dtype and size, contiguous, on the CPU."""
        coded = self._coded(name)
        assert coded is not None
        self._decode(name, coded, out.detach().reshape(-1), 0)

    def pieces(self, name: str, buffers: Iterator[Tensor]) -> Iterator[memoryview]:
        """The bytes of a tensor in pieces, those of a coded one in one of the buffers (`uint8`) each, and released."""
        coded, count, dtype = self._coded(name), self.numel(name), self.dtype(name)
        root = self._root(name)
        if isinstance(root, int):
            with self.blame(f"damaged: tensor {name!r}"):
                yield from self._container.pieces(root, PIECE)
        elif coded is None:
            yield to_bytes(self.tensor(name))
        at = 0
        while coded is not None and at < count:
            buffer = next(buffers)
            out = buffer[: min(buffer.numel(), (count - at) * dtype.itemsize)].view(dtype)
            self._decode(name, coded, out, at)
            self.release(name)
            yield to_bytes(out)
            at += out.numel()
        self.release(name)

    def release(self, name: str) -> None:
        """Let go of the memory that the mapped leaves of a tensor take; nobody else may have tensors on them."""
        root = self._root(name)
        for i in root.leaves() if isinstance(root, Node) else (root,):
            self._container.release(i)

    def _coded(self, name: str) -> tuple[Entropy, int] | None:
        """The form and the leaf of a tensor that is elements of a stream."""
        root = self._root(name)
        if not isinstance(root, Node) or not isinstance(root.form, Entropy):
            return None
        leaf = root.parts["stream"]
        return (root.form, leaf) if isinstance(leaf, int) else None

    def _decode(self, name: str, coded: tuple[Entropy, int], out: Tensor, begin: int) -> None:
        """Elements from `begin` on into `out` [n]."""
        form, leaf = coded
        with self.blame(f"tensor {name!r} cannot be decoded"):
            stream: Any = self._streams.get(leaf)
            if stream is None:
                stream = self._container.leaf(leaf).numpy()
                if self._reader.uses[leaf] > 1 and stream.size and not stream[0] & UNCOUNTED:
                    # Neighbours are read one after the other, often from the same chunk.
                    stream = self._streams[leaf] = opened(stream, 0)
            form.decode_into(stream, out, self.numel(name), begin, self.threads)

    def leaf(self, i: int) -> Tensor:
        """A leaf by its number; one that is used twice is one tensor."""
        if i in self._leaves:
            return self._leaves[i]
        leaf = self._container.leaf(i, own=self._own)
        if self._reader.uses[i] > 1:
            self._leaves[i] = leaf
        return leaf

    def verify(self) -> None:
        """Check every leaf: its checksum, or by decoding what has its own.  Raises FileError."""
        with self.blame("damaged"):
            self._container.verify()
        sealed = self._reader.sealed
        for name, root in self._roots.items():
            if isinstance(root, Node) and not sealed.isdisjoint(root.leaves()):
                self.encoded(name)

    def read_edits(self, most: int) -> list[Edit]:
        """The edits; raises FileError for more than `most` positions to keep in all."""
        found = []
        with self.blame("its edits"):
            for data in self._meta.get("edits", []):
                edit = from_plain(data, most)
                most -= len(edit.index) if isinstance(edit, (Keep, Members)) else 0
                found.append(edit)
        return found

    def _root(self, name: str) -> Node | int:
        if self._container.closed:
            raise self.error("it is closed")
        if name not in self._roots:
            raise self.error(f"no tensor {name!r}{nearest(name, self._roots)}")
        return self._roots[name]

    def _part(self, part: Node | int) -> Tensor | Encoded:
        if isinstance(part, int):
            return self.leaf(part)
        if part in self._nodes:
            return self._nodes[part]
        parts = {k: self._part(p) for k, p in part.parts.items()}
        node = Encoded(part.form, parts, torch.Size(part.slot.shape), part.slot.dtype)
        if part in self._reader.shared:
            self._nodes[part] = node
            self._memo.setdefault(id(node), None)
        return node


def as_device(device: str | int | torch.device) -> torch.device:
    """Raises ModelError for what is no device, or none of this machine's."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"no device {device!r}: {first_line(error)}") from None
    if found.type not in ("cpu", "meta"):
        check_device(str(found))
    return found


def _judged(meta: Any) -> dict[str, Any]:
    if not isinstance(meta, dict):
        raise FileError("its meta is no mapping")
    for key, value in meta.items():
        if key not in KEYS or not isinstance(value, KEYS[key]):
            raise FileError(f"{brief(key)}: {brief(value)} has no place in the meta")
    return meta
