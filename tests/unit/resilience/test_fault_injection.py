import pytest

from marlhf_mega.resilience.fault_injection import Fault, parse


def test_faults_are_parsed():
    assert parse("") == []
    text = "rank=1,step=3,phase=update,kind=kill;rank=0,step=5,phase=rollout,kind=slow,seconds=0.5"
    assert parse(text) == [
        Fault(rank=1, step=3, phase="update", kind="kill"),
        Fault(rank=0, step=5, phase="rollout", kind="slow", seconds=0.5),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "rank=1",
        "rank=x,step=3,phase=update,kind=kill",
        "rank=1,step=3,phase=update,kind=explode",
        "rank=1,step=3,phase=update,kind=kill,color=red",
        "kill",
    ],
)
def test_a_text_that_is_not_a_fault_is_refused(text):
    with pytest.raises(ValueError, match=rf"^MARLHF_FAULT={text}: must be rank=R,step=S"):
        parse(text)
