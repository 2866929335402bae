"""The `qtool` command: a lazy group of thin commands, and the one place where errors become exit codes."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import click

from qtool import __version__
from qtool.errors import EnvironmentFault, QtoolError, UsageError, escape, nearest

COMMANDS: dict[str, str] = {
    "measure": "Record what a model's activations look like: maxima, outliers, where and how large.",
    "plan": "Choose what each layer gets, under a budget, and measure it; or foretell what quantizing takes.",
    "quantize": "Quantize a model by a scheme or a recipe into a checkpoint.",
    "import": "Take over a model that GPTQ, AWQ or compressed-tensors quantized, code for code.",
    "export": "Lower a checkpoint to a package for ONNX Runtime, and prove it equal to what was scored.",
    "verify": "Re-check an artifact: every byte, and for a package every node and the whole model.",
    "explain": "What ONNX Runtime really runs: kernels, precision, bytes, time, and the traps of a graph.",
    "run": "Generate text with a package.",
    "evaluate": "Perplexity, KL and top-1 agreement of a package, checkpoint or model.",
    "bench": "Tokens per second of packages, checkpoints and models, side by side.",
    "check": "The CI gate: compare a package with a stored baseline; exit 5 on a regression.",
    "npu-check": "Check graphs against the rules of the QNN execution provider, one line per breach.",
    "audit": "Do the static ranges of an NPU package hold on other and longer text? Exit 5 when not.",
    "inspect": "Explain any artifact qtool wrote.",
}
MODULES = {"npu-check": "npu_check", "import": "import_checkpoint"}  # `import` is no name for a module

SMALLER = "use fewer or shorter sequences"

EXIT_CODES = """\b
Exit codes:
  0 done                  4 environment (disk, memory, permission, lock)
  1 a bug in qtool        5 gate failed: a measured regression
  2 usage or recipe       130, 143 interrupted; no output was written
  3 input refused
"""


class LazyGroup(click.Group):
    """Loads a command's module when it is asked for, so that `qtool --help` imports nothing heavy."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"qtool.cli.{MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS:
            raise UsageError(f"qtool {args[0]}", "is no command", nearest(args[0], COMMANDS))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qtool")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Measure, quantize and export language models, and prove what ships.

    \b
    Example, the whole line:
      qtool measure  MODEL -o stats --report stats-report
      qtool quantize MODEL -o checkpoint --scheme W4A8
      qtool export   checkpoint -o package
      qtool evaluate package --reference MODEL -o report.json
      qtool run      package --prompt "The capital of France is"
      qtool check    package --baseline report.json

    MODEL is a Hugging Face folder, a hub id (owner/name) or a .gguf file.
    """


class Interrupted(BaseException):
    """SIGINT or SIGTERM, raised at a safe point so that staging folders are removed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def _raise_interrupted(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second signal stops at once
    raise Interrupted(number)


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with the documented code."""
    arguments = sys.argv[1:] if args is None else args
    debug = "--debug" in arguments
    _set_process_defaults()
    try:
        result: Any = cli.main(args=arguments, prog_name="qtool", standalone_mode=False)
    except QtoolError as error:
        _fail(error.line(), error.exit_code, debug=debug)
    except click.UsageError as error:
        hint = error.ctx.command_path if error.ctx else "qtool"
        _fail(f"{escape(error.format_message())}; see {hint} --help", 2, debug=False)
    except click.ClickException as error:
        _fail(escape(error.format_message()), 2, debug=False)
    except (Interrupted, KeyboardInterrupt, click.Abort) as error:
        code = error.exit_code if isinstance(error, Interrupted) else 130
        _fail("interrupted: no output was written; run the same command again", code, debug=False)
    except MemoryError:
        _fail(f"out of memory: the model or the batch does not fit; {SMALLER}", 4, debug=False)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        where = escape(error.filename or "the system")
        _fail(f"{where}: {error.strerror or error}; check the path, its permissions and the disk", 4, debug=debug)
    except Exception as error:
        if _is_device_memory(error):
            _fail(EnvironmentFault("GPU memory", str(error).partition("\n")[0], SMALLER).line(), 4, debug=debug)
        what = f"internal error: {type(error).__name__}: {escape(error)[:200]}"
        _fail(f"{what}; this is a bug in qtool: report it with what --debug prints", 1, debug=debug)
    sys.exit(result if isinstance(result, int) else 0)


def _is_device_memory(error: Exception) -> bool:
    """Whether a GPU is full: torch's error is no MemoryError."""
    torch = sys.modules.get("torch")  # without it there is no such error
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _set_process_defaults() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _raise_interrupted)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file-size limit is an OSError, not a kill
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _fail(line: str, code: int, *, debug: bool) -> NoReturn:
    if debug:
        import traceback

        traceback.print_exc()
    click.echo(f"error: {line}", err=True)
    sys.exit(code)
