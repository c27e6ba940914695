"""What is asked and what is written: worked examples, questions to avoid, the form to learn."""

import json
import re
from pathlib import Path

import pytest
from refusals import refused
from sample_answers import PROMPT, answer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_r1.base.errors import Cause
from megatron_r1.config.sample import RenderConfig
from megatron_r1.data.few_shot import FewShotExamples, FewShotTokenizer
from megatron_r1.data.prompt import make_prompt
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.sample.decontamination import find_contaminated, load_avoided, word_ngrams
from megatron_r1.sample.sft_examples import Rendering

CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, str]:
    """Folders of tokenizers that put <bos> in front: with a chat template that writes it too, with
    one that opens the thought, and with one that drops earlier thoughts."""
    templates = {
        "plain": CHAT,
        "thinks": CHAT.replace("<assistant>{% endif %}", "<assistant><think>\n{% endif %}"),
        "forgets": CHAT.replace("m.content", "m.content.split('</think>')[-1]"),
    }
    folders = {}
    for name, template in templates.items():
        vocabulary = {"<bos>": 0, "<eos>": 1}
        for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
            vocabulary[symbol] = len(vocabulary)
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
        whole = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>"
        )
        whole.chat_template = template
        folder = tmp_path_factory.mktemp(name)
        whole.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.fixture
def shots_file(tmp_path) -> Path:
    rows = [
        {"question": f"{i} + {i}?", "response": f"<think>{i} twice.</think> {2 * i}"}
        for i in range(5)
    ]
    path = tmp_path / "shots.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


# Worked examples


def test_shots_are_asked_and_answered_before_the_question(shots_file, tokenizers):
    shots = FewShotExamples(shots_file, None, seed=0)
    text = FewShotTokenizer(tokenizers["plain"], "Q: {question}\nA:", shots)
    prompt = text.decode(text.encode("9 + 9?"))
    first = "<bos>Q: 0 + 0?\nA:<think>0 twice.</think> 0\n\nQ: 1 + 1?\nA:"
    assert prompt.startswith(first) and prompt.endswith("\n\nQ: 9 + 9?\nA:")
    assert prompt.count("Q: ") == 6
    # They leave no trace in what is kept.
    assert text.render("9 + 9?") == "Q: 9 + 9?\nA:"
    # A template that opens the thought opens the examples', too.
    opened = shots.prompt_text("Q: {question}\nA: <think>", "9 + 9?")
    assert opened.startswith("Q: 0 + 0?\nA: <think>0 twice.</think> 0\n\n")


def test_in_a_chat_they_are_earlier_turns(shots_file, tokenizers):
    text = FewShotTokenizer(tokenizers["plain"], "chat", FewShotExamples(shots_file, 1, seed=0))
    prompt = text.decode(text.encode("9 + 9?"))
    turn = (
        r"<bos><user>(\d) \+ \1\?\n<assistant><think>\1 twice.</think> \d\n<user>9 \+ 9\?\n<assis"
    )
    assert re.match(turn, prompt), prompt
    with refused("sample.shots", Cause.CONFLICT, tokenizers["forgets"]):
        FewShotTokenizer(tokenizers["forgets"], "chat", FewShotExamples(shots_file, 1, seed=0))


def test_which_shots_depends_on_seed_and_question_and_never_tells_the_answer(shots_file):
    def before(question, seed=0, n=2):
        return [shot.question for shot in FewShotExamples(shots_file, n, seed).choose(question)]

    assert before("a") == before("a") == before(" A ")
    assert len({tuple(before(q)) for q in "abcdefgh"}) > 3
    assert {tuple(before("a", seed)) for seed in range(9)} != {tuple(before("a"))}
    for seed in range(9):
        assert "3 + 3?" not in before("3  + 3?", seed, n=4)
    assert len(before("3 + 3?", n=5)) == 4


@pytest.mark.parametrize(
    ("content", "num_shots", "key", "cause"),
    [
        ('{"question": "a"}', None, "response", Cause.MISSING),
        ("", None, "sample.shots", Cause.EMPTY),
        ('{"question": "a", "response": "b"}', 2, "sample.num_shots", Cause.TOO_LARGE),
    ],
)
def test_a_bad_file_of_shots_is_named(tmp_path, content, num_shots, key, cause):
    path = tmp_path / "shots.jsonl"
    path.write_text(content)
    with refused(key, cause, path):
        FewShotExamples(path, num_shots, seed=0)


# Questions to avoid


def prompts(*questions):
    return [make_prompt(question, "math", "0", {}) for question in questions]


def avoided(questions, avoid, n=13):
    asked = prompts(*questions)
    found = find_contaminated(asked, avoid, n)
    return [prompt.question for prompt in asked if prompt.id in found]


LONG = (
    "A farmer has seventeen sheep and all but nine of them run away at night ; how many are left ?"
)
LONG_ZH = "一个农夫有十七只羊，夜里除了九只以外全都跑掉了，请问还剩下几只？"


def test_the_same_question_is_avoided_however_it_is_spelt():
    assert avoided(["What is 2+2?", "What is 2+3?"], ["what  IS ２+2?"]) == ["What is 2+2?"]
    assert avoided(["What is 2+2?"], ["what is 2+2?"], n=0) == ["What is 2+2?"]


@pytest.mark.parametrize("question", [LONG, LONG_ZH])
def test_thirteen_words_in_a_row_are_enough_and_twelve_are_not(question):
    grams = word_ngrams(question, 13)
    words = question.lower().split() if question is LONG else [*question.replace("，", "，")]
    assert len(grams) == len(words) - 12
    joined = " " if question is LONG else ""
    inside = joined.join(words[3:16])
    assert avoided(["Read this: " + inside + " Then go home."], [question]) == [
        "Read this: " + inside + " Then go home."
    ]
    assert avoided(["Read this: " + joined.join(words[3:15]) + " - and go home."], [question]) == []


def test_signs_are_words():
    template = "State the final answer to the following arithmetic problem: {} ="
    asked = template.format("4 - 9 + 2")
    assert avoided([asked], [template.format("4 + 9 - 2")]) == []
    # Eleven words of the task and two of the sum: too near, as no other question is a sum.
    assert avoided([asked], [template.format("4 - 9 + 3")]) == [asked]
    assert avoided([asked], [template.format("4 - 9 + 3")], n=0) == []


def test_what_more_than_ten_questions_share_is_boilerplate():
    head = "Please reason step by step and put your final answer within the box : what is "
    few, many = ([f"{head}{i} ?" for i in range(n)] for n in (10, 11))
    assert avoided(few, [head + "99 ?"]) == few
    assert avoided(many, [head + "99 ?"]) == []
    # The same question is the same question, boilerplate or not.
    assert avoided(many, [many[3]]) == [many[3]]


def test_files_of_questions_to_avoid(tmp_path):
    path = tmp_path / "held.jsonl"
    path.write_text('{"question": "a"}\n{"problem": "b"}\n')
    with refused("question", Cause.MISSING, f"{path}:2"):
        load_avoided([path])
    path.write_text('{"question": "a"}\n')
    assert load_avoided([path, path]) == ["a", "a"]


# The form to learn

ZERO = answer(0, text=" <think>6 x 7: {summary}</think> <answer>42</answer>")


def rendered(form, template="Q: {question}", response=ZERO, tokenizer=""):
    rendering = Rendering(RenderConfig(template=template, response=form), "plain", tokenizer)
    return rendering.prompt(PROMPT.question), rendering.response(response, PROMPT.question)


def test_an_answer_takes_another_form():
    whole = "<think>{thought}</think>\n{summary}"
    # What the thought itself writes in braces stays as it is.
    assert rendered(whole) == ("Q: What is 6 x 7?", "<think>6 x 7: {summary}</think>\n42")
    assert rendered("{answer}")[1] == "42"
    assert rendered("{response}")[1] == ZERO.text
    prose = answer(0, text="<think>Hm.</think>So it is \\boxed{42}.")
    assert rendered("{summary} ({answer})", response=prose)[1] == "So it is \\boxed{42}. (42)"
    bare = answer(0, text="It is 42.")
    assert rendered(whole, response=bare)[1] is None
    assert rendered("{summary}", response=bare)[1] == "It is 42."


def test_the_thought_is_opened_once():
    opened = answer(0, text="Hm.</think>42", thought_opened=True)
    into_open = "Q: {question}\nA: <think>"
    for form in ("{response}", "<think>{thought}</think>{summary}"):
        assert rendered(form, "Q: {question}", opened)[1] == "<think>Hm.</think>42"
        assert rendered(form, into_open, opened)[1] == "Hm.</think>42"
    assert rendered("{response}", into_open)[1] == "6 x 7: {summary}</think> <answer>42</answer>"
    # Plain text after an opened <think> would be learned as a thought that never ends.
    assert rendered("{response}", into_open, answer(0, text="It is 42."))[1] is None


@pytest.mark.parametrize("name", ["plain", "thinks"])
def test_a_rendered_chat_has_the_tokens_that_the_chat_has(tokenizers, name):
    prompt, response = rendered("{response}", "chat", tokenizer=tokenizers[name])
    # As `sft` reads it: the tokenizer puts <bos> in front by itself.
    as_sft_reads = PromptTokenizer(tokenizers[name], "{question}").encode(prompt)
    assert as_sft_reads == PromptTokenizer(tokenizers[name], "chat").encode(PROMPT.question)
    assert as_sft_reads.count(0) == 1
    assert response.startswith("6 x 7" if name == "thinks" else " <think>6")


def test_a_template_that_is_none_is_named():
    with refused("sample.render.template", Cause.UNKNOWN, "r1_zeroo", "r1_zero"):
        Rendering(RenderConfig(template="r1_zeroo"), "plain", "")
    with refused("sample.render.tokenizer", Cause.MISSING):
        Rendering(RenderConfig(template="chat"), "plain", "")
    with refused("sample.render.tokenizer", Cause.NOT_FOUND, "/nowhere"):
        Rendering(RenderConfig(template="chat", tokenizer="/nowhere"), "plain", "")
