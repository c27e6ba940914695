"""Prompts as tokens: what is written in front, and thoughts in a prompt."""

import asyncio
import json

import pytest
from fakes.openai_server import FakeServer
from r1_grading import Grade
from r1_grading.response_rewards import grade_format as format_grade
from test_end_tokens import collected, response_of, tokenizer_with
from tokenizers import processors

from megatron_r1.config import RewardsConfig
from megatron_r1.config.eval import ServerConfig
from megatron_r1.controller.rollouts.response_grader import ResponseGrader
from megatron_r1.data.few_shot import FewShotExamples, FewShotTokenizer
from megatron_r1.data.prompt import make_prompt
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.evaluation.remote_model import RemoteModel
from megatron_r1.evaluation.sampling_settings import SamplingSettings

BEGIN, EOS = "<|begin_of_text|>", "<|eot_id|>"


def beginning_folder(folder, chat="{{ bos_token }}{{ messages[0].content }}"):
    """A tokenizer that puts BEGIN in front, as Llama 3's."""
    tokenizer = tokenizer_with([BEGIN, EOS], EOS, bos_token=BEGIN)
    number = tokenizer.convert_tokens_to_ids(BEGIN)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, number)]
    )
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return number


@pytest.mark.parametrize(
    ("template", "question"),
    [
        ("{question}", "find a"),
        (BEGIN + "{question}", "find a"),
        (BEGIN + " find {question} ?", "a"),
        ("{question}", BEGIN + " find a"),  # as sft's prompts may be written
        ("chat", "find a"),
        ("{question}", ""),
    ],
)
def test_b23_a_prompt_begins_once(template, question, tmp_path):
    number = beginning_folder(tmp_path)
    tokenizer = PromptTokenizer(str(tmp_path), template)
    ids = tokenizer.encode(question)
    assert ids[0] == number and ids.count(number) == 1
    bare = PromptTokenizer(str(tmp_path), "{question}").encode(question.removeprefix(BEGIN))
    if template in ("chat", "{question}", BEGIN + "{question}"):
        assert ids == bare


def test_b23_so_do_prompts_with_worked_examples(tmp_path):
    number = beginning_folder(tmp_path)
    shots = tmp_path / "shots.jsonl"
    shots.write_text(json.dumps({"question": "the ?", "response": "answer"}) + "\n")
    for template in (BEGIN + "{question}", "{question}"):
        text = FewShotTokenizer(str(tmp_path), template, FewShotExamples(shots, None, 0))
        ids = text.encode("find a")
        assert ids[0] == number and ids[1] != number


@pytest.mark.parametrize(
    "template", ["{question}", BEGIN + "{question}", BEGIN + " find {question} ?"]
)
def test_b23_so_do_texts_at_a_completions_server(template, tmp_path):
    """Which encodes the text as vLLM does: with the tokenizer's tokens, unless told not to."""
    number = beginning_folder(tmp_path)
    tokenizer = PromptTokenizer(str(tmp_path), template)
    arrived = []

    def encode(prompt, body):
        given = {"add_special_tokens": body.get("add_special_tokens", True)}
        arrived.append(tokenizer.hf_tokenizer.encode(prompt, **given))
        return 200, "4"

    async def ask(url):
        server = ServerConfig(url=url, model="m", api="completions")
        policy = RemoteModel(server, template, SamplingSettings(0.6, 0.95, 8))
        await policy.respond("find a", 0)
        await policy.close()

    with FakeServer(encode) as server:
        asyncio.run(ask(server.url))
    assert arrived == [tokenizer.encode("find a")]
    assert arrived[0][0] == number and arrived[0].count(number) == 1


def test_b23_a_tokenizer_that_adds_nothing_takes_the_text_as_it_is(tmp_path):
    tokenizer = tokenizer_with([BEGIN, EOS], EOS, bos_token=BEGIN)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    number = tokenizer.convert_tokens_to_ids(BEGIN)
    assert PromptTokenizer(str(tmp_path), BEGIN + "{question}").encode("a")[0] == number
    assert number not in PromptTokenizer(str(tmp_path), "{question}").encode("a")


class FormatAlone:
    """The format reward in this process; nothing else is graded."""

    async def grade(self, kind, response, truth, **fields):
        return format_grade(response, **fields) if kind == "format" else Grade(1.0, "")


@pytest.mark.parametrize(
    ("tail", "answer", "wanted"),
    [
        ("<think>\n", "so 4</think><answer>4</answer>", 1),
        ("<think>", "so 4</think><answer>4</answer>", 1),
        ("<think>\n", "<think>so 4</think><answer>4</answer>", 0),  # the prompt holds one
        ("<think>\n\n</think>\n\n", "<answer>4</answer>", 1),  # thinking off
        ("<think></think>", " <answer>4</answer>", 1),
        ("<think>\n\n</think>\n\n", "4", 0),
        ("<think>\n\n</think>\n\n", "<think>so</think><answer>4</answer>", 0),
        ("<think>x</think>", "<answer>4</answer>", 0),  # a thought that is not empty is a text
        ("", "<think>so 4</think><answer>4</answer>", 1),
        ("", "<answer>4</answer>", 0),
    ],
)
@pytest.mark.parametrize("is_chat", [True, False])
def test_b24_the_format_counts_the_thought_that_the_prompt_holds(
    tail, answer, wanted, is_chat, tmp_path
):
    beginning_folder(tmp_path, chat="{{ messages[0].content }}" + tail)
    tokenizer = PromptTokenizer(str(tmp_path), "chat" if is_chat else "{question}" + tail)
    tokenizer.decode = lambda token_ids: answer
    grader = ResponseGrader(FormatAlone(), tokenizer, RewardsConfig().call_options)
    prompt = make_prompt("1 + 3?", "math", "4", {})
    [got] = asyncio.run(grader.grade(prompt, [response_of([1], "stop")], {"accuracy": 1.0}))
    assert got.rewards["format"] == wanted and got.text == answer


@pytest.mark.parametrize("padded", [[20, 7], [5, 4999, 1], [10**6]])
def test_b27_ids_of_the_padded_vocabulary_have_no_text(padded, tmp_path):
    """A model's embedding is larger than its tokenizer: such an id is sampled, not refused."""
    beginning_folder(tmp_path)
    tokenizer = PromptTokenizer(str(tmp_path), "{question}")
    got = collected(tokenizer, [1, *padded, tokenizer.end])
    assert not got.is_truncated and got.rewards["accuracy"] == 0.0
    assert got.text.startswith("the") and len(got.response.token_ids) == len(padded) + 2
