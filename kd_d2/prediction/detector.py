"""A detector on single images, fed exactly as the evaluation feeds it."""

import os
import tempfile
from typing import List, Optional, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Instances
from PIL import Image
from torch import nn

from kd_d2.data import build_mapper
from kd_d2.data.checks import absent_files

from .sources import Frame, Unreadable

__all__ = ["Detector", "class_names_of"]


class Detector:
    """A network with the mapper of its config.

    Args:
        model: the network; is put into eval mode.
        cfg: its config: INPUT is how images are scaled for it.
    """

    def __init__(self, model: nn.Module, cfg: CfgNode):
        self.model = model.eval()
        self._map = build_mapper(cfg, False)

    @torch.no_grad()
    def __call__(self, frame: Frame) -> Instances:
        """Return the detections on the CPU, boxes in pixels of the frame.

        Raises:
            Unreadable: the mapper cannot use the image file.
        """
        if frame.file:
            record = self._mapped(frame.file)
        else:
            # through a file without losses: any mapper sees a frame as it sees an image
            with tempfile.TemporaryDirectory(prefix="kd_d2_") as folder:
                path = os.path.join(folder, "frame.bmp")
                Image.fromarray(frame.image).save(path)
                record = self._mapped(path)
        record["height"], record["width"] = frame.image.shape[:2]
        return self.model([record])[0]["instances"].to("cpu")

    def _mapped(self, path: str):
        try:
            return self._map({"file_name": path, "image_id": 0})
        except MemoryError:
            raise
        except Exception as error:
            raise Unreadable(f"{path}: {type(error).__name__}: {error}") from error


def number_of_classes(model: nn.Module) -> Optional[int]:
    """Number of foreground classes of a detector, None if it does not say."""
    heads = (model, getattr(model, "roi_heads", None))
    return next((x.num_classes for x in heads if hasattr(x, "num_classes")), None)


def class_names_of(
    model: nn.Module,
    cfg: CfgNode,
    given: Sequence[str] = (),
    stored: Optional[Sequence[str]] = None,
) -> List[str]:
    """The names of a detector's classes: those given, else stored, else of the config's data.

    Args:
        model: the detector.
        cfg: its config, whose data sets are registered.
        given: by the user; have to be as many as the classes.
        stored: in the checkpoint.

    Returns:
        names by class index; empty if nothing fits.

    Raises:
        ValueError: another number is given than the detector has.
    """
    count = number_of_classes(model)
    if given:
        if count is not None and len(given) != count:
            raise ValueError(f"{len(given)} --classes are given, but the detector has {count}")
        return list(given)
    candidates = [stored or ()]
    for name in [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]:
        candidates.append(known_metadata(name).get("thing_classes") or ())
    fitting = (list(names) for names in candidates if names and count in (None, len(names)))
    return next(fitting, [])


def known_metadata(name: str):
    """Metadata of a data set, which may stand in its annotation file only."""
    metadata = MetadataCatalog.get(name)
    if not metadata.get("thing_classes") and name in DatasetCatalog and not absent_files(name):
        DatasetCatalog.get(name)
    return metadata
