"""Environments with mistakes that a user makes."""


class Mistaken:
    """Does what the row's column `mistake` names."""

    def __init__(self, hops: int = 3) -> None:
        self.hops = hops

    def reset(self, mistake):
        self.mistake = mistake
        return {"question": "x"} if mistake == "dict" else None

    def get(self, key: str, *more: str) -> str:
        return key

    def final_answer(self, text):
        if self.mistake == "final":
            raise KeyError(text)

    def get_reward(self):
        return {"nan": float("nan"), "text": "0.5", "none": None}.get(self.mistake, 1.0)


class Misspelt:
    def __init__(self, table):
        self.table = table

    def reset(self, seed): ...

    def get(self, key: str, default: str = "") -> str:
        return key

    def get_rewards(self):
        return 1.0


class NoSelf(Misspelt):
    def peek(key: str) -> str:  # noqa: N805
        return key


class NoArguments(Misspelt):
    def peek() -> str:
        return ""
