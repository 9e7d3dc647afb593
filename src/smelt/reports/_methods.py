"""A method as plain data: what kind it is, its card, its settings and a line of a recipe."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from smelt.core.choice import WORDS, Choice
from smelt.core.method import Codec, Composite, Method, Objective, Rewrite
from smelt.core.settings import Ramp
from smelt.core.train import Train
from smelt.core.yaml_text import to_yaml


def described(name: str, cls: Any) -> dict[str, Any]:
    """{kind, card, settings, words, example}; the example has the first setting at its default.

    `words`: of the step, like settings, with which one of them is chosen for each tensor; of codecs that lose.

    Args:
        cls: a `Method`, or `Train`.
    """
    card = cls.card() if issubclass(cls, Method) else {"does": (cls.__doc__ or "").strip()}
    first = next((f for f in fields(cls) if f.default not in (MISSING, None, "")), None)
    line = {name: {first.name: first.default} if first else {}}
    step = {"train": {"epochs": 5, "with": [line]}} if issubclass(cls, Objective) else line
    kinds = {
        Rewrite: "changes the structure",
        Objective: "adds to the training loss",
        Composite: "stands for several steps",
        Train: "trains",
    }
    lossless = issubclass(cls, Codec) and cls.lossless
    stored = "codes without loss" if lossless else "stores in another form"
    chooses = issubclass(cls, Composite) or (issubclass(cls, Codec) and not lossless)
    return {
        "kind": next((text for kind, text in kinds.items() if issubclass(cls, kind)), stored),
        "card": card,
        "settings": settings_of(cls),
        "words": [_setting(f) for f in fields(Choice) if f.name in WORDS] if chooses else [],
        "example": to_yaml([step]).strip(),
    }


def settings_of(cls: Any) -> list[dict[str, str]]:
    """{name, type, default, range, doc} of every setting of a dataclass of settings."""
    return [_setting(f) for f in fields(cls)]


def _setting(f: Any) -> dict[str, str]:
    low, high, choices = (f.metadata.get(key) for key in ("low", "high", "choices"))
    span = f"{low} to {high}" if None not in (low, high) else f"from {low}" if low is not None else ""
    return {
        "name": f.name,
        "type": str(getattr(f.type, "__name__", f.type)).replace(f" | {Ramp.__name__}", ", may ramp"),
        "default": "" if f.default is MISSING else str(f.default),
        "range": " | ".join(map(str, choices)) if choices else span or (f"to {high}" if high is not None else ""),
        "doc": f.metadata.get("doc", ""),
    }
