"""Runs a recipe in miniature: the same structure, small sizes, real trainer ranks and engines.

settings.py   the rehearsal's own settings
null_gpu.py   the processes of a rehearsal on null GPUs
jobs.py       the runs to rehearse
full_size.py  the links of the full size
layout.py     the parallel layouts: every axis that is divided stays divided
model.py      the model's own config.json with smaller sizes, random weights, a tokenizer
questions.py  synthetic data of every kind that a verb reads, and the reward of the questions
miniature.py  the recipe with its sizes divided, and what was changed
served.py     the reward models that responses are graded by
launch.py     the processes: ranks or the command, and engine hosts
forked_ranks.py   the trainer ranks of one run, forked after their imports
load_export.py    the check of an export
phases.py     start, rollout, update, push, checkpoint, kill, resume elsewhere, export
table.py      what was exercised, what was not, and why"""
