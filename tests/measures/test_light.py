"""Counting operators does not load torch's compiler."""

import subprocess
import sys

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

CODE = """
import sys, torch
from smelt.measures.macs import macs
from smelt.measures.memory import memory
layer, x = torch.nn.Linear(3, 2), torch.ones(5, 3)
print(macs(layer, x), memory(layer, x) > 0, "torch._dynamo" in sys.modules)
"""


@pytest.mark.skipif(not hasattr(TorchDispatchMode, "_should_skip_dynamo"), reason="this torch always loads it")
def test_the_compiler_is_not_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["6", "True", "False"]
