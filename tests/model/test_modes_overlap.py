"""evaluating: eval mode for a while, by any number of users of one model at once."""

import threading

import pytest
import torch
from torch import nn

from loopmdm import sample
from loopmdm.model.modes import evaluating
from tests.sampling.conftest import random_model


def modes(model):
    return [module.training for module in model.modules()]


def mixed_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model[1].eval()
    model[0].train()
    return model


def test_each_module_gets_its_own_mode_back_also_after_an_error():
    model = mixed_model()
    before = modes(model)
    assert True in before and False in before
    with pytest.raises(KeyError), evaluating([model, model]):
        assert not any(modes(model))
        raise KeyError
    assert modes(model) == before


def test_blocks_that_overlap_put_modes_back_once_all_are_left():
    model = mixed_model()
    before = modes(model)
    first, second = evaluating([model]), evaluating([model[1], model])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # as of a thread that ends while another is at work
    assert not any(modes(model))
    second.__exit__(None, None, None)
    assert modes(model) == before


def test_threads_that_sample_from_one_model_in_training_mode_draw_what_one_draws():
    """Dropout of one in two would show at once if a thread ran in the mode that another put back."""
    model = random_model(dropout=0.5)
    assert model.training
    want = [sample(model, 2, length=4, seed=seed, progress=False).tokens for seed in range(8)]
    wrong = []

    def run(seed):
        for _ in range(3):
            if not torch.equal(sample(model, 2, length=4, seed=seed, progress=False).tokens, want[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert model.training and all(modes(model))
