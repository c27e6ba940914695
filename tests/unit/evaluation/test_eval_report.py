"""The samples that the page of an evaluation shows."""

from megatron_r1.evaluation.evaluation_report import NUM_EXAMPLES, write_evaluation_report


def sample(question, reward, reason, ungraded=False):
    return {
        **{"benchmark": "sums", "id": question, "index": 0, "reward": reward, "reason": reason},
        **{
            "ungraded": ungraded,
            "truncated": False,
            "length": 3,
            "truth": "2",
            "thought_opened": False,
        },
        "response": f"response to {question}",
    }


def page_of(folder, samples):
    (folder / "eval.png").write_bytes(b"")
    questions = {("sums", s["id"]): {"question": f"question {s['id']}"} for s in samples}
    page = write_evaluation_report(
        folder / "report.html", "sums", {}, [], folder / "eval.png", questions, iter(samples)
    )
    return page.read_text()


def test_of_two_lines_about_a_sample_the_later_counts(tmp_path):
    failed = [sample(str(i), 0.0, f"no grader for {i}", True) for i in range(2 * NUM_EXAMPLES)]
    graded = [sample(str(i), 1.0, "found right") for i in range(NUM_EXAMPLES)]
    others = [sample(f"w{i}", 0.0, f"found wrong {i}") for i in range(NUM_EXAMPLES - 1)]
    page = page_of(tmp_path, [*failed[:NUM_EXAMPLES], *others, *failed[NUM_EXAMPLES:], *graded])
    assert page.count("found right") == NUM_EXAMPLES
    assert not any(f"no grader for {i}<" in page for i in range(NUM_EXAMPLES))
    # The wrong ones, and one whose grader failed and which no later line replaces.
    assert page.count("found wrong") == NUM_EXAMPLES - 1
    assert page.count("no grader for") == 1
