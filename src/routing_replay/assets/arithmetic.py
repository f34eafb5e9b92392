"""The task of the embedded model: short arithmetic stories with written-out steps.

Every problem has one checkable answer. The wording of problems and solutions varies, so that a
model that learned the task is still random at temperature 1, and the answer can be judged without
looking at the wording. Standard library only.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["TRAINING_SEED_START", "Problem", "Step", "is_solved", "make_problems", "write_solution"]

Operator = Literal["+", "-", "*"]

TRAINING_SEED_START: Final = 1_000_000
"""The embedded model was trained on seeds from here upwards; smaller seeds are held out."""

_MAX_VALUE: Final = 999
_FINAL_ANSWER: Final = re.compile(r"[Aa]nswer(?: is|:) (-?[0-9]+)\.\Z")
_END_OF_TEXT: Final = "<|end|>"

_NAMES: Final = (
    *("Ada", "Ben", "Chen", "Dina", "Emil", "Fay", "Gus", "Hana", "Ivan", "Jo", "Kofi", "Lena"),
    *("Mia", "Noor", "Omar", "Pia", "Quinn", "Rosa", "Sam", "Tara"),
)
_ITEMS: Final = (
    *("apples", "books", "cards", "coins", "eggs", "keys", "lamps", "pens", "plums", "shells"),
    *("stamps", "stones", "tickets", "toys"),
)
_BOXES: Final = ("bags", "boxes", "crates", "rows")
_OPENINGS: Final = (
    "{name} has {a} {item}.",
    "{name} starts with {a} {item}.",
    "{name} counts {a} {item}.",
    "There are {a} {item} on the table of {name}.",
)
_PRODUCT_OPENINGS: Final = (
    "{name} has {a} {box} of {b} {item}.",
    "{name} fills {a} {box} with {b} {item} each.",
)
_EVENTS: Final[dict[Operator, tuple[str, ...]]] = {
    "+": (
        "{friend} brings {b} more.",
        "{name} buys {b} more.",
        "Then {b} more arrive.",
        "{name} finds another {b}.",
        "Later {b} are added.",
    ),
    "-": (
        "{friend} takes {b}.",
        "{name} gives {b} to {friend}.",
        "Then {b} get lost.",
        "{name} sells {b}.",
        "Later {b} are used up.",
    ),
    "*": (
        "Then the number grows {b} times.",
        "The count is multiplied by {b}.",
        "{friend} makes it {b} times as many.",
    ),
}
_QUESTIONS: Final = (
    "How many {item} are there now?",
    "How many {item} is that?",
    "How many {item} does that leave?",
)
_BEGINNINGS: Final = (
    "",
    "We start with {a} {item}.",
    "Start with {a}.",
    "Let us count the {item}.",
    "First there are {a}.",
    "Step by step:",
)
_LEADS: Final = ("", "Then", "Next,", "After that,", "Now", "So")
_STEPS: Final[dict[Operator, tuple[str, ...]]] = {
    "+": ("{a} + {b} = {c}.", "adding {b} gives {a} + {b} = {c}.", "{a} plus {b} is {c}."),
    "-": ("{a} - {b} = {c}.", "taking {b} leaves {a} - {b} = {c}.", "{a} minus {b} is {c}."),
    "*": ("{a} * {b} = {c}.", "times {b} makes {a} * {b} = {c}.", "{a} times {b} is {c}."),
}
_ENDINGS: Final = (
    "The answer is {c}.",
    "So the answer is {c}.",
    "Answer: {c}.",
    "That is {c} {item}, so the answer is {c}.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One operation of a problem.

    Attributes:
        operator: `"+"`, `"-"` or `"*"`.
        operand: The right-hand side, at least 1.
    """

    operator: Operator
    operand: int

    def apply(self, value: int) -> int:
        """Return `value` after this step.

        Args:
            value: The left-hand side.

        Returns:
            The exact result.
        """
        if self.operator == "+":
            return value + self.operand
        if self.operator == "-":
            return value - self.operand
        return value * self.operand


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question with one integer answer.

    Attributes:
        question: The story, plain text; the content of the user's message.
        answer: The one accepted answer.
        start: The first number of the story.
        steps: The operations, in the order of the story.
        item: What is counted, plural.
    """

    question: str
    answer: int
    start: int
    steps: tuple[Step, ...]
    item: str


def make_problems(num_problems: int, seed: int) -> tuple[Problem, ...]:
    """Draw problems; the same arguments give the same problems on every machine.

    Args:
        num_problems: How many, at least 1. A longer draw starts with the shorter one.
        seed: Seeds from 0 to `TRAINING_SEED_START - 1` are held out from training; training data
            are drawn from the seeds above.

    Returns:
        The problems, with two or three steps each.

    Raises:
        ValueError: `num_problems` is below 1 or `seed` is negative.
    """
    if num_problems < 1:
        raise ValueError(f"num_problems is {num_problems}; pass at least 1")
    if seed < 0:
        raise ValueError(f"seed is {seed}; pass 0 or more")
    rng = random.Random(seed)
    return tuple(_make_problem(rng) for _ in range(num_problems))


def write_solution(problem: Problem, rng: random.Random, *, slip_rate: float = 0.0) -> str:
    """Write out the steps of a problem in randomly chosen wording.

    Args:
        problem: What to solve.
        rng: Chooses the wording (and the slips).
        slip_rate: Chance in [0, 1] that a step's result is off by 1, 2 or 10. Later steps go on
            from the wrong result, as a person's would. Training data have a few slips, so that the
            model keeps some doubt in its digits.

    Returns:
        The solution without an end-of-text token. Judged solved by `is_solved` unless a slip
        changed the final answer.

    Raises:
        ValueError: `slip_rate` is outside [0, 1].
    """
    if not 0.0 <= slip_rate <= 1.0:
        raise ValueError(f"slip_rate is {slip_rate}; pass a value from 0 to 1")
    value = problem.start
    sentences = [rng.choice(_BEGINNINGS).format(a=value, item=problem.item)]
    for step in problem.steps:
        result = step.apply(value)
        if rng.random() < slip_rate:
            result = max(0, result + rng.choice((-10, -2, -1, 1, 2, 10)))
        lead = rng.choice(_LEADS)
        body = rng.choice(_STEPS[step.operator]).format(a=value, b=step.operand, c=result)
        sentences.append(f"{lead} {body}" if lead else body[0].upper() + body[1:])
        value = result
    sentences.append(rng.choice(_ENDINGS).format(c=value, item=problem.item))
    return " ".join(sentence for sentence in sentences if sentence)


def is_solved(problem: Problem, completion_text: str) -> bool:
    """Judge a completion by its final stated answer.

    Strict: the text must end with `answer is N.` or `Answer: N.` (an end-of-text token and white
    space after it are ignored), and N must be the answer. The steps are not judged.

    Args:
        problem: The problem that was asked.
        completion_text: What the model wrote after the prompt.

    Returns:
        True if the final stated answer is the problem's.
    """
    text = completion_text.rstrip().removesuffix(_END_OF_TEXT).rstrip()
    match = _FINAL_ANSWER.search(text)
    return match is not None and match.group(1) == str(problem.answer)


def _make_problem(rng: random.Random) -> Problem:
    """Draw one problem.

    Args:
        rng: Consumed.

    Returns:
        The problem.
    """
    name, friend = rng.sample(_NAMES, 2)
    item = rng.choice(_ITEMS)
    num_steps = rng.choice((2, 2, 3, 3))
    words = {"name": name, "friend": friend, "item": item}
    has_product = rng.random() < 0.4
    if has_product:
        value = rng.randint(3, 9)
        steps = [Step(operator="*", operand=rng.randint(6, 19))]
        opening = rng.choice(_PRODUCT_OPENINGS)
        sentences = [opening.format(a=value, b=steps[0].operand, box=rng.choice(_BOXES), **words)]
    else:
        value = rng.randint(15, 99)
        steps = []
        sentences = [rng.choice(_OPENINGS).format(a=value, **words)]
    start = value
    value = steps[0].apply(value) if steps else value
    for step in _draw_steps(rng, value, num_steps - len(steps)):
        steps.append(step)
        value = step.apply(value)
        sentences.append(rng.choice(_EVENTS[step.operator]).format(b=step.operand, **words))
    sentences.append(rng.choice(_QUESTIONS).format(**words))
    question = " ".join(sentences)
    return Problem(question=question, answer=value, start=start, steps=tuple(steps), item=item)


def _draw_steps(rng: random.Random, value: int, num_steps: int) -> Iterator[Step]:
    """Draw operations that keep the running value between 0 and `_MAX_VALUE`.

    Args:
        rng: Consumed.
        value: The value before the first step.
        num_steps: How many to draw.

    Yields:
        The steps.
    """
    for _ in range(num_steps):
        operator: Operator = rng.choice(("+", "+", "-", "-", "*"))
        if operator == "*" and value > 120:
            operator = "-"
        if operator == "-" and value < 30:
            operator = "+"
        if operator == "*":
            operand = rng.randint(2, max(2, min(7, _MAX_VALUE // max(value, 1))))
        elif operator == "-":
            operand = rng.randint(11, min(99, value))
        else:
            operand = rng.randint(11, 99)
        step = Step(operator=operator, operand=operand)
        value = step.apply(value)
        yield step
