"""The command line: ``controlroom COMMAND``.

Each command is a function in `controlroom.app.commands`; nothing heavy is imported before one runs, so that ``--help``
answers at once. What a user can mend is one line on standard error and exit code 2, as is wrong usage; Ctrl-C is 130;
anything else is a defect of controlroom, exit code 1, with its trace after ``--debug``.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from controlroom.app.commands.controls import controls
from controlroom.app.commands.convert import convert
from controlroom.app.commands.direction import direction
from controlroom.app.commands.edit import edit
from controlroom.app.commands.enhance import enhance
from controlroom.app.commands.evaluate import evaluate
from controlroom.app.commands.explain import explain
from controlroom.app.commands.generate import generate
from controlroom.app.commands.inspect import inspect
from controlroom.app.commands.instruct_data import instruct_data
from controlroom.app.commands.look import look
from controlroom.app.commands.personalise import personalise
from controlroom.app.commands.plan import plan
from controlroom.app.commands.replay import replay
from controlroom.app.commands.retarget import retarget
from controlroom.app.commands.signal import signal
from controlroom.app.commands.stylise import stylise
from controlroom.app.commands.train import train
from controlroom.core.errors import ControlRoomError
from controlroom.core.memory import keep_freed_memory

app = typer.Typer(
    name="controlroom",
    help="One denoising loop, every control: draw pictures under any number of controls.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    generate,
    edit,
    enhance,
    retarget,
    stylise,
    look,
    personalise,
    train,
    instruct_data,
    evaluate,
    direction,
    plan,
    explain,
    replay,
    signal,
    controls,
    inspect,
    convert,
):
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
    if arguments is None:  # the process is ours, from its start to its end
        keep_freed_memory()
    line = list(sys.argv[1:] if arguments is None else arguments)
    options = line[: line.index("--")] if "--" in line else line
    debug = "--debug" in options
    if debug:
        line.remove("--debug")
    try:
        code = _run(line)
        sys.stdout.flush()  # a full disk may only show here
        return code
    except KeyboardInterrupt:
        return _failed("interrupted; nothing was written", 130)
    except ControlRoomError as error:
        if debug:
            raise
        return _failed(f"error: {error}", 2)
    except BrokenPipeError:
        return _mute(0)  # the reader of our output has gone (`| head`), which is not our mistake
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return _defect(error, debug)
        # Files say so themselves (`OutputError`); this is the terminal's or a redirection's disk.
        return _mute(_failed("error: the result cannot be printed: no space is left on the disk. Free some.", 2))
    except MemoryError:
        return _failed("error: there is not enough memory for this run. Draw fewer or smaller pictures.", 2)
    except Exception as error:
        return _defect(error, debug)


def _defect(error: Exception, debug: bool) -> int:
    if debug:
        raise error
    return _failed(
        f"unexpected error: {type(error).__name__}: {str(error)[:400]} (a defect of controlroom; run it again with "
        "--debug to see where, and report it)",
        1,
    )


def _run(line: list[str]) -> int:
    try:
        typer.main.get_command(app).main(args=line, prog_name="controlroom", standalone_mode=True)
    except SystemExit as exit:
        code = exit.code
        if code == 1 and isinstance(exit.__context__, BrokenPipeError):
            return _mute(0)
        return code if isinstance(code, int) else int(code is not None)
    return 0


def _mute(code: int) -> int:
    """Nothing more can be printed; Python must not complain about that at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _failed(message: str, code: int) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
