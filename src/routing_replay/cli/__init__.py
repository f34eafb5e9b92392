"""The command line."""

from routing_replay.cli.main import main

__all__ = ["main"]
