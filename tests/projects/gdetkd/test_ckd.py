"""CKD: the specification's examples, a naive loop over steps, gradients, types, empty batches."""

import copy

import pytest
import torch
from detectron2.structures import Boxes
from torch import nn

from kd_d2.projects.gdetkd.ckd import ContrastiveKD, PerAnchorLinear, overlapping
from tests.projects.gdetkd.loss_cases import naive_rows, saved_bytes

BOXES = [[0, 0, 10, 10], [0, 0, 10, 8], [20, 20, 30, 30]]
TEACHER = [[1, 0], [0.8, 0.6], [0, 1]]
STUDENT = [[1, 0], [0.6, 0.8], [0, 1]]


def plain(**changes):
    """f_theta is the identity of two dimensions, gamma 0.5."""
    arguments = {"student_dim": 2, "teacher_dim": 2, "dim": 2, "gamma": 0.5, "queue_size": 8}
    ckd = ContrastiveKD(**{**arguments, **changes})
    with torch.no_grad():
        ckd.projection[0].weight.copy_(torch.eye(2))
    return ckd


def images(*lists):
    return [Boxes(torch.tensor(x, dtype=torch.float32).reshape(-1, 4)) for x in lists]


def example(ckd, boxes=(BOXES,), student=1.0, teacher=1.0):
    rows = [torch.tensor(x) * factor for x, factor in ((STUDENT, student), (TEACHER, teacher))]
    return ckd(*rows, images(*boxes))


# ---------------------------------------------------------------------------------- examples
def test_the_example():
    output = example(plain())
    assert output.loss.item() == pytest.approx((0.126928 + 0.545893 + 0.460373) / 3, abs=1e-6)
    assert output.num_negatives.item() == pytest.approx(4 / 3)
    assert output.accuracy == 1
    assert output.positive_cosine.item() == pytest.approx((1 + 0.96 + 1) / 3)


@pytest.mark.parametrize(
    "thr, boxes", [(1.0, [BOXES]), (0.8, [BOXES]), (0.5, [BOXES[:1], BOXES[1:]])]
)
def test_without_exclusion(thr, boxes):
    """Off, at an IoU of exactly the threshold, or in another image."""
    output = example(plain(iou_thr=thr), boxes)
    assert output.loss.item() == pytest.approx((0.590924 + 0.794304 + 0.460373) / 3, abs=1e-6)
    assert output.num_negatives == 2


def test_an_older_row_is_a_negative():
    ckd = plain()
    ckd.queue.push(torch.tensor([[-1.0, 0.0]]), [1])
    output = example(ckd)
    assert output.loss.item() == pytest.approx(0.418803, abs=1e-6)
    assert output.num_negatives.item() == pytest.approx(7 / 3)


def test_lengths_do_not_matter():
    assert torch.allclose(example(plain(), student=7, teacher=3).loss, example(plain()).loss)


def test_exclusion_is_strict():
    half = images([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 10]])
    expected = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
    assert torch.equal(overlapping(half, 0.5), expected)
    assert overlapping(half, 0.49).all()
    # duplicates, the box itself among them
    assert not overlapping(half, 1.0).any()


def test_images_do_not_exclude_each_other():
    found = overlapping(images([BOXES[0]] * 2, [], [BOXES[0]]), 0.5)
    assert torch.equal(found, torch.block_diag(torch.ones(2, 2), torch.ones(1, 1)).bool())


def test_a_single_box_and_nothing_else():
    ckd = plain()
    student = torch.tensor([[0.6, 0.8]], requires_grad=True)
    output = ckd(student, torch.tensor([[1.0, 0.0]]), images(BOXES[:1]))
    output.loss.backward()
    assert output.loss.item() == 0 and not student.grad.any()


# ------------------------------------------------------------------------------- many steps
STEPS = [(3, 2), (0, 0), (4, 1), (1, 3), (0, 5), (2, 2)]


def step_inputs(step, dims=(5, 4)):
    generator = torch.Generator().manual_seed(step)
    number = sum(STEPS[step])
    student = torch.randn(number, dims[0], generator=generator, dtype=torch.float64)
    teacher = torch.randn(number, dims[1], generator=generator, dtype=torch.float64)
    corners = torch.randint(0, 6, (number, 2), generator=generator)
    boxes = torch.cat([corners, corners + 10], dim=1).tolist()
    first = STEPS[step][0]
    return student, teacher, [boxes[:first], boxes[first:]]


@pytest.mark.parametrize("grad_through_queue", [True, False])
@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("size", [5, 7, 100])
def test_equals_loops_over_steps(size, chunk, grad_through_queue):
    """Value and all gradients; the ring wraps around in the middle of a batch."""
    torch.manual_seed(0)
    ckd = ContrastiveKD(
        student_dim=5,
        teacher_dim=4,
        dim=3,
        gamma=0.4,
        queue_size=size,
        chunk=chunk,
        grad_through_queue=grad_through_queue,
    ).double()
    history = torch.zeros(0, 4, dtype=torch.float64)
    overlaps = 0
    for step in range(len(STEPS)):
        student, teacher, boxes = step_inputs(step)
        output = ckd(student, teacher, images(*boxes))
        others = history[max(0, len(history) - (size - len(teacher))) :]
        frozen = copy.deepcopy(ckd.projection).requires_grad_(False)

        rows = _reference(ckd, student, teacher, boxes, others, frozen, grad_through_queue)
        loss = rows.sum() / max(len(rows), 1)
        torch.testing.assert_close(output.loss, loss)
        parameters = list(ckd.parameters())
        expected = torch.autograd.grad(loss, parameters, allow_unused=True)
        actual = torch.autograd.grad(output.loss, parameters)
        for a, e in zip(actual, expected):
            torch.testing.assert_close(a, torch.zeros_like(a) if e is None else e)
        overlaps += overlapping(images(*boxes), 0.5).sum().item() - len(teacher)
        history = torch.cat([history, teacher])
    assert overlaps > 0


def _reference(ckd, student, teacher, boxes, others, frozen, grad_through_queue):
    calls = []

    def project(rows):
        # the first call is for the negatives
        calls.append(rows)
        negatives = len(calls) == 1 and not grad_through_queue
        return frozen(rows) if negatives else ckd.projection(rows)

    return naive_rows(ckd.adapter(student), teacher, boxes, others, project, 0.4, 0.5)


def test_losses_of_several_steps_in_one_backward():
    """As when gradients are accumulated: the queue moves on before the gradients are computed."""
    torch.manual_seed(0)
    together = ContrastiveKD(student_dim=5, teacher_dim=4, dim=3, queue_size=7).double()
    apart = copy.deepcopy(together)
    losses = []
    for step in range(len(STEPS)):
        student, teacher, boxes = step_inputs(step)
        losses.append(together(student, teacher, images(*boxes)).loss)
        apart(student, teacher, images(*boxes)).loss.backward()
    sum(losses).backward()
    for p, q in zip(together.parameters(), apart.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
        assert p.grad.any()


# --------------------------------------------------------------------------------- gradients
def test_gradients_reach_the_student_and_no_teacher():
    ckd = ContrastiveKD(student_dim=5, teacher_dim=4, dim=3, queue_size=20)
    student = torch.randn(3, 5, requires_grad=True)
    teacher = torch.randn(3, 4, requires_grad=True)
    ckd(student, teacher, images(BOXES)).loss.backward()
    assert student.grad.any() and teacher.grad is None
    assert all(p.grad.any() for p in ckd.parameters())
    assert not ckd.queue.rows.requires_grad
    assert torch.equal(ckd.queue.valid, teacher.detach())


def test_queue_may_train_the_projection_or_not():
    """With one row a rank and step, only the older row can differ."""
    gradients = {}
    for flag in (True, False):
        torch.manual_seed(1)
        ckd = ContrastiveKD(
            student_dim=4, teacher_dim=4, dim=3, queue_size=9, grad_through_queue=flag
        )
        ckd.queue.push(torch.randn(3, 4), [3])
        loss = ckd(torch.randn(1, 4), torch.randn(1, 4), images(BOXES[:1])).loss
        gradients[flag] = torch.autograd.grad(loss, list(ckd.parameters()))
    assert not torch.allclose(gradients[True][0], gradients[False][0])


def test_modules():
    same = ContrastiveKD(student_dim=6, teacher_dim=6, queue_size=4)
    assert same.adapter is None
    assert {k: tuple(v.shape) for k, v in same.state_dict().items()} == {
        "projection.0.weight": (128, 6),
        "projection.0.bias": (128,),
    }
    other = ContrastiveKD(student_dim=3, teacher_dim=6, queue_size=4)
    assert tuple(other.adapter.weight.shape) == (6, 3)
    mlp = ContrastiveKD(student_dim=6, teacher_dim=6, queue_size=4, proj="mlp").projection
    assert [type(x) for x in mlp] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(x.weight.shape) for x in (mlp[0], mlp[2])] == [(6, 6), (128, 6)]
    # 2.37 M for RetinaNet
    cells = ContrastiveKD(student_dim=256, teacher_dim=1024, num_anchors=9, queue_size=4).adapter
    assert sum(p.numel() for p in cells.parameters()) == 9 * 1024 * 257


# ------------------------------------------------------------------------------- anchors
def test_each_anchor_has_its_own_map():
    torch.manual_seed(0)
    layer = PerAnchorLinear(3, 2, 4)
    nn.init.normal_(layer.bias)
    x, anchor = torch.randn(6, 3), torch.tensor([2, 0, 2, 3, 0, 2])
    result = layer(x, anchor)
    for row, a, value in zip(x, anchor, result):
        torch.testing.assert_close(value, layer.weight[a] @ row + layer.bias[a])
    gradient, _ = torch.autograd.grad(result.sum(), [layer.weight, layer.bias])
    assert [bool(g.any()) for g in gradient] == [True, False, True, True]
    assert layer(x[:0], anchor[:0]).shape == (0, 2) and layer(x[:0], anchor[:0]).requires_grad
    # as wide as a linear layer of its own would start
    assert layer.weight.abs().max() <= 1
    with pytest.raises(ValueError):
        layer(x, torch.full((6,), 4))


def test_dense_students_pass_their_anchors():
    torch.manual_seed(0)
    ckd = ContrastiveKD(student_dim=2, teacher_dim=2, dim=2, num_anchors=3, queue_size=9)
    student, teacher = torch.tensor(STUDENT), torch.tensor(TEACHER)
    anchor = torch.tensor([2, 0, 2])
    reference = ContrastiveKD(student_dim=2, teacher_dim=2, dim=2, queue_size=9)
    reference.projection = ckd.projection
    adapted = torch.stack([ckd.adapter.weight[a] @ s for s, a in zip(student, anchor)])
    expected = reference(adapted, teacher, images(BOXES)).loss
    actual = ckd(student, teacher, images(BOXES), anchor).loss
    torch.testing.assert_close(actual, expected)


# ----------------------------------------------------------------------- types, empty, errors
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype):
    torch.manual_seed(0)
    ckd = ContrastiveKD(student_dim=16, teacher_dim=16, gamma=0.01, queue_size=64)
    student = (100 * torch.randn(3, 16)).to(dtype).requires_grad_()
    teacher = (100 * torch.randn(3, 16)).to(dtype)
    full = copy.deepcopy(ckd)(student.detach().float(), teacher.float(), images(BOXES))
    with torch.autocast("cpu", torch.bfloat16):
        half = ckd(student, teacher, images(BOXES))
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, full.loss)
    half.loss.backward()
    assert student.grad.isfinite().all() and student.grad.any()


def test_rows_in_half_precision():
    torch.manual_seed(0)
    single = ContrastiveKD(student_dim=8, teacher_dim=8, queue_size=20)
    half = ContrastiveKD(student_dim=8, teacher_dim=8, queue_size=20, queue_dtype="float16")
    half.load_state_dict(single.state_dict())
    for step in range(3):
        student, teacher = torch.randn(3, 8), torch.randn(3, 8)
        losses = [x(student, teacher, images(BOXES)).loss for x in (single, half)]
        torch.testing.assert_close(*losses, rtol=0.01, atol=0.01)
        losses[1].backward()
    assert half.queue.rows.dtype == torch.float16 and half.projection[0].weight.grad.any()


@pytest.mark.parametrize("counts", [(0, 0), (3, 0), (0, 3)])
@pytest.mark.parametrize("older", [0, 4])
def test_images_without_rois(counts, older):
    ckd = ContrastiveKD(student_dim=5, teacher_dim=4, dim=3, queue_size=8)
    ckd.queue.push(torch.randn(older, 4), [older])
    number = sum(counts)
    output = ckd(
        torch.randn(number, 5), torch.randn(number, 4), images(*[BOXES[:n] for n in counts])
    )
    assert all(x.isfinite() for x in output[:-1]) and output.correct.shape == (number,)
    assert (output.loss.item() == 0) == (number == 0)
    output.loss.backward()
    assert all(p.grad is not None for p in ckd.parameters())
    assert ckd.queue.count == older + number


def test_errors_name_what_is_wrong():
    wrong = {
        "PROJ": {"proj": "conv"},
        "QUEUE_DTYPE": {"queue_dtype": "int8"},
        "GAMMA": {"gamma": 0.0},
        "QUEUE_SIZE": {"queue_size": 0},
        "DIM": {"dim": 0},
        "CHUNK": {"chunk": -1},
        "IOU_THR": {"iou_thr": 1.5},
    }
    for key, arguments in wrong.items():
        with pytest.raises(ValueError, match=rf"KD\.GDETKD\.CKD\.{key} "):
            plain(**arguments)
    with pytest.raises(ValueError, match="3 of the student, 2 of the teacher and 3 boxes"):
        plain()(torch.randn(3, 2), torch.randn(2, 2), images(BOXES))
    with pytest.raises(ValueError, match="QUEUE_SIZE is 2"):
        example(plain(queue_size=2))


def test_chunks_change_memory_only():
    torch.manual_seed(0)
    number, size, dim = 128, 4000, 16
    arguments = {"student_dim": dim, "teacher_dim": dim, "dim": 8, "queue_size": size}
    whole = ContrastiveKD(**arguments, chunk=0)
    parts = ContrastiveKD(**arguments, chunk=16)
    parts.load_state_dict(whole.state_dict())
    older = torch.randn(size, dim)
    student, teacher = torch.randn(number, dim), torch.randn(number, dim)
    boxes = images(torch.rand(number, 2).repeat(1, 2).add(torch.tensor([0, 0, 1, 1])).tolist())
    used, gradients = {}, {}
    for name, ckd in (("whole", whole), ("parts", parts)):
        ckd.queue.push(older, [size])
        losses = []
        used[name] = saved_bytes(
            lambda: losses.append(ckd(student, teacher, boxes).loss) or losses[-1]
        )
        gradients[name] = torch.autograd.grad(losses[0], list(ckd.parameters()))
    torch.testing.assert_close(gradients["parts"], gradients["whole"])
    matrix = number * size * 4
    assert used["whole"] > matrix
    # the queue, its projection before and after the normalisation
    assert used["parts"] < 1.3 * size * (dim + 2 * 8) * 4 < 0.4 * matrix
