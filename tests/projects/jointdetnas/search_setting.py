"""A search with real detectors on six small images: pool, base detector, script."""

import contextlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import torch

from kd_d2.checkpoint import KDCheckpointer
from tests.fixtures import CLASSES, registered_toy_dataset, tiny_cfg
from tests.projects.jointdetnas.cases import BOTTLENECK, morph_options, student
from tests.projects.jointdetnas.elastic_cases import elastic_cfg, supernet

SCRIPT = Path(__file__).parents[3] / "projects/JointDetNAS/search_net.py"
FEW = {
    "MODEL.ELASTIC_RESNET.RECALIBRATION.BATCHES": 1,
    "MODEL.ELASTIC_RESNET.RECALIBRATION.IMAGES": 2,
    "INPUT.RESOLUTIONS": ((64, 64), (96, 64)),
}


def script():
    spec = importlib.util.spec_from_file_location("search_net", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def setting(folder):
    """A pool, a base detector, and the config ``search.yaml`` of a search for the script."""
    _, net = supernet()
    state = {"model": net.model.state_dict(), "run_info": {"classes": list(CLASSES)}}
    torch.save(state, folder / "pool.pth")
    with registered_toy_dataset(folder, 6, size=(60, 80)) as name:
        pool = elastic_cfg(**FEW, **{"DATASETS.TRAIN": (name,)})
        (folder / "pool.yaml").write_text(pool.dump())
        base = student(BOTTLENECK)
        KDCheckpointer(base, str(folder)).save("base")
        (folder / "last_checkpoint").unlink()

        def write(output, **changes):
            cfg = search_cfg(folder, name, output, **changes)
            path = folder / f"{output}.yaml"
            path.write_text(cfg.dump())
            return str(path)

        yield SimpleNamespace(folder=folder, dataset=name, write=write)


def search_cfg(folder, name, output, **changes):
    return tiny_cfg(
        "GeneralizedRCNN",
        **{
            **morph_options(BOTTLENECK),
            "MODEL.WEIGHTS": str(folder / "base.pth"),
            "DATASETS.TRAIN": (name,),
            "DATASETS.TEST": (name,),
            "INPUT.MAPPER": "RandomResolutionMapper",
            "INPUT.RESOLUTIONS": ((64, 64), (96, 64)),
            "KD.ENABLED": True,
            "KD.DISTILLERS": ("JointDetNAS", "BNSparsity"),
            "KD.JOINTDETNAS.FEAT.ADAPTER_CHANNELS": 48,
            "KD.TEACHER.TYPE": "ElasticTeacher",
            "KD.TEACHER.CONFIG_FILE": str(folder / "pool.yaml"),
            "KD.TEACHER.WEIGHTS": str(folder / "pool.pth"),
            "SOLVER.MAX_ITER": 2,
            "SOLVER.CHECKPOINT_PERIOD": 1,
            "SEARCH.MAX_TRIALS": 6,
            "SEARCH.SCORE.BASE_SIZE": (96, 64),
            "SEARCH.SCORE.SIZES": ((64, 64), (96, 64)),
            "SEARCH.CHANNEL_PRUNING.MIN_CHANNELS": 2,
            "SEARCH.CHANNEL_PRUNING.PERCENT": 0.2,
            "SEARCH.LAYER_PRUNING.PROTECT": 1,
            "SEARCH.FIXED_STUDENT_TRIALS": 1,
            "SEARCH.CALIBRATION_BATCHES": 1,
            "SEARCH.SCRIPT": ("Teacher", "Rearrange", "ChannelPruning", "AddLayer", "LayerPruning"),
            "OUTPUT_DIR": str(folder / output),
            **changes,
        },
    )


def in_this_process(module, monkeypatch):
    """Trials are evaluated without a process of their own; nothing else is different."""

    def evaluate(args, course, number):
        values = vars(args)
        module.evaluate_trial(type(args)(**{**values, "trial": str(number), "parent": 0}))

    monkeypatch.setattr(module, "evaluate_in_process", evaluate)
