"""Tables of measured configurations as data."""

from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from itertools import pairwise
from math import log
from pathlib import Path

from routing_replay.errors import ConfigError
from routing_replay.kernels.experts.config import ExpertsConfig, ExpertsShape
from routing_replay.kernels.experts.limits import config_problem

__all__ = ["ConfigTable", "ConfigTables", "Device", "LayerShape", "ShapeEntries", "TableEntry"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A kind of device.

    Attributes:
        name: As CUDA gives it.
        capability: Compute capability.
        num_sms: Streaming multiprocessors.
    """

    name: str
    capability: tuple[int, int]
    num_sms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What of an `ExpertsShape` does not change from step to step; the attributes are the same."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    num_local_experts: int
    top_k: int
    is_gated: bool = True

    @classmethod
    def of(cls, shape: ExpertsShape) -> "LayerShape":
        """Leave out the number of tokens.

        Args:
            shape: A layer and its tokens.

        Returns:
            The layer.
        """
        return cls(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_experts=shape.num_routed_over,
            num_local_experts=shape.num_local_experts,
            top_k=shape.top_k,
            is_gated=shape.is_gated,
        )

    def with_tokens(self, num_tokens: int) -> ExpertsShape:
        """Add a number of tokens.

        Args:
            num_tokens: T.

        Returns:
            The layer and its tokens, in bfloat16.
        """
        return ExpertsShape(
            num_tokens=num_tokens,
            top_k=self.top_k,
            num_local_experts=self.num_local_experts,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            is_gated=self.is_gated,
            num_experts=self.num_experts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TableEntry:
    """What was best for a number of tokens, and for which others it is used.

    Attributes:
        min_tokens: Fewest tokens that it is used for.
        max_tokens: Most.
        measured_tokens: The number that was measured.
        config: What was best.
        microseconds: Median of a whole layer with cold weights.
        rule_microseconds: The same with what the rule has.
    """

    min_tokens: int
    max_tokens: int
    measured_tokens: int
    config: ExpertsConfig
    microseconds: float
    rule_microseconds: float

    def __post_init__(self) -> None:
        if not self.min_tokens <= self.measured_tokens <= self.max_tokens:
            raise ConfigError(
                f"an entry of {self.measured_tokens} measured tokens is for {self.min_tokens} to {self.max_tokens}; "
                "accepted is a range that holds what was measured"
            )

    def holds(self, num_tokens: int) -> bool:
        """Say whether the entry is for a number of tokens.

        Args:
            num_tokens: T.

        Returns:
            Whether it is.
        """
        return self.min_tokens <= num_tokens <= self.max_tokens

    def distance(self, num_tokens: int) -> float:
        """Say how far what was measured is from a number of tokens.

        Args:
            num_tokens: T, 1 or more.

        Returns:
            The logarithm of their ratio, without sign.
        """
        return abs(log(self.measured_tokens / num_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeEntries:
    """The entries of one layer, and where they come from.

    Attributes:
        shape: The layer.
        commit: Of this package, when it was measured.
        versions: Of the packages that matter, `name version` each.
        seed: Of the data, and of the order of candidates.
        entries: By number of tokens, ranges apart.
    """

    shape: LayerShape
    commit: str
    versions: tuple[str, ...]
    seed: int
    entries: tuple[TableEntry, ...]

    def __post_init__(self) -> None:
        for before, after in pairwise(self.entries):
            if after.min_tokens <= before.max_tokens:
                raise ConfigError(
                    f"an entry for {after.min_tokens} to {after.max_tokens} tokens follows one for {before.min_tokens} "
                    f"to {before.max_tokens}; accepted are ranges in order that do not overlap"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigTable:
    """What was measured on one kind of device.

    Attributes:
        device: The device.
        shapes: The layers, each once.

    Raises:
        ConfigError: A layer is there twice, or a configuration cannot run on the device.
    """

    device: Device
    shapes: tuple[ShapeEntries, ...]

    def __post_init__(self) -> None:
        shapes = [item.shape for item in self.shapes]
        for item in self.shapes:
            if shapes.count(item.shape) > 1:
                raise ConfigError(f"{item.shape} has two lists of entries; keep one")
            for entry in item.entries:
                shape = item.shape.with_tokens(entry.measured_tokens)
                problem = config_problem(entry.config, shape, self.device.capability)
                if problem is not None:
                    raise ConfigError(
                        f"the entry of {entry.measured_tokens} tokens for {item.shape}: {problem}"
                    )

    def entries_of(self, shape: LayerShape) -> tuple[TableEntry, ...]:
        """Return the entries of a layer.

        Args:
            shape: The layer.

        Returns:
            Its entries, none where it was not measured.
        """
        return next((item.entries for item in self.shapes if item.shape == shape), ())

    def with_shape(self, measured: ShapeEntries) -> "ConfigTable":
        """Add a layer, in place of an older measurement of it.

        Args:
            measured: The layer's entries.

        Returns:
            The new table.
        """
        others = tuple(item for item in self.shapes if item.shape != measured.shape)
        return ConfigTable(device=self.device, shapes=(*others, measured))


# Compared by identity: a table is large, and it is hashed with every call that names one.
@dataclass(frozen=True, slots=True, eq=False)
class ConfigTables:
    """Tables of several devices, the first that fits having the word.

    Attributes:
        tables: The tables, in order.
    """

    tables: tuple[ConfigTable, ...] = ()

    @classmethod
    def shipped(cls) -> "ConfigTables":
        """Return the tables of the package.

        Returns:
            Always the same object; the files are read once.
        """
        return _shipped()

    @classmethod
    def from_file(cls, path: str | Path) -> "ConfigTables":
        """Read a table, such as `routing-replay tune` writes.

        Args:
            path: The file.

        Returns:
            This table first, then those of the package.

        Raises:
            ConfigError: The file is not such a table.
            OSError: It cannot be read.
        """
        from routing_replay.kernels.experts.tables.files import read_table

        return cls((read_table(Path(path)), *_shipped().tables))

    def entries(
        self, shape: ExpertsShape, *, capability: tuple[int, int], device_name: str | None = None
    ) -> tuple[TableEntry, ...]:
        """Return the entries of a layer: of the device itself, or of another of the same capability.

        Devices of one capability share their tensor cores and shared memory, on which tiles depend most.

        Args:
            shape: The layer; its number of tokens does not matter.
            capability: Compute capability of the device.
            device_name: Its name, or None for any.

        Returns:
            Entries of the first table that has some; none where no table has.
        """
        if shape.element_bytes != 2:  # bfloat16 is what is measured
            return ()
        layer = LayerShape.of(shape)
        alike = [table for table in self.tables if table.device.capability == capability]
        own = [table for table in alike if table.device.name == device_name]
        for table in (*own, *alike):
            entries = table.entries_of(layer)
            if entries:
                return entries
        return ()


@lru_cache(maxsize=1)
def _shipped() -> ConfigTables:
    from routing_replay.kernels.experts.tables.files import table_from_json

    folder = resources.files("routing_replay.kernels.experts.tables")
    files = sorted(
        (item for item in folder.iterdir() if item.name.endswith(".json")), key=lambda f: f.name
    )
    return ConfigTables(
        tuple(table_from_json(file.read_text("utf-8"), file.name) for file in files)
    )
