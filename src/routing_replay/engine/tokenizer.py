"""The tokenizer of a model folder, and its chat template."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from routing_replay.errors import ConfigError

__all__ = ["ModelTokenizer", "load_tokenizer"]


class ModelTokenizer:
    """Text to tokens and back.

    Args:
        tokenizer: The Hugging Face tokenizer.
        chat_template: Jinja source of the chat template, if the folder has one.
    """

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; special tokens in it are recognised."""
        return self._tokenizer.encode(text).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def make_decoder(self) -> Callable[[int], str | None]:
        """Return a function from the next token of one text to the text that it adds, None inside a character."""
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token_id: stream.step(self._tokenizer, token_id)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render a conversation as the prompt of the assistant's next turn.

        Args:
            messages: `{"role": ..., "content": ...}` in order.

        Returns:
            The prompt's text.

        Raises:
            ConfigError: The model has no chat template, or it refuses the messages.
        """
        if self._chat_template is None:
            raise ConfigError(
                "the model folder has no chat template; pass prompts to generate() instead"
            )

        def raise_exception(message: str) -> None:  # what Hugging Face offers to templates
            raise ConfigError(f"the chat template refuses the messages: {message}")

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(self._chat_template)
        return template.render(
            messages=list(messages), add_generation_prompt=True, raise_exception=raise_exception
        )


def load_tokenizer(folder: Path) -> ModelTokenizer | None:
    """Read the tokenizer of a model folder.

    Args:
        folder: A Hugging Face folder.

    Returns:
        The tokenizer, or None if the folder has no `tokenizer.json`.
    """
    if not (folder / "tokenizer.json").exists():
        return None
    template_path, config_path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    template: str | None = None
    if template_path.exists():
        template = template_path.read_text()
    elif config_path.exists():
        template = json.loads(config_path.read_text()).get("chat_template")
    return ModelTokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")), template)
