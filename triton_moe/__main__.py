"""The command line: `python -m triton_moe` or `triton-moe`."""

import argparse
import importlib
import os
import sys
import warnings

from . import __version__

COMMANDS = {
    "demo": "train a small SwitchAll language model on real text and check it against the reference",
    "bench": "time the kernels beside their rivals, after checking their results",
    "autotune": "find the fastest launch configurations on this GPU and keep them",
    "compile": "compile every kernel for any GPU, without one: registers, spills, shared memory",
    "doctor": "what is installed here, which configurations would be used, and what to do next",
}
MODULES = {"demo": "demo", "bench": "bench", "autotune": "autotune", "compile": "compiler", "doctor": "doctor"}
COMPILING = ("autotune", "compile", "doctor")  # these look at compiled kernels, never at interpreted ones


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(prog="triton-moe", description="Triton kernels for mixture-of-experts Transformers.")
    parser.add_argument("--version", action="version", version=f"triton-moe {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text)
        if name in argv:  # import only what is asked for
            module = importlib.import_module(f"triton_moe.{MODULES[name]}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    _choose_interpreter(args.command)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"triton-moe: error: {error}", file=sys.stderr)
        return 2


def _choose_interpreter(command: str) -> None:
    """Where there is no GPU kernels run in Triton's interpreter. Triton reads the variable when first imported."""
    if command in COMPILING:
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        import torch

        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"
            # NumPy's, where a kernel multiplies 0 by the infinity of a masked score before it selects.
            warnings.filterwarnings("ignore", "invalid value encountered", RuntimeWarning)


if __name__ == "__main__":
    sys.exit(main())
