"""Every error smelt raises on purpose.

    SmeltError                 exit code 1
    ├── RecipeError            2   a recipe, a step or a setting is wrong
    │   └── RuleError          2   steps that cannot follow each other, or a codec that finds nothing to store
    ├── ModelError             3   the model, its builder or its weights
    ├── DataError              4   the data, the metric
    ├── FileError              5   a file that is damaged, foreign or of an unknown version
    └── OutputError            6   the output exists, no space, not writable

The exit codes are those of the command line; 130 is an interruption (Ctrl-C).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LISTED = 10  # choices that an error lists at most


class SmeltError(Exception):
    exit_code = 1


class RecipeError(SmeltError, ValueError):
    exit_code = 2


class RuleError(RecipeError):
    pass


class ModelError(SmeltError, ValueError):
    exit_code = 3


class DataError(SmeltError, ValueError):
    exit_code = 4


class FileError(SmeltError, ValueError):
    exit_code = 5


class OutputError(SmeltError, OSError):
    exit_code = 6


def nearest(word: str, choices: Iterable[str]) -> str:
    """What to append to an error about an unknown word: the nearest choice, else the first of them.

    >>> nearest("ration", ["ratio", "score"])
    "; did you mean 'ratio'?"
    """
    known = sorted(set(choices))
    close = get_close_matches(str(word), known, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    shown = [*known[:LISTED], *(["..."] if len(known) > LISTED else [])]
    return f"; there is {', '.join(shown)}" if known else ""
