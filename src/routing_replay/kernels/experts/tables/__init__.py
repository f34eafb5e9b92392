"""Measured configurations: one JSON file for each kind of device, and what reads and writes such files."""

from routing_replay.kernels.experts.tables.files import read_table, write_table
from routing_replay.kernels.experts.tables.table import (
    ConfigTable,
    ConfigTables,
    Device,
    LayerShape,
    ShapeEntries,
    TableEntry,
)

__all__ = [
    "ConfigTable",
    "ConfigTables",
    "Device",
    "LayerShape",
    "ShapeEntries",
    "TableEntry",
    "read_table",
    "write_table",
]
