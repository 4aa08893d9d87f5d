"""MT-Bench: two-turn answers to FastChat's questions, each rated by a judge that writes; files in FastChat's format."""
import math
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from core.rows import fail, read_json_lines, write_rows
from core.sampling import respond
from judges.judge import chat, parse_rating
from judges.measures import mt_bench_scores

TEMPERATURE = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, "extraction": 0.0, "math": 0.0, "coding": 0.0,
               "reasoning": 0.0}  # as FastChat samples
RATING_TOKENS = 2048


def by_key(path: str, key: str, fits: Callable[[dict], bool], needs: str) -> dict:
    """key → row of a JSONL file of MT-Bench."""
    rows: dict = {}
    for number, row in read_json_lines(path):
        if not isinstance(row.get(key), (str, int)) or row[key] in rows or not fits(row):
            fail(f"{path}:{number}: needs a {key} of its own and {needs}")
        rows[row[key]] = row
    return rows


def two_texts(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def mt_bench(args, models: dict[str, str], rank: int, world: int, device) -> dict[str, dict]:
    """Two-turn answers and their ratings, name → scores. Answers and judgements are left in FastChat's format in OUT/mt_bench."""
    folder = Path(args.mt_bench)
    questions = list(by_key(str(folder / "question.jsonl"), "question_id", lambda q: isinstance(q.get("category"), str) and two_texts(q.get("turns")),
                            "a category and two turns").values())
    prompts_path = str(folder / "judge_prompts.jsonl")
    templates = by_key(prompts_path, "name", lambda t: all(isinstance(t.get(k), str) for k in ("system_prompt", "prompt_template")),
                       "a system_prompt and a prompt_template")
    references = next((str(f) for f in sorted(folder.rglob("*gpt-4.jsonl")) if "reference" in str(f.relative_to(folder))), str(folder / "reference_gpt-4.jsonl"))
    solved = by_key(references, "question_id", lambda r: isinstance(r.get("choices"), list) and r["choices"] and isinstance(r["choices"][0], dict)
                    and two_texts(r["choices"][0].get("turns")), "choices whose first has two turns")
    results = {}
    for name, path in models.items():
        turns: list[list[str]] = [[] for _ in questions]
        for t in (0, 1):
            prompts = f"{args.out}/mt_bench/{name}.turn{t + 1}.prompts.jsonl"
            if rank == 0:
                write_rows(prompts, [{"id": str(q["question_id"]), "temperature": TEMPERATURE.get(q["category"], 0.7), "prompt": [
                    message for k in range(t + 1) for message in ({"role": "user", "content": q["turns"][k]},
                                                                  {"role": "assistant", "content": own[k] if k < t else ""})][:-1]}
                    for q, own in zip(questions, turns)])
            if world > 1:
                dist.barrier()
            for own, row in zip(turns, respond(path, prompts, prompts.replace(".prompts", ""), args, rank, world, device, n=1)):
                own += row["responses"]
        cases = []  # (question, turn, name of the judge's prompt, chat with the judge)
        for q, own in zip(questions, turns):
            known = solved[q["question_id"]]["choices"][0]["turns"] if q["question_id"] in solved else []
            fields = {"question": q["turns"][0], "answer": own[0]}
            fields |= {f"{key}_{k + 1}": value for key, both in (("question", q["turns"]), ("answer", own), ("ref_answer", known))
                       for k, value in enumerate(both)}
            for t, suffix in ((1, ""), (2, "-multi-turn")):
                kind = f"single{'-math' if known else ''}-v1{suffix}"
                try:
                    cases.append((q, t, kind, [{"role": "system", "content": templates[kind]["system_prompt"]},
                                               {"role": "user", "content": templates[kind]["prompt_template"].format(**fields)}]))
                except (KeyError, IndexError, ValueError) as error:
                    fail(f"{prompts_path}: the prompt {kind} is missing, or asks for what there is not: {error}")
        verdicts = chat(args, [messages for *_, messages in cases], RATING_TOKENS, rank, world, device)
        ratings = [{"category": q["category"], "turn": t, "score": parse_rating(text)} for (q, t, _, _), text in zip(cases, verdicts)]
        results[name] = mt_bench_scores(ratings)
        if rank == 0:
            write_rows(f"{args.out}/mt_bench/model_answer/{name}.jsonl", [
                {"question_id": q["question_id"], "answer_id": f"{name}-{q['question_id']}", "model_id": name,
                 "choices": [{"index": 0, "turns": own}]} for q, own in zip(questions, turns)])
            write_rows(f"{args.out}/mt_bench/model_judgment/{name}.jsonl", [
                {"question_id": q["question_id"], "model": name, "judge": [args.judge_model, kind], "user_prompt": messages[1]["content"],
                 "judgment": text, "score": -1 if math.isnan(rating["score"]) else rating["score"], "turn": t}
                for (q, t, kind, messages), text, rating in zip(cases, verdicts, ratings)])
    return results
