"""The command line: ``fused-attn``, also ``python -m fused_attn``.

Each command is a module here with ``add_arguments(parser)`` and ``run(arguments) -> int``; only
the one that is called is imported.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from fused_attn import __version__

COMMANDS = {
    "info": "what is installed here, and which kernels can run",
    "validate": "check every kernel against its fp64 reference on this machine",
    "demo": "train on generated sentences, translate and draw, in two minutes",
    "train": "train a translation model on a parallel text",
    "translate": "translate a file or a pipe",
    "evaluate": "translate and score against references",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; default: those of the process.

    Returns:
        The exit status: 0 for success, 1 for a negative result, 2 for a mistake in the call or
        in the input, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="fused-attn", description="Fused kernels for sequence-to-sequence models."
    )
    parser.add_argument("--version", action="version", version=f"fused-attn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    try:
        for name, summary in COMMANDS.items():
            command = commands.add_parser(name, help=summary, description=summary)
            # Importing a command takes a second (torch), so only the one that is meant.
            if name in words[:1]:
                importlib.import_module(f"{__name__}.{name}").add_arguments(command)
        arguments = parser.parse_args(words)
        return importlib.import_module(f"{__name__}.{arguments.command}").run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has what it wanted, e.g. `fused-attn translate | head`. What is left
        # for it goes nowhere, so that the interpreter does not complain of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, NotImplementedError, OSError, ImportError) as error:
        print(f"fused-attn {words[0]}: {error}", file=sys.stderr)
        return 2
