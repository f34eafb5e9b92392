"""SkyRL asks for Python 3.12; what its functions here need of it is a TypedDict that pydantic accepts."""

import sys
import typing

import typing_extensions

if sys.version_info < (3, 12):
    typing.TypedDict = typing_extensions.TypedDict
