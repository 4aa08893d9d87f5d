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

from core.rows import fail, has_shape, read_json_lines, read_rows, write_rows
from core.stage import exit_if_looking, parser, publish, run_stage, start
from judges.flags import check_judge, endpoint_flags, judge_models
from judges.report import markdown

# As FastChat samples.
TEMPERATURE = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, "extraction": 0.0,
               "math": 0.0, "coding": 0.0, "reasoning": 0.0}


def flags() -> argparse.Namespace:
    """The arguments. Ends the program where the output is complete."""
    cli = parser(__doc__)
    cli.add_argument("--folder", required=True, help="FastChat's files of MT-Bench")
    cli.add_argument("--answers", nargs="+", default=[], metavar="FILE",
                     help="rows of generate.py: of the first turn, or of both")
    cli.add_argument("--out", type=os.path.normpath, required=True,
                     help="JSONL; the name of the model in it is the file's")
    endpoint_flags(cli, 2048)
    args = cli.parse_args()
    if len(args.answers) > 2 or bool(args.judge_model) != (len(args.answers) == 2):
        fail("--answers takes one file a turn; with both it needs --judge-model, and only then")
    args.judge = "openai" if args.judge_model else "none"
    args.answers = {f"turn {t}": path for t, path in enumerate(args.answers, 1)}
    start(args, judge_models(args), ["folder", "answers"])
    check_judge(args)
    exit_if_looking(args.out)
    return args


if __name__ == "__main__":
    args = flags()  # here already: what is imported below takes seconds to load

from judges.endpoint import chat, parse_rating

# ------------------------------------------------------------------------------- FastChat's files


def read_by_key(path: str, key: str) -> dict[str, dict]:
    """key → row of a JSONL file of MT-Bench. A question's number may be written as a text."""
    rows: dict = {}
    for number, row in read_json_lines(path):
        if not isinstance(row.get(key), (str, int)) or str(row[key]) in rows:
            fail(f"{path}:{number}: needs a {key} of its own")
        rows[str(row[key])] = row
    return rows


def has_two_turns(row: dict) -> bool:
    """Whether a row holds a text for each turn."""
    return has_shape(row, {"turns": ["text"]}) and len(row["turns"]) == 2


def read_questions(folder: str) -> dict[str, dict]:
    """question_id → question."""
    path = f"{folder}/question.jsonl"
    questions = read_by_key(path, "question_id")
    for key, row in questions.items():
        if not has_two_turns(row) or not isinstance(row.get("category"), str):
            fail(f"{path}: question {key}: needs a category and two turns")
    return questions


def read_solutions(folder: str) -> dict[str, list[str]]:
    """question_id → reference answers to both turns, for the questions that have some."""
    path = f"{folder}/reference_answer/gpt-4.jsonl"
    if not os.path.isfile(path):
        path = f"{folder}/reference_gpt-4.jsonl"
    solutions = {}
    for key, row in read_by_key(path, "question_id").items():
        if not has_shape(row, {"choices": ["object"]}) or not has_two_turns(row["choices"][0]):
            fail(f"{path}: question {key}: needs choices whose first has two turns")
        solutions[key] = row["choices"][0]["turns"]
    return solutions


# ----------------------------------------------------------------------------------------- answers


def prompt_rows(questions: dict[str, dict], answers: dict[str, list[str]]) -> list[dict]:
    """Prompt rows of the turn that follows the answers given. Its number stands in the id, which
    decides what is sampled."""
    rows = []
    for key, question in questions.items():
        prompt = []
        for asked, answer in zip(question["turns"], answers[key]):
            prompt.append({"role": "user", "content": asked})
            prompt.append({"role": "assistant", "content": answer})
        turn = len(answers[key])
        prompt.append({"role": "user", "content": question["turns"][turn]})
        rows.append({"id": f"{key} turn {turn + 1}", "prompt": prompt,
                     "temperature": TEMPERATURE.get(question["category"], 0.7)})
    return rows


def read_answers(questions: dict[str, dict], paths: list[str]) -> tuple[dict, dict[str, int]]:
    """(question_id → its answers, turn by turn; how many prompts and answers the context cut)."""
    answers: dict[str, list[str]] = {key: [] for key in questions}
    cuts = {"prompts cut": 0, "answers cut": 0}
    for path in paths:
        rows = {row["id"]: row for row in read_rows(path, "responses")}
        for key, expected in zip(questions, prompt_rows(questions, answers)):
            row = rows.get(expected["id"])
            if row is None or row["prompt"] != expected["prompt"] or len(row["responses"]) != 1:
                fail(f"{path}: needs one answer (generate.py -n 1) to {expected['id']!r}, asked as "
                     "the step before wrote it")
            answers[key].append(row["responses"][0])
            cuts["prompts cut"] += "prompt_cut" in row
            cuts["answers cut"] += "answer_cut" in row
    return answers, cuts


# -------------------------------------------------------------------------------------- judgements


def judge(args, questions: dict[str, dict], answers: dict[str, list[str]]) -> list[dict]:
    """Judgements in FastChat's format, with the category: every turn graded by itself."""
    path = f"{args.folder}/judge_prompts.jsonl"
    templates = read_by_key(path, "name")
    solutions = read_solutions(args.folder)
    rows, chats = [], []
    for key, question in questions.items():
        solution = solutions.get(key, [])
        fields = {"question": question["turns"][0], "answer": answers[key][0]}
        for field, turns in (("question", question["turns"]), ("answer", answers[key]),
                             ("ref_answer", solution)):
            fields |= {f"{field}_{t}": text for t, text in enumerate(turns, 1)}
        for t, suffix in ((1, ""), (2, "-multi-turn")):
            kind = f"single{'-math' if solution else ''}-v1{suffix}"
            try:
                order = templates[kind]["system_prompt"]
                asked = templates[kind]["prompt_template"].format(**fields)
            except (LookupError, ValueError, AttributeError) as error:
                fail(f"{path}: the prompt {kind} is missing, or asks for what there is not: "
                     f"{error}")
            chats.append([{"role": "system", "content": order}, {"role": "user", "content": asked}])
            rows.append({"question_id": question["question_id"], "category": question["category"],
                         "model": Path(args.out).stem, "judge": [args.judge_model, kind],
                         "user_prompt": asked, "turn": t})
    for row, text in zip(rows, chat(args, chats)):
        rating = parse_rating(text)
        row |= {"judgment": text, "score": -1 if math.isnan(rating) else rating}
    return rows


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
    questions = read_questions(args.folder)
    answers, cuts = read_answers(questions, list(args.answers.values()))
    scores = {}
    if args.judge_model:
        rows = judge(args, questions, answers)
        scores = mean_scores(rows) | cuts
    else:
        rows = prompt_rows(questions, answers)
    publish(args, {"rows": len(rows), "scores": scores}, lambda tmp: write_rows(tmp, rows))
    print(f"mt_bench: {len(rows)} rows → {args.out}")
    if scores:
        header = ["MT-Bench", Path(args.out).stem]
        print("\n" + markdown(header, [list(item) for item in scores.items()]))


if __name__ == "__main__":
    run_stage(main, args)
