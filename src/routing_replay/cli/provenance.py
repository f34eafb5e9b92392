"""What made a result: versions, and the commit where the package runs from a checkout."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import routing_replay

__all__ = ["checkout_commit", "versions"]


def checkout_commit() -> str | None:
    """Return the commit of the checkout that the package is imported from, with `-dirty` if files differ from it.

    Returns:
        The commit, or None for an installed package, or without git.
    """
    checkout = Path(routing_replay.__file__).parents[2]
    # An installed package may lie below somebody else's repository: only our own checkout has this path.
    if not (checkout / "src" / "routing_replay").is_dir() or not (checkout / ".git").exists():
        return None
    words = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    words += ["--exclude=*"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def versions(*names: str) -> dict[str, str]:
    """Return the versions of Python, this package and others.

    Args:
        names: Distributions; one that is not installed is left out.

    Returns:
        Version by name; `commit` where it is known.
    """
    found = {"python": platform.python_version()}
    for name in ("routing-replay", *names):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = checkout_commit()
    return found if commit is None else {**found, "commit": commit}
