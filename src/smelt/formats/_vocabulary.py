"""What GGUF keeps of a tokenizer, out of tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smelt.core.errors import FileError

NORMAL, UNKNOWN, CONTROL, OWN, UNUSED, BYTE = range(1, 7)
# Splits of text before byte pairs are merged, as tokenizer.json has them, and what GGUF calls them.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def keys(folder: Path, config: Mapping[str, Any], notes: list[str]) -> dict[str, tuple[str, Any]]:
    """tokenizer.ggml.* of a folder; without a tokenizer.json `none`, so that only token numbers can be given.

    Byte pairs (`gpt2`) keep their merges.  Pieces with bytes to fall back on (`llama`, SentencePiece's) have scores,
    which are higher the earlier the merge that makes them.

    Raises:
        FileError: no tokenizer of byte pairs, or one with more tokens than the model.
    """
    path = folder / "tokenizer.json"
    count = int(config["vocab_size"])
    if not path.exists():
        notes.append(f"{str(folder)!r} has no tokenizer.json; the file takes token numbers only")
        return {"tokenizer.ggml.model": ("text", "none"), **_ids(folder, config, {})}
    data = _json(path)
    model = data.get("model") or {}
    if model.get("type") != "BPE":
        raise FileError(f"{str(path)!r}: its model is {model.get('type')!r}; GGUF is written with BPE tokenizers")
    numbers = dict(model["vocab"])
    added = {token["content"]: token for token in data.get("added_tokens") or ()}
    numbers |= {content: token["id"] for content, token in added.items()}
    if max(numbers.values()) >= count:
        raise FileError(f"{str(path)!r} has token {max(numbers.values())}, and the model {count} tokens")
    names = {number: token for token, number in numbers.items()}
    tokens = [names.get(i, f"[PAD{i}]") for i in range(count)]
    pieces = bool(model.get("byte_fallback"))
    unknown = model.get("unk_token")
    kinds = [UNUSED if i not in names else _kind(token, added, unknown, pieces) for i, token in enumerate(tokens)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
    made: dict[str, tuple[str, Any]] = {
        "tokenizer.ggml.model": ("text", "llama" if pieces else "gpt2"),
        "tokenizer.ggml.tokens": ("array", ("text", tokens)),
        "tokenizer.ggml.token_type": ("array", ("i32", kinds)),
    }
    if pieces:
        ranks = {"".join(pair.split(" ")): -float(rank) for rank, pair in enumerate(merges)}
        least = -float(len(merges))
        scores = [0.0 if kind != NORMAL else ranks.get(token, least) for token, kind in zip(tokens, kinds, strict=True)]
        made["tokenizer.ggml.scores"] = ("array", ("f32", scores))
        made["tokenizer.ggml.add_space_prefix"] = ("bool", "Prepend" in json.dumps(data.get("normalizer")))
    else:
        made["tokenizer.ggml.merges"] = ("array", ("text", merges))
        made["tokenizer.ggml.pre"] = ("text", _split(data, notes if merges else []))
    return {**made, **_ids(folder, config, numbers)}


def _kind(token: str, added: Mapping[str, Any], unknown: str | None, pieces: bool) -> int:
    if token == unknown:
        return UNKNOWN
    if token in added:
        return CONTROL if added[token].get("special") else OWN
    return BYTE if pieces and len(token) == 6 and token.startswith("<0x") and token.endswith(">") else NORMAL


def _split(data: Mapping[str, Any], notes: list[str]) -> str:
    """What GGUF calls the split before byte pairs."""
    split = data.get("pre_tokenizer") or {}
    for step in (split, *(split.get("pretokenizers") or ())):
        if name := SPLITS.get((step.get("pattern") or {}).get("Regex", "")):
            return name
    if split.get("type") != "ByteLevel" or split.get("use_regex") is False:
        notes.append("the tokenizer splits text in a way that GGUF has no name for; it is called gpt-2 there")
    return "gpt-2"


def _ids(folder: Path, config: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, tuple[str, Any]]:
    path = folder / "tokenizer_config.json"
    own = _json(path) if path.exists() else {}
    found: dict[str, tuple[str, Any]] = {}
    for key, name in SPECIAL.items():
        token = own.get(key)
        token = token.get("content") if isinstance(token, Mapping) else token
        number = numbers.get(str(token), config.get(f"{key}_id"))
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < config["vocab_size"]:
            found[f"tokenizer.ggml.{name}_token_id"] = ("u32", number)
    for key in ("add_bos_token", "add_eos_token"):
        if isinstance(own.get(key), bool):
            found[f"tokenizer.ggml.{key}"] = ("bool", own[key])
    if isinstance(own.get("chat_template"), str):
        found["tokenizer.chat_template"] = ("text", own["chat_template"])
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileError(f"{str(path)!r} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise FileError(f"{str(path)!r} is no JSON object")
    return data
