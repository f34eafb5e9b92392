"""Looking for stop strings in the text of a request as it grows."""

from collections.abc import Callable, Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """The text of a request, and the first stop string in it.

    Args:
        stop: Strings that end the text; if two end with the same token, the one that begins first wins.
        include_in_text: Whether the text keeps the stop string.
        decode: Turns the next token into the text that it adds, or None while a character is incomplete.
    """

    def __init__(
        self, stop: Sequence[str], *, include_in_text: bool, decode: Callable[[int], str | None]
    ) -> None:
        self._stop = tuple(stop)
        self._includes = include_in_text
        self._decode = decode
        self._longest = max(map(len, self._stop))
        self.text = ""
        self.found: str | None = None

    def add(self, token_id: int, *, may_stop: bool) -> str | None:
        """Add a token.

        Args:
            token_id: The next generated token.
            may_stop: Whether the text is long enough to end here.

        Returns:
            The stop string that the text now ends at, or None.
        """
        piece = self._decode(token_id)
        if not piece:
            return None
        # A stop string that ends in the new piece begins at most this far back.
        first = max(0, len(self.text) - self._longest + 1)
        self.text += piece
        if not may_stop:
            return None
        hits = [(self.text.find(text, first), text) for text in self._stop]
        hits = [hit for hit in hits if hit[0] >= 0]
        if not hits:
            return None
        position, self.found = min(hits)
        self.text = self.text[: position + len(self.found) * self._includes]
        return self.found
