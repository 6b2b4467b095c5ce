"""`python -m quantformer_hf COMMAND`: what the package does from the command line, beside `run_quantformer.py`."""

import argparse
import sys

from . import average_checkpoints, export_checkpoint, inspect_checkpoint
from .mixed_precision import measure_latency


#: Modules by the name of their command; each has `add_arguments(parser)` and `run(arguments)`.
COMMANDS = {
    "inspect": inspect_checkpoint,
    "export": export_checkpoint,
    "average": average_checkpoints,
    "measure-latency": measure_latency,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command that `arguments` (by default the process's) name.

    Raises:
        SystemExit: with a line that says why, for bad input.
    """
    parser = argparse.ArgumentParser(prog="python -m quantformer_hf")
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    for name, module in COMMANDS.items():
        summary = module.__doc__.splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    parsed = parser.parse_args(arguments)
    try:
        COMMANDS[parsed.command].run(parsed)
    except (ValueError, OSError) as error:
        # Bad input: the message says the way out, and a traceback would bury it.
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
