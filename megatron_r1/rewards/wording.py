r"""Words beside a number: those that state it as the answer, and those that deny or change it.

`the answer is 204` and `we get $204$` state it; `less than $204$`, `it cannot be $204$` and
`half of the answer is 204` do not. Whether words state a number is decided by lists of what does:
there are too many ways to say something else."""

import re

# Subjects and verbs of another value: `the lower bound is`, `it could be`, `suppose x is`.
DENYING = """
    not never no cannot neither nor nobody none hardly false wrong incorrect untrue mistaken doubt
    less more greater smaller fewer larger bigger lower higher above below over under beyond
    exceed exceeds bound bounds bounded within between near nearly almost close around about
    approximately approximate approximation approx roughly circa estimate estimated
    except excluding besides but unlike instead rather different other than unequal off far
    opposite negative minus reciprocal inverse half twice double triple
    if unless whether suppose assume assuming let guess maybe perhaps possibly probably could might
    may would
"""
DENIAL = re.compile(
    rf"\b(?:{'|'.join(DENYING.split())}|at (?:least|most|best|worst))\b|n['’]t\b", re.IGNORECASE
)
CHANGED = re.compile(
    r"[\s$*)]{0,9}(?:[!?]*\?|\+(?=[\s$*.]*$)|-?ish\b"
    r"|(?:hundred|thousand|million|billion|trillion|dozen|squared|cubed)\b"
    r"|(?:less|fewer)(?=[\s$*.!]*$)"
    r"|or (?:more|less|fewer|so|maybe|perhaps|possibly)\b|\(?(?:not|un)\s?(?:sure|certain)\b"
    r"|(?:is|was) (?:too|wrong|incorrect|false)\b"
    r"|(?:is|was)(?: not|n['’]t)(?=[\s$*]*(?:$|[.,;:!?)])"
    r"|(?: (?:it|the|my|an?|final|correct|right|valid|required)){0,3}"
    r" (?:it|answer|solution|correct|right|valid|true|possible)\b))",
    re.IGNORECASE,
)
"""Text after a number which shows that the number alone is not the answer: `122 million`, `122 or
so`, `122 is wrong`, `122 squared`, `122?`. `122 is not listed` may explain the answer."""
# What may stand right before a formula that is the answer: `we get`, `equal to`, `a total of`.
LEAD = re.compile(
    r"(?:^|[:=,.]|\b(?:is|are|was|were|be|equals?|gives?|get|gets|got|have|has|had|find|finds|found"
    r"|obtain|obtains|yields?|conclude|that|makes?|takes?|took|costs?|earns?|needs?|leaves|becomes?"
    r"|means|giving|yielding|leaving|so|thus|hence|therefore|then|finally|exactly|only|just|precisely|simply|answer|value"
    r"|result|(?:given|obtained) by|to be"
    r"|(?:equal|equals|simplif(?:y|ies)|evaluates?|comes?|amounts?|reduces?|sums?|adds? up"
    r"|converges?|leads?) to"
    r"|(?:total|sum|value|area|volume|length|distance|probability|perimeter|average|speed|maximum"
    r"|minimum|radius|cost) of))[\s*:]*$",
    re.IGNORECASE,
)
ANSWER_IS = re.compile(
    r"(?<!\w)answer\b(?: to (?:the|this|that|your) (?:question|problem|puzzle))?[\s*]*"
    r"(?:(?:is|to)\b|[:=]|(?=\s\S))(?:\s+(?:therefore|thus|then|simply|just|exactly)\b)?[\s:*=]*",
    re.IGNORECASE,
)
# The words of a clause up to `answer`, where it states the answer: `so the final answer`.
BEFORE_ANSWER = """
    the a an my our your this that it final correct right simplified numerical numeric exact best
    required desired expected complete short full and so thus hence therefore then finally now
    which means implies gives here's here is we i get have see conclude say can to question
    problem option choice multiple closed form integer decimal answer
"""
CLAUSE = re.compile(r".*[.,;:!?)\n{}]", re.DOTALL)
CONCLUSION = re.compile(
    r"(?:(?:and|so|thus|hence|therefore|then|finally|consequently|accordingly|overall|in total"
    r"|as a result|in (?:conclusion|summary|short)"
    r"|(?:it|this|which) (?:follows|means|implies|gives|shows|yields)(?: us)?(?: that)?"
    r"|we (?:get|have|find|obtain|conclude|see|know)(?: that)?)\b"
    r"|\\(?:therefore|implies|Rightarrow|Longrightarrow|rightarrow|to)(?![A-Za-z])|[∴⇒⟹→]|=>)"
    r"\s*[,:]?\s*(?=\S)",
    re.IGNORECASE,
)
MAX_CONCLUSIONS = 4


def leads_to_answer(before: str) -> bool:
    """Whether `before`, the sentence up to a formula, states the formula."""
    return DENIAL.search(before) is None and LEAD.search(before.rstrip(" $*")) is not None


def after_answer_is(text: str) -> str | None:
    """Return the text after the last "answer is", "answer:" or "answer =", "" included; None where
    there is none, or where the words before it change it: `the wrong answer is`."""
    phrases = list(ANSWER_IS.finditer(text))
    if not phrases:
        return None
    clause = CLAUSE.sub("", text[: phrases[-1].start()]).lower()
    if not set(BEFORE_ANSWER.split()).issuperset(clause.strip("*#$ ").split()):
        return None
    return text[phrases[-1].end() :]


def without_conclusion(text: str) -> str:
    """Return `text` without words that draw a conclusion: `So`, `Therefore, we get`."""
    for _ in range(MAX_CONCLUSIONS):
        text = text[match.end() :] if (match := CONCLUSION.match(text)) else text
    return text
