"""The tokens of a question and a response; a reward model scores the last one.

The tokens equal those that the served model gets: the text that `r1_grading.remote` sends,
tokenized as vLLM does."""

from r1_grading.reading import Part, chat_messages, fill_template, prepare_texts

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.data.tokenizer import load_tokenizer

CHECK_QUESTION, CHECK_RESPONSE = "What is 7 + 5?", "<think>7 + 5 = 12</think>The answer is 12."


class PreferenceTokenizer:
    """The tokenizer of a Hugging Face folder with one template for question and response.

    Args:
        model_path: the folder.
        template: text with {question} and {response}; None: the tokenizer's chat template.
        part: the part of the response that is scored.
        max_chars: longer texts are shortened.

    Raises:
        UserError: for a folder without a tokenizer, or without a chat template that shows the
            scored part.
    """

    def __init__(self, model_path: str, template: str | None, part: Part, max_chars: int):
        self.template, self.part, self.max_chars = template, part, max_chars
        self._tokenizer = load_tokenizer(model_path, "model.path")
        if template is None and not self._tokenizer.chat_template:
            raise UserError(
                f"reward_model.template: the tokenizer of {model_path} has no chat template; give "
                'a text such as "User: {question}\\nAssistant: {response}<eos>"',
                key="reward_model.template",
                cause=Cause.MISSING,
            )
        response, summary = CHECK_RESPONSE, CHECK_RESPONSE.partition("</think>")[2]
        lengths = [
            len(self._encode_conversation(CHECK_QUESTION, text)) for text in (response, summary)
        ]
        # Chat templates of reasoning models drop the thought from assistant messages.
        if part == "response" and lengths[0] <= lengths[1]:
            raise UserError(
                f"reward_model.template: the chat template of {model_path} drops <think>…</think>, "
                "which reward_model.part: response is to see; give a text with {question} and "
                "{response}",
                key="reward_model.template",
                cause=Cause.CONFLICT,
            )

    def encode(
        self, question: str, response: str, thought_opened: bool = False
    ) -> list[int] | None:
        """Return the token ids; None for a response without the scored part, which serving does not
        score either.

        Args:
            question: one, or a transcript.
            response: the text as it was sampled.
            thought_opened: the prompt ended with `<think>`.
        """
        question_text, extraction = prepare_texts(
            question, response, self.part, thought_opened, self.max_chars
        )
        return (
            None
            if extraction.text is None
            else self._encode_conversation(question_text, extraction.text)
        )

    def decode(self, token_ids: list[int]) -> str:
        """Return the text, special tokens included."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _encode_conversation(self, question: str, response: str) -> list[int]:
        if self.template is not None:
            text = fill_template(self.template, question, response)
        else:
            text = self._tokenizer.apply_chat_template(
                chat_messages(question, response), tokenize=False
            )
        return self._tokenizer.encode(text, add_special_tokens=False)
