import pytest
import torch

from trl_leapalign.training.metrics import MetricBuffer, merge, summarise


def test_values_are_kept_by_sample():
    buffer = MetricBuffer()
    assert not buffer and buffer.num_batches("reward") == 0
    buffer.add({"reward": torch.tensor([1.0, 2.0], requires_grad=True), "step": torch.tensor(3)})
    buffer.add({"reward": torch.tensor([4.0, 8.0]), "step": torch.tensor(True), "late": torch.tensor([1.0])})
    assert buffer and buffer.num_batches("reward") == 2
    assert buffer.latest("reward", 1).tolist() == [4.0, 8.0]
    assert buffer.latest("reward", 2).tolist() == [1.0, 2.0, 4.0, 8.0]
    assert buffer.last_batch() == {"reward": 6.0, "step": 1.0, "late": 1.0}
    assert buffer.pop() == {"late": [1.0], "reward": [1.0, 2.0, 4.0, 8.0], "step": [3.0, 1.0]}
    assert not buffer and buffer.num_batches("reward") == 0


def test_columns_of_several_processes():
    """Names may differ between processes: a reward need not report the same of each batch."""
    columns = merge([{"reward": [1.0], "b": [2.0]}, {"reward": [3.0, 5.0]}, {"reward": [7.0], "a": [1.0, 2.0]}])
    assert columns == {"a": [1.0, 2.0], "b": [2.0], "reward": [1.0, 3.0, 5.0, 7.0]}
    assert list(columns) == ["a", "b", "reward"]
    assert summarise(columns) == {"a": 1.5, "b": 2.0, "reward": 4.0, "reward_std": pytest.approx(5**0.5)}


def test_few_huge_gradients_do_not_move_the_median():
    found = summarise({"reward": [1.0], "sample_grad_norm": [1.0, 2.0, 9.0], "sample_grad_norm_1": [5.0, 7.0]})
    assert (found["sample_grad_norm"], found["sample_grad_norm_median"]) == (4.0, 2.0)
    assert (found["sample_grad_norm_1"], found["sample_grad_norm_1_median"]) == (6.0, 6.0)
