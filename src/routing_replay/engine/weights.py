"""The weights of a running engine: replaced between steps, away while it sleeps, and fit to run or not."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from routing_replay.engine.runner import ModelRunner
from routing_replay.errors import ConfigError, EngineNotReadyError, UnsupportedModelError
from routing_replay.models import (
    HostWeights,
    WeightInfo,
    check_folder_weights,
    copy_weights,
    load_folder_weights,
    offload_weights,
    receive_weights,
    restore_weights,
)

__all__ = ["EngineWeights", "WeightChange"]

_ASLEEP = "the engine sleeps: its weights and its KV cache are off the device; call wake_up() first"
_NO_CACHE = "the engine has its weights, but no KV cache: making it failed; free memory on the device and call wake_up()"


@dataclass(slots=True, eq=False)
class WeightChange:
    """How far a replacement of weights has come.

    Attributes:
        has_begun: Whether a weight may differ from what it was. True unless whoever replaces them says otherwise.
    """

    has_begun: bool = True


class EngineWeights:
    """Weights, KV cache and graphs of an engine, there or away.

    An engine is ready, asleep, or must not run: after `sleep(level=2)` until every weight was loaded again, after an
    update that failed halfway until one succeeds, and where memory for the KV cache could not be had.

    Args:
        runner: Runs the model; nothing is in flight in any call.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.version = 0
        self._runner = runner
        self._host: HostWeights | None = None
        self._has_cache = True
        self._are_dropped = False
        self._half_done: str | None = None

    @property
    def are_away(self) -> bool:
        """Whether the engine sleeps."""
        return self._host is not None

    @property
    def is_ready(self) -> bool:
        """Whether `check_ready` lets a step run."""
        try:
            self.check_ready()
        except EngineNotReadyError:
            return False
        return True

    def check_ready(self) -> None:
        """Refuse to run a step that would compute nonsense.

        Raises:
            EngineNotReadyError: The weights or the KV cache are away, or the weights are not one whole set; it says what to do.
        """
        self._check_awake()
        if self._are_dropped:
            raise EngineNotReadyError(
                "the weights were dropped by sleep(level=2) and not all have been loaded since; load them with "
                "load_weights(), update_weights() or receive_weights()"
            )
        if self._half_done is not None:
            raise EngineNotReadyError(
                f"an update failed halfway ({self._half_done}), so that some weights are new and others old; repeat it, or "
                "load a whole folder with load_weights()"
            )
        if not self._has_cache:
            raise EngineNotReadyError(_NO_CACHE)

    @contextmanager
    def updating(self, version: int) -> Generator[WeightChange]:
        """Let weights be replaced in place.

        Where an error comes before the first one is replaced, nothing has changed. Where it comes later, `check_ready`
        refuses until another update succeeds. Either way the version stays.

        Args:
            version: Of the new weights.

        Yields:
            How far it has come.

        Raises:
            ConfigError: The version is negative.
            EngineNotReadyError: The engine sleeps.
            RuntimeError: After `sleep(level=2)`, all weights are there, but the memory of the KV cache is not.
        """
        if version < 0:
            raise ConfigError(f"weights_version={version}; accepted is 0 or more")
        self._check_awake()
        change = WeightChange()
        try:
            yield change
        except BaseException as error:
            if change.has_begun:
                said = str(error).splitlines()
                self._half_done = (
                    f"to version {version}: {type(error).__name__}: {said[0] if said else ''}"
                )
            raise
        self.version = version
        self._half_done = None
        if self._are_dropped and not self._any_nan():
            self._are_dropped = False
            self._make_cache()

    def copy(self, tensors: Iterable[tuple[str, Tensor]], change: WeightChange) -> None:
        """Replace weights by tensors; as `models.copy_weights`.

        Args:
            tensors: Names and new values.
            change: Of `updating`.
        """
        change.has_begun = is_placing = False

        def watched() -> Iterator[tuple[str, Tensor]]:
            nonlocal is_placing
            for item in tensors:
                is_placing = True
                yield item
                # Who asks for the next tensor has placed this one.
                change.has_begun, is_placing = True, False

        try:
            copy_weights(self._runner.model, watched())
        except (ConfigError, UnsupportedModelError):
            raise  # a refused tensor has not been placed
        except BaseException:
            change.has_begun |= is_placing
            raise

    def load(self, folder: Path, change: WeightChange) -> None:
        """Replace all weights by those of a folder; as `models.load_folder_weights`.

        Args:
            folder: A checkpoint of the same model.
            change: Of `updating`.
        """
        change.has_begun = False
        check_folder_weights(self._runner.model, folder)
        change.has_begun = True
        load_folder_weights(self._runner.model, folder)

    def receive(
        self,
        metadata: Sequence[WeightInfo],
        change: WeightChange,
        *,
        group: dist.ProcessGroup | None,
        src: int,
    ) -> None:
        """Replace weights by those that another process sends; as `models.receive_weights`.

        Args:
            metadata: Of the sender's tensors.
            change: Of `updating`.
            group: The process group; None for the default one.
            src: The sender's rank among all.
        """
        try:
            receive_weights(self._runner.model, metadata, group=group, src=src)
        except UnsupportedModelError:
            change.has_begun = False  # the metadata are checked before anything comes
            raise

    def sleep(self, level: int) -> None:
        """Free the device memory of weights, keys, values and graphs.

        Args:
            level: 1 keeps the weights in host memory, 2 drops them.

        Raises:
            ConfigError: The level is unknown, or the engine sleeps already.
            RuntimeError: Host memory ran out; nothing has changed.
        """
        if self._host is not None:
            raise ConfigError("the engine sleeps already; call wake_up() first")
        self._host = offload_weights(self._runner.model, level=level)
        self._are_dropped |= level == 2
        self._release_cache()

    def wake_up(self) -> None:
        """Bring back what `sleep` took away; where an update is due, the KV cache and graphs come after it.

        Raises:
            ConfigError: Nothing is away.
            RuntimeError: Memory ran out: what was away still is.
            CaptureError: A layer does not record its routing any more; the engine sleeps on.
        """
        if self._host is None and self._has_cache:
            raise ConfigError("the engine is awake; there is nothing to wake up")
        if self._host is not None:
            host = self._host
            restore_weights(self._runner.model, host)
            self._host = None
            if self._are_dropped:
                return
            try:
                self._make_cache()
            except BaseException:
                self._host = offload_weights(self._runner.model, level=1)
                raise
            return
        if self._are_dropped:
            self.check_ready()
        self._make_cache()

    def close(self) -> None:
        """Free what the engine holds on the device, for good."""
        self._release_cache()
        if self._host is None:
            self._host = offload_weights(self._runner.model, level=2)

    def _make_cache(self) -> None:
        """Make KV cache and graphs, and run the canary on them; leave neither behind where that fails."""
        try:
            self._runner.acquire()
        except BaseException:
            self._release_cache()
            raise
        self._has_cache = True

    def _release_cache(self) -> None:
        self._has_cache = False
        self._runner.release()

    def _check_awake(self) -> None:
        if self._host is not None:
            raise EngineNotReadyError(_ASLEEP)

    @torch.inference_mode()
    def _any_nan(self) -> bool:
        # A sum needs no second tensor of the weight's size.
        sums = [parameter.sum().isnan() for parameter in self._runner.model.parameters()]
        return bool(torch.stack(sums).any())
