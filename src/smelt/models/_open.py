"""Opening a model by a text: a built-in name or a function, with weights from a file."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from smelt.core import shelf
from smelt.core.errors import ModelError, nearest
from smelt.core.named import check_arguments, first_line, function_at, parse_call

NESTED = ("state_dict", "model", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.")
PICKLES = (".pt", ".pth", ".th")


def open_model(
    spec: str, weights: str | Path | None = None, arguments: Mapping[str, Any] | None = None
) -> tuple[nn.Module, str, dict[str, Any]]:
    """(module, builder's name, its arguments) of the model that a text names.

    Args:
        spec: a built-in name or `module:function` (the current directory first), with arguments if wanted:
            `lenet`, `lenet(hidden=100)`, `mine:net(width=32)`.  The function returns an `nn.Module`.
        weights: a state dict in a .pt, .pth or .th file (at the top, or under 'state_dict', 'model' or
            'model_state_dict') or a .safetensors file.  Code in a pickle is never run.  Beside its builder, a built-in
            model may define `renamed(state) -> state` for the names that other libraries give its tensors.
        arguments: more arguments of the builder, as plain data.

    Raises:
        ModelError: no such builder or argument, a builder that fails or returns something else, weights that
            cannot be read or do not fit.
    """
    name, given = parse_call(spec, ModelError)
    for key, value in (arguments or {}).items():
        if key in given:
            raise ModelError(f"{spec!r}: the argument {key!r} is given twice, as {given[key]!r} and {value!r}")
        given[key] = value
    known = shelf.names("models")
    renamed = None
    if name in known:
        module = shelf.module("models", name)
        builder, renamed = module.build, getattr(module, "renamed", None)
    elif ":" in name:
        builder = function_at(name, ModelError)
    else:
        raise ModelError(f"no model {name!r}{nearest(name, known)}; or give module:function")
    check_arguments(builder, given, name, ModelError)
    try:
        model = builder(**given)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{name!r} failed with {given}: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name!r} returns a {type(model).__name__}; it must return an nn.Module")
    if weights is not None:
        load_weights(model, weights, renamed)
    return model, name, given


def load_weights(
    model: nn.Module, path: str | Path, renamed: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> None:
    """Fill a model from a file of weights; every tensor of the model must be in it, and no other.

    Tied tensors may be in the file once, and the counters of batch norm may lack.  `renamed` gives the state dict
    of the file the model's own names.

    Raises:
        ModelError: see `open_model`.
    """
    given = read_weights(path)
    given = given if renamed is None else renamed(given)
    own = model.state_dict(keep_vars=True)
    loaded = {id(tensor) for key, tensor in own.items() if key in given}
    absent = [k for k, t in own.items() if k not in given and id(t) not in loaded]
    missing = [k for k in absent if not k.endswith("num_batches_tracked")]
    unexpected = [k for k in given if k not in own]
    pairs = [(k, given[k], t) for k, t in own.items() if k in given and isinstance(t, Tensor)]
    plain = [f"{k} is {type(x).__name__}" for k, x, _ in pairs if not isinstance(x, Tensor)]
    pairs = [] if plain else pairs
    wrong = [f"{k} {[*x.shape]} for {[*t.shape]}" for k, x, t in pairs if not is_lazy(t) and x.shape != t.shape]
    integer = [f"{k} {x.dtype}" for k, x, t in pairs if t.is_floating_point() and not x.is_floating_point()]
    kinds = {"missing": missing, "unexpected": unexpected, "no tensor": plain}
    kinds |= {"of another shape": wrong, "not floating": integer}
    if any(kinds.values()):
        raise ModelError(
            f"{str(path)!r} does not fit the model: " + "; ".join(_brief(k, v) for k, v in kinds.items() if v)
        )
    try:
        model.load_state_dict(given, strict=False)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"{str(path)!r} does not fit the model: {first_line(error)}") from error


def _brief(kind: str, keys: list[str]) -> str:
    return f"{len(keys)} {kind}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"


def read_weights(path: str | Path) -> dict[str, Any]:
    """The state dict in a file, on the CPU, without the prefixes of DataParallel and torch.compile.

    Raises:
        ModelError: see `open_model`.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"no such file of weights: {str(path)!r}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found: Any = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{str(path)!r} cannot be read as safetensors: {first_line(error)}") from None
    elif path.suffix in PICKLES:
        found = _unpickle(path)
    else:
        raise ModelError(f"{str(path)!r}: weights are in a {', '.join(PICKLES)} or .safetensors file")
    if isinstance(found, Mapping):
        found = next((found[key] for key in NESTED if isinstance(found.get(key), Mapping)), found)
    if not isinstance(found, Mapping) or not any(isinstance(v, Tensor) for v in found.values()):
        keys = ", ".join(map(str, list(found)[:3])) if isinstance(found, Mapping) else f"a {type(found).__name__}"
        raise ModelError(f"{str(path)!r} holds {keys or 'nothing'} and no state dict; save model.state_dict()")
    state = {str(k): v for k, v in found.items()}
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): v for key, v in state.items()}
    return state


def _unpickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code is None:
            raise ModelError(f"{str(path)!r} cannot be read as a PyTorch file of tensors") from error
        what = f"a pickled {code[1]}, and what is no tensor is not loaded, as it can run code"
        raise ModelError(f"{str(path)!r} holds {what}; save model.state_dict()") from None
