"""Batches side by side in threads: the same results in the same order, the settings of the calling thread, errors."""

from __future__ import annotations

import threading

import pytest
import torch

from shortstack.engine import cpu as linear
from shortstack.engine.cpu import worker_count, workers
from shortstack.runtime.private_names import has_onednn

CPU = torch.device("cpu")


@pytest.fixture
def four_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
def test_each_has_its_share_of_the_cores_and_no_gradients() -> None:
    barrier = threading.Barrier(4, timeout=20)

    def work(item: int) -> tuple[int, int, bool, str]:
        barrier.wait()  # so that each item has a thread of its own
        return item, torch.get_num_threads(), torch.is_grad_enabled(), threading.current_thread().name

    with workers(CPU) as side_by_side:
        found = list(side_by_side(work, range(4)))
    assert [entry[:3] for entry in found] == [(item, 1, False) for item in range(4)]
    assert len({entry[3] for entry in found}) == 4
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("four_threads")
def test_threads_use_the_same_library_and_the_same_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_onednn():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(linear, "_WORTH_PACKING", range(1, 1 << 24))
    packed = []
    real = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda *a: packed.append(1) or real(*a))
    layer, x = torch.nn.Linear(48, 32), torch.randn(3, 48)
    with linear.computing(torch.float32, CPU, "onednn"), workers(CPU) as side_by_side:
        found = list(side_by_side(lambda _: layer(x), range(8)))
    assert len(packed) == 1
    for result in found:
        torch.testing.assert_close(result, layer(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("four_threads")
def test_an_error_comes_out_and_the_threads_end() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    with pytest.raises(ValueError, match="three"), workers(CPU) as side_by_side:
        list(side_by_side(work, range(8)))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shortstack-batch")]
    assert torch.get_num_threads() == 4


@pytest.mark.fault(108)
@pytest.mark.parametrize("threads", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16, 17, 22, 48, 64, 96])
def test_no_core_is_left_over(threads: int) -> None:
    """Each worker has the same number of threads: which of them takes a batch changes no bit."""
    found: set[int] = set()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        count = worker_count(CPU)
        assert count <= 13
        with workers(CPU) as side_by_side:
            found.update(side_by_side(lambda _: torch.get_num_threads(), range(2 * count)))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found == {threads // count}
    assert count * threads // count == threads
    assert threads == 1 or threads == 17 or count >= 2


@pytest.mark.fault(108)
def test_a_containers_processors_are_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shortstack.engine.cpu.processors", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    try:
        assert worker_count(CPU) == 3  # a number that was set stands
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert worker_count(CPU) == 2
    finally:
        torch.set_num_threads(before)


def test_one_core_and_a_gpu_need_no_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert worker_count(CPU) == 1
        assert worker_count(torch.device("cuda")) == 1
        with workers(CPU) as side_by_side:
            assert list(side_by_side(lambda _: threading.current_thread().name, [0])) == [
                threading.current_thread().name
            ]
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
def test_a_sweep_in_threads_gives_what_one_thread_gives(built: object) -> None:
    """The rest of the tests run on one core each."""
    from tests.engine.test_forward import run

    several = run(built("llama"), 7)  # type: ignore[operator]
    torch.set_num_threads(1)
    one = run(built("llama"), 7)  # type: ignore[operator]
    assert several.candidate_nll_NW is not None
    torch.testing.assert_close(several.candidate_nll_NW, one.candidate_nll_NW, rtol=1e-6, atol=1e-7)
