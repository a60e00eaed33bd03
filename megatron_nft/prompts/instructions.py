r"""What a prompt asks of the answer's form: the instructions that settings name, and published ones that come off a question."""

from functools import lru_cache

DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer (without quotes) "
    "where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'

# name: what stands before and behind the question
INSTRUCTIONS = {
    "boxed": ("", "\nPlease reason step by step, and put your final answer within \\boxed{}."),  # Qwen2.5-Math's
    "answer": (DAPO_BEFORE, DAPO_AFTER),  # DAPO-Math-17k's
}

# as data sets have them around their questions
_PUBLISHED = tuple(
    (before.strip(), after.strip())
    for before, after in (
        (DAPO_BEFORE, DAPO_AFTER),
        INSTRUCTIONS["boxed"],
        ("", " Let's think step by step and output the final answer within \\boxed{}."),  # verl's MATH
        ("", ' Let\'s think step by step and output the final answer after "####".'),  # verl's GSM8K
    )
)


def instruct(question: str, instruction: str) -> str:
    """The question with an instruction: one of INSTRUCTIONS by its name, or a text on a line of its own below it; "" is none."""
    before, after = INSTRUCTIONS.get(instruction, ("", f"\n{instruction}" if instruction else ""))
    return f"{before}{question}{after}"


@lru_cache(maxsize=1 << 15)  # published sets have every row many times
def strip_instruction(question: str) -> str:
    """The question without the published instruction around it, where there is one. Of DAPO's, either half comes off by itself."""
    for before, after in _PUBLISHED:
        question = question.removeprefix(before).removesuffix(after)
    return question.strip()
