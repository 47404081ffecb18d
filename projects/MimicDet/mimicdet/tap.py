"""Tap of MimicDet: its pyramid is distilled as that of any other detector."""

from kd_d2.distillation import KD_TAPS, KeyInfo, Tap
from kd_d2.distillation.dense_tap import anchor_signature

from .mimicdet import MimicDet

__all__ = ["MimicDetTap"]


@KD_TAPS.register_for(MimicDet)
class MimicDetTap(Tap):
    """Keys ``backbone.*``, ``neck.*``, ``neck`` (levels of the S-head) and ``anchors``.

    The heads have no towers that other detectors share. ``head.s`` and ``head.t`` are the modules
    themselves, for MimicDet's own distiller; they are equal if their outputs can be compared.
    """

    def keys(self, model):
        shapes = model.backbone.output_shape()
        strides = tuple(shapes[name].stride for name in model.head_in_features)
        result = self.trunk_keys(model)
        result["neck"] = KeyInfo(shapes[model.head_in_features[0]].channels, strides)
        generator = model.refinement.anchor_generator
        result["anchors"] = KeyInfo(None, strides, anchor_signature(generator))
        for name in ("s", "t"):
            head = _head(model, name)
            if head is not None:
                facts = (model.num_classes, head.num_branches)
                result[f"head.{name}"] = KeyInfo(head.feature_dim, strides, facts)
        return result

    def anchor_strides(self, model):
        return list(model.refinement.anchor_generator.strides)

    def paths(self, model, keys):
        result = set()
        for key in keys:
            if key.group == "path":
                result.add(key.name)
            elif key.group == "anchors":
                result.add("backbone")
            elif key.group != "head":
                result |= self.trunk_paths(model, key)
        return result

    def read(self, store, key):
        if key.group == "path":
            return [call.output for call in store.calls(key.name)]
        if key.group == "anchors":
            return self._anchors(store)
        if key.group == "head":
            return _head(store.model, key.name)
        return self.read_trunk(store, key) if key.name else self._pyramid(store)

    def _pyramid(self, store):
        features = store.single("backbone").output
        return [features[name] for name in store.model.head_in_features]

    def _anchors(self, store):
        return store.model.refinement.anchor_generator(self._pyramid(store))

    def stage(self, path):
        return "trunk" if path.split(".")[0] == "backbone" else path

    def run_stage(self, model, stage, features):
        raise ValueError(
            f"module '{stage}' of a MimicDet teacher cannot be observed: only its backbone runs"
        )


def _head(model: MimicDet, name: str):
    return getattr(model, f"{name}_head")
