"""The house: imports point downward, nothing is in a cycle, importing is cheap, the public list is true."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import smelt

ROOT = Path(smelt.__file__).parent

# From top to bottom; what stands in one row may not import from the rows above, nor from its neighbours.
FLOORS: list[set[str]] = [
    {"__init__"},
    {"cli"},
    {"_cli_pack", "_cli_measure", "_cli_deploy"},
    {"_cli_options"},
    {"bench", "convert", "demo", "sensitivity"},
    {"compress"},
    {"measure"},
    {"runtimes"},
    {"measures", "formats", "reports"},
    {"methods"},
    {"kernels", "train", "models", "data"},
    {"graph", "statistics", "scores", "grids"},
    {"forms"},
    {"core"},
    {"native", "version"},
]
SIZE = 400


def floor(part: str) -> int:
    return next(i for i, parts in enumerate(FLOORS) if part in parts)


@cache
def modules() -> dict[str, Path]:
    return {
        ".".join(("smelt", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): p
        for p in ROOT.rglob("*.py")
    }


@cache
def imports(path: Path) -> set[str]:
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(n)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for n in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "smelt":
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in modules() else str(node.module)
                for a in node.names
            }
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "smelt"}
    return found


def part(module: str) -> str:
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def test_every_part_has_a_floor() -> None:
    assert {part(m) for m in modules()} == set().union(*FLOORS)


def test_imports_point_downward() -> None:
    wrong = []
    for module, path in modules().items():
        for other in imports(path):
            a, b = part(module), part(other)
            if a != b and floor(b) <= floor(a):
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_methods_do_not_import_each_other() -> None:
    wrong = []
    for module, path in modules().items():
        if module.startswith("smelt.methods."):
            wrong += [f"{module} imports {o}" for o in imports(path) if o.startswith("smelt.methods.")]
    assert not wrong


def test_no_cycle() -> None:
    graph = {m: {o for o in imports(p) if o in modules()} for m, p in modules().items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for other in graph[module]:
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_core_names_no_method_and_no_form() -> None:
    for path in (ROOT / "core").glob("*.py"):
        assert not any(o.split(".")[1] in ("methods", "forms") for o in imports(path) if "." in o), path


def test_files_stay_short() -> None:
    long = {str(p.relative_to(ROOT)): n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > SIZE}
    assert not long


def test_importing_is_light() -> None:
    heavy = ["torchvision", "transformers", "timm", "onnx", "sklearn", "plotly", "PIL", "jinja2"]
    code = f"import sys, smelt; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_exports_say_where_they_come_from() -> None:
    source = (ROOT / "__init__.py").read_text()
    listed = {
        n.asname or n.name for node in ast.parse(source).body if isinstance(node, ast.ImportFrom) for n in node.names
    }
    assert listed and all(hasattr(smelt, name) for name in listed)


def test_no_pickle_and_no_unsafe_loading() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        assert "pickle.load" not in text and "pickle.dump" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
