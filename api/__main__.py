"""`python -m cspd run ...` and `python -m cspd export ...`: both commands without their scripts."""

from __future__ import annotations

import importlib
import sys

PROGRAMS = {"run": "cspd.runtime.commands.cli", "export": "cspd.export.cli"}
HELP = """Usage: python -m cspd run|export [OPTIONS] COMMAND [ARGS]...

  Continuous speculative decoding of autoregressive image models.

Commands:
  run     What cspd-run does: generate images, compare methods, serve.
  export  What cspd-export does: turn checkpoints into a bundle.

In Python: import cspd; cspd.load()(["sneaker", "bag"]).images[0].save("shoe.png")
"""


def main(arguments: list[str]) -> None:
    """Run the command line that the first argument names; exit code 2 if it names none."""
    name, *rest = arguments or ["--help"]
    if name in PROGRAMS:
        program = importlib.import_module(PROGRAMS[name]).main
        program(rest, prog_name=f"python -m cspd {name}")
    elif name in ("-h", "--help"):
        print(HELP, end="")
    else:
        print(f"{HELP}\nError: no command {name!r:.60}; use run or export", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
