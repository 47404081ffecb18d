"""The entry ``arch``: written for models that describe themselves, compared before loading."""

import pytest
import torch
from torch import nn

from kd_d2.checkpoint import KDCheckpointer, architecture_entry, load_checkpoint_file


class Trunk(nn.Linear):
    """Describes itself by its width and how many siblings the model has."""

    seen = None

    def architecture_entry(self, model):
        return {"width": self.out_features, "children": len(list(model.children()))}

    def check_architecture(self, model, entry):
        self.seen = entry
        if entry is not None and entry != self.architecture_entry(model):
            raise ValueError(f"{entry} against {self.architecture_entry(model)}")


def network(width=3, classes=2):
    model = nn.Module()
    model.trunk = nn.Sequential(nn.Linear(4, 4), Trunk(4, width))
    model.head = nn.Linear(width, classes)
    return model


def test_entry_is_written_and_read(tmp_path):
    model = network()
    assert architecture_entry(model) == {"arch": {"width": 3, "children": 2}}
    KDCheckpointer(model, str(tmp_path)).save("model", iteration=4)
    data = load_checkpoint_file(str(tmp_path / "model.pth"))
    assert data["arch"] == {"width": 3, "children": 2} and set(data["model"]) == set(
        model.state_dict()
    )
    other = network()
    rest = KDCheckpointer(other).load(str(tmp_path / "model.pth"))
    assert rest["iteration"] == 4 and other.trunk[1].seen == {"width": 3, "children": 2}
    assert torch.equal(other.trunk[1].weight, model.trunk[1].weight)


def test_other_models_have_no_entry(tmp_path):
    model = nn.Linear(2, 2)
    assert architecture_entry(model) == {}
    KDCheckpointer(model, str(tmp_path)).save("model")
    assert set(load_checkpoint_file(str(tmp_path / "model.pth"))) == {"model"}
    # nor do they look at that of a file
    torch.save({"model": model.state_dict(), "arch": "anything"}, tmp_path / "other.pth")
    assert KDCheckpointer(model).load(str(tmp_path / "other.pth")) == {"arch": "anything"}


def test_another_architecture_is_refused_before_anything_is_loaded(tmp_path):
    KDCheckpointer(network(5), str(tmp_path)).save("model")
    other = network(3)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match="model.pth does not belong .*'width': 5.* against .*3"):
        KDCheckpointer(other).load(str(tmp_path / "model.pth"))
    with pytest.raises(ValueError, match="does not belong"):  # also when resuming
        KDCheckpointer(other, str(tmp_path)).resume_or_load("", resume=True)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_shapes_and_missing_keys_of_the_described_part(tmp_path):
    path = str(tmp_path / "file.pth")

    def load(state, **more):
        torch.save({"model": state, **more}, path)
        model = network()
        KDCheckpointer(model).load(path)
        return model

    entry = architecture_entry(network())
    full, wide = network().state_dict(), network(5).state_dict()
    # without an entry: keys may be missing, but not have another shape
    partly = {k: v for k, v in full.items() if k != "trunk.0.bias"}
    assert load(partly).trunk[1].seen is None
    with pytest.raises(ValueError, match="fit the trunk[^\0]*trunk.1.weight: .5, 4. in the check"):
        load({"trunk.1.weight": wide["trunk.1.weight"]})
    # with one they may not
    with pytest.raises(ValueError, match="fit the trunk[^\0]*trunk.0: bias"):
        load(partly, **entry)
    # the head is not described: other classes are Detectron2's affair
    more_classes = {**full, "head.bias": torch.zeros(7)}
    assert torch.equal(load(more_classes, **entry).trunk[1].weight, full["trunk.1.weight"])


def test_model_that_is_the_described_module_itself(tmp_path):
    KDCheckpointer(Trunk(4, 3), str(tmp_path)).save("model")
    KDCheckpointer(Trunk(4, 3)).load(str(tmp_path / "model.pth"))
    data = load_checkpoint_file(str(tmp_path / "model.pth"))
    del data["model"]["bias"]
    torch.save(data, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match="fit the model[^\0]*bias"):
        KDCheckpointer(Trunk(4, 3)).load(str(tmp_path / "cut.pth"))
