"""The analyses of the two papers, to run on models of one's own: `loopmdm study NAME`.

A study is a module of this package with

    SUMMARY                 one line
    EPILOG                  examples
    add_arguments(parser)   its options
    run(args, folder)       computes what is missing in the `StudyFolder` and returns the rows of its table
    draw(rows)              a matplotlib figure of these rows

Everything about the way (resuming, files, progress, provenance) is the folder's.
"""

from __future__ import annotations

STUDIES: tuple[str, ...] = (
    "importance",
    "attention",
    "trajectories",
    "scaling",
    "schedules",
    "search",
    "adaptive",
    "isoflop",
    "position",
)
