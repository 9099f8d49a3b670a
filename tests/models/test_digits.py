"""The shipped model: its accuracy, and that it needs its scans."""

import pytest
import torch
from safetensors import safe_open

from tests.helpers import without_scans
from vmeanba_fx import models
from vmeanba_fx.data import accuracy, load_digits_images, make_loader
from vmeanba_fx.models.factories import DIGITS_WEIGHTS


@pytest.fixture(scope="module")
def test_loader():
    return make_loader(*load_digits_images(train=False), 182)


def test_accuracy_is_the_one_the_file_states(test_loader):
    with safe_open(DIGITS_WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert {"test_accuracy", "seed", "epochs", "torch"} <= metadata.keys()
    measured = accuracy(models.vmamba_digits(pretrained=True), test_loader)
    assert measured >= 0.97
    assert measured == pytest.approx(float(metadata["test_accuracy"]), abs=0.003)  # one image of 364


def test_nothing_is_left_without_the_scans(test_loader):
    assert accuracy(without_scans(models.vmamba_digits(pretrained=True)), test_loader) < 0.3


def test_the_file_is_small_and_of_floats():
    assert DIGITS_WEIGHTS.stat().st_size < 2_000_000
    model = models.vmamba_digits(pretrained=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_pretrained_model_takes_no_overrides():
    with pytest.raises(ValueError, match="num_classes"):
        models.vmamba_digits(pretrained=True, num_classes=3)
    assert models.vmamba_digits(num_classes=3).classifier.head.out_features == 3
