"""The benchmark of data loading counts images, and times reading as a part of the mapper."""

import data_loading

from tests.fixtures import registered_toy_dataset, tiny_cfg


def test_loader_and_mapper(tmp_path):
    with registered_toy_dataset(tmp_path, 6) as name:
        values = {"DATASETS.TRAIN": (name,), "SOLVER.IMS_PER_BATCH": 2}
        cfg = tiny_cfg("RetinaNet", **values)
        result = data_loading.through_the_loader(cfg, workers=0, batches=3)
        assert result["workers"] == 0 and result["images"] == 6
        assert result["images a second"] > 0
        assert cfg.DATALOADER.NUM_WORKERS == tiny_cfg("RetinaNet").DATALOADER.NUM_WORKERS
        mapper = data_loading.through_the_mapper(cfg, images=4)
        assert 0 < mapper["reading"] < mapper["mapper"]
    report = {
        "config": "a.yaml",
        "processor": "p",
        "images a batch": 2,
        "loader": [{"workers": 0, "images a second": 12.34}, {"workers": 2, "images a second": 20}],
        "mapper": {"mapper": 3.0, "reading": 1.25},
    }
    text = data_loading.text(report)
    assert "|                2 |            20.0 |" in text and "reading 1.25 ms" in text
