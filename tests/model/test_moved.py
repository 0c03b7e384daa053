"""Old names of modules give the modules themselves, not copies."""

from importlib import import_module

import pytest

import loopmdm
from loopmdm.moved import MOVED

OLD = [
    "causal", "checkpoint", "config", "cut", "diffusion", "draws", "flops", "hub", "likeness",
    "likeness_static", "loop_law", "masks", "mdlm_stated", "mdlm_weights", "modes", "modules",
    "parallel", "patching", "pickle_machine", "pickles", "safetensors_files", "shards", "stages",
    "torch_files", "trial", "vocabulary", "quality.transformers_scorer", "train.recipes", "train.seeds",
]  # fmt: skip


def test_all_that_moved_are_known():
    assert sorted(MOVED) == sorted(f"loopmdm.{name}" for name in OLD)


@pytest.mark.parametrize("name", MOVED)
def test_an_old_name_is_the_module_that_stands_elsewhere_now(name):
    now = import_module(MOVED[name])
    assert import_module(name) is now
    assert now.__spec__ is not None and now.__spec__.name == MOVED[name]


def test_names_that_never_were_are_not_found():
    from loopmdm import pickles

    assert pickles.__name__ == "loopmdm.formats.pickles"
    assert loopmdm.pickles is pickles
    with pytest.raises(ModuleNotFoundError, match=r"loopmdm\.pickle_files"):
        import_module("loopmdm.pickle_files")
    with pytest.raises(ImportError, match="cannot import name 'pickle_files'"):
        from loopmdm import pickle_files  # noqa: F401
