"""Getting data and models. Nothing here is imported by a stage.

prompts.jsonl is the project's own, under its licence: a review, a short story, an opinion or a
description of each of 88 things, asked for in one sentence.
"""
