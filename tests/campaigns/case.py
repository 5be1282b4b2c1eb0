"""What a bad input is: how it is made, given to the program, and what its refusal must hold."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclasses.dataclass(frozen=True)
class Script:
    """A command line: words behind the interpreter, the first a file of scripts/.

    memory: bytes of address space that it may take. file: bytes that a file which it writes may have, as on a disk with
    so much room. None: any.
    """

    words: tuple[str, ...]
    memory: int | None = None
    file: int | None = None

    @property
    def command(self):
        """Its words with the interpreter in front. Limits are set by a process that then becomes the script."""
        file, *words = self.words
        command = [sys.executable, str(ROOT / "scripts" / file), *words]
        limits = [
            f"resource.setrlimit(resource.{name}, ({value}, {value}))"
            for name, value in (("RLIMIT_AS", self.memory), ("RLIMIT_FSIZE", self.file))
            if value is not None
        ]
        if not limits:
            return command
        program = f"import os, resource, sys; {'; '.join(limits)}; os.execv(sys.argv[1], sys.argv[1:])"
        return [sys.executable, "-c", program, *command]


@dataclasses.dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
      kind: its row of the table. what: the input in words; both together are unique.
      make: function of the case's own empty folder. It makes the input there and returns what gives it to the program:
        a function without arguments, or a Script.
      names: texts that the refusal must hold; {folder} stands for the case's folder.
      expected: "refused"; "accepted"; or "harmless", which may be either and may write only below the folder's `out`.
    """

    kind: str
    what: str
    make: Callable[[Path], Callable[[], object] | Script]
    names: tuple[str, ...] = ()
    expected: str = "refused"
