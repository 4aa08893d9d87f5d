"""What an LLM judge learns from: gold pairs as questions whose answer is a letter (SPA, B.2).

Each pair is asked in both orders after SPA's Listing 1; `chosen` is the right letter, `rejected`
the other. `seed_dpo.py --objective judge` learns them.
"""


def option_prompt(conversation: list[dict], first: str, second: str) -> list[dict]:
    """SPA's Listing 1: which of two responses is better, as a chat whose answer is the letter A or
    B."""
    turns = []
    for message in conversation:
        speaker = "Human" if message["role"] == "user" else message["role"].capitalize()
        turns.append(f"{speaker}: {message['content']}")
    text = "\n\n".join(turns)
    return [{"role": "user", "content": (
        f"Consider the following conversation between a human and an assistant:\n{text}\n"
        "Please choose the response that is the most helpful, honest, and harmless.\n"
        f"Options:\n(A) {first}\n(B) {second}\nThe answer is:")}]


def comparisons(rows: list[dict]) -> list[dict]:
    """Two questions a gold pair. The letter alone is learnt, as it alone is read: no end of
    turn."""
    asked = []
    for row in rows:
        good, bad = row["chosen"], row["rejected"]
        for right, wrong, first, second in (("A", "B", good, bad), ("B", "A", bad, good)):
            asked.append({"id": f"{row['id']} {right}",
                          "prompt": option_prompt(row["prompt"], first, second),
                          "chosen": right, "rejected": wrong,
                          "chosen_ended": False, "rejected_ended": False})
    return asked
