"""Compressed models in every runtime against other ways to deploy them: CPU time, bytes, outputs, accuracy.

    SMELT_DATA=... python benchmarks/deploy.py

One cell is one model in a process of its own: eager PyTorch, torch.compile, ONNX Runtime and OpenVINO in fp32,
OpenVINO in bfloat16, our files in every runtime, and the peers' int8, all in turn on one thread; CPU time, medians.  A
run that is not timed comes before each that is: caches hold what a side has left there, as where it runs alone.

ResNet-18, MobileNetV2, ViT-tiny and the decoder have random weights, batch norms settled on the calibration images: of
them speed, bytes and the signal-to-noise ratio of the outputs are shown.  The digits net, the CIFAR networks,
llama-bytes and the recommender (on generated interactions) are trained and show what they are worth.  *1 token* is a
forward of one token: what attention to earlier ones adds is the same for all sides.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import process_time
from typing import Any

import _cifar
import _llama
import _peers_deploy as peers
import torch
from _bench import CACHE, Row, arguments, conditions, data_folder, finish, run_cells
from torch import Tensor, nn
from torch.nn import functional

import smelt
from smelt.core.clock import timings
from smelt.core.data import Batches, tensors
from smelt.core.errors import SmeltError
from smelt.core.export import export, format_of
from smelt.core.named import first_line
from smelt.core.runtime import Filled, Session, open_session, parts_of, runtime
from smelt.formats.torch import load_fast
from smelt.measures.accuracy import evaluate
from smelt.measures.bytes import checkpoint_bytes
from smelt.measures.difference import difference
from smelt.runtimes._torch import TorchSession

STATES = CACHE / "deploy-states"
SECONDS = 25.0  # of timed runs in a cell
REPEATS = 9, 200
CALIBRATION = 8  # batches
INT8 = [{"quantize.affine": {"bits": 8}}]
CONV8 = [{"swap.fold_norm": {}}, *INT8]
HALF8 = [{"prune.channels": {"ratio": 0.5, "score": "magnitude"}}, *CONV8]
LOOKUPS = ["*embed_tokens*", "*lm_head*"]
FOUR = {"bits": 4, "group": 64, "symmetric": True, "on": ["*", *(f"!{name}" for name in LOOKUPS)]}
GPTQ4 = [{"quantize.gptq": FOUR}, {"quantize.affine": {"bits": 8, "on": LOOKUPS}}]
INT4 = [{"quantize.affine": FOUR | {"per": "group", "range": "mse"}}, *GPTQ4[1:]]

Way = tuple[str, list[dict[str, Any]], str, dict[str, Any]]  # label, recipe, format, its settings


def _everywhere(recipe: list[dict[str, Any]], label: str, to: Sequence[str], **settings: Any) -> list[Way]:
    return [(f"{label}, {name}", recipe, name, settings) for name in to]


RUNTIMES = ("onnx", "openvino", "executorch", "litert")
ALL = (*RUNTIMES, "torch")
NARROW = {"activations": "static", "rest": "bfloat16"}
CONV = [
    *_everywhere(CONV8, "int8", ALL, activations="static"),
    *_everywhere(CONV8, "int8 and bfloat16", ("openvino",), **NARROW),
]
DENSE = [
    *_everywhere(INT8, "int8", RUNTIMES, activations="static"),
    *_everywhere(INT8, "int8 and bfloat16", ("openvino",), **NARROW),
    *_everywhere(INT8, "dynamic int8", ("onnx", "torch"), activations="dynamic", rounds=True),
]
STATIC = ["ONNX Runtime's quantizer, static", "NNCF", "torchao PT2E"]
DYNAMIC = ["ONNX Runtime's quantizer, dynamic"]
WEIGHTS = ["ONNX Runtime's quantizer, 4 bits", "NNCF, weights in 8 bits", "NNCF, weights in 4 bits"]


@dataclass
class Built:
    """A model in evaluation mode, what is timed, what it is calibrated on; `worth(module)` is its metric."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    batches: list[tuple[Tensor, ...]]
    worth: Callable[[nn.Module], float] | None = None


@dataclass(frozen=True)
class Case:
    """targets: of rows by the start of their label.

    narrow: whether OpenVINO runs the original in bfloat16; version 2026.4.1 divides by zero while it compiles decoders
    so, which ends the process.
    """

    build: Callable[[Path | None, bool], Built]
    ours: list[Way]
    peers: list[str]
    metric: str = ""
    size: float = 0.28
    targets: tuple[tuple[str, str], ...] = ()
    needs: str = ""  # folder of the data
    narrow: bool = True


def scenes(count: int, seed: int) -> Tensor:
    """Images [count, 3, 224, 224] with structure at every scale, mean 0 and deviation about 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(count, 3, 224, 224)
    for side in (7, 14, 28, 56, 112, 224):
        noise = torch.randn(count, 3, side, side, generator=generator)
        x += functional.interpolate(noise, size=(224, 224), mode="bilinear", align_corners=False)
    return (x - x.mean()) / x.std()


def settled(model: nn.Module, images: Tensor) -> nn.Module:
    """Batch norms know the images, as those of a trained network would."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    if norms:
        with torch.no_grad():
            model.train()(images)
    return model.eval()


def _vision(name: str, folder: Path | None, quick: bool) -> Built:
    import _torchvision

    _torchvision.prepare()
    import timm
    import torchvision

    torch.manual_seed(0)
    made = {
        "ResNet-18": lambda: torchvision.models.resnet18(weights=None),
        "MobileNetV2": lambda: torchvision.models.mobilenet_v2(weights=None),
        "ViT-tiny": lambda: timm.create_model("vit_tiny_patch16_224", pretrained=False),
    }[name]()
    images = scenes(CALIBRATION * 2, 1)
    return Built(settled(made, images), (scenes(1, 2),), [(x,) for x in images.split(1)])


def _digits(folder: Path | None, quick: bool) -> Built:
    data = smelt.open_data("digits")
    torch.manual_seed(0)
    model = smelt.open_model("resnet_digits")[0]
    train = {"epochs": 4 if quick else 30, "lr": 3e-3, "optimizer": "adamw", "weight_decay": 0.1}
    model = _trained(f"digits-{train['epochs']}", model, [{"train": train}], data)
    assert isinstance(data.train, Batches) and isinstance(data.test, Batches)
    batches = [(x,) for x in data.train.inputs[: 32 * CALIBRATION].split(32)]
    return Built(model, (data.test.inputs[:32],), batches, partial(_accuracy, data.test))


def _cifar_network(name: str, folder: Path | None, quick: bool) -> Built:
    assert folder is not None
    data = _cifar.data(folder, CACHE, 0, 32 * CALIBRATION, 500 if quick else None, 32, None)
    assert isinstance(data.train, Batches) and isinstance(data.test, Batches)
    batches = [(x,) for x in data.train.inputs.split(32)]
    return Built(_cifar.network(name, folder), (data.test.inputs[:32],), batches, partial(_accuracy, data.test))


def _accuracy(test: Batches, model: nn.Module) -> float:
    return evaluate(model, test, "accuracy")


def _llama_bytes(length: int, folder: Path | None, quick: bool) -> Built:
    assert folder is not None
    folder = folder / "llama-bytes"
    ids = _llama.calibration(folder, CALIBRATION + 1, 0)[:, :length]
    worth = partial(_llama.perplexity, folder=folder, windows=8 if quick else 64)
    batches = [(x,) for x in ids[1:].split(1)]
    return Built(_llama.read(folder), (ids[:1],), batches, worth if length > 1 else None)


DECODER_SHAPE = {
    "vocab_size": 16384, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip


def _decoder(length: int, folder: Path | None, quick: bool) -> Built:
    """97.5 million parameters."""
    torch.manual_seed(0)
    model = _llama.Llama(DECODER_SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
    ids = torch.randint(0, 16384, (CALIBRATION + 1, length), generator=torch.Generator().manual_seed(1))
    return Built(model.eval(), (ids[:1],), [(x,) for x in ids[1:].split(1)])


class Recommender(nn.Module):
    """Whether a user takes an item: embeddings of both, then three hidden layers; two logits."""

    def __init__(self, users: int = 1000, items: int = 500, width: int = 64, hidden: Sequence[int] = (1024, 512, 256)):
        super().__init__()
        self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width)
        widths = [2 * width, *hidden]
        layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 2))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.layers(torch.cat([self.users(user), self.items(item)], 1))  # type: ignore[no-any-return]


def _recommender(folder: Path | None, quick: bool) -> Built:
    """Interactions are drawn from factors of rank 4: an item is taken with the probability that their product gives.
    Whoever knew the factors would be right in 81 of 100 cases."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    users, items, count = 1000, 500, 20_000 if quick else 400_000
    who = torch.randint(0, users, (count + 20_000,), generator=generator)
    what = torch.randint(0, items, (count + 20_000,), generator=generator)
    score = 1.5 * (draw(users, 4)[who] * draw(items, 4)[what]).sum(1)
    taken = (torch.rand(len(score), generator=generator) < score.sigmoid()).long()
    rows = [((who[i], what[i]), taken[i]) for i in torch.arange(len(who)).split(512)]
    cut = count // 512
    train = [(*x, y) for x, y in rows[:cut]]
    test = [(*x, y) for x, y in rows[cut:]]
    torch.manual_seed(0)
    steps = [{"train": {"epochs": 1 if quick else 6, "lr": 2e-3, "optimizer": "adamw"}}]
    model = _trained(f"recommender-{users}-{count}", Recommender(), steps, smelt.Data(train=train))
    batches = [(x[:32], y[:32]) for x, y, _ in train[:CALIBRATION]]
    return Built(model, (who[-32:], what[-32:]), batches, lambda m: evaluate(m, test, "accuracy"))


def _trained(name: str, model: nn.Module, steps: list[Any], data: smelt.Data) -> nn.Module:
    kept = STATES / f"{name}.pt"
    if not kept.exists():
        STATES.mkdir(parents=True, exist_ok=True)
        job = smelt.Job(data=smelt.Data(train=data.train), latency=False)
        state = smelt.compress(model, {"steps": steps}, job).model.state_dict()
        part = kept.with_suffix(".part")
        torch.save(state, part)
        part.replace(kept)
    model.load_state_dict(torch.load(kept, weights_only=True))
    return model.eval()


HALF = [
    *_everywhere(HALF8, "half the channels, int8", ("onnx", "openvino"), activations="static"),
    *_everywhere(HALF8, "half the channels, int8 and bfloat16", ("openvino",), **NARROW),
]
LLAMA = "llama-bytes"


def _text(build: Callable[[Path | None, bool], Built], int4: list[dict[str, Any]], **more: Any) -> Case:
    ways = [
        *_everywhere(INT8, "weights in 8 bits", ("onnx", "openvino", "torch")),
        *_everywhere(INT8, "weights in 8 bits and bfloat16", ("openvino",), rest="bfloat16"),
        *_everywhere(INT8, "dynamic int8", ("onnx", "executorch", "litert"), activations="dynamic"),
        *_everywhere(int4, "weights in 4 bits", ("onnx", "openvino", "torch")),
        *_everywhere(int4, "weights in 4 bits and bfloat16", ("openvino",), rest="bfloat16"),
        *_everywhere(int4, "dynamic int8, weights in 4 bits", ("executorch", "litert"), activations="dynamic"),
    ]
    return Case(build, ways, [*DYNAMIC, *WEIGHTS], narrow=False, **more)


CASES = {
    "digits net": Case(_digits, CONV, STATIC, "accuracy, %", 0.31),
    "ResNet-18": Case(
        partial(_vision, "ResNet-18"), [*CONV, *HALF], STATIC,
        targets=(
            ("int8, onnx", ">= 2.9 x"), ("int8, openvino", ">= 3.2 x"), ("half the channels, int8", ">= 15 x"),
        ),
    ),
    "MobileNetV2": Case(
        partial(_vision, "MobileNetV2"), CONV, STATIC,
        targets=(("int8, onnx", ">= 1.9 x"), ("int8, openvino", ">= 2.05 x")),
    ),
    "ViT-tiny": Case(partial(_vision, "ViT-tiny"), DENSE, [*STATIC, *DYNAMIC], targets=(("best", ">= 5 x"),)),
    "ResNet-20": Case(partial(_cifar_network, "ResNet-20"), CONV, STATIC, "accuracy, %", needs="resnet_cifar10"),
    "ResNet-56": Case(partial(_cifar_network, "ResNet-56"), CONV, STATIC, "accuracy, %", needs="resnet_cifar10"),
    "llama-bytes, 256 tokens": _text(partial(_llama_bytes, 256), GPTQ4, metric="perplexity", needs=LLAMA),
    "llama-bytes, 1 token": _text(partial(_llama_bytes, 1), INT4, needs=LLAMA),
    "decoder, 97 M parameters, 128 tokens": _text(partial(_decoder, 128), INT4),
    "decoder, 97 M parameters, 1 token": _text(partial(_decoder, 1), INT4, targets=(("best", ">= 5.5 x"),)),
    "recommender, batch 32": Case(_recommender, DENSE, [*STATIC, *DYNAMIC], "accuracy, %"),
}  # fmt: skip
QUICK = ("digits net",)


class _Sides:
    """What is timed, by label: sessions, bytes of their files, and what did not come to be."""

    def __init__(self, built: Built):
        self.built = built
        self.sessions: dict[str, Session] = {}
        self.bytes: dict[str, int] = {}
        self.failed: dict[str, str] = {}
        self.took: dict[str, float] = {}

    def add(self, label: str, make: Callable[[], Path | Session | nn.Module], name: str) -> None:
        """name: of the runtime that opens what is made, unless it is a session."""
        start = process_time()
        try:
            with peers.silent():
                made = make()
                if isinstance(made, Path) and name == "fast":  # no builder of ours is named in it
                    session: Session = TorchSession(load_fast(made, into=copy.deepcopy(self.built.model)), 1)
                else:
                    session = made if isinstance(made, Session) else open_session(name, made)
                session(*self.built.inputs)
        except Exception as error:  # a peer raises whatever it likes
            self.failed[label] = f"{type(error).__name__}: {first_line(error)}"[:300]
            return
        self.sessions[label] = session
        self.took[label] = process_time() - start
        if isinstance(made, Path):
            self.bytes[label] = sum(part.stat().st_size for part in parts_of(made))


def cell(name: str, quick: bool, folder: str | None) -> Any:
    """One model, all sides."""
    torch.set_num_threads(1)
    case, path = CASES[name], Path(folder) if folder else None
    built = case.build(path, quick)
    sides = _Sides(built)
    sides.add("eager", lambda: built.model, "eager")
    with tempfile.TemporaryDirectory() as scratch:
        there = Path(scratch)
        given = built.model, built.inputs, built.batches, there
        if not quick:
            sides.add("torch.compile", lambda: built.model, "compiled")
        chosen = {
            **peers.FP32,
            **(peers.NARROW if case.narrow else {}),
            **{k: v for k, v in peers.INT8.items() if k in case.peers},
        }
        for label, (make, modules, name_of) in chosen.items():
            if why := peers.missing(modules):
                sides.failed[label] = why
            elif not quick or label in ("ONNX Runtime", case.peers[0]):
                sides.add(label, partial(make, *given), name_of)
        stored: dict[str, nn.Module] = {}
        for label, recipe, to, settings in case.ours:
            if not quick or to in ("onnx", "openvino"):
                make = partial(_exported, built, recipe, to, settings, there / label.replace(" ", "-"), stored)
                sides.add(f"smelt: {label}", make, _runtime_of(to))
        return _measured(case, built, sides, quick)


def _runtime_of(to: str) -> str:
    try:
        return next(iter(format_of(to).runtimes), "eager")
    except SmeltError:
        return "eager"


def _exported(
    built: Built, recipe: list[Any], to: str, settings: dict[str, Any], path: Path, stored: dict[str, nn.Module]
) -> Path:
    key = repr(recipe)
    if key not in stored:
        data = smelt.Data(train=[(x if len(x) > 1 else x[0], None) for x in built.batches])
        stored[key] = smelt.compress(built.model, {"steps": recipe}, smelt.Job(data=data, latency=False)).model
    kind = format_of(to)
    if why := runtime(_runtime_of(to)).missing():
        raise RuntimeError(why)
    inputs = built.inputs if len(built.inputs) > 1 else built.inputs[0]
    calibration = [(x if len(x) > 1 else x[0], None) for x in built.batches]
    known = {k: v for k, v in settings.items() if k in kind.__dataclass_fields__}  # type: ignore[attr-defined]
    return export(
        stored[key], to, path.with_name(path.name + kind.suffix), example=inputs, data=calibration, **known
    ).path


def _measured(case: Case, built: Built, sides: _Sides, quick: bool) -> dict[str, Any]:
    calls = {label: partial(session, *built.inputs) for label, session in sides.sessions.items()}
    start = process_time()
    for call in calls.values():
        call()
    once = max(process_time() - start, 1e-4)
    repeats = int(max(REPEATS[0], min(REPEATS[1], (2.0 if quick else SECONDS) / once)))
    times = timings(calls, repeats, 3, settle=1)
    reference: list[Tensor] = []
    found: dict[str, Any] = {"failed": sides.failed, "checkpoint": checkpoint_bytes(built.model), "sides": {}}
    for label, session in sides.sessions.items():
        outputs = list(tensors(session(*built.inputs)))
        reference = reference or outputs
        cpu, wall = times[label].cpu, times[label].wall
        one = {"ms": cpu.median, "low": cpu.low, "high": cpu.high, "wall": wall.median}
        one |= {"bytes": sides.bytes.get(label), "sqnr": _plain(difference(reference, outputs)[1])}
        if built.worth is not None and label != "torch.compile":  # which would compile anew for other shapes
            one["worth"] = built.worth(Filled(session, len(built.inputs[0])))
        found["sides"][label] = one | {"seconds": sides.took[label]}
    return found


def _plain(value: float) -> float | None:
    return None if value != value or abs(value) == float("inf") else value


FP32 = ("torch.compile", *peers.FP32)


def rows(cells: Sequence[dict[str, Any]], runs: Sequence[Any]) -> list[Row]:
    found: list[Row] = []
    for one, run in zip(cells, runs, strict=True):
        found += _rows(one["name"], CASES[one["name"]], run)
    return found


def _rows(name: str, case: Case, run: dict[str, Any]) -> list[Row]:
    sides, eager = run["sides"], run["sides"]["eager"]["ms"]
    speed = {label: eager / side["ms"] for label, side in sides.items()}
    plain = max((label for label in ("eager", *FP32) if label in sides), key=lambda label: speed[label])
    ours = [label for label in sides if label.startswith("smelt: ")]
    theirs = [label for label in (*peers.NARROW, *case.peers) if label in sides]
    peer = max(theirs, key=lambda label: speed[label], default=None)
    found = [Row(f"{name}, {label}", round(speed[label], 2), "x eager") for label in sides if label not in ours]
    for label in ours:
        target = next((t for end, t in case.targets if label.removeprefix("smelt: ").startswith(end)), None)
        over = "eager" if target and "half" in label else plain
        value = speed[label] / speed[over]
        found.append(Row(f"{name}, {label}", round(speed[label], 2), "x eager", peer, peer and round(speed[peer], 2)))
        found.append(Row(f"{name}, {label}: over {over}", round(value, 2), "x", over, round(speed[over], 2), target))
        share = sides[label]["bytes"] / run["checkpoint"]
        mark = f"<= {case.size} x"
        theirs_share = sides[peer]["bytes"] and round(sides[peer]["bytes"] / run["checkpoint"], 3) if peer else None
        found.append(Row(f"{name}, {label}: file of fp32's", round(share, 3), "x", peer, theirs_share, mark))
        found.append(
            Row(f"{name}, {label}: outputs", _short(sides[label]["sqnr"]), "dB", peer, _of(sides, peer, "sqnr"))
        )
        if "worth" in sides[label]:
            worth, before = sides[label]["worth"], sides["eager"]["worth"]
            measure = f"{name}, {label}: {case.metric}"
            found.append(Row(measure, _short(worth, 3), "", "eager", _short(before, 3)))
            if case.metric == "perplexity":
                found.append(Row(f"{measure}, loss", round(100 * (worth / before - 1), 2), "%", target="<= 1 %"))
    if ours and peer:
        best = max(ours, key=lambda label: speed[label])
        found.append(
            Row(f"{name}, best: {best}, over the best peer", round(speed[best] / speed[peer], 2), "x", peer,
                round(speed[peer], 2), ">= 1 x")
        )  # fmt: skip
        for end, target in case.targets:
            if end == "best":
                found.append(Row(f"{name}, best: {best}, over eager", round(speed[best], 2), "x", target=target))
    found += [Row(f"{name}, {label}: did not run, {why}", None) for label, why in run["failed"].items()]
    return found


def _short(value: float | None, digits: int = 1) -> float | None:
    return None if value is None else round(value, digits)


def _of(sides: dict[str, Any], label: str | None, key: str) -> float | None:
    return _short(sides[label][key]) if label else None


def missed(found: Sequence[Row]) -> list[str]:
    """Rows whose value is on the wrong side of the target, as lines."""
    lines = []
    for row in found:
        parts = re.match(r"(>=|<=) ([\d.]+)", row.target or "")
        if parts and row.value is not None:
            wrong = row.value < float(parts[2]) if parts[1] == ">=" else row.value > float(parts[2])
            if wrong:
                lines.append(f"- {row.measure}: {row.value:.4g} {row.unit}, target {row.target}")
    return lines


def main() -> int:
    args = arguments(__doc__ or "")
    torch.set_num_threads(1)
    print(conditions())
    cells = []
    for name, case in CASES.items():
        if args.quick and name not in QUICK:
            continue
        root = data_folder(case.needs) if case.needs else None
        if root is not None or not case.needs:
            cells.append({"name": name, "quick": args.quick, "folder": str(root.parent) if root else None})
    seconds = 20 if args.quick else 300
    runs = run_cells("deploy", cell, cells, jobs=1, fresh=args.fresh, seconds=seconds, apart=True)
    found = rows(cells, runs)
    finish(found, args.json)
    judged = [row for row in found if row.target and row.value is not None]
    if lines := missed(found):
        print(f"\nMissed: {len(lines)} of {len(judged)} targets\n" + "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
