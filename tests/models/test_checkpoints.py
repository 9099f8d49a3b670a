"""Checkpoints: official layouts load, anything else is explained and changes nothing."""

import argparse
import pickle
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import make_scan_matter
from vmeanba_fx import VMeanbaError, models
from vmeanba_fx.models import CheckpointError, load_checkpoint

V0 = dict(forward_type="v0", downsample_version="v1", norm_layer="ln", mlp_ratio=0.0)
V05 = dict(forward_type="v05_noz", downsample_version="v3", norm_layer="ln2d", patchembed_version="v2")


def small(seed: int | None = None, **config) -> models.VSSM:
    model = models.VSSM(**{**V05, "depths": (1, 1), "dims": 8, "num_classes": 3, "ssm_d_state": 2, **config})
    return model if seed is None else make_scan_matter(model, seed)


def assert_same(model: torch.nn.Module, state: dict) -> None:
    actual = model.state_dict()
    assert actual.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(actual[name], value), name


@pytest.fixture
def source():
    return small(seed=1)


@pytest.mark.parametrize("suffix", [".pt", ".pth"])
@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_ema"])
def test_official_layouts(tmp_path, source, suffix, key):
    path = tmp_path / f"weights{suffix}"
    state = source.state_dict()
    torch.save(state if key is None else {"epoch": 3, key: state, "max_accuracy": 82.5}, path)
    model = small()
    assert load_checkpoint(model, path) is model
    assert_same(model, state)


def test_key_picks_the_averaged_weights(tmp_path, source):
    path = tmp_path / "both.pth"
    averaged = small(seed=2).state_dict()
    torch.save({"model": source.state_dict(), "model_ema": averaged}, path)
    assert_same(load_checkpoint(small(), path, key="model_ema"), averaged)
    assert_same(load_checkpoint(small(), str(path)), source.state_dict())
    with pytest.raises(CheckpointError, match="no state dict under 'ema'; the file has model, model_ema"):
        load_checkpoint(small(), path, key="ema")


def test_safetensors_and_our_own_writer(tmp_path, source):
    models.save_checkpoint(source, tmp_path / "own.safetensors", {"seed": 1})
    assert_same(load_checkpoint(small(), tmp_path / "own.safetensors"), source.state_dict())


def test_half_precision_files_are_cast(tmp_path, source):
    half = {name: value.half() for name, value in source.state_dict().items()}
    torch.save(half, tmp_path / "half.pt")
    model = load_checkpoint(small().double(), tmp_path / "half.pt")
    assert_same(model, {name: value.double() for name, value in half.items()})


def test_training_configuration_in_the_file_is_inert(tmp_path, source, monkeypatch):
    """Official files hold a yacs CfgNode beside the weights; it is read without yacs and without running its code."""

    class CfgNode(dict):
        def __init__(self, init=None):
            super().__init__(init or {})
            self.__dict__["__immutable__"] = True

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    config = types.ModuleType("yacs.config")
    config.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs.config", config)
    content = {
        "model": source.state_dict(),
        "config": CfgNode({"A": CfgNode({"B": 1})}),
        "args": argparse.Namespace(lr=1),
    }
    torch.save(content, tmp_path / "official.pth")
    assert_same(load_checkpoint(small(), tmp_path / "official.pth"), source.state_dict())


def test_old_key_names_of_v0(tmp_path):
    source = small(seed=1, **V0)
    renames = {
        "patch_embed.0.": "patch_embed.proj.", "patch_embed.2.": "patch_embed.norm.", "classifier.head.": "head.",
        "classifier.norm.": "norm.", "downsample.1.": "downsample.norm.", "downsample.2.": "downsample.reduction.",
        ".0.norm.": ".0.ln_1.", ".op.": ".self_attention.",
    }  # fmt: skip
    old = {}
    for name, value in source.state_dict().items():
        for new_part, old_part in renames.items():
            name = name.replace(new_part, old_part)
        old["module." + name] = value
    torch.save({"model": old}, tmp_path / "old.pth")
    assert_same(load_checkpoint(small(**V0), tmp_path / "old.pth"), source.state_dict())


def test_weights_of_the_directions_as_one_tensor(tmp_path, source):
    """Older v2 files hold (K, out, in) parameters and 1x1 convolutions."""
    state = source.state_dict()
    old = {}
    for name, value in state.items():
        if ".x_proj." in name or ".dt_projs." in name:
            old[name.replace(".weight", "_weight")] = value.unflatten(0, (4, -1))
        elif ".in_proj." in name or ".fc1.weight" in name:
            old[name] = value[:, :, None, None]
        else:
            old[name] = value
    torch.save(old, tmp_path / "old.pth")
    assert_same(load_checkpoint(small(), tmp_path / "old.pth"), state)


def test_position_embedding_is_resized(tmp_path):
    source = small(seed=1, posembed=True, imgsize=32)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = load_checkpoint(small(posembed=True, imgsize=64), tmp_path / "w.pth")
    assert model.pos_embed.shape == (1, 8, 16, 16)
    assert model.pos_embed.mean().item() == pytest.approx(source.pos_embed.mean().item(), abs=0.02)


def test_backbone_from_a_classifier_and_from_a_segmentation_file(tmp_path, source):
    config = {**V05, "depths": (1, 1), "dims": 8, "ssm_d_state": 2, "out_indices": (0, 1)}
    torch.save({"model": source.state_dict()}, tmp_path / "cls.pth")
    backbone = models.Backbone(**config)
    with pytest.raises(CheckpointError, match=r"missing: outnorm0.weight.*unexpected: classifier.norm.weight"):
        load_checkpoint(backbone, tmp_path / "cls.pth")
    load_checkpoint(backbone, tmp_path / "cls.pth", ignore=["classifier.*", "outnorm*"])
    assert torch.equal(backbone.layers[0].blocks[0].op.A_logs, source.layers[0].blocks[0].op.A_logs)
    with pytest.raises(CheckpointError, match=r"ignore pattern 'head\.\*' matches no key"):
        load_checkpoint(backbone, tmp_path / "cls.pth", ignore=["head.*"])
    segmenter = models.UperNet(backbone, num_classes=4, channels=8)
    torch.save({"state_dict": segmenter.state_dict(), "meta": {"epoch": 1}}, tmp_path / "seg.pth")
    other = load_checkpoint(models.Backbone(**config), tmp_path / "seg.pth", ignore=["decode_head.*"])
    assert_same(other, backbone.state_dict())


def assert_refused(path, match: str, **options) -> None:
    """Loading fails with a message that names the file, and the model is as it was."""
    model = small(seed=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match) as caught:
        load_checkpoint(model, path, **options)
    assert str(path) in str(caught.value) and isinstance(caught.value, VMeanbaError)
    assert "\n" not in str(caught.value)
    assert_same(model, before)


def test_missing_unexpected_and_misshaped_keys_are_named(tmp_path, source):
    state = source.state_dict()
    state["classifier.head.weight"] = torch.zeros(7, 16)
    state["extra.weight"] = state.pop("patch_embed.0.bias")
    torch.save(state, tmp_path / "w.pt")
    assert_refused(tmp_path / "w.pt", "missing: patch_embed.0.bias; unexpected: extra.weight; wrong shape: "
                   r"classifier.head.weight \(file \(7, 16\), model \(3, 16\)\)")  # fmt: skip


def test_weights_of_another_model(tmp_path):
    torch.save(small(**V0).state_dict(), tmp_path / "w.pt")
    assert_refused(tmp_path / "w.pt", r"does not fit VSSM: missing: .* and \d+ more; unexpected: ")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_truncated_files(tmp_path, source, suffix, keep):
    path = tmp_path / f"w{suffix}"
    save_file(source.state_dict(), path) if suffix == ".safetensors" else torch.save(source.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    assert_refused(path, "not a readable checkpoint")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_garbage(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(b"<html>404 not found</html>" * 20)
    assert_refused(path, "not a readable checkpoint")


def test_code_is_refused_and_not_run(tmp_path, source):
    class Hostile:
        def __reduce__(self):
            return open, (str(tmp_path / "touched"), "w")

    torch.save({"model": source.state_dict(), "hook": Hostile()}, tmp_path / "w.pt")
    assert_refused(tmp_path / "w.pt", r"refused, it contains the Python object \S*open and could run code")
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Hostile()))
    assert_refused(tmp_path / "w.pth", "refused")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({}, "it is empty"),
        ([torch.zeros(2)], "expected a dict of tensors, found list"),
        ({"model": {"a": 3, "b": torch.zeros(2)}}, "not a plain tensor: a"),
        ({"a": torch.zeros(2).to_sparse()}, "not a plain tensor: a"),
        ({3: torch.zeros(2)}, "not a plain tensor: 3"),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, match):
    torch.save(content, tmp_path / "w.pt")
    assert_refused(tmp_path / "w.pt", match)


def test_other_refusals(tmp_path, source):
    assert_refused(tmp_path / "absent.pt", "no such checkpoint file")
    assert_refused(tmp_path, "no such checkpoint file")
    state = source.state_dict()
    torch.save({**state, "head.weight": state["classifier.head.weight"]}, tmp_path / "twice.pt")
    assert_refused(tmp_path / "twice.pt", "under two names")
    torch.save(state, tmp_path / "w.pt")
    with torch.device("meta"):
        model = small()
    with pytest.raises(CheckpointError, match="meta device"):
        load_checkpoint(model, tmp_path / "w.pt")
