"""Order of the ring buffer, columns of a rank, and gradients that outlive a push."""

import pytest
import torch

from kd_d2.projects.gdetkd.teacher_queue import TeacherQueue


def rows(*values):
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1)


def pushed(queue, *values, counts=None, rank=0):
    return queue.push(rows(*values), counts or [len(values)], rank).tolist()


def content(queue):
    return queue.valid.flatten().tolist()


def test_ring_order():
    """The specification's table, K = 6."""
    queue = TeacherQueue(6, 1)
    assert content(queue) == [] and queue.rows.abs().sum() == 0
    assert pushed(queue, 1, 2, 3, 4) == [0, 1, 2, 3]
    assert (content(queue), queue.pointer, queue.count) == ([1, 2, 3, 4], 4, 4)
    assert pushed(queue, 5, 6, 7) == [4, 5, 0]
    assert (content(queue), queue.pointer, queue.count) == ([7, 2, 3, 4, 5, 6], 1, 6)
    assert pushed(queue, 8) == [1]
    assert (content(queue), queue.pointer) == ([7, 8, 3, 4, 5, 6], 2)
    assert pushed(queue) == []
    assert (content(queue), queue.pointer) == ([7, 8, 3, 4, 5, 6], 2)
    assert pushed(queue, *range(9, 15)) == [2, 3, 4, 5, 0, 1]
    assert (content(queue), queue.pointer) == ([13, 14, 9, 10, 11, 12], 2)
    assert pushed(queue, *range(15, 19)) == [2, 3, 4, 5]
    assert (content(queue), queue.pointer) == ([13, 14, 15, 16, 17, 18], 0)
    with pytest.raises(ValueError, match="QUEUE_SIZE is 6, .* has 7 RoIs.*IMS_PER_BATCH"):
        pushed(queue, *range(7))
    assert content(queue) == [13, 14, 15, 16, 17, 18]


def test_columns_are_those_of_the_rank():
    queue = TeacherQueue(6, 1)
    assert pushed(queue, 1, 2, 3, 4, counts=[2, 0, 2], rank=2) == [2, 3]
    assert pushed(queue, 5, 6, 7, counts=[1, 2, 0], rank=1) == [5, 0]
    assert pushed(queue, 8, 9, counts=[2, 0, 0], rank=2) == []


def test_rows_are_copied_without_gradient_in_the_type_of_the_queue():
    queue = TeacherQueue(4, 2, torch.float16)
    new = torch.tensor([[1.0, 1 / 3]], requires_grad=True)
    queue.push(new, [1])
    assert queue.rows.dtype == torch.float16 and not queue.rows.requires_grad
    assert torch.equal(queue.valid, new.detach().half())
    with torch.no_grad():
        new.zero_()
    assert queue.valid[0, 0] == 1


def test_buffers_are_no_part_of_checkpoints():
    queue = TeacherQueue(4, 2)
    assert not queue.state_dict() and not list(queue.parameters())
    assert queue.to(torch.float64).rows.dtype == torch.float64
    assert queue.to("meta").rows.device.type == "meta"


def test_push_before_the_backward_of_the_last_step():
    """Gradients of both steps are those of what each of them saw."""
    queue = TeacherQueue(3, 1)
    layer = torch.nn.Linear(1, 1, bias=False)
    total = 0.0
    for value, factor in ((2.0, 1.0), (5.0, 10.0)):
        pushed(queue, value, value, value)
        output = layer(queue.valid)
        queue.keep_for_backward(output)
        total = total + factor * output.sum()
    total.backward()
    assert layer.weight.grad.item() == 3 * (2 + 10 * 5)
    assert content(queue) == [5, 5, 5]


def test_usual_steps_copy_nothing():
    queue = TeacherQueue(3, 1)
    layer = torch.nn.Linear(1, 1)
    address = queue.rows.data_ptr()
    for value in range(3):
        pushed(queue, value)
        output = layer(queue.valid)
        queue.keep_for_backward(output)
        output.sum().backward()
    assert queue.rows.data_ptr() == address
    assert content(queue) == [0, 1, 2]


def test_unannounced_use_is_refused_by_autograd():
    """Why ``keep_for_backward`` exists."""
    queue = TeacherQueue(3, 1)
    layer = torch.nn.Linear(1, 1)
    pushed(queue, 1, 2)
    output = layer(queue.valid)
    pushed(queue, 3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
