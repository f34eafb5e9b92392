"""Tokenizer and training data of the embedded model."""

import json
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from routing_replay.assets.arithmetic import TRAINING_SEED_START, make_problems, write_solution

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, END, USER, ASSISTANT)
IGNORED_LABEL = -100
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ raise_exception('role must be user or assistant') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Tokenized examples, right-padded.

    Attributes:
        token_ids: int16 `[examples, length]`, padded with the pad id.
        prompt_lengths: int16 `[examples]`, tokens before the response.
        lengths: int16 `[examples]`, prompt and response with its end token.
    """

    token_ids: NDArray[np.int16]
    prompt_lengths: NDArray[np.int16]
    lengths: NDArray[np.int16]


def format_prompt(question: str) -> str:
    """Return the text that the chat template makes of one user message.

    Args:
        question: The message.

    Returns:
        The prompt, ready for the response.
    """
    return f"{USER}{question}{ASSISTANT}"


def train_tokenizer(vocab_size: int, *, num_examples: int = 20_000) -> Tokenizer:
    """Train a byte-level BPE in which no token holds more than one digit.

    Args:
        vocab_size: Tokens including the specials; at least 300.
        num_examples: Examples to train on.

    Returns:
        The tokenizer; any text survives encoding and decoding.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[0-9]| ?[A-Za-z]+| ?[^A-Za-z0-9 ]+| +"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        text for pair in write_examples(TRAINING_SEED_START, num_examples, 0.0) for text in pair
    ]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`.

    Args:
        tokenizer: What to save.
        folder: Must exist.
        max_length: Positions of the model.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "pad_token": PAD,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def write_examples(seed: int, num_examples: int, slip_rate: float) -> list[tuple[str, str]]:
    """Write training examples as text.

    Args:
        seed: At or above `TRAINING_SEED_START` for training.
        num_examples: How many.
        slip_rate: See `write_solution`.

    Returns:
        Pairs of question and solution.
    """
    rng = random.Random(-seed)
    return [
        (problem.question, write_solution(problem, rng, slip_rate=slip_rate))
        for problem in make_problems(num_examples, seed)
    ]


def make_corpus(
    tokenizer: Tokenizer, num_examples: int, length: int, slip_rate: float, *, workers: int
) -> Corpus:
    """Write and tokenize the training examples in parallel.

    Args:
        tokenizer: Encodes them.
        num_examples: Rounded down to whole shards of 10 000.
        length: Tokens per row; longer examples are refused.
        slip_rate: See `write_solution`.
        workers: Processes; the result does not depend on it.

    Returns:
        The corpus.
    """
    shards = max(1, num_examples // 10_000)
    shard_size = num_examples // shards
    arguments = [
        (tokenizer.to_str(), TRAINING_SEED_START + 1 + shard, shard_size, length, slip_rate)
        for shard in range(shards)
    ]
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(_make_shard, *zip(*arguments, strict=True)))
    return Corpus(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        prompt_lengths=np.concatenate([part.prompt_lengths for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
    )


def _make_shard(
    tokenizer_json: str, seed: int, num_examples: int, length: int, slip_rate: float
) -> Corpus:
    """Make one shard of the corpus.

    Args:
        tokenizer_json: The serialized tokenizer.
        seed: Of the shard.
        num_examples: How many.
        length: Tokens per row.
        slip_rate: See `write_solution`.

    Returns:
        The shard.

    Raises:
        ValueError: An example is longer than `length`.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json)
    end, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    examples = write_examples(seed, num_examples, slip_rate)
    prompts = [e.ids for e in tokenizer.encode_batch([format_prompt(q) for q, _ in examples])]
    responses = [e.ids for e in tokenizer.encode_batch([s for _, s in examples])]
    token_ids = np.full((num_examples, length), pad, dtype=np.int16)
    lengths = np.zeros(num_examples, dtype=np.int16)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = [*prompt, *response, end]
        if len(ids) > length:
            raise ValueError(f"an example has {len(ids)} tokens, length is {length}; raise length")
        token_ids[row, : len(ids)] = ids
        lengths[row] = len(ids)
    prompt_lengths = np.asarray([len(prompt) for prompt in prompts], dtype=np.int16)
    return Corpus(token_ids=token_ids, prompt_lengths=prompt_lengths, lengths=lengths)
