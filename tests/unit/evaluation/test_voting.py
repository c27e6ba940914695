from megatron_r1.evaluation.voting import majority_of, read_vote


def answer(text):
    return f"<think>hm</think><answer>{text}</answer>"


def majority(responses):
    return majority_of([vote and vote.key for vote in map(read_vote, responses)])


def test_the_most_frequent_answer_wins_whatever_its_spelling():
    responses = [answer("7"), answer("12"), answer(r"\boxed{12}"), answer("12.0"), answer("7")]
    assert majority(responses) == 1


def test_responses_without_an_answer_do_not_vote():
    assert majority(["I do not know", "no", answer("3")]) == 2
    assert majority(["I do not know"]) is None
    assert majority([]) is None


def test_a_tie_goes_to_the_first():
    assert majority([answer("x"), answer("y"), answer("Y"), answer("X")]) == 0
