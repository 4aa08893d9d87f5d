"""Getting data and models. Nothing here is imported by a stage.

prompts.jsonl is the project's own, under its licence: 15 kinds of text about 24 subjects, each asked
for in one or two sentences.
"""
