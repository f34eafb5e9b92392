"""Where the packs of peers are unpacked, and modules that stand in for what a peer imports but does not use here."""

import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TypeVar

from moe_bench.peers.contract import PeerError

__all__ = ["NoSettings", "Site", "import_despite_missing", "load_file", "stand_in_modules", "switched_off"]  # fmt: skip

_RECORD = ".packs.json"
_MOST_MISSING_PACKAGES = 40
_Loaded = TypeVar("_Loaded")


class Site:
    """A folder that `benchmarks/peers/install.py` filled; None where no pack was carried."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        record = None if folder is None else folder / _RECORD
        self._packs: dict[str, dict[str, list[str]]] = {}
        if record is not None and record.exists():
            self._packs = json.loads(record.read_text())

    def root(self, pack: str) -> Path:
        """Return the folder that holds a pack's files.

        Args:
            pack: Its name.

        Returns:
            The folder that its packages are in.

        Raises:
            PeerError: The pack is not there.
        """
        if self._folder is None or pack not in self._packs:
            raise PeerError(
                f"pack {pack!r} is not in {self._folder}; build it with benchmarks/peers/build_packs.py, carry build/peers/{pack}, "
                f"and unpack it with benchmarks/peers/install.py"
            )
        return self._folder

    def has(self, pack: str) -> bool:
        """Whether a pack is there."""
        return pack in self._packs

    def open(self) -> None:
        """Put what is unpacked at the end of the import path: what the machine has itself comes first."""
        if self._folder is None:
            return
        extra = [path for pack in self._packs.values() for path in pack["paths"]]
        sys.path += [str(self._folder), *(str(self._folder / path) for path in extra)]


def load_file(path: Path, name: str) -> ModuleType:
    """Import one file of a package without the package around it.

    Args:
        path: A Python file.
        name: Name of the module.

    Returns:
        The module.

    Raises:
        PeerError: There is no such file.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.exists():
        raise PeerError(f"{path} is missing; build and carry the pack again")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def stand_in_modules(modules: Mapping[str, Mapping[str, object]]) -> None:
    """Give names to import to files that are loaded without their package.

    They stay for the whole process, because the files import some of them while they run.

    Args:
        modules: Attributes of each module by its full name; parents are made as well.
    """
    for full_name, attributes in modules.items():
        parts = full_name.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[:count])
            if name not in sys.modules:
                module = ModuleType(name)
                module.__path__ = []
                sys.modules[name] = module
        sys.modules[full_name].__dict__.update(attributes)


def import_despite_missing(
    load: Callable[[], _Loaded], *, root: str, known: Sequence[str] = ()
) -> tuple[_Loaded, list[str]]:
    """Run imports; a third-party package that the machine lacks is replaced by an empty stand-in.

    Serving code of an engine imports packages for HTTP, tokenizers and logging that its kernels do not need.

    Args:
        load: Imports, and returns what is wanted of them.
        root: The peer's own package, which nothing stands in for.
        known: Packages that may be missing. Others are found by trying, which a package that registers something with
            torch while it is imported does not survive.

    Returns:
        What `load` returns, and the packages that may be stand-ins.

    Raises:
        PeerError: Too many packages are missing, or the peer cannot be imported a second time.
        ModuleNotFoundError: The peer's own package, or torch, is missing.
    """
    finder = _StandInFinder(known)
    sys.meta_path.append(finder)  # last: what the machine has comes first
    for _ in range(_MOST_MISSING_PACKAGES):
        try:
            return load(), sorted(finder.names)
        except ModuleNotFoundError as err:
            missing = (err.name or "").partition(".")[0]
            if missing in ("", root, "torch", "triton") or missing in finder.names:
                raise
            finder.names.add(missing)
            _forget(root)
        except RuntimeError as err:
            found = finder.names.difference(known)
            if not found:
                raise
            raise PeerError(
                f"{root} cannot be imported a second time ({err}); name {sorted(found)} as packages that may be missing"
            ) from err
    raise PeerError(f"{root} lacks more than {_MOST_MISSING_PACKAGES} packages: {finder.names}")


def _forget(root: str) -> None:
    """Drop a half-imported package, so that the next attempt starts afresh."""
    for name in [n for n in sys.modules if n == root or n.startswith(f"{root}.")]:
        del sys.modules[name]


def _is_decorating(arguments: tuple[object, ...], keywords: dict[str, object]) -> bool:
    """Whether a call hands over one function or class, as a decorator's does."""
    return len(arguments) == 1 and callable(arguments[0]) and not keywords


class _Anything:
    """Accepts being called, subclassed, subscripted and used as a decorator."""

    def __new__(cls, *arguments: object, **keywords: object) -> object:
        return arguments[0] if _is_decorating(arguments, keywords) else super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __call__(self, *arguments: object, **keywords: object) -> object:
        return arguments[0] if _is_decorating(arguments, keywords) else self

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __class_getitem__(cls, _: object) -> type:
        return cls

    def __or__(self, _: object) -> object:
        return self

    __ror__ = __or__


class _StandIn(ModuleType):
    __version__ = "0.0.0"
    __file__ = "stand-in"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (_Anything,), {})
        setattr(self, name, made)
        return made


class _StandInFinder:
    def __init__(self, names: Sequence[str]) -> None:
        self.names = set(names)

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:  # fmt: skip
        del path, target
        if name.partition(".")[0] not in self.names:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        del module


def switched_off(*_: object, **__: object) -> bool:
    """Return False: a feature that is not there."""
    return False


class NoSettings:
    """An object whose every attribute is a setting that is off."""

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(get=switched_off)
