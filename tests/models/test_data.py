"""The data sets: fixed splits, idx files, and errors that say what to do."""

import gzip
import sys

import numpy as np
import pytest
import torch

from tests.helpers import idx_bytes, write_fashion
from vmeanba_fx import data


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)


LABELS = np.array([9, 0, 3, 3, 1], dtype=np.uint8)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_fashion_items(tmp_path, images, packed, train):
    write_fashion(tmp_path, images, LABELS, "train" if train else "t10k", packed)
    dataset = data.FashionMNIST(tmp_path, train)
    assert len(dataset) == 5
    image, label = dataset[2]
    assert (image.shape, image.dtype, label) == ((1, 96, 96), torch.float32, 3)
    plain = data.FashionMNIST(tmp_path, train, size=28, limit=3)
    assert len(plain) == 3
    np.testing.assert_allclose(plain[1][0][0].numpy(), (images[1] / 255.0 - 0.286) / 0.353, rtol=1e-4, atol=1e-5)
    batch, labels = next(iter(torch.utils.data.DataLoader(plain, batch_size=3)))
    assert batch.shape == (3, 1, 28, 28) and labels.tolist() == [9, 0, 3]


def test_absent_fashion_says_where_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"t10k-images-idx3-ubyte.*apt-get install dataset-fashion-mnist"):
        data.FashionMNIST(tmp_path / "nowhere", train=False)


def damaged(good: bytes) -> dict[str, tuple[bytes, str]]:
    packed = gzip.compress(good)
    return {
        "empty": (b"", "not an idx file"),
        "text": (b"<html>not found</html>", "not an idx file"),
        "float idx": (b"\x00\x00\x0d" + good[3:], "not an idx file"),
        "no sizes": (good[:6], "not an idx file"),
        "too short": (good[:-1], "header says"),
        "too long": (good + b"\x00", "header says"),
        "huge header": (good[:4] + b"\xff" * 12 + good[16:], "header says"),
        "truncated gzip": (packed[: len(packed) // 2], "gzip"),
        "corrupt gzip": (packed[:20] + b"\x00" * 20 + packed[40:], "gzip|header says"),
    }


@pytest.mark.parametrize("kind", damaged(idx_bytes(np.zeros((2, 3, 3)))))
def test_damaged_files_are_named(tmp_path, images, kind):
    content, message = damaged(idx_bytes(images))[kind]
    write_fashion(tmp_path, images, LABELS, packed=False)
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        data.FashionMNIST(tmp_path, train=False)
    assert "t10k-images-idx3-ubyte" in str(caught.value)


def test_files_that_do_not_fit_together(tmp_path, images):
    write_fashion(tmp_path, images, LABELS[:4])
    with pytest.raises(ValueError, match="5 images but 4 labels"):
        data.FashionMNIST(tmp_path, train=False)
    write_fashion(tmp_path, images, LABELS + 5)
    with pytest.raises(ValueError, match="label is 14"):
        data.FashionMNIST(tmp_path, train=False)
    write_fashion(tmp_path, images[0], LABELS)
    with pytest.raises(ValueError, match="expected 3 dimensions, the file has 2"):
        data.FashionMNIST(tmp_path, train=False)


def test_digits_split_is_fixed_stratified_and_disjoint():
    train, train_labels = data.load_digits_images(train=True)
    test, test_labels = data.load_digits_images(train=False)
    assert train.shape == (1433, 1, 32, 32) and test.shape == (364, 1, 32, 32)
    assert test_labels.bincount().min() >= 34 and train_labels.bincount().min() >= 139
    assert abs(train.mean()) < 0.02 and abs(train.std() - 1) < 0.02
    again, labels = data.load_digits_images(train=False)
    assert torch.equal(again, test) and torch.equal(labels, test_labels)
    seen = {image.numpy().tobytes() for image in train}
    assert sum(image.numpy().tobytes() in seen for image in test) == 0
    other, _ = data.load_digits_images(train=False, seed=1)
    assert not torch.equal(other, test)
    assert data.load_digits_images(train=False, size=8, test_fraction=0.5)[0].shape[1:] == (1, 8, 8)
    with pytest.raises(ValueError, match="test_fraction"):
        data.load_digits_images(train=True, test_fraction=1.0)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'vmeanba-fx\[examples\]'"):
        data.load_digits_images(train=True)


def test_loader_order_and_accuracy():
    x, y = torch.eye(6), torch.arange(6)
    ordered = data.make_loader(x, y, 4)
    assert [labels.tolist() for _, labels in ordered] == [[0, 1, 2, 3], [4, 5]]
    shuffled = [[labels.tolist() for _, labels in data.make_loader(x, y, 6, seed=seed)] for seed in (3, 3, 4)]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    model = torch.nn.Dropout(0.5).train()  # the identity in evaluation
    assert data.accuracy(model, ordered) == 1.0 and model.training
    assert data.accuracy(model, data.make_loader(x, (y + (y > 2)).clamp(max=5))) == pytest.approx(4 / 6)
    with pytest.raises(ValueError, match="empty"):
        data.accuracy(model, data.make_loader(x[:0], y[:0]))
