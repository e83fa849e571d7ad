"""The command line: ``controlroom COMMAND``.

Each command is a function in `controlroom.app.commands`; nothing heavy is imported before one runs, so that ``--help``
answers at once. What a user can mend is one line on standard error and exit code 2, as is wrong usage; Ctrl-C is 130;
anything else is a defect of controlroom, exit code 1, with its trace after ``--debug``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from controlroom.app.commands.controls import controls
from controlroom.app.commands.explain import explain
from controlroom.app.commands.generate import generate
from controlroom.app.commands.replay import replay
from controlroom.app.commands.retarget import retarget
from controlroom.core.errors import ControlRoomError

app = typer.Typer(
    name="controlroom",
    help="One denoising loop, every control: draw pictures under any number of controls.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (generate, retarget, explain, replay, controls):
    app.command()(_command)


@app.callback(invoke_without_command=True)
def _global(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error (anywhere in the line).")] = False,
) -> None:
    """Draw pictures under any number of controls."""
    if version:
        import controlroom

        typer.echo(f"controlroom {controlroom.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code, for the console script to exit with."""
    line = list(sys.argv[1:] if arguments is None else arguments)
    options = line[: line.index("--")] if "--" in line else line
    debug = "--debug" in options
    if debug:
        line.remove("--debug")
    # Nothing is downloaded that was not asked for: a mistyped path must not become a request to the hub.
    try:
        typer.main.get_command(app).main(args=line, prog_name="controlroom", standalone_mode=True)
        return 0
    except SystemExit as exit:
        return _code(exit.code)
    except KeyboardInterrupt:
        return _failed("interrupted; nothing was written", 130)
    except ControlRoomError as error:
        if debug:
            raise
        return _failed(f"error: {error}", 2)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); Python must not complain about that at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        return _failed(
            f"unexpected error: {type(error).__name__}: {str(error)[:400]} (a defect of controlroom; run it again with "
            "--debug to see where, and report it)",
            1,
        )


def _failed(message: str, code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return code


def _code(code: object) -> int:
    if code is None:
        return 0
    return code if isinstance(code, int) else 1


if __name__ == "__main__":
    raise SystemExit(main())
