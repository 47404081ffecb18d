"""Configuration of the search itself: ``SEARCH``, beside the student actions and the score."""

from detectron2.config import CfgNode as CN

from kd_d2.config import CONFIG_NODES

from .. import config as _student_config  # noqa: F401  (its node has to be there first)

__all__ = ["add_hill_climbing_config"]


@CONFIG_NODES.register()
def add_hill_climbing_config(cfg: CN) -> None:
    """Add to ``SEARCH`` what algorithm 1 and its workers read. "Ours": the paper does not say."""
    node = cfg.SEARCH
    # Name in SEARCH_METHODS: "HillClimbing" (algorithm 1) or "PoolSampling" (Table 10: subnets of
    # the pool are drawn and evaluated, nothing is trained).
    node.METHOD = "HillClimbing"
    # Trials, that of the base detector included. Paper: 100 architectures.
    node.MAX_TRIALS = 100
    # Stop after so many trials without a better score; 0: never. Ours.
    node.PATIENCE = 30
    # Best pairs that a parent is drawn from, weighted k, k-1, ..., 1 by rank. Paper: 5 (A.1.4); the
    # weights are ours.
    node.TOP_K = 5
    # First trials in which only the teacher changes. Paper: 5.
    node.FIXED_STUDENT_TRIALS = 5
    # Probability that the student changes, and not the teacher, in later trials. Ours.
    node.STUDENT_PROBABILITY = 0.5
    # Whether teachers change at all; the teacher has to be an ElasticTeacher. With False and
    # STUDENT_ACTIONS () every trial trains the student of the one before further: conventional
    # distillation in rounds (Fig. 4 and 10).
    node.TEACHER_MUTATION = True
    # A depth or width of the teacher changes with this probability; at least one does. Ours.
    node.MUTATION = CN()
    node.MUTATION.PROBABILITY = 0.15
    # Largest change of a depth, blocks. Ours.
    node.MUTATION.DEPTH_STEP = 4
    # What the first trials after that of the base change, in place of a random choice: names of
    # student actions, "Teacher", or "" for the choice. One that is not legal is drawn, too.
    node.SCRIPT = ()
    # Trials that are proposed without knowing each other's results, so that so many workers are
    # busy; the course of the search depends on this number, not on that of the workers. 0: a trial
    # knows all that is finished when it is proposed, which no second search reproduces. Ours; the
    # paper's algorithm is 1.
    node.GENERATION = 1
    # A candidate whose evaluation was interrupted: "continue" from its last checkpoint, or
    # "restart" it.
    node.RESUME = "continue"
    # Evaluations of a candidate that may fail before its trial counts as failed.
    node.ATTEMPTS = 3
    # The distiller's adapter starts as that of the parent, as the student does. Ours.
    node.INHERIT_ADAPTER = True
    # Keep the weights of all candidates. False: of the base, the TOP_K best, and of parents that a
    # running trial needs.
    node.KEEP_ALL_WEIGHTS = False
    # The training that finetune.yaml of an exported student describes (Table 9): images of a batch
    # (ours), iterations (16 epochs of COCO) and first learning rate of the cosine.
    node.FINETUNE = CN()
    node.FINETUNE.IMS_PER_BATCH = 16
    node.FINETUNE.MAX_ITER = 117266
    node.FINETUNE.BASE_LR = 0.01
