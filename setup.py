"""Builds the compiled part.  Without a compiler smelt installs all the same, and computes the same with NumPy."""

import sys
from pathlib import Path

from setuptools import Extension, setup

C = Path("src/smelt/native")
# Without -ffp-contract=off, compilers for ARM fuse multiplications with additions, and k-means differs from NumPy's.
FLAGS = ["-O3", "-fvisibility=hidden", "-ffp-contract=off"]

setup(
    ext_modules=[
        Extension(
            "smelt.native._smelt",
            sorted(str(path) for path in C.glob("*.c")),
            depends=sorted(str(path) for path in C.glob("*.h")),
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            py_limited_api=True,
            optional=True,
            extra_compile_args=["/O2"] if sys.platform == "win32" else FLAGS,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
