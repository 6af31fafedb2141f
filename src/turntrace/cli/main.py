"""``turntrace``: its commands, and how it is started. What the exit codes mean is in `turntrace.cli.running`."""

from importlib.metadata import version
from typing import Annotated, Final

import typer

from turntrace.cli import keeping, looking, playing, reporting
from turntrace.cli.running import EXIT_CODES, OK, Command, command

app = typer.Typer(
    name="turntrace",
    help="Session, conversation and turn tracking for LangGraph agents in Langfuse.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

COMMANDS: Final = (
    *(playing.demo, playing.replay),
    *(looking.sessions, looking.show, looking.users),
    *(reporting.funnel, reporting.dropoff, reporting.report),
    *(keeping.sweep, keeping.forget, keeping.export, keeping.doctor),
)
for _function in COMMANDS:
    app.command(cls=Command)(command(_function))


def main() -> None:
    """Run the command that the command line names."""
    app(prog_name="turntrace")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"turntrace {version('turntrace')}")
        raise typer.Exit(OK)


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    main()
