"""Views of a sampling run: a terminal that shows masks being filled in, and a page to look at afterwards.

Views read `StepEvent`s only. `Replay` turns them into canvases; docs/watch.md says how to add a view.
"""

from loopmdm.view.page import page, write_page
from loopmdm.view.replay import Replay
from loopmdm.view.symbols import BoardSymbols, IdSymbols, Symbols, TextSymbols
from loopmdm.view.watch import Watch

__all__ = [
    "BoardSymbols",
    "IdSymbols",
    "Replay",
    "Symbols",
    "TextSymbols",
    "Watch",
    "page",
    "write_page",
]
