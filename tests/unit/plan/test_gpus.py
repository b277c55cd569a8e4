import pytest

from marlhf_mega.config.load import ConfigError
from marlhf_mega.plan.gpus import find_gpu


def test_a_device_is_found_by_any_of_its_names():
    assert find_gpu("h100").name == find_gpu("H100-80").name == "H100"
    assert find_gpu("H200-141").memory > find_gpu("A100-80").memory > find_gpu("a100-40").memory


def test_an_unknown_device_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"^--gpu=V100: must be a known device\. .*A100, H100"):
        find_gpu("V100")
