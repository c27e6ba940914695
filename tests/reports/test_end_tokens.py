"""Tokens that end a response: every one that a folder lists."""

import asyncio
import json
from array import array
from pathlib import Path

import pytest
import yaml
from r1_grading import Grade
from refusals import refused
from released_configs import RELEASED
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_r1.agents.continuation import Continuation
from megatron_r1.agents.token_tree import TokenTree
from megatron_r1.base.errors import Cause
from megatron_r1.commands.check_model import verb as check_model
from megatron_r1.commands.check_model.results import ModelCheckResult
from megatron_r1.config import ParallelConfig, RewardsConfig
from megatron_r1.controller.rollouts.collector import RolloutCollector
from megatron_r1.controller.rollouts.rollout import RolloutSampling
from megatron_r1.data.end_tokens import describe_end_tokens, end_tokens
from megatron_r1.data.prompt import make_prompt
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.engines.server.responses import Response
from megatron_r1.engines.server.stop_strings import truncate_at_stop
from megatron_r1.evaluation.sampling_settings import SamplingSettings
from megatron_r1.models.weights.formats.hf_writer import copy_model_files

MODELS = yaml.safe_load((Path(__file__).parent / "end_tokens.yaml").read_text(encoding="utf-8"))
WORDS = ["the", "answer", "is", "4", ".", "..", "...", "stop", "here", "?", "find", "a", "A"]


def tokenizer_with(added, eos, **more):
    vocabulary = {word: number for number, word in enumerate(["<unk>", *WORDS])}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own.add_special_tokens([AddedToken(text, special=True) for text in added])
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token=eos, **more)


def folder_of(name, folder, generation=True):
    """Write the tokenizer, config.json and generation_config.json of a model of end_tokens.yaml,
    with the ids of its vocabulary."""
    model = MODELS[name]
    vocabulary = {word: 600 + number for number, word in enumerate(["<unk>", *WORDS])}
    vocabulary |= {text: number for number, text in model["tokens"].items()}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own.add_special_tokens([AddedToken(text, special=True) for text in model["tokens"].values()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token=model["eos"])
    tokenizer.save_pretrained(folder)
    config = {"model_type": "llama", "eos_token_id": model.get("config")}
    (folder / "config.json").write_text(
        json.dumps(RELEASED[name][0] if name in RELEASED else config)
    )
    if generation and "generation" in model:
        settings = {"eos_token_id": model["generation"], "temperature": 0.6}
        (folder / "generation_config.json").write_text(json.dumps(settings))
    return tokenizer


def response_of(token_ids, reason):
    count = len(token_ids)
    logprobs, versions = array("f", [-1.0] * count), array("i", [0] * count)
    return Response(array("i", token_ids), logprobs, versions, reason)


class Scripted:
    """An engine whose answer is scripted, and ends as vLLM's: at one of stop_token_ids."""

    def __init__(self, token_ids):
        self.token_ids, self.asked = token_ids, {}

    async def generate(self, prompt_ids, n, max_tokens, stop_token_ids, **sampling):
        self.asked = {"stop_token_ids": stop_token_ids, **sampling}
        ends = [at for at, token in enumerate(self.token_ids) if token in stop_token_ids]
        count = min([max_tokens, *(at + 1 for at in ends)])
        reason = "stop" if ends and ends[0] < max_tokens else "length"
        return [response_of(self.token_ids[:count], reason)] * n


class Exact:
    async def grade(self, kind, response, truth, **fields):
        return Grade(float(letters(response) == letters(truth or "")), "compared")


def letters(text):
    """Return text without spaces: transformers' tokenizer of Qwen2 writes none between words."""
    return "".join(text.split())


def collected(text, token_ids, **sampling):
    engine = Scripted(token_ids)
    collector = RolloutCollector(engine, Exact(), text, RewardsConfig())
    prompt = make_prompt("is", "math", "the answer is 4", {})
    settings = RolloutSampling(1, 1.0, 1.0, len(token_ids), reward_weights={}, **sampling)
    rollout = asyncio.run(collector.collect([prompt], settings))
    return rollout.groups[0].responses[0]


ALONE = {json.dumps([RELEASED.get(name, [{}])[0].get("eos_token_id"), model]): name
         for name, model in MODELS.items()}  # fmt: skip
"""One model of each list; the others have the same."""
CASES = [(name, True) for name in MODELS]
CASES += [(name, False) for name in ALONE.values() if "generation" in MODELS[name]]


def test_b20_every_released_configuration_has_its_end_tokens():
    assert set(RELEASED) <= set(MODELS)
    assert all(model["sources"] for model in MODELS.values())


@pytest.mark.first_cases(7)
@pytest.mark.parametrize(("name", "generation"), CASES)
def test_b20_every_listed_token_ends_a_response_and_counts_as_its_end(name, generation, tmp_path):
    (folder := tmp_path / "model").mkdir()
    hf_tokenizer = folder_of(name, folder, generation)
    wanted = list(MODELS[name]["ends"])
    if not generation:  # as an older export may be
        wanted = [end for end in wanted if end not in MODELS[name].get("unlisted", ())]
    # With the tokenizer at hand and from the files alone.
    tokenizer = PromptTokenizer(str(folder), "{question}")
    # transformers gives every tokenizer of Qwen2 an <|endoftext|>, here with a number of no token.
    added = {} if "<|endoftext|>" in MODELS[name]["tokens"].values() else {"<|endoftext|>"}
    assert {end.id for end in tokenizer.end_tokens if end.text not in added} == set(wanted)
    assert {end.id for end in end_tokens(folder)} == set(wanted)
    assert tokenizer.stop_token_ids[0] == tokenizer.end == hf_tokenizer.eos_token_id == wanted[0]
    texts = MODELS[name]["tokens"]
    shown = shown_by_check_model(folder)
    assert all(f"{texts.get(end, 'token')} {end}" in shown for end in wanted)
    answer = hf_tokenizer.encode("the answer is 4", add_special_tokens=False)
    rubbish = hf_tokenizer.encode("stop here stop here", add_special_tokens=False)
    for end in wanted:
        got = collected(tokenizer, [*answer, end, *rubbish])
        assert not got.is_truncated and list(got.response.token_ids) == [*answer, end]
        assert letters(got.text) == "theansweris4" and got.rewards["accuracy"] == 1.0
    for other in set(texts) - set(wanted):
        got = collected(tokenizer, [*answer, other, *rubbish])
        assert got.is_truncated and len(got.response.token_ids) == len(answer) + 1 + len(rubbish)
    (export := tmp_path / "export").mkdir()
    copy_model_files(folder, export)
    assert [end.id for end in end_tokens(export)] == [end.id for end in end_tokens(folder)]
    written = json.loads((export / "generation_config.json").read_text())
    ids = written["eos_token_id"]
    assert set(ids if isinstance(ids, list) else [ids]) == set(wanted)
    assert ("temperature" in written) == (generation and "generation" in MODELS[name])


def shown_by_check_model(folder):
    """Return the lines of `check-model` for a folder that agrees."""
    numbers = dict.fromkeys(["parameters", "memory_bytes", "free_bytes", "tensors", "compared"], 1)
    numbers |= dict.fromkeys(["tolerance", "megatron", "vllm"], 0.0)
    ends = describe_end_tokens(end_tokens(folder))
    found = ModelCheckResult(folder=str(folder), architecture="A", dtype="float32", tokens=1,
                             agree=True, template=False, end_tokens=ends, **numbers)  # fmt: skip
    return check_model._format_findings(found, ParallelConfig())


@pytest.mark.parametrize("listed", [[7], [14, 7], 7])
def test_b20_a_listed_token_of_any_kind_ends_a_response(listed, tmp_path):
    """generation_config.json {"eos_token_id": [2, 7]}, with a 7 that is a word."""
    tokenizer_with(["<eos>"], "<eos>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 3}')
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    tokenizer = PromptTokenizer(str(tmp_path), "{question}")
    # 3 in config.json is what transformers writes where nothing is given; here it is a word.
    assert tokenizer.stop_token_ids == [14, 7]
    got = collected(tokenizer, [1, 2, 7, 8, 8])
    assert not got.is_truncated and list(got.response.token_ids) == [1, 2, 7]


def test_b20_an_end_beyond_the_model_s_vocabulary_is_left_out(tmp_path):
    """An engine refuses a request with such a token; a larger tokenizer serves several models."""
    tokenizer_with(["<eos>", "<|im_end|>"], "<eos>").save_pretrained(tmp_path)
    config = {"model_type": "llama", "eos_token_id": [14, 15, 99], "vocab_size": 15}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert PromptTokenizer(str(tmp_path), "{question}").stop_token_ids == [14]
    config["vocab_size"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert PromptTokenizer(str(tmp_path), "{question}").stop_token_ids == [14, 15]


@pytest.mark.parametrize("wrong", ["7", [1, None], True, -1, [2.5]])
def test_b20_an_end_that_is_no_token_is_refused_by_its_file(wrong, tmp_path):
    tokenizer_with(["<eos>"], "<eos>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with refused("model.path", Cause.MALFORMED, "generation_config.json", "eos_token_id"):
        PromptTokenizer(str(tmp_path), "{question}")


CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
TEMPLATES = {
    # What stands behind an answer: nothing, as GLM's; another token than eos, as Gemma's; one of
    # its own for a call, as gpt-oss's.
    "GLM-4.5-Air": (
        "{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "Gemma-3-it": (
        "{% for m in messages %}<start_of_turn>{{ m.content }}<end_of_turn>{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>{% endif %}"
    ),
    "gpt-oss-20b": (
        "{% for m in messages %}<|start|>{{ m.content }}{{ '<|call|>' if m.tool_calls else "
        "('<|return|>' if m.role == 'assistant' else '<|end|>') }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>{% endif %}"
    ),
}


@pytest.mark.parametrize(
    ("family", "end", "role"),
    [
        ("GLM-4.5-Air", "<|observation|>", "tool"),
        ("GLM-4.5-Air", "<|user|>", "user"),
        ("Gemma-3-it", "<end_of_turn>", "user"),
        ("gpt-oss-20b", "<|call|>", "tool"),
        ("gpt-oss-20b", "<|return|>", "user"),
    ],
)
def test_b21_what_an_answer_ended_with_is_not_written_again(family, end, role, tmp_path):
    tokenizer = folder_of(family, tmp_path)
    tokenizer.chat_template = TEMPLATES[family]
    ends = end_tokens(tmp_path, tokenizer=tokenizer)
    continuation = Continuation(tokenizer, ends)
    asked = {"role": "user", "content": "the answer ?"}
    answer = {"role": "assistant", "content": "stop here"}
    if role == "tool":
        answer["tool_calls"] = [CALL]
    new = {"role": role, "content": "is 4"}
    tree = TokenTree()
    first = continuation.next_prompt(tree, [asked])
    node = tree.add_prompt(None, first.token_ids, first.messages, ())
    sampled = tokenizer.encode("stop here" + end, add_special_tokens=False)
    response = response_of(sampled, "stop")
    tree.add_sampled(node, response, answer)
    got = continuation.next_prompt(tree, [asked, answer, new])
    assert got.parent is not None
    whole = [*tree.token_ids(got.parent), *got.token_ids]
    rendered = tokenizer.apply_chat_template(
        [asked, answer, new], tokenize=False, add_generation_prompt=True
    )
    assert whole == tokenizer.encode(rendered, add_special_tokens=False)


@pytest.mark.parametrize(
    ("answer", "stop", "kept"),
    [
        ("the answer . stop here", ["answer ."], 3),  # over two tokens
        ("the ... stop", [".."], 2),  # within a longer token
        ("the answer is 4", ["nothing"], 4),
        ("the answer is 4", ["answer is 4", "is"], 3),  # the one that is complete first
        ("stop here", ["stop"], 1),  # in the first token
    ],
)
def test_b18_a_stop_string_ends_a_response_with_the_token_that_completes_it(
    answer, stop, kept, tmp_path
):
    hf_tokenizer = folder_of("Qwen3-0.6B", tmp_path)
    tokenizer = PromptTokenizer(str(tmp_path), "{question}")
    ids = hf_tokenizer.encode(answer, add_special_tokens=False)
    got = collected(tokenizer, ids, stop=tuple(stop))
    is_cut = stop != ["nothing"]
    assert list(got.response.token_ids) == ids[:kept]
    assert len(got.response.logprobs) == len(got.response.policy_versions) == kept
    assert got.is_truncated != is_cut
    assert got.text == hf_tokenizer.decode(ids[:kept])


def test_b18_stop_token_ids_end_a_response_and_are_trained_on(tmp_path):
    hf_tokenizer = tokenizer_with(["<|im_end|>"], "<|im_end|>")
    hf_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    here = hf_tokenizer.convert_tokens_to_ids("here")
    tokenizer = PromptTokenizer(str(tmp_path), "{question}", stop_token_ids=[here])
    got = collected(
        tokenizer, hf_tokenizer.encode("stop here the answer", add_special_tokens=False)
    )
    assert got.response.token_ids[-1] == here and not got.is_truncated
    assert got.text == "stop here"  # a word, unlike a special token, is text
    with refused("rollout.stop_token_ids", Cause.OUT_OF_RANGE, len(hf_tokenizer)):
        PromptTokenizer(str(tmp_path), "{question}", stop_token_ids=[len(hf_tokenizer)])


def test_b18_evaluations_and_servers_get_the_same_ends():
    from megatron_r1.config import Config

    rollout = Config(rollout={"stop": ["</answer>"], "stop_token_ids": [5]}).rollout
    settings = SamplingSettings.from_options(rollout, 0.6, 0.95, 100)
    assert settings == SamplingSettings(0.6, 0.95, 100, ("</answer>",), (5,))


@pytest.mark.parametrize(
    ("tokens", "stop", "text", "kept"),
    [(["a", "...", "stop"], "..", "a ", 2), (["a", "?", "stop"], "a ?", "", 2)],
)
def test_b19_a_gateway_s_stop_string_is_not_in_the_text(tokens, stop, text, kept, tmp_path):
    tokenizer = folder_of("Qwen3-0.6B", tmp_path)
    ids = tokenizer.convert_tokens_to_ids(tokens)
    response = response_of(ids, "length")
    got, before, found = truncate_at_stop(response, 1, [stop], tokenizer.decode)
    assert (list(got.token_ids), before, found) == (ids[:kept], text, stop)
    assert got.finish_reason == "stop"
