"""Checks of nodes, links and files before a long run (docs/preflight.md).

rank.py      measures on every rank
judge.py     compares the ranks with each other and with the planner
report.py    prints and writes
settings.py  the section `preflight`
facts.py     what a rank reports
host.py      versions, memory, clock, ports and sandbox of a node
links.py     collectives of every parallel axis, and links between pairs of nodes
folder.py    the run folder: speed, fsync, locks, seen by every node
progress.py  where each rank is, and the name of one that hangs"""
