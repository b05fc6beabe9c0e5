"""The Typer application, and the one place where errors become exit statuses."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from typing import Annotated, Any

import typer

from repdeploy_cli import options
from repdeploy_cli.commands import bench, convert, doctor, export, families, inspect, report, verify

app = typer.Typer(
    name="repdeploy",
    help="Fuse, prove, export and benchmark structural re-parameterization networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    inspect.inspect, convert.convert, verify.verify, export.export, bench.bench, report.report, families.families,
    doctor.doctor,
):  # fmt: skip
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"repdeploy {version('repdeploy')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Fuse, prove, export and benchmark structural re-parameterization networks."""


def main() -> None:
    """Run one command and leave with its exit status (design section 4)."""
    sys.exit(run(sys.argv[1:]))


# typer brings its own copy of click in some versions: the base of its errors is found through what typer exports
_UsageErrors: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def run(arguments: list[str]) -> int:
    """One command; returns the exit status. An error that is not the user's passes through."""
    from repdeploy.errors import RepDeployError
    from repdeploy_cli.render import show_error, show_json_error

    if sys.stdout is None or sys.stderr is None:  # closed by the caller (`>&-`)
        sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack an arrow; that is no reason to lose a result
    try:
        status: Any = app(args=arguments or ["--help"], standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except typer.Exit as leave:
        return leave.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as reason:
        if reason.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        show_error("the output cannot be written: no space is left", "the result itself may be complete: see the bundle")
        return 2
    except RepDeployError as reason:
        if options.debugging():
            raise
        show_json_error(str(reason), reason.hint, reason.exit_status)
        show_error(str(reason), reason.hint)
        return reason.exit_status
    except _UsageErrors as reason:
        message: str = reason.format_message()  # type: ignore[attr-defined]
        show_json_error(message, "", 2)
        show_error(message.replace("Value error, ", ""), f"see repdeploy {_verb(arguments)}--help")
        return 2


def _verb(arguments: list[str]) -> str:
    known = {item.callback.__name__ for item in app.registered_commands if item.callback is not None}
    return f"{arguments[0]} " if arguments and arguments[0] in known else ""
