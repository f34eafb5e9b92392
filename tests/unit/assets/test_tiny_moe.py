"""The embedded model is what its card says, and its task can be judged."""

import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from routing_replay import LLM, SamplingParams
from routing_replay.assets import tiny_moe_path
from routing_replay.assets.arithmetic import is_solved, make_problems, write_solution


def test_weights_are_small_bfloat16_and_documented():
    folder = tiny_moe_path()
    assert (folder / "model.safetensors").stat().st_size <= 16_000_000
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    training = json.loads((folder / "training.json").read_text())
    assert {"recipe", "date", "hardware", "versions", "loss_curve"} <= set(training)
    assert "tiny-moe" in (folder / "README.md").read_text()


def test_tokenizer_round_trips_and_keeps_digits_apart():
    tokenizer = Tokenizer.from_file(str(tiny_moe_path() / "tokenizer.json"))
    rng = random.Random(1)
    for problem in make_problems(50, 1):
        for text in (problem.question, write_solution(problem, rng)):
            assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [token for token in tokenizer.encode("1234").tokens if token != "Ġ"] == list("1234")


def test_chat_template_is_that_of_transformers():
    messages = [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "Answer: 3."},
        {"role": "user", "content": "And now?"},
    ]
    theirs = AutoTokenizer.from_pretrained(tiny_moe_path()).apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert theirs == "<|user|>How many?<|assistant|>Answer: 3.<|end|><|user|>And now?<|assistant|>"
    llm = LLM(tiny_moe_path(), dtype="float32")
    assert llm.tokenizer is not None
    assert llm.tokenizer.render_chat(messages) == theirs


def test_every_expert_is_used_in_every_layer_and_problems_get_solved():
    llm = LLM(tiny_moe_path(), enable_return_routed_experts=True)
    problems = make_problems(48, 2)
    conversations = [[{"role": "user", "content": problem.question}] for problem in problems]
    outputs = llm.chat(conversations, SamplingParams(max_tokens=128))
    rows = np.concatenate([output.outputs[0].routing.ids for output in outputs])
    for layer_ids in rows.transpose(1, 0, 2):
        assert len(np.unique(layer_ids)) == llm.core.model_config.num_experts
    solved = [is_solved(p, o.outputs[0].text) for p, o in zip(problems, outputs, strict=True)]
    # 48 answers of a model that solves 72 %: outside this range with a chance of about 1e-5.
    assert 0.40 <= np.mean(solved) <= 0.97


def test_solutions_are_judged_by_their_answer():
    rng = random.Random(3)
    for problem in make_problems(200, 3):
        text = write_solution(problem, rng)
        assert is_solved(problem, text)
        assert is_solved(problem, text + "<|end|>")
        assert not is_solved(problem, text.replace(str(problem.answer), str(problem.answer + 1)))
        assert not is_solved(problem, text[:-1])
        assert not is_solved(problem, "")


def test_problems_depend_on_the_seed_alone():
    assert make_problems(5, 7) == make_problems(9, 7)[:5]
    assert make_problems(5, 7) != make_problems(5, 8)
    with pytest.raises(ValueError, match="num_problems is 0"):
        make_problems(0, 7)
