"""`routing-replay`: choose a command, run it, turn its outcome into an exit code."""

import sys

from routing_replay.errors import ConfigError, IntegrationError, RoutingReplayError

__all__ = ["main"]

_EXTRA = "pip install 'routing-replay[demo]'"


def _run(arguments: list[str] | None) -> int:
    try:
        import tyro

        from routing_replay.cli.demo import DemoOptions, run_demo
    except ModuleNotFoundError as err:
        raise IntegrationError(
            f"the command line needs {err.name}, which is missing: {_EXTRA}"
        ) from err
    app = tyro.extras.SubcommandApp()

    @app.command(name="demo")
    def demo(options: tyro.conf.OmitArgPrefixes[DemoOptions]) -> int:
        """Sample answers with the engine, audit them with Transformers, and check that replay works."""
        return run_demo(options)

    return app.cli(
        prog="routing-replay",
        args=arguments,
        description="Routing replay for mixture-of-experts models.",
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 success, 1 failure, 2 bad arguments.

    Args:
        arguments: Words after the program's name; None takes those of the process.
    """
    try:
        code = _run(arguments)
    except ConfigError as err:
        print(f"error: {err}", file=sys.stderr)
        code = 2
    except RoutingReplayError as err:
        print(f"error: {err}", file=sys.stderr)
        code = 1
    sys.exit(code)
