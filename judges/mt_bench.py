"""MT-Bench: two-turn answers to FastChat's questions, each rated by a judge that writes.

Every step is a file, and how many turns are answered says which step it is. FOLDER holds FastChat's
question.jsonl, judge_prompts.jsonl and the reference answers of gpt-4. Here `mine` is the policy
pi_3; 1 024 new tokens are FastChat's.

    python -m judges.mt_bench --folder FOLDER --out turn1.prompts.jsonl
    python generate.py --model pi_3 --prompts turn1.prompts.jsonl --out turn1.jsonl \\
        -n 1 --max-new-tokens 1024
    python -m judges.mt_bench --folder FOLDER --answers turn1.jsonl --out turn2.prompts.jsonl
    python generate.py --model pi_3 --prompts turn2.prompts.jsonl --out turn2.jsonl \\
        -n 1 --max-new-tokens 1024 --fit
    python -m judges.mt_bench --folder FOLDER --answers turn1.jsonl turn2.jsonl \\
        --judge-model NAME --base-url URL --out mine.jsonl    judgements; prints their means

A second turn's prompt holds the first answer, so nobody knows its length before: --fit cuts what
the context cannot hold, as FastChat's server does, and the scores count `prompts cut` and `answers
cut`. The rating is the first one in a judgement; one without is counted as unrated.
"""
import argparse
import math
import os
from pathlib import Path

from core.rows import fail, in_one_line, read_json_lines, read_rows, write_rows
from core.stage import parser, run_stage
from judges.endpoint import chat, parse_rating
from judges.flags import check_judge, endpoint_flags, refuse_existing
from judges.report import markdown

# As FastChat samples: 0.7 where a category does not stand here.
TEMPERATURE = {"stem": 0.1, "humanities": 0.1, "extraction": 0.0, "math": 0.0, "coding": 0.0,
               "reasoning": 0.0}


def flags() -> argparse.Namespace:
    """The arguments. Ends the program where something stands at the output."""
    cli = parser(__doc__, out="JSONL; the name of the model in it is the file's")
    cli.add_argument("--folder", required=True, help="FastChat's files of MT-Bench")
    cli.add_argument("--answers", nargs="+", default=[], metavar="FILE",
                     help="rows of generate.py: of the first turn, or of both")
    endpoint_flags(cli, 2048)
    args = cli.parse_args()
    if len(args.answers) > 2 or bool(args.judge_model) != (len(args.answers) == 2):
        fail("--answers takes one file a turn; --judge-model judges both, and only both")
    args.judge = "openai" if args.judge_model else "none"
    check_judge(args)
    refuse_existing(args.out)
    return args


# ----------------------------------------------------------------------------------------- answers


def prompt_rows(questions: list[dict], answers: list[list[str]]) -> list[dict]:
    """Prompt rows of the turn that follows the answers given. Its number stands in the id, which
    decides what is sampled."""
    rows = []
    for question, given in zip(questions, answers):
        prompt = []
        for asked, answer in zip(question["turns"], given):
            prompt.append({"role": "user", "content": asked})
            prompt.append({"role": "assistant", "content": answer})
        turn = len(given)
        prompt.append({"role": "user", "content": question["turns"][turn]})
        rows.append({"id": f"{question['question_id']} turn {turn + 1}", "prompt": prompt,
                     "temperature": TEMPERATURE.get(question["category"], 0.7)})
    return rows


def read_answers(questions: list[dict], paths: list[str]) -> tuple[list[list[str]], dict[str, int]]:
    """(the answers to each question, turn by turn; how many prompts and answers the context
    cut)."""
    answers: list[list[str]] = [[] for _ in questions]
    cuts = {"prompts cut": 0, "answers cut": 0}
    for path in paths:
        rows = {row["id"]: row for row in read_rows(path, "responses")}
        for given, expected in zip(answers, prompt_rows(questions, answers)):
            row = rows.get(expected["id"])
            if row is None or row["prompt"] != expected["prompt"] or len(row["responses"]) != 1:
                fail(f"{path}: needs one answer (generate.py -n 1) to {expected['id']!r}, asked as "
                     "the step before wrote it")
            given.append(row["responses"][0])
            cuts["prompts cut"] += "prompt_cut" in row
            cuts["answers cut"] += "answer_cut" in row
    return answers, cuts


# -------------------------------------------------------------------------------------- judgements


def read_solutions(folder: str) -> dict[str, list[str]]:
    """question_id → reference answers to both turns, for the questions that have some."""
    path = f"{folder}/reference_answer/gpt-4.jsonl"
    if not os.path.isfile(path):
        path = f"{folder}/reference_gpt-4.jsonl"
    # A question's number may be written as a text.
    return {str(row["question_id"]): row["choices"][0]["turns"] for _, row in read_json_lines(path)}


def to_judge(args, questions: list[dict], answers: list[list[str]]) -> tuple[list[dict], list]:
    """(rows of judgements in FastChat's format, with the category, but for the judgement; what the
    judge is asked for each): every turn is graded by itself."""
    lines = read_json_lines(f"{args.folder}/judge_prompts.jsonl")
    templates = {row["name"]: row for _, row in lines}
    solutions = read_solutions(args.folder)
    rows, chats = [], []
    for question, given in zip(questions, answers):
        solution = solutions.get(str(question["question_id"]), [])
        fields = {"question": question["turns"][0], "answer": given[0]}
        for field, turns in (("question", question["turns"]), ("answer", given),
                             ("ref_answer", solution)):
            fields |= {f"{field}_{t}": text for t, text in enumerate(turns, 1)}
        for t, suffix in ((1, ""), (2, "-multi-turn")):
            kind = f"single{'-math' if solution else ''}-v1{suffix}"
            order = templates[kind]["system_prompt"]
            asked = templates[kind]["prompt_template"].format(**fields)
            chats.append([{"role": "system", "content": order}, {"role": "user", "content": asked}])
            rows.append({"question_id": question["question_id"], "category": question["category"],
                         "model": Path(args.out).stem, "judge": [args.judge_model, kind],
                         "user_prompt": asked, "turn": t})
    return rows, chats


def mean_scores(judgements: list[dict]) -> dict[str, float]:
    """Mean ratings by category, by turn and of all; a score of −1 is none, counted as unrated."""
    ratings: dict[str, list[float]] = {}
    for row in judgements:
        for group in (row["category"], f"turn {row['turn']}", "average"):
            ratings.setdefault(group, [])
            if row["score"] != -1:
                ratings[group].append(row["score"])
    unrated = len(judgements) - len(ratings["average"])
    means = {group: sum(scores) / len(scores) if scores else math.nan
             for group, scores in ratings.items()}
    return {**means, "unrated": unrated}


def main(args: argparse.Namespace) -> None:
    with in_one_line(f"{args.folder}: not FastChat's files of MT-Bench"):
        questions = [row for _, row in read_json_lines(f"{args.folder}/question.jsonl")]
        answers, cuts = read_answers(questions, args.answers)
        if args.judge_model:
            rows, chats = to_judge(args, questions, answers)
        else:
            rows = prompt_rows(questions, answers)
    table = ""
    if args.judge_model:
        for row, text in zip(rows, chat(args, chats)):
            rating = parse_rating(text)
            row |= {"judgment": text, "score": -1 if math.isnan(rating) else rating}
        scores = [list(item) for item in (mean_scores(rows) | cuts).items()]
        table = "\n\n" + markdown(["MT-Bench", rows[0]["model"]], scores)
    write_rows(args.out, rows)
    print(f"mt_bench: {len(rows)} rows → {args.out}{table}")


if __name__ == "__main__":
    run_stage(main, flags())
