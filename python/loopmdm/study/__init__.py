"""The analyses of the two papers, to run on models of one's own: `loopmdm study NAME`.

A study is a module with

    SUMMARY                 one line
    EPILOG                  examples
    add_arguments(parser)   its options
    run(args, folder)       computes what is missing in the `StudyFolder` and returns the rows of its table
    draw(rows)              a matplotlib figure of these rows

Everything about the way (resuming, files, progress, provenance) is the folder's. One of several files has a
folder, which may go with its line here; what studies share is in `kit`.
"""

from __future__ import annotations

# {name on the command line: its module}
STUDIES = {
    "importance": "loopmdm.study.importance",
    "attention": "loopmdm.study.attention",
    "trajectories": "loopmdm.study.trajectories.study",
    "scaling": "loopmdm.study.scaling.study",
    "schedules": "loopmdm.study.schedules.study",
    "search": "loopmdm.study.adaptive.search",
    "adaptive": "loopmdm.study.adaptive.study",
    "isoflop": "loopmdm.study.training.isoflop",
    "position": "loopmdm.study.training.position",
}
