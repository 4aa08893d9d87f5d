"""MT-Bench: two-turn answers to FastChat's questions, each rated by a judge that writes; files in
FastChat's format."""
import math
from pathlib import Path

import torch.distributed as dist

from core.rows import fail, read_json_lines, write_rows
from core.sampling import respond
from judges.judge import chat, parse_rating
from judges.measures import mt_bench_scores

# as FastChat samples
TEMPERATURE = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, "extraction": 0.0,
               "math": 0.0, "coding": 0.0, "reasoning": 0.0}
RATING_TOKENS = 2048
# What the context did to second turns: name in the report → key in the answer's row.
CUTS = {"prompts cut": "prompt_cut", "answers cut": "answer_cut"}


def two_texts(value) -> bool:
    """Whether a JSON value is a list of two strings."""
    return (isinstance(value, list) and len(value) == 2
            and all(isinstance(text, str) for text in value))


def is_question(row: dict) -> bool:
    return isinstance(row.get("category"), str) and two_texts(row.get("turns"))


def is_template(row: dict) -> bool:
    return all(isinstance(row.get(key), str) for key in ("system_prompt", "prompt_template"))


def is_solution(row: dict) -> bool:
    choices = row.get("choices")
    return (isinstance(choices, list) and bool(choices) and isinstance(choices[0], dict)
            and two_texts(choices[0].get("turns")))


def read_by_key(path: str, key: str) -> dict:
    """key → (line number, row) of a JSONL file of MT-Bench."""
    rows: dict = {}
    for number, row in read_json_lines(path):
        if not isinstance(row.get(key), (str, int)) or row[key] in rows:
            fail(f"{path}:{number}: needs a {key} of its own")
        rows[row[key]] = number, row
    return rows


def read_folder(folder: Path) -> tuple[list[dict], dict, dict, str]:
    """(questions, templates by name, reference answers by question, path of the templates)."""
    questions = []
    path = str(folder / "question.jsonl")
    for number, row in read_by_key(path, "question_id").values():
        if not is_question(row):
            fail(f"{path}:{number}: needs a category and two turns")
        questions.append(row)
    templates = {}
    templates_path = str(folder / "judge_prompts.jsonl")
    for name, (number, row) in read_by_key(templates_path, "name").items():
        if not is_template(row):
            fail(f"{templates_path}:{number}: needs a system_prompt and a prompt_template")
        templates[name] = row
    path = str(folder / "reference_gpt-4.jsonl")
    for found in sorted(folder.rglob("*gpt-4.jsonl")):
        if "reference" in str(found.relative_to(folder)):
            path = str(found)
            break
    solved = {}
    for key, (number, row) in read_by_key(path, "question_id").items():
        if not is_solution(row):
            fail(f"{path}:{number}: needs choices whose first has two turns")
        solved[key] = row["choices"][0]["turns"]
    return questions, templates, solved, templates_path


def conversation(question: dict, answers: list[str]) -> list[dict]:
    """The prompt of the turn that follows the given answers."""
    messages = []
    for asked, answer in zip(question["turns"], answers):
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": question["turns"][len(answers)]})
    return messages


def two_turns(args, name: str, path: str, questions: list[dict], rank: int, world: int,
              device) -> tuple[list[list[str]], dict[str, int]]:
    """(two answers a question, how many second turns the context cut), sampled turn by turn. A
    turn's draws are its own: its number stands in the id that decides them."""
    answers: list[list[str]] = [[] for _ in questions]
    cuts = dict.fromkeys(CUTS, 0)
    for t in (1, 2):
        prompts = f"{args.out}/mt_bench/{name}.turn{t}.prompts.jsonl"
        if rank == 0:
            rows = []
            for question, own in zip(questions, answers):
                heat = TEMPERATURE.get(question["category"], 0.7)
                rows.append({"id": f"{question['question_id']} turn {t}", "temperature": heat,
                             "prompt": conversation(question, own)})
            write_rows(prompts, rows)
        if world > 1:
            dist.barrier()
        # A first turn is as long as its question; a second's length is known to nobody before.
        rows = respond(path, prompts, prompts.replace(".prompts", ""), args, rank, world, device,
                       n=1, fit=t == 2)
        for own, row in zip(answers, rows):
            own.append(row["responses"][0])
            for label, key in CUTS.items():
                cuts[label] += key in row
    return answers, cuts


def mt_bench(args, models: dict[str, str], rank: int, world: int, device) -> dict[str, dict]:
    """Two-turn answers and their ratings, name → scores. Answers and judgements are left in
    FastChat's format in OUT/mt_bench."""
    questions, templates, solved, templates_path = read_folder(Path(args.mt_bench))
    results = {}
    for name, path in models.items():
        answers, cuts = two_turns(args, name, path, questions, rank, world, device)
        cases = []  # (question, turn, name of the judge's prompt, chat with the judge)
        for question, own in zip(questions, answers):
            known = solved.get(question["question_id"], [])
            fields = {"question": question["turns"][0], "answer": own[0]}
            for key, both in (("question", question["turns"]), ("answer", own),
                              ("ref_answer", known)):
                fields |= {f"{key}_{k}": text for k, text in enumerate(both, 1)}
            for t, suffix in ((1, ""), (2, "-multi-turn")):
                kind = f"single{'-math' if known else ''}-v1{suffix}"
                try:
                    asked = templates[kind]["prompt_template"].format(**fields)
                    order = templates[kind]["system_prompt"]
                except (KeyError, IndexError, ValueError) as error:
                    fail(f"{templates_path}: the prompt {kind} is missing, or asks for what there "
                         f"is not: {error}")
                cases.append((question, t, kind, [{"role": "system", "content": order},
                                                  {"role": "user", "content": asked}]))
        room = max(RATING_TOKENS, args.judge_tokens)
        verdicts = chat(args, [messages for *_, messages in cases], room, rank, world, device)
        ratings = [{"category": question["category"], "turn": t, "score": parse_rating(text)}
                   for (question, t, _, _), text in zip(cases, verdicts)]
        results[name] = {**mt_bench_scores(ratings), **cuts}
        if rank == 0:
            write_answers(args, name, questions, answers)
            write_judgements(args, name, cases, verdicts, ratings)
    return results


def write_answers(args, name: str, questions: list[dict], answers: list[list[str]]) -> None:
    rows = []
    for question, own in zip(questions, answers):
        number = question["question_id"]
        rows.append({"question_id": number, "answer_id": f"{name}-{number}", "model_id": name,
                     "choices": [{"index": 0, "turns": own}]})
    write_rows(f"{args.out}/mt_bench/model_answer/{name}.jsonl", rows)


def write_judgements(args, name: str, cases: list, verdicts: list[str],
                     ratings: list[dict]) -> None:
    rows = []
    for (question, t, kind, messages), text, rating in zip(cases, verdicts, ratings):
        rated = not math.isnan(rating["score"])
        rows.append({"question_id": question["question_id"], "model": name,
                     "judge": [args.judge_model, kind], "user_prompt": messages[1]["content"],
                     "judgment": text, "score": rating["score"] if rated else -1, "turn": t})
    write_rows(f"{args.out}/mt_bench/model_judgment/{name}.jsonl", rows)
