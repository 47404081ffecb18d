"""The folder of a candidate: every file in it is complete or not there."""

import glob
import json
import os
from typing import Any, Dict, List, Mapping, Optional

from kd_d2.checkpoint import atomic_write

from ..space import Architecture
from .proposal import Outcome, Proposal

__all__ = ["Candidate", "read_json", "write_json"]


def read_json(path: str) -> Optional[Dict[str, Any]]:
    """The content of a file; None if it is not there."""
    try:
        with open(path) as file:
            return json.load(file)
    except FileNotFoundError:
        return None


def write_json(path: str, content: Mapping[str, Any]) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode())


class Candidate:
    """One trial's folder, ``cand/<number>`` of the search.

    - ``spec.json``: the proposal;
    - ``config.yaml``, ``init.pth``: the student before its training, with what it inherits;
    - ``model_*.pth`` and Detectron2's logs while it trains, then ``student.pth``: weights,
      ``arch``, distillers;
    - ``eval_<long>x<short>.json``: its AP at one resolution;
    - ``result.json``: score, architecture, AP and complexity. It is written last.
    """

    def __init__(self, search_folder: str, number: int):
        self.number = number
        self.folder = os.path.join(search_folder, "cand", f"{number:04d}")

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    @property
    def config(self) -> str:
        return self.path("config.yaml")

    @property
    def init(self) -> str:
        return self.path("init.pth")

    @property
    def student(self) -> str:
        return self.path("student.pth")

    @property
    def log(self) -> str:
        """What evaluations print."""
        return self.path("evaluate.log")

    def has(self, path: str) -> bool:
        return os.path.isfile(path)

    def spec(self) -> Optional[Proposal]:
        values = read_json(self.path("spec.json"))
        return values and Proposal.from_dict(values)

    def write_spec(self, proposal: Proposal) -> None:
        os.makedirs(self.folder, exist_ok=True)
        write_json(self.path("spec.json"), proposal.to_dict())

    def result(self) -> Optional[Dict[str, Any]]:
        return read_json(self.path("result.json"))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """The keys that a search itself reads: ``score``, ``arch``, ``teacher``."""
        write_json(self.path("result.json"), result)

    def outcome(self) -> Outcome:
        """What later trials may know.

        Raises:
            ValueError: the trial is complete, but its result is not there.
        """
        result = self.result()
        if result is None:
            raise ValueError(
                f"{self.path('result.json')} is missing, although the journal has its trial as "
                "complete: the folder of a search must stay as it is"
            )
        return Outcome(
            self.number,
            result["score"],
            Architecture.from_entry(result["arch"]),
            result["teacher"],
        )

    def checkpoints(self) -> List[str]:
        """Files of the training, with which it could be continued."""
        names = glob.glob(os.path.join(glob.escape(self.folder), "model_*.pth"))
        return sorted([*names, *filter(os.path.isfile, [self.path("last_checkpoint")])])

    def remove_checkpoints(self) -> None:
        """Forget the training, not what came out of it."""
        # the name of the last checkpoint goes last, for a kill in between
        for path in self.checkpoints()[::-1]:
            _remove(path)

    def remove_weights(self) -> None:
        """Remove whatever is large; specification, result, config and logs stay."""
        self.remove_checkpoints()
        for path in (self.init, self.student):
            _remove(path)


def _remove(path: str) -> None:
    try:
        os.remove(path)
    except FileNotFoundError:
        pass  # another worker was faster
