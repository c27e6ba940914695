"""The tokens a reward model is trained on are those that its server scores."""

import pytest
from r1_grading.remote.reward_model import Helpful, RewardModelSettings, Safety
from refusals import refused
from transformers import AutoTokenizer

from megatron_r1.base.errors import Cause
from megatron_r1.data.preference_tokenizer import PreferenceTokenizer

QUESTION, RESPONSE = "What {response} is it?", "<think>Let me see.</think> It is <|im_end|> late."
TEMPLATE = "[user] {question}\n[assistant] {response}<eos>"
CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
DROPPING = CHAT.replace("m['content']", "m['content'].split('</think>')[-1]")


@pytest.fixture
def folder(tmp_path):
    """A byte-level tokenizer that puts <bos> in front when it is not told otherwise."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<bos>": 0, "<eos>": 1}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(tmp_path)
    return tmp_path


def set_chat_template(folder, template):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def sent(kind, template):
    """What the reward sends to the server: the text or the messages."""
    settings = RewardModelSettings(url="http://h:1", model="m", template=template)
    model = kind(settings)
    bodies = []

    class Stop(Exception):
        pass

    async def request(body):
        bodies.append(body)
        raise Stop

    model.service.request = request
    with pytest.raises(Stop):
        model.grade(RESPONSE, question=QUESTION).send(None)
    return bodies[0]


@pytest.mark.parametrize(("kind", "part"), [(Helpful, "summary"), (Safety, "response")])
def test_a_template_gives_the_tokens_of_the_text_that_serving_sends(folder, kind, part):
    body = sent(kind, TEMPLATE)
    assert body["add_special_tokens"] is False
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer(body["input"], add_special_tokens=False).input_ids
    text = PreferenceTokenizer(str(folder), TEMPLATE, part, 20_000)
    assert text.encode(QUESTION, RESPONSE) == expected
    assert expected[-1] == tokenizer.eos_token_id and expected[0] != tokenizer.bos_token_id
    shown = tokenizer.decode(expected)
    assert "What {response} is it?" in shown and "< |im_end| >" in shown
    assert ("Let me see." in shown) == (part == "response")


@pytest.mark.parametrize(("kind", "part"), [(Helpful, "summary"), (Safety, "response")])
def test_without_one_the_chat_template_renders_the_messages_that_serving_sends(folder, kind, part):
    set_chat_template(folder, CHAT)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = tokenizer.apply_chat_template(sent(kind, None)["messages"])["input_ids"]
    assert (
        PreferenceTokenizer(str(folder), None, part, 20_000).encode(QUESTION, RESPONSE) == expected
    )


def test_what_serving_does_not_score_is_none_and_what_it_cuts_is_cut(folder):
    text = PreferenceTokenizer(str(folder), TEMPLATE, "summary", 100)
    assert text.encode("q", "<think>never closed") is None
    assert text.encode("q", "thought </think> done", thought_opened=True) == text.encode(
        "q", "done"
    )
    assert "characters left out" in text.decode(text.encode("q", "a" * 300))


def test_a_chat_template_that_hides_the_thought_cannot_serve_safety(folder):
    with refused("reward_model.template", Cause.MISSING, folder):
        PreferenceTokenizer(str(folder), None, "summary", 100)
    set_chat_template(folder, DROPPING)
    PreferenceTokenizer(str(folder), None, "summary", 100)
    with refused("reward_model.template", Cause.CONFLICT, folder):
        PreferenceTokenizer(str(folder), None, "response", 100)
